"""Rows of text formats: separated values, JSON lines, JSON, plain text, CoNLL; and what the first line of a table says.

Each reader yields pairs of line (or row number) and row; in place of a broken row, what is wrong with it.
"""

from __future__ import annotations

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
from fulltune.tasks.columns import USUAL_NAMES, BadCell, fault, may_be_faulty
from fulltune.text import counted

_UNCLOSED = "a double quote is opened in this row and never closed, expected one at the cell's end; close it"
_DOUBLED = "write a double quote inside of a quoted text twice"
_AGAIN = "the header line stands again (were two files put one behind the other?), expected a row; remove the line"
_NAMES_AGAIN = "holds the names of data.columns, expected a row; remove this line, or data.columns where it is a header"
_JOINED = "lines of this row look like rows: if they are, remove the double quotes that open and close its cell"
_KNOWN = 10_000
"""Cells of ordinary rows by which such lines are told from those of a text."""
_MARK = "a byte order mark stands before a double quote, as in files that were put one behind the other; remove it"
_NAMES = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}


def separated(
    file: Path, columns: Sequence[str] | None, encoding: str, notes: dict[str, None]
) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Rows of a csv or tsv file, with names of its columns where the first line does not give them; what makes none of
    them wrong is noted. Raises `DataError` when the first line is no header."""
    delimiter, line = delimiter_of(file, encoding), 1
    remedy = f"put a text with {_NAMES[delimiter]} or line ends in double quotes"
    known, joined = set[tuple[int, str]](), list[tuple[int, list[list[str]]]]()
    with csv_reader(file, delimiter, encoding, strict=True) as reader:
        try:
            header, source = (columns, "data.columns") if columns else (next(reader, []), "the header")
            _check_header(file, header, delimiter)
            line = reader.line_num + 1
            for cells in reader:
                # Behind the mark a quote opens nothing: it would be a part of the text, and what it holds be split.
                if cells and cells[0].startswith('\ufeff"'):
                    yield line, _MARK
                elif cells and len(cells) != len(header):
                    yield line, f"{counted(len(cells), 'cell')}, expected {len(header)} as in {source}; {remedy}"
                elif cells and [cells[0].removeprefix("\ufeff"), *cells[1:]] == [*header]:
                    yield line, _NAMES_AGAIN if columns else _AGAIN
                elif cells:
                    yield line, dict(zip(header, cells, strict=True))
                    if reader.line_num > line:
                        lines = delimiter.join(cells).replace("\r\n", "\n").split("\n")
                        rows = [[*map(_kind, one.split(delimiter))] for one in lines if one.strip()]
                        joined += [(line, rows)] if {len(row) for row in rows} == {len(header)} != {1} else []
                    elif len(known) < _KNOWN:
                        known.update(enumerate(map(_kind, cells)))
                line = reader.line_num + 1
        except csv.Error as error:
            yield line, _UNCLOSED if "unexpected end of data" in str(error) else f"not valid csv: {error}; {_DOUBLED}"
    for line, rows in joined:
        if sum(not known.isdisjoint(enumerate(row)) for row in rows) > 1:
            notes[f"{file.name}:{line}: {len(rows):,} {_JOINED}"] = None


def _kind(cell: str) -> str:
    """What the cells of a column have in common: the name of a class, or being a number."""
    return "0" if is_number(cell) else cell


def _check_header(file: Path, header: Sequence[str], delimiter: str) -> None:
    if header and (header[0].startswith("# ") or (len(header) == 1 and header[0].startswith("#"))):
        raise DataError(
            f"{file}:1: begins with a comment ({header[0][:40]!r}), expected a header line with column names; remove "
            "the lines that begin with #"
        )
    if not header:
        raise DataError(f"{file}:1: no header line, expected one with column names; write one")
    # One column whose name holds another delimiter is a file that was written with that one.
    other = next((sign for sign in _NAMES if sign != delimiter and sign in header[0]), None)
    if len(header) == 1 and other is not None:
        raise DataError(
            f"{file}:1: its columns are separated by {_NAMES[other]}, expected {_NAMES[delimiter]}; save it with "
            "commas as .csv or with tabs as .tsv"
        )
    repeated = _repeated(header)
    if repeated:
        raise DataError(
            f"{file}:1: column '{repeated[0][:60]}' stands twice in the header, expected each name once; rename one"
        )


def _repeated(names: Sequence[str]) -> list[str]:
    """Those that stand twice, sorted; there may be a million names."""
    return sorted(name for name, count in Counter(names).items() if count > 1)


def json_lines(file: Path, encoding: str = UTF_8) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Rows of a file with an object on each line."""
    expected = "expected an object {...} on each line; repair or remove it"
    with file.open(encoding=encoding) as stream:
        for line, text in enumerate(stream, start=1):
            if not text.strip():
                continue
            try:
                row = _from_json(text.rstrip())
            except ValueError as error:
                yield line, f"not valid JSON: {_json_problem(error)}; {expected}"
                continue
            yield line, _row(row, may_be_faulty(text), f"found {type(row).__name__}, {expected}")


