"""What a model gives for each row, kept for comparisons; nothing is scored here, so that test rows stay sealed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fulltune.evaluate.drift import generic
from fulltune.evaluate.scoring import Bench
from fulltune.models.processors import opened
from fulltune.tasks import Predictions


@dataclass(frozen=True)
class Outputs:
    """Of one model."""

    kept: dict[str, Predictions]
    """Split to what the task's `reduce` gave of each row."""
    generic: np.ndarray | None
    """Of texts that have nothing to do with the task: see `drift.generic`; None for images."""
    seconds_per_row: float
    """Of the last split, in batches as evaluation makes them."""


def outputs(
    bench: Bench,
    model_folder: Path | None,
    texts: Sequence[str],
    most_tokens: int,
    splits: Sequence[str] = ("eval", "test"),
) -> Outputs:
    """Run a model over eval and test rows and over generic texts.

    Args:
        bench: The rows and how they are run.
        model_folder: A finished model; None: the pretrained model, with the head that training begins with.
        texts: Generic texts.
        most_tokens: Where these are cut.
        splits: Whose rows to run.
    """
    model, tokenizer = bench.load_pretrained() if model_folder is None else bench.load_trained(model_folder)
    kept: dict[str, Predictions] = {}
    seconds, rows = 0.0, 0
    for split in splits:
        present: Any = opened(bench.rows(split), tokenizer)
        began = time.monotonic()
        kept[split] = bench.run(model, tokenizer.pad_token_id, present, split)
        seconds, rows = time.monotonic() - began, len(present)
    of_texts = None
    if bench.task.FACTS.reads == "text":
        of_texts = generic(model, tokenizer, texts, bench.target.problem_type, bench.plan.precision, most_tokens)
    return Outputs(kept=kept, generic=of_texts, seconds_per_row=seconds / max(1, rows))


def save(path: Path, kept: Predictions) -> None:
    """Write the numbers of each row; objects (texts, ragged lists) are left out: only pickle could keep them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    numbers: dict[str, Any] = {name: array for name, array in kept.items() if array.dtype != object}
    part = path.with_name(path.name + ".part.npz")
    np.savez_compressed(part, **numbers)
    part.replace(path)


def load(path: Path) -> Predictions:
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}
