"""What a row says beside what is learned of it: whose it is (`data.group`), and when it came (`data.time`)."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Literal

import numpy as np

from fulltune.audit.texts import masked_text
from fulltune.data.groups import draw
from fulltune.data.readers.read import PlacedRow
from fulltune.recipe.data import DataBlock
from fulltune.tasks.columns import BadCell, is_blank
from fulltune.text import counted, listed

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?([eE][+-]?\d+)?")
_SHOWN = 3
_EMPTY = "is empty"

TimeKind = Literal["date", "date-time", "date-time with a zone", "number"]
Setting = Literal["group", "time", "kind of time"]


@dataclass
class Found:
    """What was found in the columns: how many rows hold it, and where the first ones stand."""

    counts: Counter[tuple[Setting, str]] = field(default_factory=Counter)
    first: dict[tuple[Setting, str], list[str]] = field(default_factory=dict)

    def add(self, setting: Setting, what: str, places: Sequence[str], count: int = 1) -> None:
        """Count rows."""
        self.counts[setting, what] += count
        shown = self.first.setdefault((setting, what), [])
        shown.extend(places[: _SHOWN - len(shown)])

    def take(self, other: Found) -> None:
        """Add what was found in the rows that follow."""
        for (setting, what), count in other.counts.items():
            self.add(setting, what, other.first[setting, what], count)


@dataclass(frozen=True)
class Marks:
    """What some rows say."""

    values: np.ndarray
    """`draw` of whose each is: uint64 [rows]; without rows where it is not asked."""
    times: np.ndarray
    """When each came, in an order of time: float64 [rows]; without rows where it is not asked."""
    found: Found


def marks_of(
    rows: Sequence[PlacedRow], group: str | None, time: str | None, seed: int, is_optional: bool = False
) -> Marks:
    """Read the marks of some rows."""
    found, values, times = Found(), np.zeros(len(rows) if group else 0, np.uint64), np.zeros(len(rows) if time else 0)
    for number, (place, row) in enumerate(rows):
        if group:
            try:
                values[number] = draw(seed, value_of(row.get(group)))
            except ValueError as error:
                if not is_optional:
                    found.add("group", str(error), [place])
        if time:
            cell = row.get(time)
            try:
                kind, times[number] = time_of(cell)
                found.add("kind of time", kind, [place])
            except ValueError as error:
                told = f"{place}: {masked_text(str(cell))[:40]!r}"
                shown = place if str(error) == _EMPTY or isinstance(cell, BadCell) else told
                found.add("time", str(error), [shown])
    return Marks(values, times, found)


def value_of(cell: object) -> str:
    """What a cell of `data.group` says; spaces at its ends and the way a whole number is written do not matter. Raises
    `ValueError` saying what the cell is or holds, if it is nobody's."""
    if isinstance(cell, BadCell):
        raise ValueError(f"holds {cell.reason}")
    if isinstance(cell, (list, tuple, dict, bytes)):
        raise ValueError("holds a list, an object or bytes, expected a text or a number")
    if cell is None or (isinstance(cell, float) and math.isnan(cell)) or is_blank(str(cell)):
        raise ValueError(_EMPTY)
    if isinstance(cell, float) and cell.is_integer():
        return str(int(cell))
    return str(cell).strip()


def time_of(cell: object) -> tuple[TimeKind, float]:
    """The kind of a time, and its place in time: seconds since 1970, of a number itself. Raises `ValueError` saying
    what the cell is or holds, if it is no time."""
    if isinstance(cell, BadCell):
        raise ValueError(f"holds {cell.reason}")
    is_nothing = isinstance(cell, (float, datetime)) and cell != cell  # not a number; pandas' not a time
    if cell is None or is_nothing or (isinstance(cell, str) and is_blank(cell)):
        raise ValueError(_EMPTY)
    try:
        value = _parsed(cell.strip()) if isinstance(cell, str) else cell
        if isinstance(value, datetime):
            if value.tzinfo is None:
                return "date-time", (value.replace(tzinfo=UTC) - _EPOCH).total_seconds()
            return "date-time with a zone", (value.astimezone(UTC) - _EPOCH).total_seconds()
        if isinstance(value, date):
            return "date", (datetime(value.year, value.month, value.day, tzinfo=UTC) - _EPOCH).total_seconds()
        if isinstance(value, (int, float, Decimal)) and not isinstance(value, bool) and math.isfinite(value):
            return "number", float(value)
    except (ValueError, OverflowError):
        pass
    raise ValueError("holds no time")


def _parsed(text: str) -> date | float:
    if _NUMBER.fullmatch(text):
        return float(text)
    try:
        return date.fromisoformat(text)
    except ValueError:
        return datetime.fromisoformat(text)


def time_in_words(kind: str, time: float) -> str:
    """A time as it stands in the user's files; of a zone's, in UTC."""
    if kind == "number":
        return str(int(time)) if time.is_integer() else str(time)
    moment = _EPOCH + timedelta(seconds=time)
    if kind == "date":
        return moment.date().isoformat()
    text = moment.replace(tzinfo=None).isoformat(sep=" ", timespec="seconds")
    return f"{text} UTC" if kind == "date-time with a zone" else text


def kind_of_time(found: Found) -> str:
    """Of a source in which all rows have one of the same kind."""
    return next(what for setting, what in found.counts if setting == "kind of time")


def problems_of(block: DataBlock, found: Found, num_rows: int, where: str) -> list[str]:
    """What is wrong with a source's marks: a line for each kind of fault, with the first places."""
    problems, kinds = [], []
    for (setting, what), count in found.counts.items():
        first = found.first[setting, what]
        places = ", ".join(first) + (f" and {count - len(first):,} more" if count > len(first) else "")
        column = f"column '{getattr(block, setting, None)}' (data.{setting})"
        match setting:
            case "kind of time":
                kinds.append(f"{what} in {counted(count, 'row')} ({first[0]})")
            case "group":
                gaps = "a group column with gaps: " if what == _EMPTY else ""
                problems.append(
                    f"{where}: {gaps}{column} {what} in {count:,} of {counted(num_rows, 'row')} ({places}); such a row "
                    "could stand on two sides of a split: write whose each is, a value of its own for one that stands "
                    "alone, or remove these rows"
                )
            case "time":
                problems.append(
                    f"{where}: {column} {what} in {count:,} of {counted(num_rows, 'row')} ({places}); expected a date "
                    "such as 2026-11-28, a date-time such as 2026-11-28 14:30:00+01:00, or a number such as Unix "
                    "seconds: write when each came, or remove these rows"
                )
    if len(kinds) > 1:
        problems.append(
            f"{where}: column '{block.time}' (data.time) mixes kinds of times, so that their order is not known: "
            f"{listed(kinds)}; write all of them alike"
        )
    return problems
