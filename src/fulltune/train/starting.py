"""How the parent starts a worker: as a command of its own, or forked from a process that has the libraries loaded.

A comparison trains dozens of short trials, and each would spend seven seconds on imports. A `Nursery` imports once and
forks for each attempt; every attempt is still a process of its own, so that its memory and its faults stay its own.

    parent ──line: request, log──▶ nursery ──fork──▶ worker (own session, own log)
    parent ◀──line: pid, exit code── nursery
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Protocol

from fulltune import zero
from fulltune.train import distributed
from fulltune.train.distributed import Child
from fulltune.train.request import Request

PRELOADED = ("fulltune.train.attempt", "fulltune.train.worker", "peft", "sklearn.metrics")


class Starter(Protocol):
    """Starts the worker of a request, which writes into `log`."""

    def __call__(self, request: Request, log: Path) -> Child: ...


def in_new_process(request: Request, log: Path) -> Child:
    """A process, or with torchrun several, that imports everything anew."""
    with log.open("w", encoding="utf-8") as out:
        return subprocess.Popen(
            distributed.command(request, request.folder / "request.json"),
            stdout=out,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env=distributed.environment(request),
        )


@contextlib.contextmanager
def nursery() -> Iterator[Starter]:
    """A starter that forks workers where that is safe: on a CPU under Linux, with one process.

    Elsewhere it starts them as `in_new_process` does: a process that has asked for a GPU cannot be forked, and macOS's
    frameworks do not survive it.
    """
    kept: list[Nursery] = []

    def start(request: Request, log: Path) -> Child:
        plan = request.plan
        alone = plan.device == "cpu" and plan.num_processes == 1 and not zero.wanted(request.recipe)
        if not (alone and sys.platform == "linux"):
            return in_new_process(request, log)
        if not kept or kept[0].is_gone:
            kept[:] = [Nursery(distributed.environment(request))]
        return kept[0].start(request, log)

    try:
        yield start
    finally:
        for one in kept:
            one.close()


class Nursery:
    """The parent's side of the process that forks."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from fulltune.train import starting; starting.serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is the parent's to pass on
            env=environment,
            text=True,
        )

    @property
    def is_gone(self) -> bool:
        return self._process.poll() is not None

    def start(self, request: Request, log: Path) -> Child:
        to, back = self._process.stdin, self._process.stdout
        assert to is not None, "a pipe"
        assert back is not None, "a pipe"
        to.write(json.dumps({"request": str(request.folder / "request.json"), "log": str(log)}) + "\n")
        to.flush()
        line = back.readline()
        if not line:  # it died while importing: the plain way says why in the log
            return in_new_process(request, log)
        return Forked(int(line), back)

    def close(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()


class Forked:
    """A worker that the nursery forked."""

    args: Sequence[str] = ()

    def __init__(self, pid: int, back: IO[str]) -> None:
        self.pid = pid
        self._back = back
        self._code: int | None = None

    def poll(self) -> int | None:
        return self._read(wait=False)

    def wait(self) -> int:
        code = self._read(wait=True)
        assert code is not None, "it was waited for"
        return code

    def _read(self, *, wait: bool) -> int | None:
        if self._code is None and (wait or select.select([self._back], [], [], 0)[0]):
            # Without an answer the nursery itself was killed, and its workers with it.
            self._code = int(self._back.readline() or -signal.SIGKILL)
        return self._code


def serve() -> None:
    """The nursery: import, then fork for each line of stdin until it is closed."""
    import importlib

    for name in PRELOADED:
        importlib.import_module(name)
    for line in sys.stdin:
        asked = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _be_worker(asked)
        print(pid, flush=True)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _be_worker(asked: dict[str, str]) -> None:
    """The forked process: what `python -m fulltune.train.worker` would be."""
    from fulltune.train import worker

    os.setsid()
    _end_with_the_one_that_forked()
    log = os.open(asked["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    code = 1
    try:
        code = worker.main(asked["request"])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _end_with_the_one_that_forked() -> None:
    """Be killed when the nursery is: nobody would read how this process ends. Linux only, like the nursery."""
    import ctypes

    set_parent_death_signal = 1  # PR_SET_PDEATHSIG of linux/prctl.h
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
