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
USUAL_PAIRS = [(text, pair) for text, pair in _TABLE["pairs"]]


class BadCell:
    """Placeholder for an unreadable cell: `reason` is for messages, `shown` for files."""

    def __init__(self, reason: str, shown: str = "") -> None:
        self.reason, self.shown = reason, shown or f"<{reason}>"

    def __str__(self) -> str:
        return self.shown


def why_unreadable(row: Mapping[str, object], columns: Mapping[str, str]) -> str | None:
    """Return a message if a cell in a column with a role is unreadable, else None."""
    for role, column in columns.items():
        cell = row.get(column)
        if isinstance(cell, BadCell):
            return f"column '{column}' holds {cell.reason}"
        if isinstance(cell, bytes) and role != "image":
            return f"column '{column}' holds bytes that are not UTF-8 text"
    return None


def is_whole(row: Mapping[str, object]) -> bool:
    return not any(isinstance(cell, BadCell) for cell in row.values())


MOST_NESTED = 100


def find_defect(value: object, level: int = 0) -> str | None:
    """Describe a lone surrogate or excessive nesting in a JSON value; return None if there is neither."""
    if level > MOST_NESTED:
        return f"lists nested more than {MOST_NESTED} levels deep"
    if isinstance(value, str):
        is_utf8 = value.encode("utf-8", "ignore").decode() == value
        return None if is_utf8 else "half a character (a lone surrogate, such as half an emoji)"
    inner: Iterable[object] = value if isinstance(value, (list, tuple)) else ()
    inner = chain.from_iterable(value.items()) if isinstance(value, dict) else inner
    return next(filter(None, (find_defect(part, level + 1) for part in inner)), None)


def may_have_defect(text: str) -> bool:
    """Return False only if a value with this text certainly has no defect. This is faster than `find_defect`."""
    has_escape = "\\ud" in text or "\\uD" in text or "\\U" in text
    return has_escape or text.count("[") + text.count("{") > MOST_NESTED


