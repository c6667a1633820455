from __future__ import annotations

import concurrent.futures
import errno
import fcntl
import mmap
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fulltune.errors import SetupError
from fulltune.system.hardware import disk_free_bytes
from fulltune.system.memory import read_lines
from fulltune.text import format_bytes

PAGE = 4096
"""Direct I/O needs addresses, offsets and lengths that are multiples of it."""
PIECE = 16 * 2**20
"""Bytes that a thread reads or writes in one call."""
LOST = "the training state is lost, so start a new run (--fresh)"
Transfer = list[Future[int]]


def page_align(num_bytes: int) -> int:
    return -(-num_bytes // PAGE) * PAGE


def page_buffer(num_bytes: int) -> Tensor:
    """Return page-aligned zeros, which take no memory until they are changed: uint8 [bytes]."""
    pages = mmap.mmap(-1, max(PAGE, page_align(num_bytes)), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # A process forked during a transfer would share the pages, and the parent could keep a page without the data.
    pages.madvise(mmap.MADV_DONTFORK)
    with suppress(OSError):  # not every kernel has huge pages
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8)


def check_disk(folder: Path, needed: int) -> None:
    """Raise an error if a folder, which may be missing yet, is in memory, cannot be written or has less than `needed`
    bytes free."""
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not (place.is_dir() and os.access(place, os.W_OK | os.X_OK)):
        raise SetupError(f"{folder}: {place} is no folder that can be written; set train.stream.disk to one that can")
    device = place.stat().st_dev
    for line in read_lines("/proc/self/mountinfo"):
        mount, _, source = line.partition(" - ")
        kind = source.split()[0]
        if kind in ("tmpfs", "ramfs") and mount.split()[2] == f"{os.major(device)}:{os.minor(device)}":
            raise SetupError(f"{folder}: is in memory ({kind}); set train.stream.disk to a folder on a disk")
    if needed > (free := disk_free_bytes(place)):
        raise SetupError(
            f"{folder}: the training state needs {format_bytes(needed)}, but only {format_bytes(free)} are free on "
            "this disk; free space, or set train.stream.disk to a folder on another disk"
        )


def complete(transfer: Transfer) -> int:
    """Wait until a transfer ends and empty it; raise its error, or return the sum of its data as 64-bit integers."""
    concurrent.futures.wait(transfer)
    total = sum(piece.result() for piece in transfer) % 2**64
    transfer.clear()
    return total


class DiskFile:
    """A file of fixed size that one process reads and writes in the background, past the page cache."""

    def __init__(self, path: Path, num_bytes: int, create: bool) -> None:
        self.path = path
        flags = os.O_RDWR | (os.O_CREAT if create else 0)
        with explain_disk_errors(path, "opened"):
            try:
                self._file, self._direct = os.open(path, flags | os.O_DIRECT, 0o600), True
            except OSError as error:
                if error.errno != errno.EINVAL:  # some file systems refuse O_DIRECT
                    raise
                self._file, self._direct = os.open(path, flags, 0o600), False
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if create:
                os.posix_fallocate(self._file, 0, num_bytes)
        self._threads = ThreadPoolExecutor(4)

    def move(self, pages: Tensor, offset: int, write: bool, is_summed: bool = False) -> Transfer:
        """Start to read or write pages of a buffer; unless `is_summed`, their sum is 0."""
        data, begins = pages.numpy().data, range(0, len(pages), PIECE)
        pieces = ((data[at : at + PIECE], offset + at) for at in begins)
        return [self._threads.submit(self._move, *piece, write, is_summed) for piece in pieces]

    def _move(self, piece: memoryview, offset: int, write: bool, is_summed: bool) -> int:
        count, move = 0, os.pwritev if write else os.preadv
        with explain_disk_errors(self.path, "written" if write else "read"):
            while count < len(piece):
                moved = move(self._file, [piece[count:]], offset + count)
                if not moved:
                    raise SetupError(f"{self.path}: is not complete; {LOST}")
                count += moved
            if not self._direct:
                if write:  # the page cache keeps what is not on the disk yet
                    os.fdatasync(self._file)
                os.posix_fadvise(self._file, offset, len(piece), os.POSIX_FADV_DONTNEED)
        return int(np.frombuffer(piece, np.int64).sum()) if is_summed else 0

    def sync(self) -> None:
        """Wait until all that was written is on the disk."""
        with explain_disk_errors(self.path, "written"):
            os.fdatasync(self._file)
            if not os.fstat(self._file).st_nlink or not self.path.exists():
                raise SetupError(f"{self.path}: was deleted while a run used it; {LOST}")

    def close(self) -> None:
        self._threads.shutdown()
        os.close(self._file)


@contextmanager
def explain_disk_errors(path: Path, verb: str) -> Iterator[None]:
    """Raise a `SetupError` if the file cannot be opened, read or written."""
    try:
        yield
    except OSError as error:
        advice = "check the disk, its free space and the file's permissions, then run the same command again"
        if verb == "opened" and error.errno in (errno.EAGAIN, errno.EACCES):
            advice = "end the run that uses it, then run the same command again"
        advice = LOST if verb == "opened" and error.errno == errno.ENOENT else advice
        raise SetupError(f"{path}: cannot be {verb} ({error.strerror}); {advice}") from None
