"""Runs of a tiny model by two commands on one machine, which take each other for two machines: the commands and
processes of a cluster, with one rendezvous on loopback. Tests and `bench/placements.py` use it."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from fulltune.train.parent import spawn
from tests import tiny
from tests.invariant import placed
from tests.invariant.placed import Family, Place

AGENT = spawn.LAUNCHER


def free_port() -> int:
    """One that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Job:
    """Two commands of one recipe; the run lies in `folder/run`."""

    folder: Path
    family: Family
    place: Place
    changes: dict[str, Any] = field(default_factory=dict)
    host: str = "127.0.0.1"
    port: int = field(default_factory=free_port)
    wait: str = "90s"
    commands: dict[int, subprocess.Popen[bytes]] = field(default_factory=dict)

    def write(self, dropout: bool = False) -> None:
        """The recipe, its rows and its model."""
        self.folder.mkdir(parents=True, exist_ok=True)
        model = self.family.model(self.folder / "model", dropout)
        data = tiny.write_jsonl(self.folder / "rows.jsonl", self.family.rows(self.folder))
        train = {**placed.TRAIN, "precision": "fp32", **self.place.settings, "num_machines": 2, **self.changes}
        evaluate = {"bootstrap_samples": 100, "baselines": False}
        blocks = {**self.family.blocks, "train": train, "evaluate": evaluate}
        tiny.write_recipe(self.folder / "recipe.yaml", model, data, **blocks)

    def start(self, rank: int, *settings: str, verb: str = "train", recipe: Path | None = None) -> None:
        """The command of one machine, which is not waited for."""
        command = [sys.executable, "-m", "fulltune.cli.app", verb, str(recipe or self.folder / "recipe.yaml")]
        command += ["--machine-rank", str(rank), "--rendezvous", f"{self.host}:{self.port}"]
        command += [
            "--wait-for-machines",
            self.wait,
            *(("--run-folder", str(self.folder / "run")) if rank == 0 else ()),
        ]
        command += [part for one in settings for part in ("--set", one)]
        with self.log(rank).open("ab") as log:
            # A machine's processes are killed together.
            self.commands[rank] = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                start_new_session=True,
                env=os.environ | {"COLUMNS": "200"},
            )

    def log(self, rank: int) -> Path:
        """What a machine's commands said."""
        return self.folder / f"said-{rank}.txt"

    def said(self, rank: int) -> str:
        return self.log(rank).read_text(encoding="utf-8", errors="replace")

    def wait_for(self, *ranks: int) -> list[int]:
        """Exit codes of the commands, once they have ended."""
        return [self.commands[rank].wait(timeout=300) for rank in ranks or sorted(self.commands)]

    def steps(self) -> list[int]:
        """Steps that were written down, of all attempts."""
        written = [path.read_text(encoding="utf-8") for path in self.folder.glob("run/attempts/*/metrics.jsonl")]
        whole = [line for text in written for line in text.splitlines(keepends=True) if line.endswith("\n")]
        events = [json.loads(line) for line in whole]
        return [event["step"] for event in events if event["kind"] == "train"]

    def at_step(self, step: int, draw: random.Random | None = None) -> int:
        """Wait until this step is written down, and up to 0.3 s longer; returns the last one that is."""
        while step not in self.steps():
            assert all(one.poll() is None for one in self.commands.values()), f"{self.said(0)}\n{self.said(1)}"
            time.sleep(0.02)
        time.sleep(0 if draw is None else 0.3 * draw.random())
        return max(self.steps())

    def at_first_step_of(self, attempt: int) -> None:
        """Wait until an attempt has written a step down."""
        while not any(self.folder.glob(f"run/attempts/*-{attempt:02d}/heartbeat")):
            assert all(one.poll() is None for one in self.commands.values()), f"{self.said(0)}\n{self.said(1)}"
            time.sleep(0.02)

    def agent(self, rank: int) -> psutil.Process:
        """torchrun's process on a machine."""
        below = psutil.Process(self.commands[rank].pid).children(recursive=True)
        return next(one for one in below if AGENT in one.cmdline())

    def kill_machine(self, rank: int) -> None:
        """All its processes at once."""
        command = psutil.Process(self.commands[rank].pid)
        for one in (command, *command.children(recursive=True)):
            one.kill()
        self.commands[rank].wait()

    def ask_to_stop(self, rank: int) -> None:
        self.commands[rank].send_signal(signal.SIGTERM)

    def end(self) -> None:
        for rank, command in self.commands.items():
            if command.poll() is None:
                self.kill_machine(rank)


@contextmanager
def two_machines(folder: Path, family: Family, place: Place, host: str = "127.0.0.1", **changes: Any) -> Iterator[Job]:
    """Both commands started, on one of this machine's addresses; whatever is left of them ends with the block."""
    job = Job(folder, family, place, changes, host)
    job.write(dropout=bool(changes.pop("dropout", False)))
    try:
        for rank in (1, 0):
            job.start(rank)
        yield job
    finally:
        job.end()
