"""What a row says beside what is learned of it: whose it is (`data.group`), and when it came (`data.time`)."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal

import numpy as np

from fulltune.audit.texts import masked_text
from fulltune.data.groups import draw
from fulltune.data.readers.read import PlacedRow
from fulltune.recipe.data import DataBlock
from fulltune.tasks.columns import BadCell, is_blank
from fulltune.text import counted, listed

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?([eE][+-]?\d+)?")
_DAY = re.compile(r"\d{4}-\d{2}-\d{2}")
_KEPT = 10
_EMPTY = "is empty"


@dataclass
class RowCounts:
    """What was found in rows: how often, and where the first ones stand, with what is said of each."""

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    """By its kind, and what it is."""
    first: dict[tuple[str, str], list[tuple[str, str]]] = field(default_factory=dict)

    def add(self, kind: str, what: str, place: str, said: str = "") -> None:
        """Count a row."""
        self.counts[kind, what] += 1
        if self.counts[kind, what] <= _KEPT:
            self.first.setdefault((kind, what), []).append((place, said))

    def take(self, other: RowCounts) -> None:
        """Add what was found in the rows that follow."""
        self.counts.update(other.counts)
        for key, places in other.first.items():
            shown = self.first.setdefault(key, [])
            shown += places[: _KEPT - len(shown)]

    def of(self, kind: str) -> Counter[str]:
        """The counts of a kind."""
        return Counter({what: count for (of, what), count in self.counts.items() if of == kind})


def marks_of(
    rows: Sequence[PlacedRow], group: str | None, time: str | None, seed: int, tally: RowCounts
) -> tuple[np.ndarray, np.ndarray]:
    """Whose each row is, as `draw` gives it: uint64 [rows]; and when each came: float64 [rows]. Without rows where no
    column says so. What the columns hold is counted."""
    values, times = np.zeros(len(rows) if group else 0, np.uint64), np.zeros(len(rows) if time else 0)
    for number, (place, row) in enumerate(rows):
        if group:
            try:
                values[number] = draw(seed, value_of(row.get(group)))
            except ValueError as error:
                tally.add("group", str(error), place)
        if time:
            try:
                kind, times[number] = time_of(cell := row.get(time))
                tally.add("kind of time", kind, place)
            except ValueError as error:
                is_shown = str(error) != _EMPTY and not isinstance(cell, BadCell)
                tally.add("time", str(error), place, f": {masked_text(str(cell))[:40]!r}" if is_shown else "")
    return values, times


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


def time_of(cell: object) -> tuple[str, float]:
    """The kind of a time, and its place in time: seconds since 1970, of a number itself. Raises `ValueError` saying
    what the cell is or holds, if it is no time."""
    if isinstance(cell, BadCell):
        raise ValueError(f"holds {cell.reason}")
    is_nothing = isinstance(cell, (float, datetime)) and cell != cell  # not a number; pandas' not a time
    if cell is None or is_nothing or (isinstance(cell, str) and is_blank(cell)):
        raise ValueError(_EMPTY)
    try:
        value = cell
        if isinstance(cell, str):
            is_number, is_day = _NUMBER.fullmatch(text := cell.strip()), _DAY.fullmatch(text)
            value = float(text) if is_number else (date if is_day else datetime).fromisoformat(text)
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


def time_in_words(kind: str, time: float) -> str:
    """A time as it stands in the user's files; of a zone's, in UTC."""
    if kind == "number":
        return str(int(time)) if time.is_integer() else str(time)
    moment = _EPOCH + timedelta(seconds=time)
    if kind == "date":
        return moment.date().isoformat()
    text = moment.replace(tzinfo=None).isoformat(sep=" ", timespec="seconds")
    return f"{text} UTC" if kind == "date-time with a zone" else text


def problems_of(block: DataBlock, tally: RowCounts, num_rows: int, where: str) -> list[str]:
    """What is wrong with the columns of `data.group` and `data.time` of a source: a line for each kind of fault, with
    the first places."""
    problems, kinds = [], []
    for (kind, what), count in tally.counts.items():
        if kind not in ("group", "time", "kind of time"):
            continue
        places = ["".join(item) for item in tally.first[kind, what]]
        if kind == "kind of time":
            kinds.append(f"{what} in {counted(count, 'row')} ({places[0]})")
            continue
        more = count - min(3, len(places))
        shown = ", ".join(places[:3]) + (f" and {more:,} more" if more else "")
        problems.append(
            f"{where}: column '{getattr(block, kind)}' (data.{kind}) {what} in {count:,} of "
            f"{counted(num_rows, 'row')} ({shown}); {_REMEDIES[kind]}, or remove these rows"
        )
    if len(kinds) > 1:
        problems.append(
            f"{where}: column '{block.time}' (data.time) mixes kinds of times, so that their order is not known: "
            f"{listed(kinds)}; write all of them alike"
        )
    return problems


_REMEDIES = {
    "group": "such a row could stand on two sides of a split: write whose each is, a value of its own for one that "
    "stands alone",
    "time": "expected a date such as 2026-11-28, a date-time such as 2026-11-28 14:30:00+01:00, or a number such as "
    "Unix seconds: write when each came",
}
