from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from fulltune.data.readers import columnar, text_files
from fulltune.data.readers.derived import DerivedColumns
from fulltune.data.readers.files import convert_os_errors, is_image_folder, list_data_files, list_images, printable
from fulltune.data.readers.text_files import SEPARATED
from fulltune.errors import DataError
from fulltune.recipe.address import is_address
from fulltune.recipe.data import UTF_8, TextRows
from fulltune.recipe.selection import Selection
from fulltune.tasks import Row
from fulltune.tasks.columns import USUAL_NAMES, BadCell, parse_cell
from fulltune.text import counted

LocatedRow = tuple[str, dict[str, Any]]
_MAX_SHOWN, _MAX_LINE = 5, 100_000_000
_FILE_SIGNATURES = {
    b"\x1f\x8b": "compressed (gzip)",
    b"BZh": "compressed (bzip2)",
    b"\xfd7zXZ\0": "compressed (xz)",
    b"\x28\xb5\x2f\xfd": "compressed (zstandard)",
    b"PK\3\4": "compressed (zip, like office documents)",
    b"SQLite format 3\0": "an SQLite database",
    b"%PDF-": "a PDF document",
}
_MARKUP_STARTS = (b"<!doctype html", b"<html", b"<?xml")
_LFS_POINTER_START = b"version https://git-lfs.github.com/spec/"
_SAVE_AS_UTF_8 = (
    "save it as UTF-8, or set data.encoding (init: --encoding) to its encoding, such as cp1252, which Excel writes"
)


