"""Files that are written whole: a reader sees the old one or the new one, never half of it; and files of JSON lines.

Imports nothing of ours.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name to write to, `<path>.part`, that takes the place of `path` when the block ends well and is removed else.

    Args:
        path: The file; folders above it are made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole; it is on the disk, not only in the system's memory, before it takes its name."""
    with replacing(path) as part, part.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def write_text(path: Path, text: str) -> None:
    """Write a text file (UTF-8) whole."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def append_line(path: Path, entry: Mapping[str, Any]) -> None:
    """Add an entry to a file of JSON lines, in one write: processes that append at the same time do not mix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+", buffering=0) as file:
        # Where the disk was full the last line may have no end.
        if size := file.seek(0, os.SEEK_END):
            file.seek(size - 1)
        whole = not size or file.read(1) == b"\n"
        file.write((("" if whole else "\n") + json.dumps(entry) + "\n").encode())


def lines_of(path: Path) -> list[dict[str, Any]]:
    """The entries of a file of JSON lines, without one that was cut off, or is none."""
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        with suppress(ValueError, RecursionError):
            found.append(json.loads(line))
    return [entry for entry in found if isinstance(entry, dict)]