def json_list(file: Path, encoding: str = UTF_8) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Rows of a file with a list of objects, or with an object that holds one list. Raises `DataError` when it is not
    JSON, or another value."""
    text = file.read_text(encoding=encoding)
    try:
        value = _from_json(text)
    except ValueError as error:
        is_lines = "Extra data" in str(error)
        to_do = (
            "a file with one object a line is named .jsonl: rename it" if is_lines else "repair it, or write it again"
        )
        line = getattr(error, "lineno", 1)
        raise DataError(f"{file}:{line}: not valid JSON: {_json_problem(error)}; {to_do}") from None
    if isinstance(value, dict):
        lists = [inner for inner in value.values() if isinstance(inner, list)]
        value = lists[0] if len(lists) == 1 else value
    expected = "expected a list of objects [{...}, ...]; write one object for each row"
    if not isinstance(value, list):
        raise DataError(f"{file}: found {type(value).__name__}, {expected}")
    is_doubtful = may_be_faulty(text)
    for number, row in enumerate(_questions(value), start=1):
        yield number, _row(row, is_doubtful, f"found {type(row).__name__} in the list, {expected}")


def _questions(articles: list[Any]) -> list[Any]:
    """Each question with its passage, of a file as SQuAD publishes it; any other list as it is."""
    try:
        passages = [passage for article in articles for passage in article["paragraphs"]]
        return [{"context": passage["context"], **question} for passage in passages for question in passage["qas"]]
    except (KeyError, TypeError):
        return articles


def _from_json(text: str) -> Any:
    """Like `json.loads`; what no row can hold is a `ValueError` as well."""
    try:
        return json.loads(text, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError("its lists or objects are nested too deep") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Of two values of a name, JSON's readers silently take the last one."""
    values = dict(pairs)
    if len(values) < len(pairs):
        repeated = _repeated([name for name, _ in pairs])
        raise ValueError(f"{repeated[0][:60]!r} stands twice in an object")
    return values


def _json_problem(error: ValueError) -> str:
    place = f" (column {error.colno})" if isinstance(error, json.JSONDecodeError) else ""
    return f"{getattr(error, 'msg', error)}{place}"


def _row(row: Any, is_doubtful: bool, refusal: str) -> dict[str, Any] | str:
    """A row whose cells that cannot be used are marked as such, and whose names can be written; the refusal of another
    value."""
    if not isinstance(row, dict):
        return refusal
    if not is_doubtful:
        return row
    return {
        _writable(name): BadCell(reason, _writable(value) if isinstance(value, str) else "") if reason else value
        for name, value, reason in ((name, value, fault(value)) for name, value in row.items())
    }


def _writable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


# ---- plain text as lines, paragraphs or sections, and CoNLL with a word a line ---------------------------------------

SECTION_CHARACTERS = 4_000
"""About a thousand tokens: long enough to be read as a whole, short enough that a book can be split."""
_LINES_LOOKED_AT = 10_000


