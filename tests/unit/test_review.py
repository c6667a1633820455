"""Suspicious rows are asked about in order; each decision is kept at once, can be taken back, and is asked once."""

from __future__ import annotations

from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from fulltune.cli.review import about, accepted, precision_of, queue, review
from fulltune.data.patch import load_patch
from fulltune.errors import DataError, RecipeError, SetupError
from fulltune.records.audit import Remedy, RowDecision, RowIssue


def issue(row: str, check: str, score: float = 0.0, change: str | None = None) -> RowIssue:
    remedy = Remedy(action="drop") if change is None else Remedy(action="replace", column="label", value=change)
    return RowIssue(
        check=check,
        split="train",
        place=f"rows.csv:{row}",
        row=row,
        reason=f"why {row}",
        text=f"text {row}",
        label="old",
        remedy=remedy,
        score=score,
    )


ISSUES = [
    issue("a", "markup"),
    issue("b", "label error", 0.6, "new"),
    issue("c", "label error", 0.9, "newer"),
    issue("b", "duplicate"),
]


def pressing(keys: str) -> Callable[[], str]:
    waiting = iter(keys)
    return lambda: next(waiting)


def asked(keys: str, patch: Path) -> tuple[dict[str, RowDecision], str]:
    out = StringIO()
    return review(Console(file=out, width=80), ISSUES, patch, pressing(keys)), out.getvalue()


def test_rows_come_once_the_costliest_and_surest_first() -> None:
    waiting = queue(ISSUES, {})
    assert [one.row for one in waiting] == ["c", "b", "a"]
    assert [one.check for one in waiting[1].issues] == ["label error", "duplicate"]


def test_decisions_are_kept_and_not_asked_again(tmp_path: Path) -> None:
    patch = tmp_path / "p.jsonl"
    decided, shown = asked("cdk", patch)
    assert {row: one.remedy.action for row, one in decided.items()} == {"c": "replace", "b": "drop", "a": "keep"}
    assert decided["c"].remedy.value == "newer"
    assert load_patch(patch) == decided
    for word in (
        "rows.csv:c",
        "text c",
        "label: old",
        "label error: why c",
        "proposed: label: newer",
        "1 of 3",
        "[k]eep",
    ):
        assert word in shown
    again, shown = asked("", patch)
    assert again == decided
    assert shown == ""


def test_undo_goes_back_and_quitting_keeps_what_was_decided(tmp_path: Path) -> None:
    patch = tmp_path / "p.jsonl"
    decided, _ = asked("duuknq", patch)  # the second undo has nothing to take back
    assert {row: one.remedy.action for row, one in decided.items()} == {"c": "keep"}
    assert load_patch(patch) == decided


def test_other_keys_and_changes_that_are_not_proposed_do_nothing(tmp_path: Path) -> None:
    decided, _ = asked("xcnncq", tmp_path / "p.jsonl")  # no change is proposed for the third row
    assert {row: one.remedy.action for row, one in decided.items()} == {"c": "replace"}


def test_without_a_terminal_the_queue_is_a_file_to_edit(tmp_path: Path) -> None:
    patch = tmp_path / "p.jsonl"
    kept = review(Console(file=StringIO()), ISSUES, patch, None)
    assert [one.remedy.action for one in kept.values()] == ["keep"] * 3
    assert load_patch(patch) == kept
    with pytest.raises(SetupError, match="is there already"):
        review(Console(file=StringIO()), ISSUES, patch, None)
    patch.write_text("nonsense\n")
    with pytest.raises(DataError, match="no decision"):
        asked("q", patch)


def test_precision_is_said_with_an_interval(tmp_path: Path) -> None:
    decided, _ = asked("cdk", tmp_path / "p.jsonl")
    assert precision_of(decided.values()) == {"label error": (2, 2), "markup": (0, 1)}
    said = "\n".join(about(decided, tmp_path / "p.jsonl"))
    assert "label error: right in 2 of 2 (95 % interval: 34.2% to 100.0%)" in said
    assert "data.patch" in said


def test_what_is_proposed_for_a_check_can_be_taken_at_once(tmp_path: Path) -> None:
    patch = tmp_path / "p.jsonl"
    asked("kq", patch)  # the surest is kept by hand
    decided = accepted(ISSUES, ["label error"], patch)
    assert {row: one.remedy.action for row, one in decided.items()} == {"c": "keep", "b": "replace"}
    assert load_patch(patch) == decided
    with pytest.raises(RecipeError, match="'label eror' found no row; expected one of 'duplicate', 'label error'"):
        accepted(ISSUES, ["label eror"], patch)
