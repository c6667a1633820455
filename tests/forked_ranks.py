"""Ranks as forks of a process that has imported the libraries: for tests about what ranks compute, which would spend
most of their time on imports by torchrun and by each process that it starts.

test ──request──▶ server ──fork──▶ leader, in place of torchrun ──fork──▶ rank 0, rank 1 ...

That torchrun's processes compute the same, bit by bit, is shown by `tests/invariant/test_one_of_two.py`.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

from fulltune.records.events import Listener
from fulltune.records.training import Outcome
from fulltune.train.parent import child, fork_server, spawn
from fulltune.train.request import Request
from tests import noisy

ROOT = Path(__file__).parents[1]
HOST = "127.0.0.1"
SECONDS_AFTER_A_FAILURE = 30
"""As torchrun's: then the other ranks are killed."""


_run_worker = child.run_worker


@contextlib.contextmanager
def by_torchrun() -> Iterator[None]:
    """Have the runs of this process start theirs as usual, even within `Forks.instead_of_torchrun`."""
    with mock.patch.object(child, "run_worker", _run_worker):
        yield


class Forks:
    """Starts ranks; its server begins with the first ones."""

    def __init__(self) -> None:
        self._server: subprocess.Popen[bytes] | None = None

    def start(self, request: Request, log: Path) -> spawn.WorkerProcess:
        """Start the processes of an attempt, as `spawn.start_in_new_process` does."""
        variables = spawn.worker_environment(request) | spawn.loopback_variables()
        if self._server is None:
            self._server = _start_server(variables)
        line = {"request": str(request.folder / "request.json"), "log": str(log), "variables": variables}
        is_alone = request.plan.num_processes == 1 and not request.recipe.train.zero_enabled_by
        line |= {"ranks": 0 if is_alone else request.plan.num_processes}
        log.touch()
        found = fork_server._fork_worker(self._server, json.dumps(line))
        assert found is not None, "the server has ended: python -m tests.forked_ranks shows why"
        return found

    @contextlib.contextmanager
    def instead_of_torchrun(self) -> Iterator[None]:
        """Have the runs of this process start theirs so."""

        def run_worker(request: Request, listener: Listener, start: object = None) -> Outcome:
            return _run_worker(request, listener, self.start)

        with mock.patch.object(child, "run_worker", run_worker):
            yield

    def end(self) -> None:
        if self._server is not None:
            self._server.kill()
            self._server.wait()


def _start_server(variables: dict[str, str]) -> subprocess.Popen[bytes]:
    # `tests` is found in the folder; DeepSpeed, which is imported where it is installed, looks for no GPU.
    variables = variables | {"DS_ACCELERATOR": "cpu"}
    del variables["PYTHONSAFEPATH"]
    return subprocess.Popen(
        [sys.executable, "-m", __name__, str(os.getpid())],
        **{"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL},
        cwd=ROOT,
        start_new_session=True,
        env=variables,
        bufsize=0,
    )


# ---- in the server and its forks -----------------------------------------------------------------------------------


def _lead(request: dict[str, Any], server: int) -> None:
    """Be the leader, in a fork of the server, and exit."""
    code = 1
    try:
        os.setpgid(0, 0)  # before there are ranks, which belong to the group
        os.environ.update(request["variables"])
        if not request["ranks"]:
            _run_alone(request, server)
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o666)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((nothing, 0), (log, 1), (log, 2)):
            os.dup2(source, target)
        spawn.die_with_parent(server)
        code = _wait_for_ranks(request["request"], request["ranks"])
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


_run_alone = fork_server._run_as_worker


def _wait_for_ranks(request: str, count: int) -> int:
    """Fork the ranks, be their store, and return 0 once all have ended well."""
    from torch.distributed import TCPStore

    listening, leader = socket.create_server((HOST, 0)), os.getpid()
    port = listening.getsockname()[1]
    running = set()
    for rank in range(count):
        if (pid := os.fork()) == 0:
            listening.close()
            os.environ.update(_variables_of(rank, count, port))
            _be_rank(request, leader)
        running.add(pid)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the whole group gets it, and the ranks save
    options: Any = {"wait_for_workers": False, "multi_tenant": True, "master_listen_fd": listening.detach()}
    _store = TCPStore(HOST, port, is_master=True, **options)
    code, until = 0, float("inf")
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        running.discard(pid)
        if pid and status:
            code, until = 1, min(until, time.monotonic() + SECONDS_AFTER_A_FAILURE)
        for left in running if time.monotonic() > until else ():
            os.kill(left, signal.SIGKILL)
        time.sleep(0 if pid else 0.02)
    return code


def _variables_of(rank: int, count: int, port: int) -> dict[str, str]:
    """What torchrun sets on one machine."""
    own = {"RANK": rank, "LOCAL_RANK": rank, "ROLE_RANK": rank, "GROUP_RANK": 0, "GROUP_WORLD_SIZE": 1}
    sizes = dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE", "ROLE_WORLD_SIZE"), count)
    store = {"MASTER_ADDR": HOST, "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": True}
    elastic = {"TORCHELASTIC_RESTART_COUNT": 0, "TORCHELASTIC_MAX_RESTARTS": 0, "TORCHELASTIC_RUN_ID": "none"}
    return {name: str(value) for name, value in (own | sizes | store | elastic).items()}


def _be_rank(request: str, leader: int) -> None:
    code = 1
    try:
        spawn.die_with_parent(leader)
        from fulltune.train.worker import main as worker

        with noisy.noise():
            code = worker.main(request)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    """Import what ranks do, then fork for each line of stdin."""
    if find_spec("deepspeed") is not None:
        importlib.import_module("deepspeed")
        # DeepSpeed asks for the CPU before each of its extensions, which takes a process and two seconds each time.
        cpu_info = importlib.import_module("cpuinfo")
        found = cpu_info.get_cpu_info()
        cpu_info.get_cpu_info = lambda: found
    fork_server._run_as_worker = _lead
    fork_server.serve_forks()


if __name__ == "__main__":
    main()
