"""Rows of text formats: separated values, JSON lines, JSON. Each yields pairs of line (or row number) and row."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fulltune.data.readers.header import LONGEST_CELL
from fulltune.errors import DataError
from fulltune.tasks.columns import BadCell, fault, may_be_faulty

_NAMES = {",": "commas", ";": "semicolons", "\t": "tabs"}
_SHOWN = 5
"""Broken lines that are named one by one."""


def separated(
    file: Path, delimiter: str, columns: tuple[str, ...] | None = None
) -> Iterable[tuple[int, dict[str, Any]]]:
    """Rows of a csv or tsv file.

    Args:
        file: The file.
        delimiter: What stands between cells.
        columns: Names of the columns, where the first line does not give them.

    Raises:
        DataError: After the last line, naming the first broken ones.
    """
    csv.field_size_limit(LONGEST_CELL)
    problems: list[str] = []
    with file.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.reader(stream, delimiter=delimiter, strict=True)
        line = 1
        try:
            header, source = (list(columns), "data.columns") if columns else (next(reader, None), "the header")
            if not header:
                raise DataError(f"{file}:1: no header line, expected one with column names; write one")
            _refuse_other_delimiter(file, header, delimiter)
            repeated = sorted({name for name in header if header.count(name) > 1})
            if repeated:
                raise DataError(
                    f"{file}:1: column '{repeated[0]}' stands twice in the header, expected each name once; rename one"
                )
            line = reader.line_num + 1
            for cells in reader:
                if cells and len(cells) != len(header):
                    problems.append(
                        f"{file}:{line}: {len(cells)} cells, expected {len(header)} as in {source}; "
                        f"put a text with {_NAMES[delimiter]} or line ends in double quotes"
                    )
                elif cells:
                    yield line, dict(zip(header, cells, strict=True))
                line = reader.line_num + 1
        except csv.Error as error:
            what = f"not valid csv: {error}; write a double quote inside of a quoted text twice"
            if "unexpected end of data" in str(error):
                what = "a double quote is opened in this row and never closed, expected one at the cell's end; close it"
            problems.append(f"{file}:{line}: {what}")
    if problems:
        raise DataError(first_few(problems, file))


def first_few(problems: Sequence[str], file: Path) -> list[str]:
    """The first broken lines of a file, and how many more there are."""
    more = len(problems) - _SHOWN
    return [*problems[:_SHOWN], *([f"{file}: {more} more broken lines; repair them, too"] if more > 0 else [])]


def _refuse_other_delimiter(file: Path, header: Sequence[str], delimiter: str) -> None:
    """One column whose name holds another delimiter is a file that was written with that one."""
    other = next((sign for sign in _NAMES if sign != delimiter and sign in header[0]), None)
    if len(header) == 1 and other is not None:
        raise DataError(
            f"{file}:1: its columns are separated by {_NAMES[other]}, expected {_NAMES[delimiter]}; save it with "
            "commas as .csv or with tabs as .tsv"
        )


def json_lines(file: Path) -> Iterable[tuple[int, dict[str, Any]]]:
    problems: list[str] = []
    with file.open(encoding="utf-8-sig") as stream:
        for line, text in enumerate(stream, start=1):
            if not text.strip():
                continue
            try:
                row = _from_json(text.rstrip())
            except ValueError as error:
                problems.append(f"{file}:{line}: not valid JSON: {_json_problem(error)}; expected {_OBJECT}")
                continue
            if not isinstance(row, dict):
                problems.append(f"{file}:{line}: found {type(row).__name__}, expected {_OBJECT}")
                continue
            yield line, _sound(row) if may_be_faulty(text) else row
    if problems:
        raise DataError(first_few(problems, file))


_OBJECT = "an object {...} on each line; repair or remove it"


def json_list(file: Path) -> Iterable[tuple[int, dict[str, Any]]]:
    text = file.read_text(encoding="utf-8-sig")
    try:
        value = _from_json(text)
    except ValueError as error:
        line = getattr(error, "lineno", 1)
        is_lines = "Extra data" in str(error)
        to_do = (
            "a file with one object a line is named .jsonl: rename it" if is_lines else "repair it, or write it again"
        )
        raise DataError(f"{file}:{line}: not valid JSON: {_json_problem(error)}; {to_do}") from None
    if isinstance(value, dict):
        lists = [inner for inner in value.values() if isinstance(inner, list)]
        value = lists[0] if len(lists) == 1 else value
    expected = "expected a list of objects [{...}, ...]; write one object for each row"
    if not isinstance(value, list):
        raise DataError(f"{file}: found {type(value).__name__}, {expected}")
    wrong = [
        f"{file}:{number}: found {type(row).__name__} in the list, {expected}"
        for number, row in enumerate(value, start=1)
        if not isinstance(row, dict)
    ]
    if wrong:
        raise DataError(first_few(wrong, file))
    is_doubtful = may_be_faulty(text)
    for number, row in enumerate(value, start=1):
        yield number, _sound(row) if is_doubtful else row


def _from_json(text: str) -> Any:
    """Like `json.loads`; what no row can hold is a `ValueError` as well."""
    try:
        return json.loads(text, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError("its lists or objects are nested too deep") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Of two values of a name, JSON's readers silently take the last one."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} stands twice in an object")
    return found


def _sound(row: dict[str, Any]) -> dict[str, Any]:
    """A row whose cells that cannot be used are marked as such, and whose names can be written."""
    return {
        name.encode("utf-8", "backslashreplace").decode(): _cell(value)
        if isinstance(value, (str, list, dict))
        else value
        for name, value in row.items()
    }


def _cell(value: Any) -> Any:
    reason = fault(value)
    if reason is None:
        return value
    shown = value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else f"<{reason}>"
    return BadCell(reason, shown)


def _json_problem(error: ValueError) -> str:
    place = f" (column {error.colno})" if isinstance(error, json.JSONDecodeError) else ""
    return f"{getattr(error, 'msg', error)}{place}"
