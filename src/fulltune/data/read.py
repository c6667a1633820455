"""Read the user's files into rows: csv, tsv, jsonl, json, parquet, arrow, or a folder of these.

Every error names the file and, where there is one, the line.
"""

from __future__ import annotations

import csv
import hashlib
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fulltune.errors import DataError

READERS = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet", ".arrow", ".feather")


@dataclass(frozen=True)
class Table:
    """Rows of one split and where each came from."""

    rows: list[dict[str, Any]]
    columns: tuple[str, ...]
    places: list[str]
    """For each row its file and line, for example `train.csv:17`."""
    where: str
    """The file's name, or the first of several: for messages."""


def read(paths: Sequence[str]) -> Table:
    """Read and join files.

    Raises:
        DataError: For a missing, empty, broken or unknown file; all files are looked at before it is raised.
    """
    files, problems = _all_files(paths)
    rows: list[dict[str, Any]] = []
    places: list[str] = []
    for file in files:
        try:
            found = list(_rows(file))
            if not found:
                raise DataError(f"{file}: no rows")
        except DataError as error:
            problems += error.problems
            continue
        rows += [row for _, row in found]
        places += [f"{file.name}:{line}" for line, _ in found]
    if problems:
        raise DataError(problems)
    columns = tuple(dict.fromkeys(name for row in rows for name in row))
    where = files[0].name if len(files) == 1 else f"{files[0].name} and {len(files) - 1} more"
    return Table(rows, columns, places, where)


def content_hash(paths: Sequence[str]) -> str:
    """SHA-256 over names and bytes of the files: the same content gives the same data stage."""
    files, problems = _all_files(paths)
    if problems:
        raise DataError(problems)
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _all_files(paths: Sequence[str]) -> tuple[list[Path], list[str]]:
    """The files behind paths, and a line for each that cannot be used."""
    files: list[Path] = []
    problems: list[str] = []
    for path in paths:
        try:
            files += _files(Path(path))
        except DataError as error:
            problems += error.problems
    return files, problems


def _files(path: Path) -> list[Path]:
    if not path.exists():
        parent = path.parent
        near = [file.name for file in parent.iterdir() if file.suffix in READERS] if parent.is_dir() else []
        hint = f" (in that folder: {', '.join(sorted(near)[:4])})" if near else ""
        raise DataError(f"{path}: no such file{hint}")
    if path.is_dir():
        found = sorted(file for file in path.iterdir() if file.suffix.lower() in READERS)
        if not found:
            raise DataError(f"{path}: no data file in this folder; expected {', '.join(READERS)}")
        return found
    if path.suffix.lower() not in READERS:
        raise DataError(f"{path}: unknown kind of file '{path.suffix}'; expected {', '.join(READERS)}")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty")
    return [path]


def _rows(file: Path) -> Iterable[tuple[int, dict[str, Any]]]:
    """Pairs of line (or row number, from 1) and row."""
    try:
        match file.suffix.lower():
            case ".csv":
                yield from _separated(file, ",")
            case ".tsv":
                yield from _separated(file, "\t")
            case ".jsonl" | ".ndjson":
                yield from _json_lines(file)
            case ".json":
                yield from _json(file)
            case _:
                yield from _columnar(file)
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


def _separated(file: Path, delimiter: str) -> Iterable[tuple[int, dict[str, Any]]]:
    # A cell may be longer than the csv module's default limit of 128 KiB.
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with file.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.reader(stream, delimiter=delimiter, strict=True)
        line = 1
        try:
            header = next(reader, None)
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
                        f"{file}:{line}: {len(cells)} cells, expected {len(header)} as in the header; "
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
        raise DataError(f"{file}: expected a list of objects [{{...}}, ...], found {type(value).__name__}")
    yield from enumerate(value, start=1)


def _json_problem(error: ValueError) -> str:
    return f"{getattr(error, 'msg', error)} (column {getattr(error, 'colno', 1)})"


def _columnar(file: Path) -> Iterable[tuple[int, dict[str, Any]]]:
    import pyarrow as pa
    from pyarrow import feather, parquet

    try:
        if file.suffix.lower() == ".parquet":
            table = parquet.read_table(file)
        elif file.suffix.lower() == ".feather":
            table = feather.read_table(file)
        else:
            with pa.memory_map(str(file)) as stream:
                try:
                    table = pa.ipc.open_file(stream).read_all()
                except pa.ArrowInvalid:
                    table = pa.ipc.open_stream(stream).read_all()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file}: not a valid {file.suffix[1:]} file: {str(error).splitlines()[0]}") from None
    yield from enumerate(table.to_pylist(), start=1)
