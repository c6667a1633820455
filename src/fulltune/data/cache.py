"""Prepared rows kept for other runs: a folder per content, linked into each run that uses it."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from pathlib import Path

KEPT = 5
"""Prepared data sets that stay; a run that was linked to an older one keeps its files."""

_ABANDONED_SECONDS = 24 * 3600


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
    """Delete all but the last used data sets, and what killed runs left half done."""

    def age(path: Path) -> float:
        with contextlib.suppress(FileNotFoundError):  # another run pruned it
            return path.stat().st_mtime
        return 0.0

    for path in folder.glob("*.part-*"):
        if time.time() - age(path) > _ABANDONED_SECONDS:
            shutil.rmtree(path, ignore_errors=True)
    whole = [path for path in folder.iterdir() if path.is_dir() and ".part-" not in path.name]
    for path in sorted(whole, key=age, reverse=True)[KEPT:]:
        shutil.rmtree(path, ignore_errors=True)