@dataclass(frozen=True)
class DataFiles:
    """The files of one source; each iteration reads them again."""

    files: tuple[Path, ...]
    where: str
    text_rows: TextRows = "auto"
    image_folder: Path | None = None
    has_relative_image_paths: bool = False
    image_column: str | None = None
    columns: tuple[str, ...] | None = None
    """Column names of tables without a header line."""
    encoding: str = UTF_8
    lists: tuple[str, ...] = ()
    """Columns whose lists are read as one row for each item."""
    selections: Mapping[Path, Selection] = field(default_factory=dict)
    """What is read of each file, by default everything."""
    derived: DerivedColumns = field(default_factory=DerivedColumns)
    notes: dict[str, None] = field(default_factory=dict, compare=False)

    def rows(self, problems: list[str] | None = None) -> Iterator[LocatedRow]:
        """Yield rows with locations, such as `train.csv:17`. Errors go to `problems`, or are raised if None."""
        if self.image_folder is not None:
            for path in self.files:
                name = printable(path.name)
                image = str(path) if name == path.name else BadCell("a file name that is not UTF-8; rename it", name)
                yield f"{path.parent.name}/{name}", {"image": image, "label": path.parent.name}
            return
        names, matching = Counter(file.name for file in self.files), list[int]()
        for file in self.files:
            name = file.name if names[file.name] == 1 else str(file)
            broken, columns, num_read, num_kept = list[str](), dict[str, object](), 0, 0
            selection, is_columnar = self.selections.get(file, Selection()), file.suffix.lower() in columnar.SUFFIXES
            parsed = self._parse(file, selection)
            if selection.rows is not None:
                parsed = islice(parsed, selection.rows.start, selection.rows.stop)
            try:
                with convert_os_errors(file):
                    for line, row in parsed:
                        num_read += 1
                        if isinstance(row, str):
                            broken.append(f"{file}:{line}: {row}")
                            continue
                        row = self._resolve_paths_and_bytes(row, file.parent)
                        columns.update(row)
                        if (selected := selection.select(row)) is not None:
                            num_kept += 1
                            derived = self.derived.added_to(selected)
                            yield from _one_row_each((f"{name}:{line}", derived), self.lists)
                    if file.suffix.lower() == ".parquet" and selection.rows is None:  # some rows were not read
                        num_read = self.num_rows(file)
                if not num_read and selection.rows is None:
                    broken = [f"{file}: no rows; add rows, or choose another file"]
                elif columns and not is_columnar:
                    selection.refuse_missing(file, columns)
                if (where := selection.condition.text) and num_read and not broken:
                    matching.append(num_kept)
                    self.notes[f"where: {num_kept:,} of {counted(num_read, 'row')} of {name} match"] = None
                    if len(matching) == len(self.files) and not any(matching):
                        broken = [f"{self.where}: none of its rows match where: {where}; change the condition"]
            except UnicodeError:
                broken = [f"{file}:{_describe_encoding_error(file, self.encoding)}"]
            except DataError as error:
                broken = list(error.problems)
            if more := broken[_MAX_SHOWN:]:
                broken[_MAX_SHOWN:] = [f"{file}: {counted(len(more), 'more broken line')}; repair them too"]
            if problems is not None:
                problems += broken
            elif broken:
                raise DataError(broken)

    def num_rows(self, file: Path) -> int:
        from pyarrow import parquet

        is_parquet = file.suffix.lower() == ".parquet"
        return parquet.read_metadata(file).num_rows if is_parquet else sum(1 for _ in self._parse(file, Selection()))

    def _parse(self, file: Path, selection: Selection) -> Iterator[tuple[int, text_files.RowOrProblem]]:
        """Yield a file's line numbers with rows or error messages."""
        suffix = file.suffix.lower()
        _refuse_non_data_file(file)
        if suffix in columnar.SUFFIXES:
            yield from columnar.read_columnar_rows(file, selection)
            return
        if b"\0" not in "a".encode(self.encoding):
            with file.open("rb") as stream:
                for line, content in enumerate(stream, start=1):
                    if 0 in content:
                        problem = "contains NUL bytes (is it UTF-16?), but UTF-8 text was expected"
                        raise DataError(f"{file}:{line}: {problem}; {_SAVE_AS_UTF_8}")
                    if len(content) > _MAX_LINE and suffix != ".json":
                        raise DataError(
                            f"{file}:{line}: {len(content):,} bytes, expected {_MAX_LINE:,} or less; split it"
                        )
        match suffix:
            case ".csv" | ".tsv":
                yield from text_files.read_csv_or_tsv(file, self.columns, self.encoding, self.notes)
            case ".jsonl" | ".ndjson":
                yield from text_files.read_json_lines(file, self.encoding)
            case ".json":
                yield from text_files.read_json_list(file, self.encoding)
            case ".txt":
                yield from text_files.read_text_file(file, self.text_rows, self.encoding)
            case _:
                yield from text_files.read_conll_sentences(file, self.encoding)

    def _resolve_paths_and_bytes(self, row: dict[str, Any], folder: Path) -> dict[str, Any]:
        if self.has_relative_image_paths:
            row = resolve_image_paths(row, folder, self.image_column)
        if not any(isinstance(value, bytes) for value in row.values()):
            return row
        of_images = _image_columns(row, self.image_column)
        return {name: value if name in of_images else _decode_bytes(value) for name, value in row.items()}


def _one_row_each(located: LocatedRow, names: Sequence[str]) -> Iterator[LocatedRow]:
    """Yield a row for each item of the columns' lists, or the row itself if these are not lists of one length."""
    place, row = located
    lists = [cell for name in names if isinstance(cell := parse_cell(row.get(name)), list) and cell]
    if not lists or {*map(len, lists)} != {len(lists[0])} or len(lists) < len(names):
        yield located
        return
    for number, items in enumerate(zip(*lists, strict=True), start=1):
        yield f"{place}, item {number}", {**row, **dict(zip(names, items, strict=True))}


