"""What strikes a run of `faults.py` from outside: signals, a disk that is too small, damaged files.

Each function that strikes gets the running command and its run folder; each one that mends or damages gets the folder
after the command ended.
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
from planted import REAL_WORKER, WORKER

from fulltune import files
from fulltune.train.parent import spawn
from fulltune.train.request import number_in

Strike = Callable[[psutil.Process, Path], None]
LARGE = 4 * 2**30
"""Bytes of a disk on which any of these runs fits; it takes memory only as it is filled."""


def ranks(command: psutil.Process) -> list[psutil.Process]:
    """The training processes, the first one first; torchrun is none of them."""
    words = ((one, one.cmdline()) for one in command.children(recursive=True))
    workers = {WORKER, REAL_WORKER}
    found = [one for one, line in words if workers & set(line) and spawn.LAUNCHER not in line]
    return sorted(found, key=lambda one: int(one.environ().get("RANK", "0")))


def kill_started(command: psutil.Process, run: Path) -> None:
    """What the command itself started: the training process, or torchrun."""
    for child in command.children():
        child.kill()


def kill_parent(command: psutil.Process, run: Path) -> None:
    command.kill()


def ask_parent(command: psutil.Process, run: Path) -> None:
    command.terminate()


def kill_last(command: psutil.Process, run: Path) -> None:
    ranks(command)[-1].kill()


def stop_last(command: psutil.Process, run: Path) -> None:
    ranks(command)[-1].send_signal(signal.SIGSTOP)


def kill_all(command: psutil.Process, run: Path) -> None:
    for one in [command, *command.children(recursive=True)]:
        one.kill()


def newest_checkpoint(run: Path) -> Path:
    whole = [path.parent for path in run.glob(f"checkpoints/*/checkpoint-*/{files.SEAL}")]
    return max(whole, key=number_in)


def tear(run: Path) -> None:
    file = newest_checkpoint(run) / "optimizer.pt"
    os.truncate(file, file.stat().st_size // 2)


def flip(run: Path) -> None:
    file = newest_checkpoint(run) / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 255
    file.write_bytes(data)


def resize(run: Path, size: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(run)], check=True)


def fill(share: float) -> Strike:
    """Let the disk have room for so much of a checkpoint."""

    def strike(command: psutil.Process, run: Path) -> None:
        size = sum(file.stat().st_size for file in newest_checkpoint(run).iterdir())
        resize(run, shutil.disk_usage(run).used + int(share * size))

    return strike


def make_room(run: Path) -> None:
    resize(run, LARGE)


@contextmanager
def disk(run: Path) -> Iterator[None]:
    """Inside, the run folder is a disk of its own; what is on it stays."""
    run.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={LARGE}", "tmpfs", str(run)], check=True)
    try:
        yield
        shutil.copytree(run, f"{run}.kept")
    finally:
        subprocess.run(["umount", "--lazy", str(run)], check=True)
    run.rmdir()
    Path(f"{run}.kept").rename(run)
