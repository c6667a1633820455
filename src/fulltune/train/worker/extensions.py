"""DeepSpeed's compiled parts: built before training starts, and not held up by a lock that nobody holds.

torch compiles an extension at its first use, under a lock file. A compilation that was killed leaves its lock behind,
and every later run would wait for it without a word.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fulltune.errors import SetupError

QUIET_SECONDS = 120.0
"""A compilation whose owner cannot be seen (another machine, another container) writes nothing for so long at most."""
LONGEST_SECONDS = 1200.0
POLL_SECONDS = 1.0
Say = Callable[[str], None]
Note = Callable[[str, str], None]


def build(on_cpu: bool, offload_optimizer: bool, phase: Say, note: Note) -> None:
    """Compile what is missing of the extensions that a run needs; the first process does it for all.

    Args:
        on_cpu: Training runs on the CPU.
        offload_optimizer: The optimizer runs on the CPU.
        phase: Told what takes time.
        note: Told, as event and detail, what belongs into the journal.

    Raises:
        SetupError: When a lock stays, or when compiling fails.
    """
    from deepspeed.accelerator import get_accelerator
    from torch.utils import cpp_extension

    names = [*(["ShareMemCommBuilder"] if on_cpu else []), *(["CPUAdamBuilder"] if offload_optimizer else [])]
    for name in names:
        builder: Any = get_accelerator().create_op_builder(name)
        if builder is None or not hasattr(builder, "jit_load") or not builder.is_compatible(verbose=False):
            continue  # DeepSpeed does without it, or says itself what is missing
        folder = Path(cpp_extension._get_build_directory(builder.name, verbose=False))
        clear_lock(folder / "lock", phase, note)
        if not (folder / f"{builder.name}.so").exists():
            phase(f"compiling DeepSpeed's {builder.name}, once: about a minute")
        try:
            builder.load(verbose=False)
        except (RuntimeError, OSError, ImportError) as error:
            reason = " ".join(str(error).split())[:300]
            raise SetupError(
                f"DeepSpeed's {builder.name} cannot be compiled: {reason}; it needs a C++ compiler (such as g++) and "
                f"ninja; compiled parts lie in {folder}"
            ) from error


def clear_lock(lock: Path, phase: Say, note: Note) -> None:
    """Wait for a compilation that goes on; remove the lock of one that ended without removing it.

    Raises:
        SetupError: When the lock is held for very long.
    """
    began, said = time.monotonic(), ""
    while lock.exists():
        holder = _holder(lock)
        written = [file.stat().st_mtime for file in lock.parent.iterdir() if file.exists()]
        quiet = time.time() - max(written, default=time.time())  # nothing there: it was removed a moment ago
        if holder is None and quiet > QUIET_SECONDS:
            lock.unlink(missing_ok=True)
            note("stale lock removed", f"{lock}: no process holds it, and nothing was compiled for {quiet:.0f} seconds")
            return
        if time.monotonic() - began > LONGEST_SECONDS:
            who = f"process {holder}" if holder else "a process that cannot be seen from here"
            raise SetupError(f"{lock}: held by {who} for very long; end it, or delete the file when nothing compiles")
        waiting = f"waiting for {lock} ({f'process {holder} compiles' if holder else 'its owner is not to be seen'})"
        if waiting != said:
            phase(waiting)
        said = waiting
        time.sleep(POLL_SECONDS)


def _holder(lock: Path) -> int | None:
    """The process that has the file open, as torch does while it compiles; None when none can be seen."""
    import psutil

    for process in psutil.process_iter():
        try:
            if any(file.path == str(lock.resolve()) for file in process.open_files()):
                return int(process.pid)
        except (psutil.Error, OSError):
            continue  # ended, or not ours
    return None
