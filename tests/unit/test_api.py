"""From Python: what is there, what it is called with, and how results print."""

from __future__ import annotations

import inspect
from pathlib import Path

import numpy as np
import pytest

import fulltune
from fulltune.errors import RecipeError, SetupError
from fulltune.records.data import DataSummary, SplitSummary
from fulltune.records.scores import Estimate, Scores
from fulltune.system.run_folder import Reached
from tests import tiny


def _recipe(folder: Path) -> Path:
    return tiny.write_recipe(folder / "recipe.yaml", "some/model", "rows.csv")


def test_functions_show_with_their_arguments() -> None:
    assert set(fulltune.__all__) <= set(dir(fulltune))
    assert {"metrics", "class_weights", "run_folder"} <= inspect.signature(fulltune.run).parameters.keys()
    assert inspect.signature(fulltune.run).parameters == inspect.signature(fulltune.job).parameters


@pytest.mark.parametrize("kind", [str, Path])
def test_predictor_takes_a_text_or_a_path(tmp_path: Path, kind: type) -> None:
    with pytest.raises(SetupError, match=f"{tmp_path}: no finished model here"):
        fulltune.load_predictor(kind(tmp_path))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("balanced", "balanced"),
        ({"a": np.float32(2)}, {"a": 2.0}),
        (np.array([1.0, 3.0]), (1.0, 3.0)),
    ],
)
def test_class_weights_from_python_are_the_recipes(tmp_path: Path, given: object, expected: object) -> None:
    job = fulltune.job(_recipe(tmp_path), class_weights=given)  # type: ignore[arg-type]  # of this type
    assert job.recipe.train.class_weights == expected
    again = fulltune.job(job.recipe, class_weights=given, run_folder=job.folder)  # type: ignore[arg-type]
    assert again.folder == job.folder


def test_wrong_class_weights_from_python_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"train.class_weights: expected balanced"):
        fulltune.job(_recipe(tmp_path), class_weights="equal")


def test_results_print_short() -> None:
    split = SplitSummary(rows=4, tokens=4, trained_tokens=4, truncated_rows=0, dropped_rows=0, length_percentiles={})
    summary = DataSummary(
        task="text-classification",
        problem_type="single_label",
        columns={"text": "t", "label": "l"},
        labels=tuple(f"label {number}" for number in range(150)),
        max_length=8,
        max_length_reason="because " * 100,
        splits={"train": split, "eval": split, "test": split},
        sources={},
        fingerprint="x",
    )
    assert len(repr(summary)) < 500
    assert repr(summary).count("\n") == 0
    assert "train: SplitSummary(...)" in str(summary)
    accuracy = Estimate(value=0.51234, low=0.4, high=0.6)
    scores = Scores(
        name="full-seed42",
        kind="trained",
        rows=4,
        metrics={"accuracy": accuracy},
        main_metric="accuracy",
        greater_is_better=True,
        confidence=0.95,
    )
    assert "metrics={accuracy: 0.5123 [0.4, 0.6]}" in repr(scores)
    reached = Reached(Path("runs/one"), summary, scores=(scores,), report=Path("runs/one/report.html"))
    assert str(reached).splitlines() == [
        "Reached: runs/one",
        "  full-seed42: accuracy 0.5123 [0.4, 0.6]",
        "  report: runs/one/report.html",
    ]
