"""Suspicious rows are asked about in order; each decision is kept at once, can be taken back, and is asked once."""

from __future__ import annotations

from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from fulltune.cli import audit
from fulltune.cli.audit import accept_remedies, list_undecided_rows, make_open_decision, review_rows
from fulltune.data.patch import load_patch
from fulltune.records.audit import Remedy, RowDecision, RowIssue
from fulltune.records.data import DataSummary


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
    found = review_rows(
        Console(file=out, width=80), ISSUES, patch, load_patch(patch) if patch.exists() else {}, pressing(keys)
    )
    return {row: one for (_, row), one in found.items()}, out.getvalue()


def kept_in(patch: Path) -> dict[str, RowDecision]:
    return {row: one for (_, row), one in load_patch(patch).items()}


def test_rows_come_once_the_costliest_and_surest_first() -> None:
    waiting = list_undecided_rows(ISSUES, {})
    assert [one[0].key for one in waiting] == [("train", "c"), ("train", "b"), ("train", "a")]
    assert [one.check for one in waiting[1]] == ["label error", "duplicate"]


def test_decisions_are_kept_and_not_asked_again(tmp_path: Path) -> None:
    patch = tmp_path / "p.jsonl"
    decided, shown = asked("cdk", patch)
    assert {row: one.remedy.action for row, one in decided.items()} == {"c": "replace", "b": "drop", "a": "keep"}
    assert decided["c"].remedy.value == "newer"
    assert kept_in(patch) == decided
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
    assert "[l]abel" not in shown
    again, shown = asked("", patch)
    assert again == decided
    assert shown == ""


def test_undo_goes_back_and_quitting_keeps_what_was_decided(tmp_path: Path) -> None:
    patch = tmp_path / "p.jsonl"
    decided, _ = asked("duuknq", patch)  # the second undo has nothing to take back
    assert {row: one.remedy.action for row, one in decided.items()} == {"c": "keep"}
    assert kept_in(patch) == decided


def test_other_keys_and_changes_that_are_not_proposed_do_nothing(tmp_path: Path) -> None:
    decided, _ = asked("xcnncq", tmp_path / "p.jsonl")  # no change is proposed for the third row
    assert {row: one.remedy.action for row, one in decided.items()} == {"c": "replace"}


def test_rows_that_are_written_down_to_be_decided_are_asked_about_again(tmp_path: Path) -> None:
    asked("dq", patch := tmp_path / "p.jsonl")
    before = load_patch(patch)
    found = {them[0].key: make_open_decision(them) for them in list_undecided_rows(ISSUES, before)}
    assert [one.remedy.action for one in found.values()] == ["undecided", "undecided"]  # what was decided stays
    assert all(one.proposed and one.text and one.reason for one in found.values())
    assert len(list_undecided_rows(ISSUES, {**before, **found})) == 2


def test_what_is_proposed_for_a_check_can_be_taken_at_once(tmp_path: Path) -> None:
    patch = tmp_path / "p.jsonl"
    asked("kq", patch)  # the surest is kept by hand
    decided, said = accept_remedies(ISSUES, ["label error"], load_patch(patch))
    assert {row: one.remedy.action for (_, row), one in decided.items()} == {"c": "keep", "b": "replace"}
    assert said == ["label error: accepted the proposals for 1 row"]


def test_of_several_proposals_for_a_row_leaving_it_out_wins_and_others_are_said_to_wait() -> None:
    decided, said = accept_remedies(ISSUES, ["label error", "duplicate"], {})
    assert decided["train", "b"].remedy.action == "drop"
    two = [issue("a", "markup", change="x"), issue("a", "secret", change="y")]
    decided, said = accept_remedies(two, ["markup", "secret"], {})
    assert decided["train", "a"].remedy.value == "y"  # the costlier one first
    assert said == [
        "secret: accepted the proposals for 1 row",
        "more changes are proposed for 1 row: apply the patch, then run this again",
    ]


def test_any_other_label_can_be_given(tmp_path: Path) -> None:
    answers = iter([None, Remedy(action="replace", column="label", value="rare")])
    out = StringIO()
    found = review_rows(Console(file=out), ISSUES, tmp_path / "p.jsonl", {}, pressing("llq"), lambda: next(answers))
    assert [(row, one.remedy.value) for (_, row), one in found.items()] == [("c", "rare")]  # the first was no answer
    assert "[l]abel" in out.getvalue()


@pytest.mark.parametrize("keys", ["kl", "k"])
def test_ctrl_d_ends_a_review_as_q_does_and_keeps_what_was_decided(tmp_path: Path, keys: str) -> None:
    """At a label, and at a key."""

    def ended() -> Remedy | None:
        raise EOFError

    waiting = iter(keys)

    def press() -> str:
        return next(waiting, None) or ended()

    found = review_rows(Console(file=StringIO()), ISSUES, tmp_path / "p.jsonl", {}, press, ended)
    assert [(row, one.remedy.action) for (_, row), one in found.items()] == [("c", "keep")]
    assert list(kept_in(tmp_path / "p.jsonl")) == ["c"]


@pytest.mark.parametrize(
    ("typed", "value"),
    [(["old"], "old"), (["a new one", "a new one"], "a new one"), (["a new one", "a mew one"], None), ([""], None)],
)
def test_label_is_one_that_there_is_or_a_new_one_typed_twice(
    typed: list[str], value: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    summary = DataSummary.model_construct(
        task="text-classification",
        problem_type="single_label",
        columns={"text": "text", "label": "topic"},
        labels=("old", "new"),
    )
    waiting = iter(typed)
    monkeypatch.setattr(audit.out, "input", lambda prompt: next(waiting))
    ask = audit._make_label_prompt(summary)
    assert ask is not None
    found = ask()
    assert found == (None if value is None else Remedy(action="replace", column="topic", value=value))
    assert next(waiting, None) is None
    assert audit._make_label_prompt(summary.model_copy(update={"problem_type": "regression"})) is None
