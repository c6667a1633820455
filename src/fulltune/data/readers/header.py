"""The first line of tables: what separates their columns, and what these could be called where no line names them."""

from __future__ import annotations

import contextlib
import csv
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from fulltune.recipe.data import UTF_8
from fulltune.tasks.columns import USUAL_NAMES

SEPARATED = {".csv": ",", ".tsv": "\t"}
_USUAL = {name for names in USUAL_NAMES.values() for name in names}
_LONGEST_CELL = min(sys.maxsize, 2**31 - 1)
"""The csv module's default is 128 KiB."""
_FEW, _ROWS = 100, 1000
_WORDS = 5
"""A cell of so many words, above others like it, is a text and no name."""


@contextlib.contextmanager
def csv_reader(
    file: Path, delimiter: str, encoding: str = UTF_8, *, strict: bool = False, errors: str = "strict"
) -> Iterator[Any]:
    """A reader of the csv module, for cells of any length."""
    csv.field_size_limit(_LONGEST_CELL)
    with file.open(encoding=encoding, errors=errors, newline="") as stream:
        yield csv.reader(stream, delimiter=delimiter, strict=strict)


def delimiter_of(file: Path, encoding: str = UTF_8) -> str:
    """What stands between the cells of a csv or tsv file.

    In a csv it may be semicolons, which spreadsheets write where the comma is the decimal sign: then the first line has
    one cell by commas and several by semicolons, and so many have most of the next ones: a few may be broken.
    """
    usual = SEPARATED[file.suffix.lower()]
    if usual == "\t":
        return usual
    counts = []
    try:
        for sign in (usual, ";"):
            with csv_reader(file, sign, encoding, errors="replace") as reader:
                counts.append([len(row) for row in islice(filter(None, reader), _FEW)] or [1])
    except csv.Error:
        return usual  # the reader says what is wrong with the file
    by_commas, by_semicolons = counts
    most = Counter(by_semicolons).most_common(1)[0][0]
    return ";" if by_commas[0] == 1 < by_semicolons[0] == most else usual


def names_without_header(file: Path, encoding: str = UTF_8) -> tuple[str, ...] | None:
    """Names for the columns of a table whose first line looks like a row; None: it has a header, or is no table."""
    if file.suffix.lower() not in SEPARATED:
        return None
    try:
        with csv_reader(file, delimiter_of(file, encoding), encoding) as reader:
            first, *rows = islice(reader, _ROWS)
    except (OSError, ValueError, csv.Error):
        return None  # the reader says what is wrong with the file
    if _USUAL & {name.lower().strip() for name in first}:
        return None
    rows = [row for row in rows if len(row) == len(first)]
    if not rows:
        return None
    columns = list(zip(*rows, strict=True))
    if not any(_is_value(name, values) for name, values in zip(first, columns, strict=True)):
        return None
    return _names([(name, *values) for name, values in zip(first, columns, strict=True)])


def _is_value(name: str, values: Sequence[str]) -> bool:
    """Whether what stands in the first line is one more value of its column."""
    if is_number(name):
        return all(map(is_number, values))
    if len(name.split()) >= _WORDS:
        return sorted(len(value.split()) for value in values)[len(values) // 2] >= _WORDS
    return bool(name) and name in values


def is_number(text: str) -> bool:
    """Whether a cell is a number."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def _names(columns: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """The longest one is `text`; of the others, the one with the fewest different values is `label`."""
    lengths = [sum(map(len, values)) for values in columns]
    text = lengths.index(max(lengths))
    kinds = {place: len(set(values)) for place, values in enumerate(columns) if place != text and all(values)}
    several = [place for place, count in kinds.items() if count > 1]
    label = min(several, key=kinds.__getitem__, default=None)
    roles = {text: "text", label: "label"}
    return tuple(roles.get(place, f"column{place + 1}") for place in range(len(columns)))
