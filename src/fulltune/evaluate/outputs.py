"""What a model gives for each row, kept for comparisons, which score nothing here."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fulltune.evaluate.scoring import Scoring
from fulltune.files import replacing
from fulltune.inference.generic import GenericText
from fulltune.tasks import Predictions


@dataclass(frozen=True)
class Outputs:
    """Of one model."""

    kept: dict[str, Predictions]
    """Split to what the task's `reduce` gave of each row."""
    generic: np.ndarray | None
    """Of texts that have nothing to do with the task: see `GenericText.read`; None for images."""
    seconds_per_row: float
    """Of the last split, in batches as evaluation makes them."""


def outputs(
    scoring: Scoring,
    model_folder: Path | None,
    texts: Sequence[str],
    most_tokens: int,
    splits: Sequence[str] = ("eval", "test"),
) -> Outputs:
    """Run a finished model (None: the pretrained one, with the head that training begins with) over the splits' rows
    and over generic texts, which are cut at `most_tokens`."""
    model, processor = scoring.load(model_folder)
    kept: dict[str, Predictions] = {}
    seconds = 0.0
    for split in splits:
        began = time.monotonic()
        kept[split] = scoring.run(model, processor, split)
        seconds = (time.monotonic() - began) / max(1, len(scoring.rows(split)))
    of_texts = None
    if texts and scoring.task.FACTS.reads == "text":
        form, precision = scoring.target.form, scoring.plan.precision
        head = scoring.selective_head(model, processor.pad_token_id, scoring.rows("eval"))
        of_texts = GenericText.of(texts, processor, form.reads_any_text, precision, most_tokens).read(model, head)
    return Outputs(kept=kept, generic=of_texts, seconds_per_row=seconds)


def save(path: Path, kept: Predictions) -> None:
    """Write the numbers of each row; objects (texts, ragged lists) are left out: only pickle could keep them."""
    numbers: dict[str, Any] = {name: array for name, array in kept.items() if array.dtype != object}
    with replacing(path) as part, part.open("wb") as file:
        np.savez_compressed(file, **numbers)


def load(path: Path) -> Predictions:
    """What `save` wrote."""
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}
