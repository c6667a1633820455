"""Faults from outside a training: signals to its processes, a disk that is too small, damaged checkpoints.

A `Strike` gets the running command and its run folder; `tear`, `flip` and `make_room` get the folder after it ended.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from bench.faulty_command import REAL_WORKER, WORKER

from fulltune import files
from fulltune.train.parent import spawn
from fulltune.train.request import number_in

Strike = Callable[[psutil.Process, Path], None]
LARGE = 4 * 2**30
"""Bytes of a disk on which any of these runs fits; it takes memory only as it is filled."""


def training_processes(command: psutil.Process) -> list[psutil.Process]:
    """The training processes by rank, without torchrun."""
    children = ((child, set(child.cmdline())) for child in command.children(recursive=True))
    workers = [child for child, words in children if words & {WORKER, REAL_WORKER} and spawn.LAUNCHER not in words]
    return sorted(workers, key=lambda worker: int(worker.environ().get("RANK", "0")))


def kill_started(command: psutil.Process, run: Path) -> None:
    """Kill what the command itself started: the training process, or torchrun."""
    for child in command.children():
        child.kill()


def kill_parent(command: psutil.Process, run: Path) -> None:
    command.kill()


def terminate_parent(command: psutil.Process, run: Path) -> None:
    command.terminate()


def kill_last_rank(command: psutil.Process, run: Path) -> None:
    training_processes(command)[-1].kill()


def hang_last_rank(command: psutil.Process, run: Path) -> None:
    training_processes(command)[-1].send_signal(signal.SIGSTOP)


def kill_all(command: psutil.Process, run: Path) -> None:
    for process in [command, *command.children(recursive=True)]:
        process.kill()


def newest_checkpoint(run: Path) -> Path:
    complete = [path.parent for path in run.glob(f"checkpoints/*/checkpoint-*/{files.SEAL}")]
    return max(complete, key=number_in)


def tear(run: Path) -> None:
    """Cut the newest checkpoint's optimizer state in half."""
    file = newest_checkpoint(run) / "optimizer.pt"
    os.truncate(file, file.stat().st_size // 2)


def flip(run: Path) -> None:
    """Flip the bits of a byte of the newest checkpoint's weights."""
    file = newest_checkpoint(run) / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 255
    file.write_bytes(data)


def _resize(run: Path, size: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(run)], check=True)


def fill_disk(share: float) -> Strike:
    """A strike that leaves room for this share of a checkpoint."""

    def strike(command: psutil.Process, run: Path) -> None:
        size = sum(file.stat().st_size for file in newest_checkpoint(run).iterdir())
        _resize(run, shutil.disk_usage(run).used + int(share * size))

    return strike


def make_room(run: Path) -> None:
    _resize(run, LARGE)


@contextmanager
def own_disk(run: Path) -> Iterator[None]:
    """Make the run folder a disk of its own, which needs root; its files stay afterwards."""
    run.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={LARGE}", "tmpfs", str(run)], check=True)
    try:
        yield
        shutil.copytree(run, f"{run}.kept")
    finally:
        subprocess.run(["umount", "--lazy", str(run)], check=True)
    run.rmdir()
    Path(f"{run}.kept").rename(run)
