from __future__ import annotations

import bz2
import gzip
import lzma
import shutil
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from typing import IO, Any

from fulltune.data.readers.files import SUFFIXES, has_data_suffix
from fulltune.errors import DataError, DoesNotFitError
from fulltune.system.hardware import disk_free_bytes
from fulltune.text import first_few, format_bytes

_COPIED_BYTES = 2**20


def unpacked(packed: Path, folder: Path) -> list[Path]:
    """Unpack a file beside it, or a zip archive's data files into `folder`; delete it, and return what was unpacked.
    Raises `DataError` for damage, and for archives without data files or with paths that lead outside."""
    import pyarrow as pa

    try:
        if packed.suffix.lower() == ".zip":
            files = _unzip(packed, folder)
        else:
            files = [packed.with_suffix("")]
            if not has_data_suffix(files[0]):
                raise DataError(f"{packed.name}: unpacks to '{files[0].name}'; expected one of {', '.join(SUFFIXES)}")
            with _open(packed) as stream:
                _write(stream, files[0])
    except (EOFError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, pa.ArrowInvalid, RuntimeError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the disk's errors have a number
            raise
        raise DataError(f"{packed.name}: cannot be unpacked ({error}); expected a whole file: copy it again") from None
    packed.unlink()
    return files


def _open(packed: Path) -> Any:
    import pyarrow as pa

    match packed.suffix.lower():
        case ".gz":
            return gzip.open(packed)
        case ".bz2":
            return bz2.open(packed)
        case ".xz":
            return lzma.open(packed)
        case _:
            return pa.CompressedInputStream(pa.OSFile(str(packed.resolve())), "zstd")


def _unzip(packed: Path, folder: Path) -> list[Path]:
    files = list[Path]()
    with zipfile.ZipFile(packed) as archive:
        members = [one for one in archive.infolist() if not one.is_dir() and has_data_suffix(Path(one.filename))]
        members = [one for one in members if not {"__MACOSX"} & {*PurePosixPath(one.filename).parts}]
        outside = [one.filename for one in members if {"..", "/"} & {*PurePosixPath(one.filename).parts}]
        if outside:
            raise DataError(f"{packed.name}: '{outside[0]}' lies outside the archive; unpack it yourself, and check it")
        if not members:
            names = first_few(archive.namelist()) or "nothing"
            raise DataError(f"{packed.name}: contains no data file ({names}); expected one of {', '.join(SUFFIXES)}")
        need, free = sum(one.file_size for one in members), disk_free_bytes(folder)
        if need > free:
            raise DoesNotFitError(
                f"{packed.name}: unpacks to {format_bytes(need)}, but only {format_bytes(free)} are free; make room"
            )
        for member in members:
            files.append(folder / packed.stem / member.filename)
            files[-1].parent.mkdir(parents=True, exist_ok=True)
            with archive.open(member) as stream:
                _write(stream, files[-1])
    return sorted(files)


def _write(stream: IO[bytes], target: Path) -> None:
    with target.open("wb") as file:
        shutil.copyfileobj(stream, file, _COPIED_BYTES)
