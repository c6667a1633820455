"""Prepared rows kept for other runs: a folder per content, linked into each run that uses it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

KEPT = 5
"""Prepared data sets that stay; a run that was linked to an older one keeps its files."""
_ABANDONED_SECONDS = 24 * 3600
_ENTRY = re.compile(r"[0-9a-f]{16}(\.part-\d+)?")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the cache: two runs never put, link or prune at the same time."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def put(part: Path, folder: Path) -> None:
    """Move a finished folder to its place; an older one there is replaced."""
    if folder.exists():
        shutil.rmtree(folder)
    part.rename(folder)


def link(cached: Path, folder: Path) -> None:
    """Give a run the cached files: as hard links, which need no space, or as copies on another file system."""
    part = folder.with_name(f"{folder.name}.part-{os.getpid()}")
    shutil.rmtree(part, ignore_errors=True)
    try:
        shutil.copytree(cached, part, copy_function=_link_or_copy)
        put(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    os.utime(cached)  # used now: the last one to be pruned


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copy2(source, target)


def prune(folder: Path) -> None:
    """Delete all but the last used data sets, and what killed runs left half done; nothing else that lies there."""
    entries = [path for path in folder.iterdir() if _ENTRY.fullmatch(path.name)]
    parts = [path for path in entries if ".part-" in path.name]
    whole = sorted({*entries} - {*parts}, key=lambda path: path.stat().st_mtime, reverse=True)
    abandoned = [path for path in parts if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS]
    for path in [*whole[KEPT:], *abandoned]:
        shutil.rmtree(path)
