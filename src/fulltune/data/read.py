"""Read the user's files row by row: csv, tsv, jsonl, json, parquet, arrow, CoNLL, text, or a folder of these.

Every error names the file and, where there is one, the line.
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fulltune.data import images, plain_text
from fulltune.data.header import SEPARATED
from fulltune.errors import DataError
from fulltune.recipe import TextRows
from fulltune.records import SplitName

READERS = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet", ".arrow", ".feather", ".conll", ".iob", ".bio")
ONLY_BY_NAME = (".txt", ".annotated", ".iob2")
"""Kinds that a folder may hold for other reasons (a licence, notes): read when the recipe names the file."""
_ROWS_AT_ONCE = 1000
PlacedRow = tuple[str, dict[str, Any]]


@dataclass(frozen=True)
class Source:
    """The files of one split, read anew, row by row, each time it is asked."""

    files: tuple[Path, ...]
    where: str
    """The file's name, or the first of several: for messages."""
    text_rows: TextRows = "auto"
    image_folder: Path | None = None
    image_paths: bool = False
    """Paths of images start at the table's folder."""
    image_column: str | None = None
    columns: tuple[str, ...] | None = None
    """Names of a table's columns, where its first line does not give them."""

    def rows(self, problems: list[str] | None = None) -> Iterator[PlacedRow]:
        """Rows with the place each came from, for example `train.csv:17`.

        Args:
            problems: Takes what is wrong with a file, and reading goes on with the next one; without it, it is raised.

        Raises:
            DataError: For an empty or broken file.
        """
        if self.image_folder is not None:
            yield from images.rows(self.image_folder)
            return
        names = Counter(file.name for file in self.files)
        for file in self.files:
            name = file.name if names[file.name] == 1 else str(file)
            try:
                is_empty = True
                for line, row in _rows(file, self.text_rows, self.columns):
                    is_empty = False
                    if self.image_paths:
                        row = images.beside(row, file.parent, self.image_column)
                    yield f"{name}:{line}", row
                if is_empty:
                    raise DataError(f"{file}: no rows")
            except DataError as error:
                if problems is None:
                    raise
                problems += error.problems


@dataclass(frozen=True)
class Table:
    """All rows of some files, in memory: for files that are read once and are small."""

    rows: list[dict[str, Any]]
    columns: tuple[str, ...]
    places: list[str]
    where: str


def locate(paths: Sequence[str], text_rows: TextRows = "auto", columns: tuple[str, ...] | None = None) -> Source:
    """Find the files behind paths; nothing is read yet.

    Args:
        paths: Files and folders.
        text_rows: What is a row in a .txt file.
        columns: Names of the columns of tables without a header line.

    Raises:
        DataError: For each path that is missing, empty or of an unknown kind.
    """
    if len(paths) == 1 and images.is_image_folder(Path(paths[0])):
        folder = Path(paths[0])
        return Source(tuple(images.files(folder)), folder.name, image_folder=folder)
    files: list[Path] = []
    problems: list[str] = []
    for path in paths:
        try:
            files += files_of(Path(path))
        except DataError as error:
            problems += error.problems
    problems += [
        f"{file}: data.columns names the columns of csv and tsv files without a header line, and this one is another "
        "kind of file; remove data.columns"
        for file in files
        if columns and file.suffix.lower() not in SEPARATED
    ]
    if problems:
        raise DataError(problems)
    where = files[0].name if len(files) == 1 else f"{files[0].name} and {len(files) - 1} more"
    return Source(tuple(files), where, text_rows, columns=columns)


def read(paths: Sequence[str]) -> Table:
    """Read and join files.

    Raises:
        DataError: For a missing, empty, broken or unknown file; all files are looked at before it is raised.
    """
    source = locate(paths)
    problems: list[str] = []
    found = list(source.rows(problems))
    if problems:
        raise DataError(problems)
    columns = tuple(dict.fromkeys(name for _, row in found for name in row))
    return Table([row for _, row in found], columns, [place for place, _ in found], source.where)


