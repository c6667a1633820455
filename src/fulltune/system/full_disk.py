"""Recognise that the disk is full, whoever says so: each library has words of its own for it."""

from __future__ import annotations

import errno
from pathlib import Path

from fulltune.errors import FulltuneError
from fulltune.system.hardware import disk_free_bytes

_SAID = ("No space left", "PytorchStreamWriter failed", "enforce fail at inline_container")
"""What safetensors and torch say when a file could not be written to its end."""
_MAY_SAY = ("iostream error", "requested and")
"""What C++ and numpy say then, and elsewhere: the disk is asked, which has less than a MiB."""


def is_disk_full(error: BaseException, folder: Path) -> bool:
    """Whether an exception means that what it wrote found no room on the disk of this folder."""
    text = "" if isinstance(error, FulltuneError) else str(error)
    no_room = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    may_be = any(words in text for words in _MAY_SAY) and disk_free_bytes(folder) < 2**20
    return no_room or may_be or any(words in text for words in _SAID)
