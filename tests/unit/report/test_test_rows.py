"""On what terms the test scores hold: rows that stand in train, and models that were scored before."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fulltune import report
from fulltune.records.data import DataSummary
from fulltune.records.run import ACCESSES, Access
from fulltune.records.scores import Estimate, Scores
from fulltune.report.format.blocks import Headline, Paragraph
from fulltune.report.run.about_scores import describe_leaks, warn_of_repeated_scoring
from fulltune.report.run.read import read_run


def of(kit: SimpleNamespace, left_out: int, rows: int, unseen: Estimate | None) -> list[Scores]:
    whole = Estimate(value=0.934, low=0.92, high=0.945, rows=rows)
    more: Any = {"rows": rows, "metrics": {"accuracy": whole}}
    more |= {"num_leaks": left_out, "near_leaks": rows == 41, "metric_without_leaks": unseen}
    return [kit.scores("majority class", "baseline", 0.1), kit.scores("full-seed42", "trained", 0.934, **more)]


UNSEEN = Estimate(value=0.931, low=0.922, high=0.94, rows=2935, clusters=2900)


@pytest.mark.parametrize(
    ("left_out", "rows", "unseen", "expected"),
    [
        (
            145, 3080, UNSEEN,
            "145 of 3,080 test rows are leaked: their text also occurs in train. Without them: accuracy 93.1% [92.2%, "
            "94.0%] (93.4% with them).",
        ),
        (
            2, 41, UNSEEN,
            "2 of 41 test rows are leaked: their text also occurs in train (equal, or nearly so). Without them: "
            "accuracy 93.1% [92.2%, 94.0%] (93.4% with them).",
        ),
        (
            37, 40, None,
            "37 of 40 test rows are leaked: their text also occurs in train. Too few other rows remain to judge the "
            "model on unseen rows.",
        ),
    ],
)  # fmt: skip
def test_metric_without_rows_of_train_is_said_in_report_and_terminal(
    classification: Path, kit: SimpleNamespace, left_out: int, rows: int, unseen: Estimate | None, expected: str
) -> None:
    scores, summary = of(kit, left_out, rows, unseen), DataSummary.of_run(classification)
    assert describe_leaks(scores, summary) == expected
    passages = summary.model_copy(update={"columns": {"context": "c", "question": "q"}})
    assert "passage" in (describe_leaks(scores, passages) or "")
    kit.save_scores(classification, *scores)
    report.write_run_report(classification)
    text = (classification / "report.md").read_text(encoding="utf-8")
    assert expected in text.replace("\\", "")
    assert Paragraph(expected) in report.build_run_terminal_report(classification)


def access(run: str, model: str = "m", day: int = 2, trial: str = "full-seed1", rows: str = "r") -> Access:
    time = f"2026-11-{day:02}T10:00:00+00:00"
    return Access(time=time, run=run, trial=trial, model=model, rows=rows)


def test_models_are_counted_and_not_how_often_one_is_scored() -> None:
    assert warn_of_repeated_scoring([]) == warn_of_repeated_scoring([access("a"), access("a", day=3)]) == ""
    assert warn_of_repeated_scoring([access("a", day=4), access("b"), access("c", day=7), access("c", day=8)]) == (
        "3 runs in this folder have scored these test rows, the first on 2026-11-02. The best of several test scores "
        "is optimistic, so choose a run by its eval score."
    )
    assert "2 runs in this folder" in warn_of_repeated_scoring([access("a"), access("a", "trained anew")])
    compared = [access("b", "", trial="comparison"), access("b", "", trial="comparison"), access("a")]
    assert "2 runs in this folder" in warn_of_repeated_scoring(compared)


def test_report_tells_of_other_runs_on_the_same_rows(classification: Path) -> None:
    name = classification.name
    lines = [access(name), access("other", day=1), access("of other rows", rows="s")]
    log = classification.parent / ACCESSES
    log.write_text("".join(json.dumps(one.model_dump()) + "\n" for one in lines), encoding="utf-8")
    [headline] = [part for part in report.build_run_terminal_report(classification) if isinstance(part, Headline)]
    assert "2 runs in this folder have scored these test rows, the first on 2026-11-01" in headline.note
    report.write_run_report(classification)
    for page in ("report.md", "report.html"):
        assert "2 runs in this folder have scored" in (classification / page).read_text(encoding="utf-8")


def test_log_that_cannot_be_read_is_missing_and_the_report_is_written(classification: Path) -> None:
    (classification.parent / ACCESSES).mkdir()
    assert [what for what, _ in read_run(classification).missing] == [f"{ACCESSES}, beside the run folder"]
