"""`fulltune evaluate RUN --file`: rows that came after a run are scored as its test rows; rows of train are not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fulltune.records.scores import Scores
from tests import tiny
from tests.contract.command import fulltune
from tests.train import runs

ROWS = [{**row, "region": ("north", "south")[number % 2]} for number, row in enumerate(tiny.topic_rows(400))]
TRAINED, LATER = ROWS[:240], ROWS[240:]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path) -> Path:
    """The folder of a run whose test file holds the first half of the later rows."""
    folder = tmp_path_factory.mktemp("later")
    files = {"test": str(tiny.write_csv(folder / "test.csv", LATER[:80]))}
    with runs.without_tracing():
        reached = runs.run(
            folder, tiny_encoder, TRAINED, until="report", data=files, evaluate={"slice_by": "region"},
            method={"kind": "full", "learning_rate": 3e-3}, train={"num_train_epochs": 2},
        )  # fmt: skip
    return reached.folder


def evaluated(run: Path, rows: list[dict[str, Any]], *options: str) -> Any:
    return fulltune("evaluate", run, "--file", tiny.write_jsonl(run.parent / "later.jsonl", rows), *options)


def test_rows_of_the_test_file_have_the_scores_that_the_run_gave_them(finished: Path) -> None:
    said = evaluated(finished, LATER[:80], "--json")
    assert said.code == 0, said.err
    trained = [Scores.model_validate(one) for one in json.loads(said.out)][-1]
    before = Scores.load(finished / "scores" / "full-seed42.json")
    assert trained.metrics == before.metrics
    assert trained.slices == before.slices
    assert trained.calibration == before.calibration
    majority = "majority class"
    assert trained.differences[majority] == before.differences[majority]
    assert not (finished / "evaluations" / "later" / "data" / "whole").exists()


def test_rows_that_came_later_have_a_page_of_their_own_and_leave_the_run_s_alone(finished: Path) -> None:
    before = {path: path.read_bytes() for path in finished.glob("*.html")} | {
        path: path.read_bytes() for path in (finished / "scores").iterdir()
    }
    said = evaluated(finished, LATER[80:])
    assert said.code == 0, said.err
    page = finished / "evaluations" / "later" / "report.html"
    assert "majority class" in said.out
    assert str(page) in said.out
    assert f"model:   {finished / 'models' / 'full'}" in fulltune("run", finished).out
    text = page.with_suffix(".md").read_text(encoding="utf-8")
    for part in ("Results on the test rows", "Results by region", "later.jsonl", "80 test rows", "Calibration"):
        assert part in text, part
    assert "What is missing" not in text
    assert {path: path.read_bytes() for path in before} == before


def test_rows_of_train_are_refused_with_their_number_unless_allowed(finished: Path) -> None:
    rows = [*LATER[80:], *TRAINED[:30]]
    said = evaluated(finished, rows)
    assert said.code == 4
    [problem] = said.problems[-1:]
    assert "later.jsonl:81" in problem
    assert "--allow-training-rows" in problem
    allowed = evaluated(finished, rows, "--allow-training-rows", "--json")
    assert allowed.code == 0, allowed.err
    trained = Scores.model_validate(json.loads(allowed.out)[-1])
    assert f"{trained.num_leaks} of 110 rows" in problem
    assert 0 < trained.num_leaks <= 30  # some of the 30 are rows of eval
    assert trained.metric_without_leaks is not None


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ([{"text": "the sun shines", "region": "north"}], "no column 'label'"),
        ([{**row, "label": "sport"} for row in LATER[80:100]], "'sport'"),
    ],
)
def test_rows_that_cannot_be_scored_are_refused(rows: list[dict[str, Any]], problem: str, finished: Path) -> None:
    said = evaluated(finished, rows)
    assert said.code == 4
    assert problem in said.problems[-1]


@pytest.mark.parametrize(
    "options", [["--method", "full"], ["--allow-training-rows"], ["--file", "x.csv", "--set", "train.seed=1"]]
)
def test_options_that_do_not_fit_together_are_refused(options: list[str], finished: Path) -> None:
    said = fulltune("evaluate", finished, *options)
    assert said.code == 2
    assert "--file" in said.problems[-1]
