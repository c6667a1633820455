from __future__ import annotations

import codecs
import contextlib
import csv
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain, groupby, islice
from pathlib import Path
from typing import Any

from fulltune.errors import DataError
from fulltune.recipe.data import UTF_8, TextRows
from fulltune.tasks.columns import USUAL_NAMES, BadCell, find_defect, may_have_defect
from fulltune.text import counted

RowOrProblem = dict[str, Any] | str
_UNCLOSED = "a double quote in this row is never closed; close it at the end of the cell"
_DOUBLED = "double each double quote inside a quoted text"
_AGAIN = "repeats the header line (were two files concatenated?), expected a row; remove the line"
_NAMES_AGAIN = "contains the names of data.columns, expected a row; remove this line, or data.columns if it is a header"
_JOINED = "lines of this row look like rows: if they are, remove the double quotes around the cell"
_MAX_VALUES = 10_000
_MARK = "a byte order mark before a double quote, as in concatenated files; remove it"
_NAMES = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}


def read_csv_or_tsv(
    file: Path, columns: Sequence[str] | None, encoding: str, notes: dict[str, None]
) -> Iterator[tuple[int, RowOrProblem]]:
    """Yield `(line number, row or error message)`; note suspicious lines. Raises `DataError` for a bad header."""
    delimiter, line = detect_delimiter(file, encoding), 1
    remedy = f"put a text with {_NAMES[delimiter]} or line breaks in double quotes"
    values, joined = set[tuple[int, str]](), list[tuple[int, list[list[str]]]]()
    with open_csv_reader(file, delimiter, encoding, strict=True) as reader:
        try:
            header, source = (columns, "data.columns") if columns else (next(reader, []), "the header")
            names = [name or f"column {number}" for number, name in enumerate(header, start=1)]
            for line_of_names in (header, names):
                _refuse_bad_header(file, line_of_names, delimiter)
            line = reader.line_num + 1
            for cells in reader:
                # After a byte order mark, a quote does not open a cell, so the cell's text would be split.
                if cells and cells[0].startswith('\ufeff"'):
                    yield line, _MARK
                elif cells and len(cells) != len(header):
                    yield line, f"found {counted(len(cells), 'cell')}, but {source} has {len(header)}; {remedy}"
                elif cells and [cells[0].removeprefix("\ufeff"), *cells[1:]] == [*header]:
                    yield line, _NAMES_AGAIN if columns else _AGAIN
                elif cells:
                    yield line, dict(zip(names, cells, strict=True))
                    if reader.line_num > line:
                        lines = delimiter.join(cells).replace("\r\n", "\n").split("\n")
                        rows = [[*map(_cell_or_zero, text.split(delimiter))] for text in lines if text.strip()]
                        joined += [(line, rows)] if {len(row) for row in rows} == {len(header)} != {1} else []
                    elif len(values) < _MAX_VALUES:
                        values.update(enumerate(map(_cell_or_zero, cells)))
                line = reader.line_num + 1
        except csv.Error as error:
            yield line, _UNCLOSED if "unexpected end of data" in str(error) else f"not valid csv: {error}; {_DOUBLED}"
    for line, rows in joined:
        if sum(not values.isdisjoint(enumerate(row)) for row in rows) > 1:
            notes[f"{file.name}:{line}: {len(rows):,} {_JOINED}"] = None


def _cell_or_zero(cell: str) -> str:
    return "0" if is_number(cell) else cell


def _refuse_bad_header(file: Path, header: Sequence[str], delimiter: str) -> None:
    """Raise `DataError` if a table's header is missing, is a comment, or repeats a name."""
    if header and (header[0].startswith("# ") or (len(header) == 1 and header[0].startswith("#"))):
        raise DataError(
            f"{file}:1: starts with a comment ({header[0][:40]!r}), expected a header line with column names; remove "
            "the lines that start with #"
        )
    if not header:
        raise DataError(f"{file}:1: no header line; add one with column names")
    # A single column whose name contains another delimiter shows that the file uses that one.
    other = next((sign for sign in _NAMES if sign != delimiter and sign in header[0]), None)
    if len(header) == 1 and other is not None:
        raise DataError(
            f"{file}:1: its columns are separated by {_NAMES[other]}, expected {_NAMES[delimiter]}; save it with "
            "commas as .csv or with tabs as .tsv"
        )
    repeated = _repeated(header)
    if repeated:
        raise DataError(f"{file}:1: column '{repeated[0][:60]}' appears twice in the header; rename one")


