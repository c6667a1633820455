"""Find the column for a role: the one the recipe names, or one with a usual name."""

from __future__ import annotations

import ast
import io
import json
import re
import tokenize
import tomllib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, TypeVar
from unicodedata import normalize

from fulltune.errors import DataError
from fulltune.recipe.data import DataBlock
from fulltune.tasks import Refused, Row, Target
from fulltune.text import did_you_mean, first_few

T = TypeVar("T")
_SHOWN, _LONG_NAME = 40, 80

_TABLE = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
USUAL_NAMES, CHOICE_NAMES = (
    {role: tuple(names) for role, names in _TABLE[kind].items()} for kind in ("roles", "choices")
)
"""Role to the usual names of its column, and the same for rows with choices."""
USUAL_PAIRS = [(text, pair) for text, pair in _TABLE["pairs"]]
"""Names of two columns that are read together."""


class BadCell:
    """A cell that could not be read, in a row whose other cells are whole: in the place of a value.

    Args:
        reason: What is wrong with it, for messages.
        shown: What is written down in its place.
    """

    def __init__(self, reason: str, shown: str = "") -> None:
        self.reason, self.shown = reason, shown or f"<{reason}>"

    def __str__(self) -> str:
        return self.shown


def unreadable(row: Mapping[str, object], columns: Mapping[str, str]) -> str | None:
    """Why a row cannot be used, by its cells in the columns of all roles; None: they could be read."""
    for role, column in columns.items():
        cell = row.get(column)
        if isinstance(cell, BadCell):
            return f"column '{column}' holds {cell.reason}"
        if isinstance(cell, bytes) and role != "image":
            return f"column '{column}' holds bytes that are not text in UTF-8"
    return None


def is_whole(row: Mapping[str, object]) -> bool:
    """Every cell of a row could be read."""
    return not any(isinstance(cell, BadCell) for cell in row.values())


MOST_NESTED = 100
"""Lists and objects in each other; a cell with more is damaged, or made to crash what reads it."""


def fault(value: object) -> str | None:
    """What makes a value from JSON unusable: half a character, or depth; None: nothing does."""
    waiting: list[Iterator[object]] = [iter([value])]  # one for each level: a list may hold millions
    while waiting:
        for part in waiting[-1]:
            if len(waiting) - 1 > MOST_NESTED:
                return f"lists nested more than {MOST_NESTED} deep"
            if isinstance(part, str):
                try:
                    part.encode()
                except UnicodeEncodeError:
                    return "half a character (a lone surrogate, as a cut emoji leaves it)"
            elif isinstance(part, (dict, list, tuple)):
                waiting.append(chain.from_iterable(part.items()) if isinstance(part, dict) else iter(part))
                break
        else:
            waiting.pop()
    return None


def may_be_faulty(text: str) -> bool:
    """Whether a value that was written so as JSON, or by Python, is worth asking for its `fault`: most are not."""
    has_escape = "\\ud" in text or "\\uD" in text or "\\U" in text
    return has_escape or text.count("[") + text.count("{") > MOST_NESTED


