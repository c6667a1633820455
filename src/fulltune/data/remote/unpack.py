"""Packed files: those of a copy, and those on this machine."""

from __future__ import annotations

import lzma
import os
import shutil
import zipfile
import zlib
from collections.abc import Iterator
from errno import ENOSPC
from pathlib import Path
from typing import IO

from fulltune.data.readers.files import SUFFIXES, has_data_suffix, list_data_files
from fulltune.data.remote.listing import Listing, OnBytes, RemoteFile, may_hold_rows, revision_of
from fulltune.errors import DataError
from fulltune.system.hardware import disk_free_bytes
from fulltune.text import first_few

MARGIN_BYTES = 2**26
"""What stays free on the disk."""
_KINDS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}


def list_files(path: str, revision: str | None) -> Listing:
    status = list_data_files(Path(path), may_be_packed=True)[0].stat()
    file = RemoteFile(Path(path).name, status.st_size, str(status.st_mtime_ns))
    return Listing((file,), revision_of([file]))


def download(path: str, listing: Listing, file: RemoteFile, target: Path, report: OnBytes) -> None:
    target.unlink(missing_ok=True)
    target.symlink_to(path)


def unpacked(packed: Path) -> list[Path]:
    """Unpack a file into a folder of its own beside it; delete it, and return its data files. Raises `DataError` for
    damage, and for archives without data files or with paths that lead outside."""
    import pyarrow as pa

    folder, files = packed.with_name(f"{packed.name}.unpacked"), list[Path]()
    shutil.rmtree(folder, ignore_errors=True)
    try:
        for name, stream in _contents(packed):
            files.append(folder / name)
            files[-1].parent.mkdir(parents=True, exist_ok=True)
            with files[-1].open("xb") as file:
                while piece := stream.read(2**20):
                    if disk_free_bytes(folder) < MARGIN_BYTES:
                        raise OSError(ENOSPC, os.strerror(ENOSPC), packed.name)
                    file.write(piece)
    except FileExistsError:
        raise DataError(f"{packed.name}: contains '{Path(name)}' more than once; pack it again") from None
    except (EOFError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, pa.ArrowInvalid, RuntimeError, OSError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError) and error.errno is not None:  # the disk's errors have a number
            raise
        packed.unlink()
        raise DataError(f"{packed.name}: cannot be unpacked ({error}); expected a whole file: restore it") from None
    packed.unlink()
    return sorted(files)


def _contents(packed: Path) -> Iterator[tuple[str, IO[bytes]]]:
    import pyarrow as pa

    expected = f"expected one of {', '.join(SUFFIXES)}"
    if packed.suffix.lower() == ".zip":
        with zipfile.ZipFile(packed) as archive:
            if outside := [one for one in archive.namelist() if ".." in Path(one).parts or one.startswith("/")]:
                raise DataError(f"{packed.name}: '{outside[0]}' lies outside the archive; check and unpack it yourself")
            inside = [one.filename for one in archive.infolist() if not one.is_dir() and may_hold_rows(one.filename)]
            names = [one for one in inside if has_data_suffix(Path(one))]
            if not names:
                listed = first_few(inside) or "nothing"
                raise DataError(f"{packed.name}: contains no data file ({listed}); {expected}")
            for name in names:
                with archive.open(name) as stream:
                    yield name, stream
    elif has_data_suffix(packed.with_suffix("")):
        kind = _KINDS.get(packed.suffix.lower())
        with pa.CompressedInputStream(str(packed), kind) if kind else lzma.open(packed) as stream:
            yield packed.stem, stream
    else:
        raise DataError(f"{packed.name}: unpacks to '{packed.stem}'; {expected}")
