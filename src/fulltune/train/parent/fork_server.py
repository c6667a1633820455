"""A process that has the libraries loaded and forks a worker for each attempt.

A comparison trains dozens of short trials, and each would spend seven seconds on imports. Every attempt is still a
process of its own, so that its memory and its faults stay its own. (multiprocessing's fork server is not used: in each
child it imports the user's main script anew.)

    parent ──{"request": ..., "log": ...}──▶ server ──fork──▶ worker (own group, own log)
    parent ◀── the worker's process id, and later its exit code, a line each
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
    """A starter that forks workers where that is safe, on a CPU under Linux, with one process; one at a time."""
    servers: list[subprocess.Popen[bytes]] = []

    def start(request: Request, log: Path) -> Child:
        plan = request.plan
        alone = plan.device == "cpu" and plan.num_processes == 1 and not request.recipe.train.engine_by
        if not (alone and sys.platform == "linux"):
            return in_new_process(request, log)
        if not servers or servers[-1].poll() is not None:
            servers.append(_start_server(environment(request)))
        log.touch()  # a folder that cannot be written to is the parent's to report
        asked = json.dumps({"request": str(request.folder / "request.json"), "log": str(log)})
        # A server that died while importing: the plain way says why in the log.
        return _forked(servers[-1], asked) or in_new_process(request, log)

    try:
        yield start
    finally:
        for server in servers:  # a worker that nobody waited for ends with it
            server.kill()
            server.wait()


def _start_server(variables: dict[str, str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", "from fulltune.train.parent import fork_server as f; f.serve()", str(os.getpid())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # what libraries say while they are imported; workers have logs
        start_new_session=True,  # Ctrl-C is the parent's to pass on
        env=variables,
        bufsize=0,  # what is read is one line: the next one must be seen by `select`
    )


def _forked(server: subprocess.Popen[bytes], asked: str) -> ForkedWorker | None:
    assert server.stdin is not None, "a pipe"
    assert server.stdout is not None, "a pipe"
    with contextlib.suppress(BrokenPipeError):
        server.stdin.write(asked.encode() + b"\n")
        if pid := server.stdout.readline():
            return ForkedWorker(server.stdout, int(pid))
    return None


class ForkedWorker:
    """A worker that the server forked."""

    args: Sequence[str] = ()

    def __init__(self, answers: IO[bytes], pid: int) -> None:
        self.pid = pid
        self._code: int | None = None
        self._answers = answers

    def poll(self) -> int | None:
        if self._code is None and select.select([self._answers], [], [], 0)[0]:
            return self.wait()
        return self._code

    def wait(self) -> int:
        if self._code is None:
            # Without an answer the server itself was killed, and its worker with it.
            self._code = int(self._answers.readline() or -signal.SIGKILL)
        return self._code


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
            os.close(answers)
            _be_worker(json.loads(line), server)
        with contextlib.suppress(ProcessLookupError, PermissionError):  # it may have ended
            os.setpgid(pid, pid)  # before anybody knows its name: a group is asked to stop
        os.write(answers, f"{pid}\n".encode())
        _, status = os.waitpid(pid, 0)
        os.write(answers, f"{os.waitstatus_to_exitcode(status)}\n".encode())


def _be_worker(asked: dict[str, str], server: int) -> None:
    """The forked process: what `python -m fulltune.train.worker.main` would be."""
    code = 1
    try:
        log = os.open(asked["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((nothing, 0), (log, 1), (log, 2)):
            os.dup2(source, target)
        end_with(server)
        from fulltune.train.worker import main as worker

        code = worker.main(asked["request"])
    except BaseException:
        traceback.print_exc()  # the parent looks in the log for words about memory
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
