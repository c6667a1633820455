"""Metrics by value of a column that the model does not read: of a run, in its scores and in its report."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from fulltune.errors import DataError, RecipeError
from fulltune.evaluate import spans
from fulltune.evaluate.scoring import Scoring
from fulltune.evaluate.slices import slice_names
from fulltune.recipe.file import check_recipe
from fulltune.records.scores import Scores
from fulltune.report import write_run_report
from fulltune.tasks import PLACE, Target
from tests import tiny
from tests.train.runs import run, without_tracing
from tests.unit.test_scored_clusters import TEST, bench

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "training.md"
REGIONS = ("north", "south", "jane@gmail.com", " ")


def test_values_are_joined_and_counted_by_rows() -> None:
    cells = [*["a"] * 10, *["b"] * 9, None, *[f"c{number}" for number in range(5)]]
    rows = [{PLACE: f"t.csv:{number}", "x": cell} for number, cell in enumerate(cells)]
    assert slice_names(rows, "x").tolist() == [*["a"] * 10, *["other (7 values)"] * 15]
    # Windows of one long row are one row, and an empty cell, NaN and a missing cell are one value.
    windows = [{PLACE: "t.csv:1", "x": "a"}] * 10
    empty = [{PLACE: f"t.csv:{number + 2}", "x": cell} for number, cell in enumerate(["", " ", float("nan"), None] * 3)]
    assert set(slice_names([*windows, *empty, {PLACE: "t.csv:99"}], "x")) == {"other (1 value)", "(none)"}
    many = [{PLACE: f"t.csv:{number}", "x": number % 40} for number in range(40 * 10)]
    assert len(set(slice_names(many, "x"))) == 31


def test_run_reports_the_worst_value_first(tmp_path: Path, tiny_encoder: Path) -> None:
    """The labels of the test rows of the south are turned round."""
    [recipe] = [text for text in re.findall(r"```yaml\n(.*?)```", GUIDE.read_text(), re.DOTALL) if "slice_by" in text]
    rows = [{**row, "region": REGIONS[number // 3 % 4]} for number, row in enumerate(tiny.topic_rows(320))]
    turned = {"weather": "food", "food": "weather"}
    tested = [row | {"label": turned[row["label"]]} if row["region"] == "south" else row for row in rows[200:]]
    files = {"test": str(tiny.write_csv(tmp_path / "test.csv", tested))}
    with without_tracing():
        made = run(
            tmp_path, tiny_encoder, rows[:200], until="report", **yaml.safe_load(recipe),
            method={"kind": "full", "learning_rate": 3e-3}, train={"num_train_epochs": 3}, data=files,
        )  # fmt: skip
    *untrained, trained = made.scores
    assert not any(scores.slices for scores in untrained)
    assert next(part.value for part in trained.slices) == "south"
    assert {part.value for part in trained.slices} == {"north", "south", "[EMAIL]", "(none)"}
    whole = trained.metrics["accuracy"]
    parts = [part.metrics["accuracy"] for part in trained.slices]
    assert sum((part.rows or 0) * part.value for part in parts) == pytest.approx((whole.rows or 0) * whole.value)
    assert all(part.metrics.keys() == trained.metrics.keys() for part in trained.slices)
    assert all(0 < (part.clusters or 0) <= (part.rows or 0) and part.low <= part.value <= part.high for part in parts)
    page = (made.folder / "report.md").read_text(encoding="utf-8")
    worst = f"Worst region: 'south' has accuracy {100 * parts[0].value:.1f}%"
    assert worst in page
    assert "jane" not in page
    assert worst in (made.folder / "models" / "full" / "README.md").read_text(encoding="utf-8")
    # Without a clearly worse value, the table stands alone.
    alike = trained.model_copy(update={"slices": trained.slices[1:]})
    alike.save(made.folder / "scores" / f"{alike.name}.json")
    write_run_report(made.folder)
    page = (made.folder / "report.md").read_text(encoding="utf-8")
    assert "Results by region" in page
    assert "Worst region" not in page


def test_questions_of_several_windows_count_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row has two windows, and every second question lies in the first slice."""
    scoring = replace(bench(tmp_path, range(len(TEST)), Target("span", {})), slice_by="side")
    texts = [{PLACE: f"t.csv:{place // 2}", "side": "ab"[place // 2 % 2]} for place in range(len(TEST))]
    monkeypatch.setattr(Scoring, "texts", texts)
    first = spans._first_windows(texts)
    right = {"f1": np.array([float(texts[place]["side"] == "a") for place in first])}
    found = scoring.estimate_metrics(right, first, metrics=lambda rows: {"f1": float(rows["f1"].mean())})
    assert {value: (one.value, one.num_rows) for value, one in found["f1"].slices.items()} == {
        "a": (1, 30),
        "b": (0, 30),
    }


def test_scores_of_earlier_runs_load() -> None:
    assert Scores.model_fields["slices"].default == ()


def test_column_must_exist_and_a_comparison_has_none(tmp_path: Path, tiny_encoder: Path) -> None:
    with pytest.raises(DataError, match=r"rows.csv: no column 'lable' \(evaluate.slice_by\); did you mean 'label'"):
        run(tmp_path, tiny_encoder, tiny.topic_rows(64), until="data", evaluate={"slice_by": "lable"})
    recipe = {"model": "m", "task": "text-classification", "data": {"train": "t.csv"}, "evaluate": {"slice_by": "x"}}
    with pytest.raises(RecipeError, match=r"evaluate.slice_by: has no effect in a comparison"):
        check_recipe({**recipe, "methods": ["full", "lora"]}, tmp_path)
