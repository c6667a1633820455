"""The loss of each train and eval row by a run's trained model: read once, without dropout, as test rows are scored."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fulltune.evaluate.scoring import Scoring
from fulltune.records.data import SplitName
from fulltune.stats.row_scores import measure_of
from fulltune.tasks.classes import label_words, predict_labels

SPLITS: tuple[SplitName, ...] = ("train", "eval")
"""Test rows are left alone: what is decided about them by a model flatters it."""
Losses = tuple[np.ndarray, Sequence[str | None]]
"""Summed loss of each example and its items (1, trained tokens or words), float64 [examples, 2]; and what the model
says; None: not in a word."""


def row_losses(scoring: Scoring, model_folder: Path) -> dict[SplitName, Losses]:
    """Read train and eval rows.

    Args:
        scoring: The run's rows.
        model_folder: Of its trained model.
    """
    model, processor = scoring.load(model_folder)
    measure = measure_of(scoring.recipe.task, scoring.target, "loss")
    assert measure.counts is not None, "a loss is a mean"
    found: dict[SplitName, Losses] = {}
    for split in SPLITS:
        kept = scoring.run(model, processor, split)
        counts = measure.counts(kept)
        said: list[str | None] = [None] * len(counts)
        if "logits" in kept:
            said = [label_words(one, scoring.target) for one in predict_labels(kept["logits"], scoring.target)]
        found[split] = counts, said
    return found
