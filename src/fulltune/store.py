"""Where prepared rows lie: one arrow folder per split, features and words side by side. Layer 1."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fulltune.tasks import LENGTH

if TYPE_CHECKING:
    from datasets import Dataset

TEXT = "words"
"""File beside the features with each row's own values, one JSON line a row."""


def save_split(folder: Path, features: Sequence[Mapping[str, Any]], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a split: `features` as arrow, the rows in words as `words.jsonl`."""
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    names = list(features[0]) if features else []
    columns = {name: [row[name] for row in features] for name in names}
    columns[LENGTH] = [len(row["input_ids"]) for row in features]
    Dataset.from_dict(columns).save_to_disk(str(folder))
    with (folder / f"{TEXT}.jsonl").open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")


def load_split(folder: Path) -> Dataset:
    """The features of a split, memory-mapped."""
    from datasets import load_from_disk

    return load_from_disk(str(folder))


def load_texts(folder: Path) -> list[dict[str, Any]]:
    """The rows of a split in the user's own columns."""
    with (folder / f"{TEXT}.jsonl").open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]
