from __future__ import annotations

import lzma
import shutil
import zipfile
import zlib
from pathlib import Path

from fulltune.data.readers.files import SUFFIXES, has_data_suffix
from fulltune.errors import DataError, DoesNotFitError
from fulltune.system.hardware import disk_free_bytes
from fulltune.text import first_few, format_bytes

_KINDS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}


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
            kind = _KINDS.get(packed.suffix.lower())
            with (
                pa.CompressedInputStream(str(packed), kind) if kind else lzma.open(packed) as stream,
                files[0].open("wb") as file,
            ):
                shutil.copyfileobj(stream, file, 2**20)
    except (EOFError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, pa.ArrowInvalid, RuntimeError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the disk's errors have a number
            raise
        packed.unlink()
        raise DataError(f"{packed.name}: cannot be unpacked ({error}); expected a whole file: restore it") from None
    packed.unlink()
    return files


def _unzip(packed: Path, folder: Path) -> list[Path]:
    with zipfile.ZipFile(packed) as archive:
        members = [one for one in archive.infolist() if not one.is_dir() and has_data_suffix(Path(one.filename))]
        members = [one for one in members if "__MACOSX" not in Path(one.filename).parts]
        outside = [one.filename for one in members if ".." in Path(one.filename).parts or one.filename[0] == "/"]
        if outside:
            raise DataError(f"{packed.name}: '{outside[0]}' lies outside the archive; unpack it yourself, and check it")
        if not members:
            names = first_few(archive.namelist()) or "nothing"
            raise DataError(f"{packed.name}: contains no data file ({names}); expected one of {', '.join(SUFFIXES)}")
        need, free = sum(one.file_size for one in members), disk_free_bytes(folder)
        if need > free:
            sizes = f"{format_bytes(need)}, but only {format_bytes(free)} are free"
            raise DoesNotFitError(f"{packed.name}: unpacks to {sizes}; make room")
        archive.extractall(folder / packed.stem, members)
    return sorted(folder / packed.stem / one.filename for one in members)
