"""Commands whose processes are ended above a ceiling of memory, and what they needed."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.runs import environment

POLL_SECONDS = 0.2
POLLS_PER_SUM = 10
"""Polls between two sums over all processes, which take longer."""
GIB = 2**30
STATE_FILE = "state.bin"
"""`fulltune.stream.state.FILE`, which cannot be imported without torch."""


@dataclass(frozen=True)
class Ended:
    """A command that has ended, or was ended."""

    code: int
    """Its exit code; negative where a signal ended it."""
    seconds: float
    peak_bytes: int
    """Highest resident memory (VmHWM) of any of its processes, pages of mapped files included."""
    anonymous_bytes: int
    """Highest resident memory of any of its processes without pages of files, which the system may drop."""
    total_bytes: int
    """Highest sum over all of its processes (Pss, sampled every two seconds)."""
    written_bytes: int
    """Bytes that its processes gave to disks: the most of one, which includes those of its children that have ended."""
    over: bool
    """Whether it was ended because a process exceeded the ceiling."""


def limited(
    command: Sequence[str],
    ceiling: int,
    log: Path,
    *,
    seconds: float = float("inf"),
    stop: Callable[[], bool] = lambda: False,
    **variables: str,
) -> Ended:
    """Run a command, and kill it and all that it started when one of these processes exceeds the ceiling.

    VmHWM is the kernel's own maximum, so no peak between two polls is missed, but for a process's last. RLIMIT_DATA
    refuses private memory beyond twice the ceiling at once: reserved and never touched memory counts there, so it
    cannot be the ceiling itself.

    Args:
        command: What to run.
        ceiling: Bytes of resident memory that no process may exceed.
        log: Where its output is appended.
        seconds: After which it is killed.
        stop: Asked at each poll; all processes are killed (SIGKILL) as soon as it is true.
        variables: Further variables of the environment.
    """
    began, polls = time.monotonic(), 0
    peak = anonymous = total = 0
    written: dict[str, int] = {}
    with log.open("ab") as file:
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=file,
            start_new_session=True,
            env=environment(**variables),
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (2 * ceiling, 2 * ceiling)),
        )
        tree = ProcessTree(process.pid)
        try:
            while True:
                code = process.poll()
                for place in tree.processes():
                    peak = max(peak, _kilobytes(place / "status", "VmHWM"))
                    parts = (_kilobytes(place / "status", name) for name in ("RssAnon", "RssShmem"))
                    anonymous = max(anonymous, sum(parts))
                    written[place.name] = max(written.get(place.name, 0), _number(place / "io", "write_bytes"))
                if polls % POLLS_PER_SUM == 0:
                    sums = (_kilobytes(place / "smaps_rollup", "Pss") for place in tree.processes())
                    total = max(total, sum(sums))
                if code is not None:
                    break
                if peak > ceiling or stop() or time.monotonic() - began > seconds:
                    tree.kill()
                polls += 1
                time.sleep(POLL_SECONDS)
        finally:
            tree.kill()
    return Ended(
        code,
        time.monotonic() - began,
        peak,
        anonymous,
        total,
        max(written.values(), default=0),
        peak > ceiling,
    )


class ProcessTree:
    """A process and all that it started, also in sessions of their own (the training process) or after their parent
    has ended."""

    def __init__(self, root: int) -> None:
        self._began = {root: _begin(root)}

    def processes(self) -> list[Path]:
        """The folders in /proc of those that are alive."""
        parents = {int(place.name): _parent(place) for place in Path("/proc").iterdir() if place.name.isdigit()}
        self._began = {one: began for one, began in self._began.items() if one in parents and _begin(one) == began}
        before = -1
        while before != len(self._began):
            before = len(self._began)
            self._began |= {one: _begin(one) for one, parent in parents.items() if parent in self._began} | self._began
        return [Path("/proc") / str(one) for one in self._began]

    def kill(self) -> None:
        """Kill them until none is left: one may start another meanwhile."""
        while alive := [place for place in self.processes() if _state(place) != "Z"]:
            for place in alive:
                with contextlib.suppress(OSError):
                    os.kill(int(place.name), signal.SIGKILL)


def _fields(place: Path) -> list[str]:
    """State, parent, and further fields of a process's `stat`, or none if it is gone."""
    with contextlib.suppress(OSError):
        return (place / "stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    return []


def _state(place: Path) -> str:
    return (_fields(place) or ["Z"])[0]


def _parent(place: Path) -> int:
    return int((_fields(place) or ["", "0"])[1])


def _begin(process: int) -> str:
    """When a process started, which tells it from a later one with its number."""
    return (_fields(Path("/proc") / str(process)) or [""] * 20)[19]


def _kilobytes(path: Path, name: str) -> int:
    return 1024 * _number(path, name)


def _number(path: Path, name: str) -> int:
    """The number in a line of a process's file; 0 when the process is gone."""
    with contextlib.suppress(OSError):
        for line in path.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1])
    return 0


def disk_bytes(folder: Path) -> int:
    """Bytes that the files below a folder take on the disk."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # removed meanwhile
            total += path.lstat().st_blocks * 512
    return total


class DiskUse:
    """The most that a folder took, and whether a streamed training's state was in it; a `stop` that never stops."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.highest, self.has_state, self._polls = folder, 0, False, 0

    def __call__(self) -> bool:
        if self._polls % 10 == 0:
            self.highest = max(self.highest, disk_bytes(self.folder))
            self.has_state = self.has_state or any(self.folder.rglob(STATE_FILE))
        self._polls += 1
        return False