def _repeated(names: Sequence[str]) -> list[str]:
    return sorted(name for name, count in Counter(names).items() if count > 1)


def read_json_lines(file: Path, encoding: str = UTF_8) -> Iterator[tuple[int, RowOrProblem]]:
    """Yield `(line number, row or error message)` for each line of a file with one JSON object per line."""
    expected = "expected an object {...} on each line; repair or remove it"
    with file.open(encoding=encoding) as stream:
        for line, text in enumerate(stream, start=1):
            if not text.strip():
                continue
            try:
                row = _parse_json(text.rstrip())
            except ValueError as error:
                yield line, f"not valid JSON: {_json_problem(error)}; {expected}"
                continue
            yield line, _mark_bad_cells(row, may_have_defect(text), f"found {type(row).__name__}, {expected}")


def read_json_list(file: Path, encoding: str = UTF_8) -> Iterator[tuple[int, RowOrProblem]]:
    """Yield `(number, row or error message)` of a JSON list, also inside an object. Raises `DataError` otherwise."""
    text = file.read_text(encoding=encoding)
    try:
        value = _parse_json(text)
    except ValueError as error:
        is_lines = "Extra data" in str(error)
        to_do = "rename it to .jsonl, as it has one object per line" if is_lines else "repair it, or write it again"
        line = getattr(error, "lineno", 1)
        raise DataError(f"{file}:{line}: not valid JSON: {_json_problem(error)}; {to_do}") from None
    if isinstance(value, dict):
        lists = [inner for inner in value.values() if isinstance(inner, list)]
        value = lists[0] if len(lists) == 1 else value
    expected = "expected a list of objects [{...}, ...]; write one object for each row"
    if not isinstance(value, list):
        raise DataError(f"{file}: found {type(value).__name__}, {expected}")
    is_doubtful = may_have_defect(text)
    for number, row in enumerate(_flatten_squad(value), start=1):
        yield number, _mark_bad_cells(row, is_doubtful, f"found {type(row).__name__} in the list, {expected}")


def _flatten_squad(articles: list[Any]) -> list[object]:
    """Return each SQuAD question with its passage, and any other list unchanged."""
    try:
        passages = [passage for article in articles for passage in article["paragraphs"]]
        return [{"context": passage["context"], **question} for passage in passages for question in passage["qas"]]
    except (KeyError, TypeError):
        return articles


def _parse_json(text: str) -> object:
    """Parse JSON. Raises `ValueError` for invalid JSON, repeated names and deep nesting."""
    try:
        return json.loads(text, object_pairs_hook=_without_repeated_names)
    except RecursionError:
        raise ValueError("its lists or objects are nested too deeply") from None


def _without_repeated_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Raises `ValueError` for repeated names."""
    values = dict(pairs)
    if len(values) < len(pairs):
        repeated = _repeated([name for name, _ in pairs])
        raise ValueError(f"{repeated[0][:60]!r} appears twice in an object")
    return values


def _json_problem(error: ValueError) -> str:
    place = f" (column {error.colno})" if isinstance(error, json.JSONDecodeError) else ""
    return f"{getattr(error, 'msg', error)}{place}"


def _mark_bad_cells(row: object, may_be_bad: bool, not_object_error: str) -> RowOrProblem:
    """Return a row with a `BadCell` for each unusable value, or `not_object_error` if the row is not a dictionary.

    Values are checked only if `may_be_bad`.
    """
    if not isinstance(row, dict):
        return not_object_error
    if not may_be_bad:
        return row
    return {
        _replace_surrogates(name): BadCell(reason, _replace_surrogates(value) if isinstance(value, str) else "")
        if reason
        else value
        for name, value, reason in ((name, value, find_defect(value)) for name, value in row.items())
    }


def _replace_surrogates(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


# ---- plain text as lines, paragraphs or sections, and CoNLL with one word per line -----------------------------------

SECTION_CHARACTERS = 4_000
_MAX_LINES_READ = 10_000


def read_text_file(file: Path, text_rows: TextRows, encoding: str = UTF_8) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield line numbers and rows of plain text. `auto` reads sections if there are blank lines, otherwise lines."""
    if text_rows == "auto":
        text_rows = "section" if has_blank_lines(file, encoding) else "line"
    with file.open(encoding=encoding) as stream:
        lines = ((number, line.rstrip("\n") if line.strip() else "") for number, line in enumerate(stream, start=1))
        for number, text in lines if text_rows == "line" else _join_lines(lines, text_rows):
            if text:
                yield number, {"text": text}


