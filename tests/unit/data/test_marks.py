"""Whose a row is and when it came: what cells say, and what is refused."""

from __future__ import annotations

import math
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any

import pytest

from fulltune.data.groups import RowCounts, marks_of, time_in_words, time_of, value_of
from fulltune.tasks.columns import BadCell

NOON = datetime(2026, 11, 28, 12, tzinfo=UTC).timestamp()
DAY = datetime(2026, 11, 28, tzinfo=UTC).timestamp()


@pytest.mark.parametrize(
    ("cell", "kind", "time"),
    [
        ("2026-11-28", "date", DAY),
        (date(2026, 11, 28), "date", DAY),
        ("2026-11-28 12:00", "date-time", NOON),
        (" 2026-11-28T12:00:00.000 ", "date-time", NOON),
        (datetime(2026, 11, 28, 12), "date-time", NOON),  # what a column without a zone holds
        ("2026-11-28T12:00:00Z", "date-time with a zone", NOON),
        ("2026-11-28 14:00:00+02:00", "date-time with a zone", NOON),
        (datetime(2026, 11, 28, 14, tzinfo=timezone(timedelta(hours=2))), "date-time with a zone", NOON),
        (1_795_000_000, "number", 1_795_000_000.0),
        (1.5, "number", 1.5),
        (Decimal("2.5"), "number", 2.5),
        ("1795000000", "number", 1_795_000_000.0),
        ("-1.5e3", "number", -1500.0),
        ("2026", "number", 2026.0),
        ("20261128", "number", 20_261_128.0),
    ],
)
def test_time_of_what_is_a_time(cell: object, kind: str, time: float) -> None:
    assert time_of(cell) == (kind, time)


@pytest.mark.parametrize(
    ("cell", "reason"),
    [
        (None, "is empty"),
        ("  ", "is empty"),
        (math.nan, "is empty"),
        ("yesterday", "holds no time"),
        ("28.11.2026", "holds no time"),
        ("2026-13-01", "holds no time"),
        ("nan", "holds no time"),
        ("1_000", "holds no time"),
        (math.inf, "holds no time"),
        (10**400, "holds no time"),
        (True, "holds no time"),
        (["2026-11-28"], "holds no time"),
        (datetime(1, 1, 1, tzinfo=timezone(timedelta(hours=2))), "holds no time"),
        (BadCell("a text that is not UTF-8"), "holds a text that is not UTF-8"),
    ],
)
def test_time_of_what_is_none(cell: object, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        time_of(cell)


def test_times_in_words_are_those_of_the_file() -> None:
    assert time_in_words("date", DAY) == "2026-11-28"
    assert time_in_words("date-time", NOON) == "2026-11-28 12:00:00"
    assert time_in_words("date-time with a zone", NOON) == "2026-11-28 12:00:00 UTC"
    assert [time_in_words("number", number) for number in (2026.0, 1.5)] == ["2026", "1.5"]


@pytest.mark.parametrize(
    ("cell", "value"), [("anna ", "anna"), ("Anna", "Anna"), (7, "7"), (7.0, "7"), ("7", "7"), (0, "0"), (True, "True")]
)
def test_value_of_what_is_somebody(cell: object, value: str) -> None:
    assert value_of(cell) == value


@pytest.mark.parametrize("cell", [None, "", " \t", "\u200b", math.nan, [], ["a"], {"a": 1}, b"\xff", BadCell("damage")])
def test_value_of_what_is_nobody(cell: object) -> None:
    with pytest.raises(ValueError, match=r"^(is empty|holds )"):
        value_of(cell)


def placed(cells: list[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    return [(f"a.csv:{number}", row) for number, row in enumerate(cells, start=2)]


def test_marks_are_equal_for_equal_values_and_other_for_other_seeds() -> None:
    rows = placed([{"user": user, "at": at} for user, at in (("a", 3), ("b", 1), ("a ", 2))])
    (one, times), (other, _) = (marks_of(rows, "user", "at", seed, RowCounts()) for seed in (1, 2))
    assert one[0] == one[2] != one[1]
    assert not set(one.tolist()) & set(other.tolist())
    assert times.tolist() == [3, 1, 2]
    assert list(map(len, marks_of(rows, None, None, 1, nothing := RowCounts()))) == [0, 0]
    assert nothing == RowCounts()
