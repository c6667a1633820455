"""Packed files on this machine."""

from __future__ import annotations

from pathlib import Path

from fulltune.data.readers.files import list_data_files
from fulltune.data.remote.listing import Listing, OnBytes, RemoteFile, revision_of


def list_files(path: str, revision: str | None) -> Listing:
    status = list_data_files(Path(path), may_be_packed=True)[0].stat()
    file = RemoteFile(Path(path).name, status.st_size, str(status.st_mtime_ns))
    return Listing((file,), revision_of([file]))


def download(path: str, listing: Listing, file: RemoteFile, target: Path, report: OnBytes) -> None:
    target.unlink(missing_ok=True)
    target.symlink_to(path)
