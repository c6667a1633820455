"""Classes whose names differ only in capitals, blanks, form or look are named with their rows; others are not."""

from __future__ import annotations

import pytest

from fulltune.audit.texts.content import group_similar_names, note_similar_names


@pytest.mark.parametrize(
    "names",
    [
        ["Timer", "timer", "TIMER"],
        ["credit card", "credit  card", "Credit_Card"],
        ["caf\u00e9", "cafe\u0301"],
        ["cat", "\u0441at"],  # a Cyrillic letter
        ["\u0391lpha", "alpha"],  # a Greek capital
        ["news", "news\u200b", "\ufeffnews"],
        ["heart \u2764", "heart \u2764\ufe0f"],
        ["kelvin", "\u212aelvin"],
        ["\uff21", "A"],
        ["Stra\u00dfe", "STRASSE"],
    ],
)
def test_names_that_may_be_one_are_grouped_the_most_frequent_first(names: list[str]) -> None:
    counts = {name: number for number, name in enumerate(names, start=1)} | {"other": 9}
    assert group_similar_names(counts) == [names[::-1]]


def test_other_names_are_left_alone() -> None:
    names = ["cat", "cats", "caf\u00e9", "cafe", "1", "-1", "1.5", "15", "кот", "", "a b", "a-b"]
    assert group_similar_names(dict.fromkeys(names, 1)) == []
    assert note_similar_names({"yes": 3, "no": 2}) is None


def test_groups_are_said_with_their_rows_and_what_joins_them() -> None:
    note = note_similar_names({"timer": 12, "Timer": 30, "\u0441at": 1, "cat": 2, "a": 1, "A": 1, "b": 1, "B": 1})
    assert note is not None
    for part in ("'Timer' (30 rows), 'timer' (12 rows)", r"'cat' (2 rows), '\u0441at' (1 row)", "and 1 more group"):
        assert part in note
    assert '--accept "class names"' in note
    assert "data.patch" in note
