"""Reading a run folder: torn files, resumed attempts, what is missing and why."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest

from fulltune import report
from fulltune.errors import SetupError
from fulltune.report.run.read import read_run


def test_metrics_torn_last_line_keeps_the_others(classification: Path) -> None:
    path = classification / "attempts" / "full-seed42-01" / "metrics.jsonl"
    before = read_run(classification).history
    path.write_bytes(path.read_bytes() + b'{"kind":"train","step":310,"loss":0.\xe2\x82')
    assert read_run(classification).history == before


def test_metrics_not_finite_values_are_kept_as_such(stopped: Path) -> None:
    loss = read_run(stopped).history.train["loss"]
    assert [step for step, _ in loss] == [10, 20, 30]
    assert math.isnan(loss[-1][1])


def test_metrics_lines_of_unexpected_shape_are_left_out(classification: Path, kit: SimpleNamespace) -> None:
    lines = [
        {"kind": "train", "loss": 1.0},
        {"kind": "train", "step": 10, "loss": None, "learning_rate": 1e-4},
        {"kind": "eval", "step": 10, "metrics": None},
        {"kind": "later version"},
    ]
    kit.write_lines(classification / "attempts" / "full-seed42-01" / "metrics.jsonl", lines)
    history = read_run(classification).history
    assert history.train == {"learning_rate": ((10, 1e-4),)}
    assert history.evaluation == {}


def test_history_resumed_attempt_is_one_curve_where_the_later_attempt_wins(
    tmp_path: Path, kit: SimpleNamespace
) -> None:
    first, second = tmp_path / "attempts" / "full-seed1-01", tmp_path / "attempts" / "full-seed1-02"
    kit.write_lines(first / "metrics.jsonl", [kit.train_line(step, 1.0) for step in (10, 20, 30, 35)])
    kit.write_lines(second / "metrics.jsonl", [kit.train_line(step, 0.5) for step in (30, 40)])
    history = read_run(tmp_path).history
    assert history.train["loss"] == ((10, 1.0), (20, 1.0), (30, 0.5), (40, 0.5))
    assert history.restarts == (30,)


def test_attempts_ten_and_more_are_ordered_by_number(tmp_path: Path, kit: SimpleNamespace) -> None:
    for number in (2, 10, 1):
        folder = tmp_path / "attempts" / f"full-seed1-{number:02d}"
        kit.outcome("full-seed1", number, status="crashed").save(folder / "outcome.json")
    view = read_run(tmp_path)
    assert [attempt.name for attempt in view.attempts] == ["full-seed1-01", "full-seed1-02", "full-seed1-10"]
    outcome = view.outcome
    assert outcome is not None
    assert outcome.attempt == 10


def test_steps_outcome_without_any_are_those_that_were_logged(stopped: Path, kit: SimpleNamespace) -> None:
    kit.outcome(status="error", steps=0).save(stopped / "attempts" / "full-seed42-01" / "outcome.json")
    assert read_run(stopped).attempts[0].steps == 30


def test_missing_stopped_run_gives_the_guard_s_reason(stopped: Path) -> None:
    missing = dict(read_run(stopped).missing)
    assert missing["the test scores of full-seed42"] == (
        "training ended as 'stopped by guard': the loss was not finite at step 40, 3 times in a row."
    )


def test_missing_only_a_recipe_names_every_part(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("model: org/x\ntask: causal-lm\n", encoding="utf-8")
    what = " ".join(what for what, _ in read_run(tmp_path).missing)
    for part in ("data summary", "plan", "learning curves", "test scores"):
        assert part in what
    assert "no trial was planned or started" in report.write_run_report(tmp_path).read_text(encoding="utf-8")


def test_missing_complete_run_is_empty(classification: Path) -> None:
    """Records of other kinds lie beside the plan: they are neither plans nor damaged."""
    view = read_run(classification)
    assert view.missing == ()
    assert view.plan is not None
    assert view.plan.trial == "full-seed42"


@pytest.mark.parametrize(
    "name", ["shapes.json", "footprint.json", "survey.json", "measured.json", "full.deepspeed.json"]
)
def test_other_files_beside_a_plan_are_no_damaged_plans(classification: Path, name: str) -> None:
    (classification / "plan" / name).write_text("{}", encoding="utf-8")
    assert [what for what, _ in read_run(classification).missing if name in what] == []


@pytest.mark.parametrize("text", ['{"trial": "full-seed42", "settings"', '{"trial": "full-seed42", "settings": []}'])
def test_plan_that_is_torn_or_of_another_version_is_named(classification: Path, text: str) -> None:
    (classification / "plan" / "full.json").write_text(text, encoding="utf-8")
    with pytest.raises(SetupError, match=r"plan/full\.json: the file is damaged or from another version"):
        read_run(classification)


def test_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="not a run folder"):
        read_run(tmp_path)
    with pytest.raises(SetupError, match="no such run folder"):
        read_run(tmp_path / "gone")
