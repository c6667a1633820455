"""Read the user's files row by row: csv, tsv, jsonl, json, parquet, arrow, CoNLL, text, or a folder of these.

Every error names the file and, where there is one, the line.
"""

from __future__ import annotations

import codecs
import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fulltune.data.readers import columnar, conll, images, plain_text, text_tables
from fulltune.data.readers.files import data_files, reading
from fulltune.data.readers.header import SEPARATED
from fulltune.errors import DataError
from fulltune.recipe.data import TextRows
from fulltune.text import counted

PlacedRow = tuple[str, dict[str, Any]]
_SHOWN = 5
"""Broken lines of a file that are named one by one."""
_PACKED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstandard",
    b"PK\3\4": "zip, as office documents are, too",
}
"""How packed files begin, whatever their names are. No text in UTF-8 begins so but for `BZh` and `PK`."""


@dataclass(frozen=True)
class DataFiles:
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
                for line, row in self._rows_of(file):
                    is_empty = False
                    yield f"{name}:{line}", self._whole(row, file.parent)
                if is_empty:
                    raise DataError(f"{file}: no rows, expected some; add rows, or name another file")
            except DataError as error:
                if problems is None:
                    raise
                problems += error.problems

    def _rows_of(self, file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
        """Pairs of line (or row number, from 1) and row; after the last one, what is wrong with the others."""
        problems: list[str] = []
        try:
            with reading(file):
                for line, row in self._parsed(file):
                    if isinstance(row, str):
                        problems.append(f"{file}:{line}: {row}")
                    else:
                        yield line, row
        except UnicodeDecodeError:
            raise DataError(f"{file}:{_undecodable_line(file)}: not UTF-8; save the file as UTF-8") from None
        if more := problems[_SHOWN:]:
            problems[_SHOWN:] = [f"{file}: {counted(len(more), 'more broken line')}; repair them, too"]
        if problems:
            raise DataError(problems)

    def _parsed(self, file: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
        suffix = file.suffix.lower()
        if suffix in (".parquet", ".arrow", ".feather"):
            yield from columnar.rows(file)
            return
        _refuse_binary(file)
        match suffix:
            case ".csv" | ".tsv":
                yield from text_tables.separated(file, self.columns)
            case ".jsonl" | ".ndjson":
                yield from text_tables.json_lines(file)
            case ".json":
                yield from text_tables.json_list(file)
            case ".txt":
                yield from plain_text.rows(file, self.text_rows)
            case _:
                yield from conll.rows(file)

    def _whole(self, row: dict[str, Any], folder: Path) -> dict[str, Any]:
        """Paths of images with their folder; bytes as text, as some programs write it: not of images, nor others."""
        if self.image_paths:
            row = images.beside(row, folder, self.image_column)
        if not any(isinstance(value, bytes) for value in row.values()):
            return row
        of_images = images.columns_of(row, self.image_column)
        return {name: value if name in of_images else _decoded(value) for name, value in row.items()}


def locate(paths: Sequence[str], text_rows: TextRows = "auto", columns: tuple[str, ...] | None = None) -> DataFiles:
    """Find the files behind paths; nothing is read yet.

    Args:
        paths: Files and folders.
        text_rows: What is a row in a .txt file.
        columns: Names of the columns of tables without a header line.

    Raises:
        DataError: For each path that is missing, empty or of an unknown kind.
    """
    if len(paths) == 1:
        folder = Path(paths[0])
        with reading(folder):
            if images.is_image_folder(folder):
                return DataFiles(tuple(images.files(folder)), folder.name, image_folder=folder)
    files: list[Path] = []
    problems: list[str] = []
    for path in paths:
        try:
            files += data_files(Path(path))
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
    where = files[0].name + (f" and {len(files) - 1} more" if len(files) > 1 else "")
    return DataFiles(tuple(files), where, text_rows, columns=columns)


def content_hash(sources: Mapping[str, DataFiles]) -> str:
    """SHA-256 over names and bytes of the files of each source: the same content gives the same data stage.

    Of an image folder, places, sizes and times of change stand for the bytes: reading a hundred thousand images would
    take longer than all other preparations.
    """
    digest = hashlib.sha256()
    for name, source in sources.items():
        digest.update(f"{name}:{len(source.files)}".encode())
        for file in source.files:
            digest.update(os.fsencode(file.name))
            if source.image_folder is not None:
                status = file.stat() if file.exists() else file.lstat()  # a link that leads nowhere is listed later
                digest.update(os.fsencode(os.path.realpath(file)))
                digest.update(f":{status.st_size}:{status.st_mtime_ns}".encode())
                continue
            with reading(file), file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _undecodable_line(file: Path) -> int:
    """The first line that is not UTF-8: a decoding error counts from the start of its block, not of the file."""
    with file.open("rb") as stream:
        return next((line for line, content in enumerate(stream, start=1) if isinstance(_decoded(content), bytes)), 1)


def _refuse_binary(file: Path) -> None:
    """No text in UTF-8 holds NUL bytes; one in UTF-16 is half of them where its language has Latin letters.

    Raises:
        DataError: With the line.
    """
    line = 1
    with file.open("rb") as stream:
        while block := stream.read(2**20):
            start = block[:1000]
            packed = next((kind for sign, kind in _PACKED.items() if line == 1 and start.startswith(sign)), None)
            if packed and not _is_text(start):
                raise DataError(
                    f"{file}: is packed ({packed}), expected text in UTF-8; unpack it, and name what was in it"
                )
            if line == 1 and (
                block.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
                or (len(start) / 5 < start.count(0) < len(start))
            ):
                raise DataError(f"{file}:1: is UTF-16, expected UTF-8; save the file as UTF-8")
            place = block.find(0)
            if place >= 0:
                line += block.count(b"\n", 0, place)
                raise DataError(
                    f"{file}:{line}: NUL bytes, expected text in UTF-8; the file is damaged, or no text: "
                    "copy or write it again"
                )
            line += block.count(b"\n")


def _is_text(start: bytes) -> bool:
    """Whether bytes are text in UTF-8 that may be cut."""
    return 0 not in start and isinstance(_decoded(start[: start.rfind(b"\n") + 1] or start), str)


def _decoded(value: Any) -> Any:
    """Bytes in UTF-8 as text; anything else as it is."""
    try:
        return value.decode("utf-8") if isinstance(value, bytes) else value
    except UnicodeDecodeError:
        return value
