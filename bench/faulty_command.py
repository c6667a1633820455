"""The command line with a fault planted in its real training processes.

    PLANTED='{"act": "nan_gradient", "first": 205, "steps": 1}' python bench/planted.py evaluate recipe.yaml ...

As the parent it is `fulltune`, except that the workers which it starts, alone or under torchrun, are this file. As a
worker it plants a fault of `tests/train/faults.py` at the given optimizer steps of the first attempt (each fault is
transient: it comes once), and then does what `fulltune.train.worker.main` does. Without guard (`"guarded": false`) no
loss and no norm stops the worker, and no step is skipped: transformers' own Trainer in fulltune's surroundings.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

HERE = Path(__file__).resolve()
sys.path.insert(0, str(HERE.parent.parent))  # for the tests' faults

VARIABLE, WORKER, REAL_WORKER = "PLANTED", "worker-with-a-fault", "fulltune.train.worker.main"
IN_FIRST_PROCESS = ("corrupted_labels", "shuffled_inputs", "infinite_logits")
"""Faults of one process's rows or forward pass. The others are of reduced gradients and rates: the same in each."""
IN_LAST_PROCESS = ("no_memory",)


@dataclass(frozen=True)
class Planted:
    """What is planted."""

    act: str = ""
    """A function of `tests/train/faults.py`; empty: nothing."""
    first: int = 0
    """The first optimizer step with the fault."""
    steps: int = 0
    guarded: bool = True
    footprints: str = ""
    """Folder for the models' memory, which takes longer to find than a short run to train; empty: found anew."""

    @classmethod
    def read(cls) -> Planted:
        """From the environment."""
        return cls(**json.loads(os.environ.get(VARIABLE, "{}")))

    def variables(self) -> dict[str, str]:
        """For the environment."""
        return {VARIABLE: json.dumps(asdict(self))}

    def is_here(self) -> bool:
        """Whether it strikes in this one of several processes."""
        rank, last = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")) - 1
        if self.act in IN_FIRST_PROCESS:
            return rank == 0
        return bool(self.act) and (rank == last or self.act not in IN_LAST_PROCESS)


def command_line(given: Planted) -> None:
    """`fulltune` with this file's workers."""
    from fulltune.cli import app

    with workers_of(HERE, WORKER), kept_footprints(given.footprints):
        app.main()


@contextlib.contextmanager
def workers_of(file: Path, word: str) -> Iterator[None]:
    """Start a file of one's own, with a word before its arguments, where the real worker would be started."""
    from fulltune.train.parent import spawn

    real = spawn.command

    def command(*request_and_file: Any) -> list[str]:
        found = real(*request_and_file)
        place = found.index(REAL_WORKER)
        return [*found[: place - 1], str(file), word, *found[place + 1 :]]

    with mock.patch.object(spawn, "command", command):
        yield


@contextlib.contextmanager
def kept_footprints(folder: str) -> Iterator[None]:
    """Trace each model once for all runs."""
    from fulltune.footprint import trace
    from fulltune.footprint.records import Footprint

    real = trace.traced

    def traced(case: Any) -> Footprint:
        name = f"{type(case.config).__name__}-{case.precision}-{case.weights_dtype}-{case.attn_implementation}.json"
        if not (Path(folder) / name).exists():
            real(case).save(Path(folder) / name)
        return Footprint.load(Path(folder) / name)

    with mock.patch.object(trace, "traced", traced) if folder else contextlib.nullcontext():
        yield


def worker(given: Planted, file: str) -> int:
    """One attempt of the real worker."""
    from tests.train import faults

    from fulltune.train.request import Request
    from fulltune.train.worker import main

    with contextlib.ExitStack() as planted:
        if not given.guarded:
            planted.enter_context(unguarded())
        if Request.load(Path(file)).attempt == 1 and given.is_here():
            steps = range(given.first, given.first + given.steps)
            planted.enter_context(faults.planted(getattr(faults, given.act), steps.__contains__))
        return main.main(file)


@contextlib.contextmanager
def unguarded() -> Iterator[None]:
    """No step, reading or end is judged."""
    from fulltune.stats import curves
    from fulltune.train.loop import callbacks, step_guard
    from fulltune.train.worker import attempt

    def never(history: step_guard.StepHistory, *_: Any, **__: Any) -> step_guard.StepVerdict:
        return step_guard.StepVerdict("go on", history)

    places = (callbacks, "diverged"), (attempt, "ended_high"), (attempt, "nothing_learned")
    with contextlib.ExitStack() as off:
        off.enter_context(mock.patch.object(step_guard, "judge", never))
        for module, name in places:
            off.enter_context(mock.patch.object(module, name, return_value=curves.GO_ON))
        yield


if __name__ == "__main__":
    if sys.argv[1:2] == [WORKER]:
        sys.exit(worker(Planted.read(), sys.argv[2]))
    command_line(Planted.read())
