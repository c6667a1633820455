"""Eval rows shared out over processes; processes that are asked to stop, and ended; DeepSpeed's compiled parts."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import psutil
import pytest
from torch.utils import cpp_extension

from fulltune.inference.run import batches
from fulltune.train.optim import zero
from fulltune.train.parent import retry, spawn
from fulltune.train.worker import distributed
from tests import plans


@pytest.mark.parametrize(("rows", "size", "processes"), [(10, 3, 2), (7, 2, 3), (1, 4, 2), (12, 3, 4), (5, 8, 1)])
def test_share_covers_each_row_once_in_batches_of_one_process(rows: int, size: int, processes: int) -> None:
    order = list(range(rows))[::-1]
    shares = [distributed.rows_of_rank(order, size, rank, processes) for rank in range(processes)]

    counted = [position for positions, count in shares for position in positions[:count]]
    assert sorted(counted) == list(range(rows))
    number = {len(list(batches(positions, size))) for positions, _ in shares}
    assert len(number) == 1  # weights that are shared out need equally many passes
    whole = [list(batch) for batch in batches(order, size)]
    for positions, count in shares:
        assert all(list(batch) in whole for batch in batches(positions[:count], size))


def test_workers_find_programs_that_come_with_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/only/here")
    plan = SimpleNamespace(device="cpu", placement="zero3", num_processes=1)
    request: Any = SimpleNamespace(plan=plan, recipe=plans.recipe(train={"placement": "zero3"}))
    assert spawn.worker_environment(request)["PATH"] == f"/only/here:{Path(sys.executable).parent}"


LAUNCHER = """
import subprocess, sys, time
worker = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
child = subprocess.Popen([sys.executable, "-c", worker], start_new_session=True, stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
time.sleep(60)
"""
"""Like torchrun: its worker is in a session of its own."""


@pytest.mark.slow
def test_end_reaches_a_worker_in_a_session_of_its_own() -> None:
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCHER], stdout=subprocess.PIPE, start_new_session=True)
    assert launcher.stdout is not None
    worker = psutil.Process(int(launcher.stdout.readline()))

    spawn.kill_workers(launcher)

    assert launcher.wait(timeout=60) == -9
    _, alive = psutil.wait_procs([worker], timeout=60)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


def test_attempts_are_in_the_order_of_their_numbers_beyond_99(tmp_path: Path) -> None:
    for number in (1, 99, 100, 101):
        (tmp_path / "attempts" / f"full-seed42-{number:02d}").mkdir(parents=True)

    outcomes = retry.earlier_outcomes(tmp_path, "full-seed42")

    assert [outcome.attempt for outcome in outcomes] == [1, 99, 100, 101]


def test_torchrun_is_asked_through_its_workers(tmp_path: Path) -> None:
    """A launcher that dies of SIGTERM stays: only the worker, which then writes a file, gets the signal."""
    file = tmp_path / f"{spawn.LAUNCHER.replace('.', '/')}.py"
    file.parent.mkdir(parents=True)
    for folder in file.parents[:3]:
        (folder / "__init__.py").touch()
    file.write_text(
        "import subprocess, sys\n"
        "worker = ('import signal, sys, time\\n'\n"
        "          'signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))\\n'\n"
        "          'print(\"up\", flush=True)\\n'\n"
        "          'time.sleep(60)')\n"
        "child = subprocess.Popen([sys.executable, '-c', worker], start_new_session=True)\n"
        "sys.exit(child.wait())\n",
        encoding="utf-8",
    )
    launcher = subprocess.Popen(
        [sys.executable, "-m", spawn.LAUNCHER], cwd=tmp_path, stdout=subprocess.PIPE, start_new_session=True
    )
    assert launcher.stdout is not None
    assert launcher.stdout.readline() == b"up\n"

    spawn.ask_workers_to_stop(launcher)

    started = time.monotonic()
    assert launcher.wait(timeout=60) == 7
    assert time.monotonic() - started < 20


@pytest.mark.parametrize("is_locked", [True, False])
def test_lock_is_named_with_what_to_do(is_locked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    builder = SimpleNamespace(
        name="cpu_adam", jit_load=None, is_compatible=lambda verbose: True, load=lambda verbose: log.append("loaded")
    )
    module: Any = ModuleType("deepspeed.accelerator")
    module.get_accelerator = lambda: SimpleNamespace(create_op_builder=lambda name: builder)
    monkeypatch.setitem(sys.modules, "deepspeed", ModuleType("deepspeed"))
    monkeypatch.setitem(sys.modules, "deepspeed.accelerator", module)
    monkeypatch.setattr(cpp_extension, "_get_build_directory", lambda name, verbose: str(tmp_path))
    (tmp_path / "cpu_adam.so").touch()
    if is_locked:
        (tmp_path / "lock").touch()

    zero.build_extensions(False, True, log.append)

    waiting = (
        f"waiting for {tmp_path / 'lock'}: cpu_adam is being compiled; if no process is compiling, delete this file"
    )
    assert log == [*([waiting] if is_locked else []), "loaded"]
