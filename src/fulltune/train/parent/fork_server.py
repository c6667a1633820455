"""A process that has imported the libraries and forks a worker for each attempt, which saves seven seconds per attempt.

parent ──{"request", "log", "variables"}──▶ server ──fork──▶ worker (own group, own log)
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
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

from fulltune.train.parent.spawn import (
    Starter,
    WorkerProcess,
    die_with_parent,
    start_in_new_process,
    worker_environment,
)
from fulltune.train.request import Request

PRELOADED = ("fulltune.train.worker.attempt", "fulltune.train.worker.main", "peft", "sklearn.metrics")


@contextlib.contextmanager
def fork_server() -> Iterator[Starter]:
    """Yield a function that starts workers: forks of single CPU processes on Linux, else new processes."""
    servers: list[subprocess.Popen[bytes]] = []

    def start_worker(request: Request, log: Path) -> WorkerProcess:
        plan = request.plan
        alone = plan.device == "cpu" and plan.num_processes == 1 and not request.recipe.train.zero_enabled_by
        if not (alone and sys.platform == "linux"):
            return start_in_new_process(request, log)
        variables = worker_environment(request)
        if not servers or servers[-1].poll() is not None:
            servers.append(_start_server(variables))
        log.touch()  # the parent must report a folder that is not writable
        path = str(request.folder / "request.json")
        line = json.dumps({"request": path, "log": str(log), "variables": variables})
        # If the server died while importing, a new process writes the reason into the log.
        return _fork_worker(servers[-1], line) or start_in_new_process(request, log)

    try:
        yield start_worker
    finally:
        for server in servers:  # a running worker ends with it
            server.kill()
            server.wait()


def _start_server(variables: dict[str, str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", "from fulltune.train.parent import fork_server as f; f.serve_forks()", str(os.getpid())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # output of imports; workers have logs
        start_new_session=True,  # the parent forwards Ctrl-C
        env=variables,
        bufsize=0,  # `select` must see the next line after one is read
    )


def _fork_worker(server: subprocess.Popen[bytes], line: str) -> ForkedWorker | None:
    """Send the request `line` to the server; return the forked worker, or None if the server died."""
    assert server.stdin is not None, "a pipe"
    assert server.stdout is not None, "a pipe"
    with contextlib.suppress(BrokenPipeError):
        server.stdin.write(line.encode() + b"\n")
        if pid := server.stdout.readline():
            return ForkedWorker(server.stdout, int(pid))
    return None


class ForkedWorker:
    args: Sequence[str] = ()

    def __init__(self, answers: IO[bytes], pid: int) -> None:
        """Watch process `pid`, whose exit code the server writes to `answers`."""
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


def serve_forks() -> None:
    """Import the libraries, then fork a worker for each request on stdin."""
    die_with_parent(int(sys.argv[1]))
    answers = os.dup(1)
    os.dup2(2, 1)  # output of libraries must not mix with the answers
    for name in PRELOADED:
        importlib.import_module(name)
    server = os.getpid()
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            os.close(answers)
            _run_as_worker(json.loads(line), server)
        with contextlib.suppress(ProcessLookupError, PermissionError):  # it may have ended
            os.setpgid(pid, pid)  # before the parent knows the pid, as signals go to its group
        os.write(answers, f"{pid}\n".encode())
        _, status = os.waitpid(pid, 0)
        os.write(answers, f"{os.waitstatus_to_exitcode(status)}\n".encode())


def _run_as_worker(request: Mapping[str, object], server_pid: int) -> None:
    """Run a request in this forked process, log its output, and exit."""
    code = 1
    try:
        log = os.open(str(request["log"]), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((nothing, 0), (log, 1), (log, 2)):
            os.dup2(source, target)
        die_with_parent(server_pid)
        os.environ.clear()  # the server's are those of its first request
        os.environ.update(dict[str, str](request["variables"]))  # type: ignore[call-overload]  # from JSON
        from fulltune.train.worker import main as worker

        code = worker.main(str(request["request"]))
    except BaseException:
        traceback.print_exc()  # the parent looks in the log for words about memory
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
