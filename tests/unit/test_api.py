"""From Python: what is there, what it is called with, and how results print."""

from __future__ import annotations

from pathlib import Path

import pytest

import fulltune
from fulltune.errors import SetupError
from fulltune.records.data import DataSummary, SplitSummary
from fulltune.records.scores import Estimate, Scores
from fulltune.system.run_folder import RunResult
from tests import tiny


def _recipe(folder: Path) -> Path:
    return tiny.write_recipe(folder / "recipe.yaml", "some/model", "rows.csv")


def test_functions_are_there_and_unknown_ones_are_refused(tmp_path: Path) -> None:
    assert set(fulltune.__all__) <= set(dir(fulltune))
    with pytest.raises(TypeError, match="unknown argument 'metric'; did you mean 'metrics'"):
        fulltune.job(_recipe(tmp_path), metric=len)


def test_events_go_to_the_listener_and_are_printed_without_one(tmp_path: Path) -> None:
    events: list[object] = []
    assert fulltune.job(_recipe(tmp_path), listener=events.append).listener == events.append
    assert callable(fulltune.job(_recipe(tmp_path)).listener)


@pytest.mark.parametrize("kind", [str, Path])
def test_predictor_takes_a_text_or_a_path(tmp_path: Path, kind: type) -> None:
    with pytest.raises(SetupError, match=f"{tmp_path}: no finished model here"):
        fulltune.load_predictor(kind(tmp_path))


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
    assert len(repr(summary)) < 600
    assert repr(summary).count("\n") == 0
    assert str(summary) == repr(summary)
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
    assert "metrics={'accuracy': Estimate(value=0.51234, low=0.4, high=0.6)}" in repr(scores)
    reached = RunResult(Path("runs/one"), summary, scores=(scores,), report=Path("runs/one/report.html"))
    assert str(reached).splitlines() == [
        "RunResult: runs/one",
        "  full-seed42: accuracy 0.5123 [0.4, 0.6]",
        "  report: runs/one/report.html",
    ]
