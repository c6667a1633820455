"""All rows of some files, for tests of the readers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fulltune.data.readers.read import locate_data_files
from fulltune.errors import DataError


@dataclass(frozen=True)
class ReadTable:
    rows: list[dict[str, Any]]
    columns: tuple[str, ...]
    places: list[str]
    where: str


def read(paths: list[str]) -> ReadTable:
    """Read and join files; what is wrong with any of them is raised at the end."""
    files = locate_data_files(paths)
    problems: list[str] = []
    placed = list(files.rows(problems))
    if problems:
        raise DataError(problems)
    columns = tuple(dict.fromkeys(name for _, row in placed for name in row))
    return ReadTable([row for _, row in placed], columns, [place for place, _ in placed], files.where)
