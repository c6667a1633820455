"""A process that has the libraries loaded and forks a worker for each attempt.

A comparison trains dozens of short trials, and each would spend seven seconds on imports. Every attempt is still a
process of its own, so that its memory and its faults stay its own. (multiprocessing's fork server is not used: in each
child it imports the user's main script anew.)

    parent ──{"request": ..., "log": ...}──▶ server ──fork──▶ worker (own session, own log)
    parent ◀── "pid 123" (the worker, once it can be signalled), "end 0" (the server, its exit code)
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from fulltune.train.parent.spawn import Child, Starter, end_with, environment, in_new_process
from fulltune.train.request import Request

PRELOADED = ("fulltune.train.worker.attempt", "fulltune.train.worker.main", "peft", "sklearn.metrics")


@contextlib.contextmanager
def fork_server() -> Iterator[Starter]:
    """A starter that forks workers where that is safe, on a CPU under Linux, with one process."""
    server: ForkServer | None = None

    def start(request: Request, log: Path) -> Child:
        nonlocal server
        plan = request.plan
        alone = plan.device == "cpu" and plan.num_processes == 1 and not request.recipe.train.engine_by
        if not (alone and sys.platform == "linux"):
            return in_new_process(request, log)
        if server is None or server.is_gone:
            server = ForkServer(environment(request))
        return server.start(request, log)

    try:
        yield start
    finally:
        if server is not None:
            server.close()


class ForkServer:
    """The parent's side; one worker at a time."""

    def __init__(self, variables: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from fulltune.train.parent import fork_server as f; f.serve()", str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # what libraries say while they are imported; workers have logs
            start_new_session=True,  # Ctrl-C is the parent's to pass on
            env=variables,
            bufsize=0,  # what is read is one line: the next one must be seen by `select`
        )
        self._worker: ForkedWorker | None = None

    @property
    def is_gone(self) -> bool:
        return self._process.poll() is not None

    def start(self, request: Request, log: Path) -> Child:
        to, back = self._process.stdin, self._process.stdout
        assert to is not None, "a pipe"
        assert back is not None, "a pipe"
        assert self._worker is None or self._worker.code is not None, "one worker at a time"
        log.touch()  # a folder that cannot be written to is the parent's to report
        try:
            to.write(json.dumps({"request": str(request.folder / "request.json"), "log": str(log)}).encode() + b"\n")
            kind, _, number = back.readline().decode().partition(" ")
        except BrokenPipeError:
            kind, number = "", ""
        if not kind:  # it died while importing: the plain way says why in the log
            return in_new_process(request, log)
        self._worker = ForkedWorker(back, int(number) if kind == "pid" else 0)
        if kind == "end":  # before it could say its name
            self._worker.code = int(number)
        return self._worker

    def close(self) -> None:
        """End it; with a worker that nobody waited for, that one as well."""
        assert self._process.stdin is not None, "a pipe"
        if self._worker is not None and self._worker.code is None:
            self._process.kill()
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()


class ForkedWorker:
    """A worker that the server forked; `code` is its exit code once it was read."""

    args: Sequence[str] = ()

    def __init__(self, back: IO[bytes], pid: int) -> None:
        self.pid = pid
        self.code: int | None = None
        self._back = back

    def poll(self) -> int | None:
        if self.code is None and select.select([self._back], [], [], 0)[0]:
            return self.wait()
        return self.code

    def wait(self) -> int:
        if self.code is None:
            # Without an answer the server itself was killed, and its worker with it.
            self.code = int(self._back.readline().decode().partition(" ")[2] or -signal.SIGKILL)
        return self.code


def serve() -> None:
    """The server: import, then fork for each line of stdin until it is closed."""
    end_with(int(sys.argv[1]))
    answers = os.dup(1)
    os.dup2(2, 1)  # what libraries print is no answer
    for name in PRELOADED:
        importlib.import_module(name)
    server = os.getpid()
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            _be_worker(json.loads(line), server, answers)
        _, status = os.waitpid(pid, 0)
        os.write(answers, f"end {os.waitstatus_to_exitcode(status)}\n".encode())


def _be_worker(asked: dict[str, str], server: int, answers: int) -> None:
    """The forked process: what `python -m fulltune.train.worker.main` would be."""
    code = 1
    try:
        log = os.open(asked["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((nothing, 0), (log, 1), (log, 2)):
            os.dup2(source, target)
        os.setsid()
        end_with(server)
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
