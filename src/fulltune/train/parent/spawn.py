"""How the parent starts a worker: as a command of its own, or forked from a process that has the libraries loaded.

A comparison trains dozens of short trials, and each would spend seven seconds on imports. A `Nursery` imports once and
forks for each attempt; every attempt is still a process of its own, so that its memory and its faults stay its own.

    parent ──{"request": ..., "log": ...}──▶ nursery ──fork──▶ worker (own session, own log)
    parent ◀── "pid 123" (the worker, once it can be signalled), "end 0" (the nursery, its exit code)
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Protocol

from fulltune.system import deepspeed
from fulltune.train.request import Request
from fulltune.train.worker import distributed
from fulltune.train.worker.distributed import Child

PRELOADED = ("fulltune.train.worker.attempt", "fulltune.train.worker.main", "peft", "sklearn.metrics")


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
        alone = plan.device == "cpu" and plan.num_processes == 1 and not deepspeed.wanted(request.recipe)
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
    """The parent's side of the process that forks; one worker at a time."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from fulltune.train.parent import spawn; spawn.serve()", str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # what libraries say while they are imported; workers have logs
            start_new_session=True,  # Ctrl-C is the parent's to pass on
            env=environment,
            bufsize=0,  # what is read is one line: the next one must be seen by `select`
        )
        self._busy = False

    @property
    def is_gone(self) -> bool:
        return self._process.poll() is not None

    def start(self, request: Request, log: Path) -> Child:
        to, back = self._process.stdin, self._process.stdout
        assert to is not None, "a pipe"
        assert back is not None, "a pipe"
        assert not self._busy, "one worker at a time"
        log.touch()  # a folder that cannot be written to is the parent's to report
        self._busy = True
        try:
            to.write(json.dumps({"request": str(request.folder / "request.json"), "log": str(log)}).encode() + b"\n")
            kind, _, number = back.readline().decode().partition(" ")
        except BrokenPipeError:
            kind, number = "", ""
        if not kind:  # it died while importing: the plain way says why in the log
            self._busy = False
            return in_new_process(request, log)
        worker = Forked(self, back, int(number) if kind == "pid" else 0)
        if kind == "end":  # before it could say its name
            worker.ended(int(number))
        return worker

    def worker_ended(self) -> None:
        self._busy = False

    def close(self) -> None:
        """End it; with a worker that nobody waited for, that one as well."""
        assert self._process.stdin is not None
        if self._busy:
            self._process.kill()
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()


class Forked:
    """A worker that the nursery forked."""

    args: Sequence[str] = ()

    def __init__(self, nursery: Nursery, back: IO[bytes], pid: int) -> None:
        self.pid = pid
        self._nursery = nursery
        self._back = back
        self._code: int | None = None

    def ended(self, code: int) -> None:
        self._code = code
        self._nursery.worker_ended()

    def poll(self) -> int | None:
        return self._read(wait=False)

    def wait(self) -> int:
        code = self._read(wait=True)
        assert code is not None, "it was waited for"
        return code

    def _read(self, *, wait: bool) -> int | None:
        if self._code is None and (wait or select.select([self._back], [], [], 0)[0]):
            # Without an answer the nursery itself was killed, and its worker with it.
            self.ended(int(self._back.readline().decode().partition(" ")[2] or -signal.SIGKILL))
        return self._code


def serve() -> None:
    """The nursery: import, then fork for each line of stdin until it is closed."""
    import importlib

    end_with(int(sys.argv[1]))
    answers = os.dup(1)
    os.dup2(2, 1)  # what libraries print is no answer
    for name in PRELOADED:
        importlib.import_module(name)
    nursery = os.getpid()
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            _be_worker(json.loads(line), nursery, answers)
        _, status = os.waitpid(pid, 0)
        os.write(answers, f"end {os.waitstatus_to_exitcode(status)}\n".encode())


def _be_worker(asked: dict[str, str], nursery: int, answers: int) -> None:
    """The forked process: what `python -m fulltune.train.worker.main` would be."""
    code = 1
    try:
        log = os.open(asked["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((nothing, 0), (log, 1), (log, 2)):
            os.dup2(source, target)
        os.setsid()
        end_with(nursery)
        os.write(answers, f"pid {os.getpid()}\n".encode())
        os.close(answers)
        from fulltune.train.worker import main as worker

        code = worker.main(asked["request"])
    except BaseException:
        traceback.print_exc()  # the parent looks in the log for words about memory
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def end_with(parent: int) -> None:
    """Be killed when the parent is: nobody would read how this process ends. Linux only, like the nursery."""
    import ctypes

    set_parent_death_signal = 1  # PR_SET_PDEATHSIG of linux/prctl.h
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != parent:  # it ended just before
        os._exit(1)
