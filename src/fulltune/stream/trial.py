from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

import torch

from fulltune.stream.store import PIECE, DiskFile, check_disk, complete, explain_disk_errors, page_buffer

TRIAL_BYTES, SECONDS = 16 * PIECE, 0.5  # whatever ends first


def measure_disk(folder: Path, needed: int) -> tuple[float, float]:
    """Return the bytes per second that a folder's disk reads and writes past the page cache; raise an error if the
    folder, which may be missing, is in memory or has less than `needed` bytes free."""
    check_disk(folder, max(needed, TRIAL_BYTES))
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    pages, speeds = page_buffer(2 * PIECE), list[float]()
    pages.copy_(torch.frombuffer(bytearray(os.urandom(2 * PIECE)), dtype=torch.uint8))  # a disk may compress zeros
    with explain_disk_errors(existing, "measured"), tempfile.TemporaryDirectory(dir=existing) as scratch:
        file = DiskFile(Path(scratch, "file"), TRIAL_BYTES, create=True)
        try:
            for write in (True, False):
                began, moved = time.perf_counter(), 0
                while moved < TRIAL_BYTES and time.perf_counter() - began < SECONDS:
                    complete(file.move(pages, moved, write))
                    moved += len(pages)
                file.sync()
                speeds.append(moved / (time.perf_counter() - began))
        finally:
            file.close()
    return speeds[1], speeds[0]
