"""Comparisons of tiny models, for tests of their line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fulltune import pipeline
from fulltune.compare import run as comparing
from fulltune.recipe.file import load_recipe
from fulltune.records.events import Listener
from fulltune.system.run_folder import find_or_make_folder
from tests import tiny

METHODS = ["base", {"kind": "full", "learning_rate": 3e-3}, {"kind": "lora", "learning_rate": 1e-2}]


def job(folder: Path, methods: list[Any], listener: Listener = lambda event: None, **blocks: Any) -> pipeline.Run:
    """A comparison of these methods in `folder/run`."""
    if not (folder / "model").exists():
        tiny.save_model(folder / "model", "bert")
        tiny.write_jsonl(folder / "rows.jsonl", tiny.topic_rows(120))
    path = tiny.write_recipe(
        folder / "recipe.yaml",
        folder / "model",
        folder / "rows.jsonl",
        methods=methods,
        train=blocks.pop("train", {"num_train_epochs": 2}),
        compare={"seeds": 2, "margin": 0.05, **blocks.pop("compare", {})},
        **blocks,
    )
    recipe = comparing.comparison_recipe(load_recipe(path))
    found, _ = find_or_make_folder(recipe, path.read_text(encoding="utf-8"), "run", folder / "run", False)
    return pipeline.Run(recipe, found, listener=listener)
