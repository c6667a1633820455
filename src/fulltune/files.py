from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

SEAL = "checksums.json"


@contextmanager
def replace_atomically(path: Path, private: bool = False) -> Iterator[Path]:
    """Yield the path `<path>.part`, which replaces `path` if the block succeeds. With `private`, only the owner can
    read the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    try:
        if private:
            create_private_file(part)
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def create_private_file(path: Path) -> None:
    """Create an empty file that only its owner can read."""
    path.unlink(missing_ok=True)
    path.touch(0o600)


def write_text(path: Path, text: str, private: bool = False) -> None:
    """Write a file atomically: another process sees the old or the whole new content. If `private`, only its owner can
    read it."""
    with replace_atomically(path, private) as part, part.open("wb") as file:
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_checksums(folder: Path) -> None:
    """Write each file's SHA-256 to `checksums.json` in the folder, after flushing all files to disk."""
    sums = {}
    for file in sorted(folder.rglob("*")):
        if file.is_file() and file.name != SEAL:
            with file.open("rb") as stream:
                sums[str(file.relative_to(folder))] = hashlib.file_digest(stream, "sha256").hexdigest()
                os.fsync(stream.fileno())
    write_json(folder / SEAL, sums)


def find_damage(folder: Path) -> str | None:
    """Return why a folder with checksums is damaged or incomplete, or None if the folder is intact."""
    try:
        sums = json.loads((folder / SEAL).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return "the folder is incomplete"
    except ValueError:
        return f"{SEAL} is damaged"
    for name, expected in sums.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        with file.open("rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != expected:
                return f"{name} does not match its checksum"
    return None


def append_line(path: Path, entry: Mapping[str, Any]) -> None:
    """Append `entry` as a JSON line. A file lock keeps lines of concurrent processes apart."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+", buffering=0) as file:
        with suppress(OSError):  # some file systems have no locks
            fcntl.flock(file, fcntl.LOCK_EX)
        # If the disk was full, the last line may be incomplete.
        if size := file.seek(0, os.SEEK_END):
            file.seek(size - 1)
        whole = not size or file.read(1) == b"\n"
        file.write((("" if whole else "\n") + json.dumps(entry) + "\n").encode())


def parse_json_line(line: str | bytes) -> dict[str, Any] | None:
    """Return the dictionary in a JSON line, or None if the line is broken."""
    with suppress(ValueError, RecursionError):
        return entry if isinstance(entry := json.loads(line), dict) else None
    return None


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Return the entries of a JSON lines file, without broken lines; empty if the file is missing."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ()
    return [entry for line in lines if (entry := parse_json_line(line)) is not None]