def parse_list_or_object(text: str) -> list[Any] | dict[str, Any] | None:
    """Parse text with a list or object in JSON or as a Python literal; return None for other text."""
    for parse in (json.loads, ast.literal_eval):
        try:
            value = parse(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        is_wrong = (may_have_defect(text) and find_defect(value)) or (
            parse is not json.loads and _has_adjacent_strings(text)
        )
        return value if isinstance(value, (list, dict)) and not is_wrong else None
    return None


def parse_cell(value: Any) -> Any:
    """Parse a cell whose text is a list or object; return any other cell unchanged."""
    parts = parse_list_or_object(value) if isinstance(value, str) and value.strip()[:1] in ("[", "{") else None
    return value if parts is None else parts


def _has_adjacent_strings(text: str) -> bool:
    """Return True if strings follow each other without a comma, as numpy prints them."""
    if re.search(r"""['"]\s+['"]""", text) is None:
        return False
    kinds = [token.type for token in tokenize.generate_tokens(io.StringIO(text).readline)]
    return any(one == two == tokenize.STRING for one, two in pairwise(kinds))


def find_usual_column(names: Sequence[str], columns: Sequence[str], file: str) -> str | None:
    """Return the column with one of these names, ignoring case, or None. Earlier names take precedence. Raise
    `DataError` if a name matches two columns."""
    for name in names:
        alike = [column for column in columns if column.lower().strip() == name]
        if name in alike or len(alike) == 1:
            return name if name in alike else alike[0]
        if alike:
            shown = " and ".join(repr(column) for column in alike)
            raise DataError(
                f"{file}: columns {shown} differ only in case or spaces, expected one '{name}'. Rename one of them, "
                "or name the right one in the recipe"
            )
    return None


def find_column(
    role: str, name: str | None, columns: Sequence[str], file: str, names: Sequence[str] = ()
) -> str | None:
    """Return a role's column: `name` from the recipe, which must exist, or else one with a usual name from `names`, or
    None."""
    if name is not None:
        # Names from other programs may be in another Unicode normal form.
        same = [column for column in columns if normalize("NFC", column) == normalize("NFC", name)]
        if not same:
            hint = did_you_mean(name, columns) or f"columns in the file: {shown(columns)}"
            raise DataError(f"{file}: no column '{name}' (data.{role}); {hint}")
        return name if name in columns else same[0]
    return find_usual_column(names or USUAL_NAMES[role], columns, file)


def find_required_column(
    role: str, name: str | None, columns: Sequence[str], file: str, excluded: Collection[str | None] = ()
) -> str:
    """Return a role's column; raise `DataError` if it is missing or among the `excluded` columns."""
    if name is None:
        column = find_column(role, None, [column for column in columns if column not in excluded], file)
    elif (column := find_column(role, name, columns, file)) in excluded:
        raise DataError(
            f"{file}: column '{name}' (data.{role}) already has another role; set that role in the recipe, too"
        )
    if column is None:
        raise DataError(missing_column(role, columns, file))
    return column


def find_columns(
    roles: Sequence[str], columns: Sequence[str], sample: Sequence[Row], data: DataBlock, file: str
) -> dict[str, str]:
    """Map each role to its column; raise `DataError` if a role has no column, or two share one."""
    by_role: dict[str, str] = {}
    for role in roles:
        by_role[role] = find_required_column(role, getattr(data, role), columns, file, by_role.values())
    return by_role


def missing_column(role: str, columns: Sequence[str], file: str) -> str:
    return f"{file}: no column found for data.{role}; set it in the recipe (columns in the file: {shown(columns)})"


def shown(columns: Iterable[str]) -> str:
    """List column names for a message, shortened if there are many."""
    return first_few([name if len(name) <= _LONG_NAME else f"{name[:_LONG_NAME]}..." for name in columns], _SHOWN)


def why_cell_blank(row: Row, target: Target, *roles: str) -> Refused | None:
    """Return the reason to drop a row if a role's cell has no text, else None."""
    for role in roles:
        if refused := refuse_list(row, target, role):
            return refused
        if is_blank(as_text(row.get(target.columns[role]))):
            return Refused(f"no {role}", f"column '{target.columns[role]}' is empty")
    return None


def refuse_list(row: Row, target: Target, role: str) -> Refused | None:
    is_text = not isinstance(row.get(column := target.columns[role]), (list, tuple, dict))
    return None if is_text else Refused(f"no {role}", f"column '{column}' holds a list or an object, not text")


def similar_column(column: str, roles: Mapping[str, str], columns: Iterable[str], sample: Sequence[Row]) -> str | None:
    """Return the first column without a role whose texts are about as long and varied as `column`'s, or None."""
    texts = {name: [cell for row in sample if isinstance(cell := row.get(name), str) and cell] for name in columns}

    def is_similar(cells: Sequence[str]) -> bool:
        words = sum(sum(map(str.isalpha, cell.split())) for cell in cells)
        is_long = 2 * sum(map(len, cells)) >= sum(map(len, texts.get(column, ())))
        return is_long and words > 2 * len(cells) < 4 * len(set(cells))

    return next((name for name, cells in texts.items() if name not in roles.values() and is_similar(cells)), None)


def as_text(value: object) -> str:
    return "" if value is None else str(value)


def is_blank(text: str) -> bool:
    return not text.strip() or not text.translate(_NO_WIDTH).strip()


_NO_WIDTH = dict.fromkeys(map(ord, "\u200b\u200c\u200d\u2060\ufeff"))


def normalised(text: str) -> str:
    return " ".join(text.lower().split())


def in_batches(rows: Iterable[T], most_rows: int = 2_048, most_characters: int = 4_000_000) -> Iterator[list[T]]:
    """Yield lists of rows, limited in number and characters. A longer row is yielded alone."""
    window: list[T] = []
    size = 0
    for row in rows:
        characters = _count_characters(row)
        if window and (len(window) == most_rows or size + characters > most_characters):
            yield window
            window, size = [], 0
        window.append(row)
        size += characters
    if window:
        yield window


def _count_characters(value: Any) -> int:
    """Count a cell's characters or bytes. Other values, and each item of a list or object, count as one."""
    if isinstance(value, (str, bytes)):
        return len(value)
    if isinstance(value, Mapping):
        return len(value) + sum(map(_count_characters, value.values()))
    return len(value) + sum(map(_count_characters, value)) if isinstance(value, (list, tuple)) else 1
