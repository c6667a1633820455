"""The data stage over rows of a test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fulltune import data
from fulltune.inference.store import read_original_rows
from fulltune.recipe.fields import Recipe
from fulltune.records.data import DataSummary
from tests import tiny


def prepare(
    folder: Path,
    rows: list[dict[str, Any]] | Path | str,
    tokenizer: Any,
    task: str = "text-classification",
    mixed: list[dict[str, Any]] | None = None,
    probe: Path | None = None,
    **settings: Any,
) -> DataSummary:
    """Prepare rows, or a file, with others mixed in by a weight of 0.2; eval and test may be rows as well."""
    for name in ("eval", "test"):
        if isinstance(given := settings.get(name), list):
            settings[name] = str(tiny.write_jsonl(folder / f"{name}-file.jsonl", given))
    train: Any = str(rows if isinstance(rows, (Path, str)) else tiny.write_jsonl(folder / "train.jsonl", rows))
    if mixed:
        train = [train, {"path": str(tiny.write_jsonl(folder / "mixed.jsonl", mixed)), "weight": 0.2}]
    blocks = {"data": {"train": train, **settings}, "preserve": {"probe": probe and str(probe)}}
    recipe = Recipe.model_validate({"model": "x", "task": task, **blocks})
    return data.prepare(data.Stage(recipe, folder / "data", tokenizer, data.Limits(tiny.POSITIONS)))


def of_splits(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The rows of each split."""
    return {name: list(read_original_rows(folder / "data" / name)) for name in ("train", "eval", "test")}


def dropped(folder: Path) -> list[dict[str, Any]]:
    """The rows that are listed as dropped."""
    return [json.loads(line) for line in (folder / "data" / "dropped.jsonl").read_text(encoding="utf-8").splitlines()]
