"""What a model gives for each row, kept for comparisons, which score nothing here."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fulltune.evaluate.scoring import Scoring
from fulltune.files import replacing
from fulltune.inference.generic import GenericText
from fulltune.tasks import Predictions


def outputs(
    scoring: Scoring,
    model_folder: Path | None,
    texts: Sequence[str],
    most_tokens: int,
    splits: Sequence[str] = ("eval", "test"),
) -> tuple[dict[str, Predictions], float]:
    """Run a finished model (None: the pretrained one, with the head that training begins with) over the splits' rows
    and, but for images, over generic texts, cut at `most_tokens`: by split what the task's `reduce` gave, of `generic`
    what `GenericText.read` did, and the seconds per row of the last split."""
    model, processor = scoring.load(model_folder)
    kept: dict[str, Predictions] = {}
    seconds = 0.0
    for split in splits:
        began = time.monotonic()
        kept[split] = scoring.run(model, processor, split)
        seconds = (time.monotonic() - began) / max(1, len(scoring.rows(split)))
    if texts and scoring.task.FACTS.reads == "text":
        form, precision = scoring.target.form, scoring.plan.precision
        head = scoring.selective_head(model, processor.pad_token_id, scoring.rows("eval"))
        read = GenericText.of(texts, processor, form.reads_any_text, precision, most_tokens).read(model, head)
        kept["generic"] = {"generic": read}
    return kept, seconds


def save(path: Path, kept: Predictions) -> None:
    """Write the numbers of each row; objects (texts, ragged lists) are left out: only pickle could keep them."""
    numbers: dict[str, Any] = {name: array for name, array in kept.items() if array.dtype != object}
    with replacing(path) as part, part.open("wb") as file:
        np.savez_compressed(file, **numbers)


def load(path: Path) -> Predictions:
    """What `save` wrote."""
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}