def locate_data_files(
    paths: Sequence[str], text_rows: TextRows = "auto", columns: tuple[str, ...] | None = None
) -> DataFiles:
    """Find the files at these paths without reading them. Raises a `DataError` that lists all problems."""
    if len(paths) == 1:
        folder = Path(paths[0])
        with convert_os_errors(folder):
            if is_image_folder(folder):
                return DataFiles(tuple(list_images(folder)), folder.name, image_folder=folder)
    files: list[Path] = []
    problems: list[str] = []
    for path in paths:
        try:
            files += list_data_files(Path(path))
        except DataError as error:
            problems += error.problems
    problems += [
        f"{file}: data.columns applies only to csv and tsv files without a header line; remove data.columns"
        for file in files
        if columns and file.suffix.lower() not in SEPARATED
    ]
    if problems:
        raise DataError(problems)
    where = files[0].name + (f" and {len(files) - 1} more" if len(files) > 1 else "")
    return DataFiles(tuple(files), where, text_rows, columns=columns)


def _image_columns(row: Row, column: str | None) -> list[str]:
    names = (column,) if column is not None else USUAL_NAMES["image"]
    return [name for name in row if name == column or name.lower().strip() in names]


def resolve_image_paths(row: Row, folder: Path, column: str | None) -> dict[str, Any]:
    """Return a row whose image paths, in `column` or in columns with usual names, begin with `folder`."""
    changed = dict(row)
    for name in _image_columns(row, column):
        value = row[name]
        if isinstance(value, str) and is_address(value.strip()):
            changed[name] = BadCell(f"the address '{value.strip()}', expected a file; images are not downloaded")
        elif isinstance(value, str) and value.strip():
            changed[name] = str(folder / value.strip())
        elif isinstance(value, dict) and not value.get("bytes") and isinstance(value.get("path"), str):
            changed[name] = {**value, "path": str(folder / value["path"])}
    return changed


def hash_files(sources: Mapping[str, DataFiles]) -> str:
    """Hash the names and contents of files. For speed, images are hashed only by path, size and modification time."""
    digest = hashlib.sha256()
    for name, source in sources.items():
        digest.update(f"{name}:{len(source.files)}".encode())
        for file in source.files:
            digest.update(os.fsencode(file.name))
            digest.update(repr(source.selections[file]).encode() if file in source.selections else b"")
            if source.image_folder is not None:
                status = file.stat() if file.exists() else file.lstat()  # broken links are reported later
                digest.update(os.fsencode(os.path.realpath(file)))
                digest.update(f":{status.st_size}:{status.st_mtime_ns}".encode())
                continue
            with convert_os_errors(file), file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _describe_encoding_error(file: Path, encoding: str) -> str:
    """Describe the first line that `encoding` cannot decode."""
    with file.open("rb") as stream:
        lines = enumerate(stream, start=1)
        line = next((number for number, content in lines if isinstance(_decode_bytes(content, encoding), bytes)), 1)
    return f"{line}: not {'UTF-8' if encoding == UTF_8 else encoding}; {_SAVE_AS_UTF_8}"


def _refuse_non_data_file(file: Path) -> None:
    """Raise `DataError` for archives, web pages, documents and Git LFS pointers."""
    with file.open("rb") as stream:
        start = stream.read(1000)
    text = start.lstrip(b" \r\n").lower()
    kind = None
    if text.startswith(_LFS_POINTER_START):
        kind = "a Git LFS pointer ('git lfs pull' downloads the file itself)"
    elif text.startswith(_MARKUP_STARTS) and file.suffix.lower() != ".txt":
        kind = "a web page (HTML) or XML, such as a login or error page"
    elif 0 in start or isinstance(_decode_bytes(start[: start.rfind(b"\n") + 1] or start), bytes):
        kind = next((kind for sign, kind in _FILE_SIGNATURES.items() if start.startswith(sign)), None)
    if kind:
        to_do = "unpack it, download the real file, or save its rows as csv in UTF-8, and use that file"
        raise DataError(f"{file}: is {kind}, expected rows; {to_do}")


def _decode_bytes(value: object, encoding: str = "utf-8") -> object:
    """Decode `value` if it is bytes in this encoding; otherwise return it unchanged."""
    try:
        return value.decode(encoding) if isinstance(value, bytes) else value
    except UnicodeError:
        return value