def literal(text: str) -> list[Any] | dict[str, Any] | None:
    """A list or an object written as JSON, or as Python writes it (what pandas makes of such a column)."""
    for parse in (json.loads, ast.literal_eval):
        try:
            found = parse(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        is_wrong = (may_be_faulty(text) and fault(found)) or (parse is not json.loads and _is_glued(text))
        return found if isinstance(found, (list, dict)) and not is_wrong else None
    return None


def parsed(value: Any) -> Any:
    """A list or an object, where a cell holds it as text; else the cell."""
    found = literal(value) if isinstance(value, str) and value.strip()[:1] in ("[", "{") else None
    return value if found is None else found


def _is_glued(text: str) -> bool:
    """Python makes one text of two without a comma between them, as numpy writes a list."""
    if re.search(r"""['"]\s+['"]""", text) is None:
        return False
    kinds = [token.type for token in tokenize.generate_tokens(io.StringIO(text).readline)]
    return any(one == two == tokenize.STRING for one, two in pairwise(kinds))


def usual(names: Sequence[str], columns: Sequence[str], where: str) -> str | None:
    """The column with the first of these names that is there; upper case and spaces at its ends do not matter. Raises
    `DataError` when several have it."""
    for name in names:
        alike = [column for column in columns if column.lower().strip() == name]
        if name in alike or len(alike) == 1:
            return name if name in alike else alike[0]
        if alike:
            shown = " and ".join(repr(column) for column in alike)
            raise DataError(
                f"{where}: columns {shown} differ in case or spaces only, expected one '{name}'; rename one, or name "
                "the right one in the recipe"
            )
    return None


def named(role: str, given: str | None, columns: Sequence[str], where: str, names: Sequence[str] = ()) -> str | None:
    """The column that the recipe names for a role, or one with a usual name (by default `USUAL_NAMES`), or None. Raises
    `DataError` when the recipe names a column that is not there."""
    if given is not None:
        # What looks the same is: a name from another program may stand in another normal form.
        same = [column for column in columns if normalize("NFC", column) == normalize("NFC", given)]
        if not same:
            hint = did_you_mean(given, columns) or f"columns here: {shown(columns)}"
            raise DataError(f"{where}: no column '{given}' (data.{role}); {hint}")
        return given if given in columns else same[0]
    return usual(names or USUAL_NAMES[role], columns, where)


def required(
    role: str, given: str | None, columns: Sequence[str], where: str, besides: Collection[str | None] = ()
) -> str:
    """Like `named`, for a role that the task cannot do without; `besides` are columns that have another role."""
    if given is None:
        column = named(role, None, [column for column in columns if column not in besides], where)
    elif (column := named(role, given, columns, where)) in besides:
        raise DataError(f"{where}: column '{given}' (data.{role}) is read for something else; name that column, too")
    if column is None:
        raise DataError(missing_column(role, columns, where))
    return column


def find_columns(
    roles: Sequence[str], columns: Sequence[str], sample: Sequence[Row], data: DataBlock, where: str
) -> dict[str, str]:
    """A column of its own for each role, where the task can do without none of them."""
    found: dict[str, str] = {}
    for role in roles:
        found[role] = required(role, getattr(data, role), columns, where, found.values())
    return found


def missing_column(role: str, columns: Sequence[str], where: str) -> str:
    """What is said of a role without a column."""
    return f"{where}: no column found for data.{role}; name it in the recipe (columns here: {shown(columns)})"


def shown(columns: Iterable[str]) -> str:
    """Names of columns in a message, which a broken file may have by the million, or of a million characters."""
    return first_few([name if len(name) <= _LONG_NAME else f"{name[:_LONG_NAME]}..." for name in columns], _SHOWN)


def without_text(row: Row, target: Target, *roles: str) -> Refused | None:
    """Why a row that needs text in these roles cannot be used, or None."""
    for role in roles:
        if refused := not_text(row, target, role):
            return refused
        if is_blank(as_text(row.get(target.columns[role]))):
            return Refused(f"no {role}", f"column '{target.columns[role]}' is empty")
    return None


def not_text(row: Row, target: Target, role: str) -> Refused | None:
    """Why a row whose text in this role may be empty cannot be used, or None."""
    is_text = not isinstance(row.get(column := target.columns[role]), (list, tuple, dict))
    return None if is_text else Refused(f"no {role}", f"column '{column}' holds a list or an object, not text")


def second_text(read: str, roles: Mapping[str, str], columns: Iterable[str], sample: Sequence[Row]) -> str | None:
    """A column that no role has and that holds texts like those of the column that is read: several words in each,
    few of them twice, together at least half as long."""
    texts = {name: [cell for row in sample if isinstance(cell := row.get(name), str) and cell] for name in columns}

    def is_like(cells: Sequence[str]) -> bool:
        words = sum(sum(map(str.isalpha, cell.split())) for cell in cells)
        is_long = 2 * sum(map(len, cells)) >= sum(map(len, texts.get(read, ())))
        return is_long and words > 2 * len(cells) < 4 * len(set(cells))

    return next((name for name, cells in texts.items() if name not in roles.values() and is_like(cells)), None)


def as_text(value: object) -> str:
    """A cell as text; a missing one is empty."""
    return "" if value is None else str(value)


def is_blank(text: str) -> bool:
    """Nothing to read: white space, and signs of no width."""
    return not text.strip() or not text.translate(_NO_WIDTH).strip()


_NO_WIDTH = dict.fromkeys(map(ord, "\u200b\u200c\u200d\u2060\ufeff"))


def normalised(text: str) -> str:
    """Case and white space do not make a different row."""
    return " ".join(text.lower().split())


def windows(rows: Iterable[T], most_rows: int = 2_048, most_characters: int = 4_000_000) -> Iterator[list[T]]:
    """Rows, whatever form they have, in their order, some at a time; one that is longer than a window stands alone."""
    window: list[T] = []
    size = 0
    for row in rows:
        characters = _characters(row)
        if window and (len(window) == most_rows or size + characters > most_characters):
            yield window
            window, size = [], 0
        window.append(row)
        size += characters
    if window:
        yield window


def _characters(value: Any) -> int:
    """Characters and bytes in a cell; anything else counts as one, and so does a place in a list or an object: a row
    may have a million empty ones."""
    if isinstance(value, (str, bytes)):
        return len(value)
    if isinstance(value, Mapping):
        return len(value) + sum(map(_characters, value.values()))
    return len(value) + sum(map(_characters, value)) if isinstance(value, (list, tuple)) else 1
