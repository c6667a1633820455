"""The command line with a fault planted in its real training processes.

    FAULT='{"act": "nan_gradient", "first": 205, "steps": 1}' python -m bench.faulty_command evaluate recipe.yaml ...

As the parent it is `fulltune`, except that the workers which it starts, alone or under torchrun, are this file. As a
worker it plants a fault of `tests/train/faults.py` at the given optimizer steps of the first attempt (each fault comes
once), and then does what `fulltune.train.worker.main` does.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

VARIABLE, WORKER, REAL_WORKER = "FAULT", "worker-with-a-fault", "fulltune.train.worker.main"
IN_FIRST_PROCESS = ("corrupted_labels", "shuffled_inputs", "infinite_logits")
"""Faults of one process's rows or forward pass. The others are of reduced gradients and rates: the same in each."""
IN_LAST_PROCESS = ("no_memory",)


@dataclass(frozen=True)
class Fault:
    """What is planted, and where."""

    act: str = ""
    """A function of `tests/train/faults.py`; empty: nothing."""
    first: int = 0
    """First optimizer step with the fault."""
    steps: int = 0
    footprints: str = ""
    """Folder that keeps the traces of models, which take longer than a short run; empty: none is kept."""

    @classmethod
    def from_environment(cls) -> Fault:
        return cls(**json.loads(os.environ.get(VARIABLE, "{}")))

    def variables(self) -> dict[str, str]:
        return {VARIABLE: json.dumps(asdict(self))}

    def is_here(self) -> bool:
        """Whether this one of several processes gets the fault."""
        rank, last = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")) - 1
        if self.act in IN_FIRST_PROCESS:
            return rank == 0
        return bool(self.act) and (rank == last or self.act not in IN_LAST_PROCESS)


def command_line(fault: Fault) -> None:
    """`fulltune` with this file's workers."""
    from fulltune.cli import app

    with workers_of(Path(__file__).resolve(), WORKER), kept_footprints(fault.footprints):
        app.main()


@contextlib.contextmanager
def workers_of(file: Path, word: str) -> Iterator[None]:
    """Start a file, with a word before its arguments, where the real worker would be started."""
    from fulltune.train.parent import spawn

    real = spawn.worker_command

    def command(*arguments: Any) -> list[str]:
        words = real(*arguments)
        place = words.index(REAL_WORKER)
        return [*words[: place - 1], str(file), word, *words[place + 1 :]]

    with mock.patch.object(spawn, "worker_command", command):
        yield


@contextlib.contextmanager
def kept_footprints(folder: str) -> Iterator[None]:
    """Trace each model once for all runs."""
    from fulltune.footprint import trace
    from fulltune.footprint.records import Footprint

    real: Callable[[Any], Footprint] = vars(trace)["trace_footprint"]  # it may be patched

    def traced(case: Any) -> Footprint:
        name = f"{type(case.config).__name__}-{case.precision}-{case.weights_dtype}-{case.attn_implementation}.json"
        if not (Path(folder) / name).exists():
            real(case).save(Path(folder) / name)
        return Footprint.load(Path(folder) / name)

    with mock.patch.object(trace, "trace_footprint", traced) if folder else contextlib.nullcontext():
        yield


def worker(fault: Fault, request: str) -> int:
    """One attempt of the real worker, with the fault in the first one."""
    from tests.train import faults

    from fulltune.train.request import Request
    from fulltune.train.worker import main

    if Request.load(Path(request)).attempt > 1 or not fault.is_here():
        return main.main(request)
    steps = range(fault.first, fault.first + fault.steps)
    with faults.planted(getattr(faults, fault.act), steps.__contains__):
        return main.main(request)


if __name__ == "__main__":
    if sys.argv[1:2] == [WORKER]:
        sys.exit(worker(Fault.from_environment(), sys.argv[2]))
    command_line(Fault.from_environment())