def text_file(file: Path, text_rows: TextRows, encoding: str = UTF_8) -> Iterator[tuple[int, dict[str, Any]]]:
    """Pairs of the line where a text begins and `{"text": ...}`.

    `auto` takes sections where blank lines separate paragraphs (a book, a play), else every line is a row.
    """
    if text_rows == "auto":
        text_rows = "section" if has_blank_lines(file, encoding) else "line"
    with file.open(encoding=encoding) as stream:
        lines = ((number, line.rstrip("\n") if line.strip() else "") for number, line in enumerate(stream, start=1))
        for number, text in lines if text_rows == "line" else _paragraphs(lines, text_rows):
            if text:
                yield number, {"text": text}


def has_blank_lines(file: Path, encoding: str = UTF_8) -> bool:
    """Whether blank lines stand between texts."""
    with file.open(encoding=encoding) as stream:
        marks = "".join("x" if line.strip() else " " for line in islice(stream, _LINES_LOOKED_AT))
    return " " in marks.strip()


def _paragraphs(lines: Iterator[tuple[int, str]], text_rows: TextRows) -> Iterator[tuple[int, str]]:
    """Runs of lines that are not blank, or sections of several, with the line each begins on."""
    start, size, held = 1, 0, list[str]()
    for number, paragraph in _runs(lines):
        if held and (text_rows == "paragraph" or size + len(paragraph) > SECTION_CHARACTERS):
            yield start, "\n\n".join(held)
            size, held = 0, []
        start = start if held else number
        held.append(paragraph)
        size += len(paragraph)
    yield start, "\n\n".join(held)


def _runs(lines: Iterator[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    for has_text, run in groupby(lines, key=lambda line: bool(line[1])):
        if has_text:
            numbered = list(run)
            yield numbered[0][0], "\n".join(text for _, text in numbered)


_SPACES = re.compile(r"[ \t]+")  # not \s: a no-break space can be a word


def sentences(file: Path, encoding: str = UTF_8) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Sentences of a file.

    The first column is the word, the last one the tag; those between are not read. Columns are separated by tabs when
    the first line holds a tab, else by spaces. A blank line or a line `-DOCSTART-` ends a sentence. In place of a
    broken line stands what is wrong with it.
    """
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
            # Spaces at the ends separate nothing; a tab at an end has an empty cell beside it.
            columns = separator.split(content.strip(" ") if separator is _SPACES else content)
            expected = expected or len(columns)
            if problem := _problem(columns, expected):
                yield line, problem
                continue
            if not sentence["tokens"]:
                first = line
            sentence["tokens"].append(columns[0])
            sentence["tags"].append(columns[-1])


def _problem(columns: list[str], expected: int) -> str | None:
    """What is wrong with a line."""
    if len(columns) != expected:
        return (
            f"{counted(len(columns), 'column')}, expected {expected} as in the first line; write a word and its tag on "
            "each line, all separated by tabs or all by spaces, and no comments"
        )
    if len(columns) < 2:
        return "1 column, expected a word and its tag; write both on each line"
    if not columns[-1].strip():
        return f"the word '{columns[0]}' has no tag, expected one; write O where there is no entity"
    return None


# ---- the first line of a table ---------------------------------------------------------------------------------

SEPARATED = {".csv": ",", ".tsv": "\t"}
_USUAL = {name for names in USUAL_NAMES.values() for name in names}
_MAX_CELL = min(sys.maxsize, 2**31 - 1)
"""The csv module's default is 128 KiB."""
_FEW, _ROWS = 100, 1000
_WORDS = 5
"""A cell of so many words, above others like it, is a text and no name."""


@contextlib.contextmanager
def csv_reader(
    file: Path, delimiter: str, encoding: str = UTF_8, *, strict: bool = False, errors: str = "strict"
) -> Iterator[Any]:
    """A reader of the csv module, for cells of any length."""
    csv.field_size_limit(_MAX_CELL)
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
    return ";" if by_commas[0] == 1 < by_semicolons[0] == Counter(by_semicolons).most_common(1)[0][0] else usual


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
    text = max(range(len(columns)), key=lambda place: sum(map(len, columns[place])))
    kinds = {place: len(set(values)) for place, values in enumerate(columns) if place != text and all(values)}
    label = min((place for place, count in kinds.items() if count > 1), key=kinds.__getitem__, default=None)
    return tuple({text: "text", label: "label"}.get(place, f"column{place + 1}") for place in range(len(columns)))
