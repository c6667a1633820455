"""A comparison of two methods for each task: it ends with a verdict on the task's own metric."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fulltune import pipeline
from fulltune.compare import run as comparing
from fulltune.recipe.file import load_recipe
from fulltune.records.comparison import Comparison
from fulltune.system.run_folder import find_or_make
from tests import tiny
from tests.train.runs import in_this_process
from tests.train.test_learning_choices import choice_rows
from tests.train.test_learning_spans import cooking
from tests.train.test_methods import tag_rows, written_rows

COUNT = 60
FULL = {"kind": "full", "learning_rate": 3e-3}


def several_labels(count: int) -> list[dict[str, Any]]:
    return [
        {"text": row["text"], "label": [row["label"], "all"][: 1 + n % 2]}
        for n, row in enumerate(tiny.topic_rows(count))
    ]


def numbers(count: int) -> list[dict[str, Any]]:
    return [{"text": row["text"], "label": len(row["text"]) / 7} for row in tiny.topic_rows(count)]


CASES: dict[str, tuple[str, Any, Any, str, str]] = {
    # kind of model, task, rows, the other method, metric that decides
    "several labels": ("bert", "text-classification", several_labels, "lora", "f1_micro"),
    "a number": ("bert", "text-classification", numbers, "adapter", "spearman"),
    "tags": ("bert", "token-classification", tag_rows, "prompt", "f1"),
    "spans": ("bert", "question-answering", cooking, "lora", "f1"),
    "choices": ("bert", "multiple-choice", choice_rows, "adapter", "accuracy"),
    "a decoder": ("llama", "causal-lm", tiny.pair_rows, "prompt", "loss"),
    "a writer": ("t5", "seq2seq", written_rows, "lora", "loss"),
    "images": ("vit", "image-classification", None, "lora", "accuracy"),
}


def compared(folder: Path, case: str) -> Comparison:
    kind, task, rows, method, _ = CASES[case]
    if kind == "vit":
        tiny.save_image_model(folder / "model")
        data = tiny.write_images(folder / "images", COUNT)
    else:
        tiny.save_model(folder / "model", kind)
        data = tiny.write_jsonl(folder / "rows.jsonl", rows(COUNT))
    path = tiny.write_recipe(
        folder / "recipe.yaml",
        folder / "model",
        data,
        task=task,
        methods=[FULL, {"kind": method, "learning_rate": 1e-2}],
        train={"max_steps": 4},
        compare={"seeds": 2, "margin": 0.05},
    )
    recipe = comparing.recipe_for(load_recipe(path))
    found, _ = find_or_make(recipe, path.read_text(encoding="utf-8"), "run", folder / "run", False)
    with in_this_process():
        return comparing.run(pipeline.Run(recipe, found), "fulltune compare recipe.yaml").comparison


LONG = ("a number", "a writer", "choices", "several labels", "spans", "images")


@pytest.mark.parametrize("case", [pytest.param(case, marks=pytest.mark.long if case in LONG else ()) for case in CASES])
def test_comparison_of_each_task_ends_with_a_verdict(case: str, tmp_path: Path) -> None:
    found = compared(tmp_path, case)
    method, metric = CASES[case][3:]
    assert found.metric == metric
    difference = found.decision.difference(method)
    sign = 1 if found.greater_is_better else -1
    rows = {row.arm: row for row in found.rows}
    assert set(rows) == {"full", method}
    assert all(len(row.seeds) == 2 and len(row.values) == 2 for row in rows.values())
    assert difference.estimate == pytest.approx(
        sign * (rows["full"].metric.value - rows[method].metric.value), abs=1e-9
    )
    for one in (rows["full"].metric, rows[method].metric):
        assert one.low <= one.value <= one.high
    assert difference.adjusted_low <= difference.estimate <= difference.adjusted_high
    assert rows[method].num_trainable < rows["full"].num_trainable
    assert rows[method].saved_bytes < rows["full"].saved_bytes
    assert (rows["full"].drift is None) == (case == "images")
    assert (tmp_path / "run" / "card.html").exists()