def content_hash(sources: Mapping[SplitName, Source]) -> str:
    """SHA-256 over names and bytes of the files of each split: the same content gives the same data stage.

    Of an image folder, places, sizes and times of change stand for the bytes: reading a hundred thousand images would
    take longer than all other preparations.
    """
    digest = hashlib.sha256()
    for split, source in sources.items():
        digest.update(f"{split}:{len(source.files)}".encode())
        for file in source.files:
            digest.update(file.name.encode())
            if source.image_folder is not None:
                status = file.stat()
                digest.update(f"{file.resolve()}:{status.st_size}:{status.st_mtime_ns}".encode())
                continue
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def files_of(path: Path) -> list[Path]:
    """A data file itself, or the data files in a folder, sorted.

    Raises:
        DataError: When there is none, or it is empty or of an unknown kind.
    """
    if not path.exists():
        parent = path.parent
        near = [file.name for file in parent.iterdir() if file.suffix in READERS] if parent.is_dir() else []
        near = difflib.get_close_matches(path.name, near, cutoff=0.5) or sorted(near)[:4]
        hint = f" (in that folder: {', '.join(near)})" if near else ""
        raise DataError(f"{path}: no such file{hint}")
    if path.is_dir():
        found = sorted(file for file in path.iterdir() if file.suffix.lower() in READERS)
        if not found:
            raise DataError(f"{path}: no data file in this folder; expected {', '.join(READERS)}")
        return found
    if path.suffix.lower() not in (*READERS, *ONLY_BY_NAME):
        raise DataError(f"{path}: unknown kind of file '{path.suffix}'; expected {', '.join(READERS)}")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty")
    return [path]


def _rows(
    file: Path, text_rows: TextRows, columns: tuple[str, ...] | None = None
) -> Iterable[tuple[int, dict[str, Any]]]:
    """Pairs of line (or row number, from 1) and row."""
    try:
        match file.suffix.lower():
            case ".csv":
                yield from _separated(file, ",", columns)
            case ".tsv":
                yield from _separated(file, "\t", columns)
            case ".jsonl" | ".ndjson":
                yield from _json_lines(file)
            case ".json":
                yield from _json(file)
            case ".txt":
                yield from plain_text.rows(file, text_rows)
            case ".parquet" | ".arrow" | ".feather":
                yield from _columnar(file)
            case _:
                from fulltune.data import conll

                yield from conll.rows(file)
    except UnicodeDecodeError:
        raise DataError(f"{file}:{_undecodable_line(file)}: not UTF-8; save the file as UTF-8") from None
    except PermissionError:
        raise DataError(f"{file}: may not be read (permission denied)") from None


def _undecodable_line(file: Path) -> int:
    """The first line that is not UTF-8: a decoding error counts from the start of its block, not of the file."""
    with file.open("rb") as stream:
        for line, content in enumerate(stream, start=1):
            try:
                content.decode("utf-8")
            except UnicodeDecodeError:
                return line
    return 1


def _separated(
    file: Path, delimiter: str, columns: tuple[str, ...] | None = None
) -> Iterable[tuple[int, dict[str, Any]]]:
    # A cell may be longer than the csv module's default limit of 128 KiB.
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with file.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.reader(stream, delimiter=delimiter, strict=True)
        line = 1
        try:
            header, source = (list(columns), "data.columns") if columns else (next(reader, None), "the header")
            if not header:
                raise DataError(f"{file}: no header line with column names")
            _refuse_other_delimiter(file, header, delimiter)
            repeated = sorted({name for name in header if header.count(name) > 1})
            if repeated:
                raise DataError(f"{file}:1: column '{repeated[0]}' stands twice in the header")
            line = reader.line_num + 1
            for cells in reader:
                if cells and len(cells) != len(header):
                    raise DataError(
                        f"{file}:{line}: {len(cells)} cells, expected {len(header)} as in {source}; "
                        "put a text with commas or line ends in double quotes"
                    )
                if cells:
                    yield line, dict(zip(header, cells, strict=True))
                line = reader.line_num + 1
        except csv.Error as error:
            if "unexpected end of data" in str(error):
                raise DataError(f"{file}:{line}: a double quote is opened in this row and never closed") from None
            raise DataError(f"{file}:{line}: not valid csv: {error}") from None


