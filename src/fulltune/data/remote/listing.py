from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

OnBytes = Callable[[int], None]
"""Is called with the number of bytes that have arrived since the last call."""

_DESCRIPTIONS = ("config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")


@dataclass(frozen=True)
class RemoteFile:
    """A file in a store."""

    name: str
    """Relative path of the local copy."""
    size: int | None
    """Size in bytes, or None if the store does not say."""
    version: str
    """ETag or another text that changes with the content, or "" if the store has none."""
    key: str = ""
    """Where the store finds the file, if its name does not say it."""


@dataclass(frozen=True)
class Listing:
    """The files that belong to an address."""

    files: tuple[RemoteFile, ...]
    revision: str
    """Commit, or hash of the files' versions, or "" if the content is known only once it was read."""
    rows: int | None = None
    """Number of rows, if the store says so before they are read."""
    notes: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """Bytes of all files whose size is known."""
        return sum(file.size or 0 for file in self.files)


def revision_of(files: Sequence[RemoteFile]) -> str:
    """Return a hash of the files' versions, or "" if one has none."""
    text = "\n".join(f"{file.name} {file.size} {file.version}" for file in files)
    return hashlib.sha256(text.encode()).hexdigest()[:16] if all(file.version for file in files) else ""


def may_hold_rows(file: str) -> bool:
    """Return whether a file is not hidden, and does not describe others."""
    is_hidden = any(part.startswith((".", "__MACOSX")) for part in Path(file).parts)
    return not is_hidden and Path(file).name not in _DESCRIPTIONS