def has_blank_lines(file: Path, encoding: str = UTF_8) -> bool:
    """Return whether a file has blank lines between texts."""
    with file.open(encoding=encoding) as stream:
        marks = "".join("x" if line.strip() else " " for line in islice(stream, _MAX_LINES_READ))
    return " " in marks.strip()


def _join_lines(lines: Iterator[tuple[int, str]], text_rows: TextRows) -> Iterator[tuple[int, str]]:
    """Yield the first line number and text of each paragraph or, for `section`, of each group of paragraphs."""
    start, size, section = 1, 0, list[str]()
    for number, paragraph in _split_at_blank_lines(lines):
        if section and (text_rows == "paragraph" or size + len(paragraph) > SECTION_CHARACTERS):
            yield start, "\n\n".join(section)
            size, section = 0, []
        start = start if section else number
        section.append(paragraph)
        size += len(paragraph)
    yield start, "\n\n".join(section)


def _split_at_blank_lines(lines: Iterator[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    """Yield each paragraph's first line number and text."""
    for has_text, run in groupby(lines, key=lambda line: bool(line[1])):
        if has_text:
            numbered = list(run)
            yield numbered[0][0], "\n".join(text for _, text in numbered)


_SPACES = re.compile(r"[ \t]+")  # not \s: a no-break space can be a word


def read_conll_sentences(file: Path, encoding: str = UTF_8) -> Iterator[tuple[int, RowOrProblem]]:
    """Yield `(first line number, row or error message)` of CoNLL sentences: words first, tags in the last column."""
    sentence: dict[str, Any] = {"tokens": [], "tags": []}
    separator, expected, first = _SPACES, 0, 0
    with file.open(encoding=encoding) as stream:
        for line, text in enumerate(chain(stream, [""]), start=1):  # a blank line ends the last sentence
            content = text.rstrip("\r\n")
            if not content.strip(" \t") or content.startswith("-DOCSTART-"):
                if sentence["tokens"]:
                    yield first, sentence
                    sentence = {"tokens": [], "tags": []}
                continue
            if not expected and "\t" in content:
                separator = re.compile("\t")
            # Spaces at the ends separate nothing, but a tab at an end has an empty cell next to it.
            columns = separator.split(content.strip(" ") if separator is _SPACES else content)
            expected = expected or len(columns)
            if problem := _conll_line_error(columns, expected):
                yield line, problem
                continue
            if not sentence["tokens"]:
                first = line
            sentence["tokens"].append(columns[0])
            sentence["tags"].append(columns[-1])


def _conll_line_error(columns: list[str], num_expected: int) -> str | None:
    if len(columns) != num_expected:
        return (
            f"{counted(len(columns), 'column')}, expected {num_expected} as in the first line; write a word and its "
            "tag on each line, all separated by tabs or all by spaces, and no comments"
        )
    if len(columns) < 2:
        return "1 column, expected a word and its tag; write both on each line"
    if not columns[-1].strip():
        return f"the word '{columns[0]}' has no tag; write O for words outside entities"
    return None


# ---- the first line of a table ---------------------------------------------------------------------------------


def guess_encoding(file: Path) -> str:
    """Return `utf-16` or `cp1252` for a text file that seems to have it, else `utf-8`."""
    if file.suffix.lower() not in (".csv", ".tsv", ".txt", ".json", ".jsonl", ".ndjson", ".conll", ".iob", ".bio"):
        return "utf-8"
    valid, other = 0, list[bytes]()
    with contextlib.suppress(OSError), file.open("rb") as stream:  # the reader will report what is wrong with the file
        if stream.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            return "utf-16"
        for line in stream:
            if not line.isascii():
                try:
                    valid += bool(line.decode("utf-8"))
                except UnicodeDecodeError:
                    other.append(line)
    try:
        text = b"".join(other).decode("cp1252")
    except UnicodeDecodeError:
        return "utf-8"
    # Other alphabets would give a text full of accents; a broken UTF-8 file has more lines that are right.
    return "cp1252" if len(other) > valid and 5 * len(re.sub(r"[\x00-\x7f]", "", text)) < len(text) else "utf-8"


SEPARATED = {".csv": ",", ".tsv": "\t"}
_USUAL = {name for names in USUAL_NAMES.values() for name in names}
_MAX_CELL = min(sys.maxsize, 2**31 - 1)
_FEW, _ROWS = 100, 1000
_MIN_TEXT_WORDS = 5


@contextlib.contextmanager
def open_csv_reader(
    file: Path, delimiter: str, encoding: str = UTF_8, *, strict: bool = False, errors: str = "strict"
) -> Iterator[Any]:
    """Yield a `csv.reader` for cells of any length; the file is open inside the context."""
    csv.field_size_limit(_MAX_CELL)
    with file.open(encoding=encoding, errors=errors, newline="") as stream:
        yield csv.reader(stream, delimiter=delimiter, strict=strict)


def detect_delimiter(file: Path, encoding: str = UTF_8) -> str:
    """Return the delimiter for a table's suffix, or a semicolon if it fits the lines of a .csv file better."""
    usual = SEPARATED[file.suffix.lower()]
    if usual == "\t":
        return usual
    counts = []
    try:
        for sign in (usual, ";"):
            with open_csv_reader(file, sign, encoding, errors="replace") as reader:
                counts.append([len(row) for row in islice(filter(None, reader), _FEW)] or [1])
    except csv.Error:
        return usual  # the reader will report what is wrong with the file
    by_commas, by_semicolons = counts
    return ";" if by_commas[0] == 1 < by_semicolons[0] == Counter(by_semicolons).most_common(1)[0][0] else usual


def guess_missing_header(file: Path, encoding: str = UTF_8) -> tuple[str, ...] | None:
    """Return suggested column names if a table seems to lack a header, else None."""
    if file.suffix.lower() not in SEPARATED:
        return None
    try:
        with open_csv_reader(file, detect_delimiter(file, encoding), encoding) as reader:
            first, *rows = islice(reader, _ROWS)
    except (OSError, ValueError, csv.Error):
        return None  # the reader will report what is wrong with the file
    if _USUAL & {name.lower().strip() for name in first}:
        return None
    rows = [row for row in rows if len(row) == len(first)]
    if not rows:
        return None
    columns = list(zip(*rows, strict=True))
    if not any(_looks_like_data_cell(name, values) for name, values in zip(first, columns, strict=True)):
        return None
    # The longest column is suggested as `text`, the one with the fewest distinct values as `label`.
    columns = [(name, *values) for name, values in zip(first, columns, strict=True)]
    text = max(range(len(columns)), key=lambda place: sum(map(len, columns[place])))
    kinds = {place: len(set(values)) for place, values in enumerate(columns) if place != text and all(values)}
    label = min((place for place, count in kinds.items() if count > 1), key=kinds.__getitem__, default=None)
    return tuple({text: "text", label: "label"}.get(place, f"column{place + 1}") for place in range(len(columns)))


def _looks_like_data_cell(first_cell: str, cells_below: Sequence[str]) -> bool:
    """Return whether a column's first cell resembles the cells below."""
    if is_number(first_cell):
        return all(map(is_number, cells_below))
    if len(first_cell.split()) >= _MIN_TEXT_WORDS:
        return sorted(len(value.split()) for value in cells_below)[len(cells_below) // 2] >= _MIN_TEXT_WORDS
    return bool(first_cell) and first_cell in cells_below


def is_number(text: str) -> bool:
    """Return whether Python's `float` accepts a text."""
    try:
        float(text)
    except ValueError:
        return False
    return True