def _refuse_other_delimiter(file: Path, header: Sequence[str], delimiter: str) -> None:
    """One column whose name holds another delimiter is a file that was written with that one."""
    names = {",": "commas", ";": "semicolons", "\t": "tabs"}
    other = next((sign for sign in names if sign != delimiter and sign in header[0]), None)
    if len(header) == 1 and other is not None:
        raise DataError(
            f"{file}:1: its columns are separated by {names[other]}, expected {names[delimiter]}; save it with commas "
            "as .csv or with tabs as .tsv"
        )


def _json_lines(file: Path) -> Iterable[tuple[int, dict[str, Any]]]:
    problems: list[str] = []
    with file.open(encoding="utf-8-sig") as stream:
        for line, text in enumerate(stream, start=1):
            if not text.strip():
                continue
            try:
                row = json.loads(text.rstrip())
            except ValueError as error:
                problems.append(f"{file}:{line}: not valid JSON: {_json_problem(error)}")
                continue
            if not isinstance(row, dict):
                problems.append(f"{file}:{line}: expected an object {{...}}, found {type(row).__name__}")
                continue
            yield line, row
    if problems:
        more = [f"{file}: {len(problems) - 5} more broken lines"] if len(problems) > 5 else []
        raise DataError(problems[:5] + more)


def _json(file: Path) -> Iterable[tuple[int, dict[str, Any]]]:
    try:
        value = json.loads(file.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        if isinstance(error, UnicodeDecodeError):
            raise
        line = getattr(error, "lineno", 1)
        hint = "; a file with one object a line is named .jsonl" if "Extra data" in str(error) else ""
        raise DataError(f"{file}:{line}: not valid JSON: {_json_problem(error)}{hint}") from None
    if isinstance(value, dict):
        lists = [inner for inner in value.values() if isinstance(inner, list)]
        value = lists[0] if len(lists) == 1 else value
    if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
        found = type(value).__name__
        if isinstance(value, list) and value:
            found = f"a list with {next(type(row).__name__ for row in value if not isinstance(row, dict))}"
        raise DataError(f"{file}: expected a list of objects [{{...}}, ...], found {found}")
    yield from enumerate(value, start=1)


def _json_problem(error: ValueError) -> str:
    return f"{getattr(error, 'msg', error)} (column {getattr(error, 'colno', 1)})"


def _columnar(file: Path) -> Iterable[tuple[int, dict[str, Any]]]:
    """Row groups or record batches one after another, so that a large file never lies in memory as a whole."""
    import pyarrow as pa

    try:
        number = 1
        for batch in _batches(file):
            yield from enumerate(batch.to_pylist(), start=number)
            number += len(batch)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file}: not a valid {file.suffix[1:]} file: {str(error).splitlines()[0]}") from None


def _batches(file: Path) -> Iterator[Any]:
    import pyarrow as pa
    from pyarrow import feather, parquet

    if file.suffix.lower() == ".parquet":
        with parquet.ParquetFile(file) as parts:
            yield from parts.iter_batches(_ROWS_AT_ONCE)
        return
    if file.suffix.lower() == ".feather":
        yield from feather.read_table(file, memory_map=True).to_batches(_ROWS_AT_ONCE)
        return
    with pa.memory_map(str(file)) as stream:
        try:
            table = pa.ipc.open_file(stream).read_all()
        except pa.ArrowInvalid:
            table = pa.ipc.open_stream(stream).read_all()
    yield from table.to_batches(_ROWS_AT_ONCE)
