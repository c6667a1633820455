"""Faults in real runs, from inside and from outside: which runs recover, and what do they lose?

Each run is the command line, a parent with one training process or two under torchrun. Each fault comes once, at the
middle. Those inside are planted in the training processes (`faulty_command.py`, `tests/train/faults.py`). Those outside
(`process_faults.py`) are signals, a full disk (a small tmpfs, which needs root) and damaged checkpoints; after a
command that failed the fault is mended and the same command given once more.

A run has recovered when its last command ended with 0 and its metric on the test rows is not worse than that of the
clean run of the same kind, processes and seed by more than one standard error of their paired difference and what the
control lost, a run without one of its updates: the smallest harmless change.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from bench import process_faults
from bench.clean_steps import KINDS, prepared
from bench.faulty_command import Fault
from bench.public_data import banking77
from bench.results import Figure
from bench.runs import SMOKE, Records, environment, events, script

from fulltune.records.plan import Plan
from fulltune.stats.bootstrap import Resampled
from fulltune.train.journal import read_completed_steps

LONGEST_SECONDS = 1200
"""A command that takes longer hangs, and is killed."""


@dataclass(frozen=True)
class Training:
    """How a kind of runs is trained; the fault comes at the middle."""

    rate: float
    steps: int
    batch: int = 16

    @property
    def middle(self) -> int:
        return self.steps // 2 + 5


TRAININGS = {
    "prompts-llama": Training(3e-3, 24 if SMOKE else 260),
    "written-t5": Training(3e-3, 260),
    "classes-minilm": Training(5e-5, 160, batch=4),
    "numbers-bert": Training(1e-3, 260),
}
USED = {name: replace(KINDS[name], batch=training.batch, rows=1000) for name, training in TRAININGS.items()}
USED["classes-minilm"] = replace(USED["classes-minilm"], write=functools.partial(banking77, scored_share=1 / 3))


@dataclass(frozen=True)
class Inside:
    """A fault in the training processes: a function of `tests/train/faults.py`, and for how many steps."""

    act: str
    steps: int = 1


@dataclass(frozen=True)
class Outside:
    """A fault of the surroundings."""

    strike: process_faults.Strike
    mend: Callable[[Path], None] = lambda run: None
    """Gets the run folder after a command that failed."""
    small_disk: bool = False
    processes: tuple[int, ...] = (1, 2)
    exits: int = 0
    """What the first command should end with."""


CLEAN, CONTROL = "clean", "control: one update dropped"
FAULTS: dict[str, Inside | Outside] = {
    CLEAN: Inside("", 0),
    CONTROL: Inside("update_left_out"),
    "NaN gradient, 1 step": Inside("nan_gradient"),
    "NaN gradient, 5 steps": Inside("nan_gradient", 5),
    "infinite gradient": Inside("infinite_gradient"),
    "infinite logits": Inside("infinite_logits"),
    "gradient x10": Inside("large_gradient"),
    "rate x30, 5 steps": Inside("high_rate", 5),
    "rate x30, 20 steps": Inside("high_rate", 20),
    "corrupted labels, 3 steps": Inside("corrupted_labels", 3),
    "corrupted labels, 20 steps": Inside("corrupted_labels", 20),
    "shuffled inputs, 20 steps": Inside("shuffled_inputs", 20),
    "out of memory": Inside("no_memory"),
    "kill -9 of the parent": Outside(process_faults.kill_parent, exits=-9),
    "kill -9 of the worker": Outside(process_faults.kill_started),
    "kill -9 of one process of two": Outside(process_faults.kill_last_rank, processes=(2,)),
    "SIGTERM of the parent": Outside(process_faults.terminate_parent, exits=75),
    "hung process": Outside(process_faults.hang_last_rank),
    "full disk": Outside(process_faults.fill_disk(0.5), process_faults.make_room, small_disk=True, exits=3),
    "full disk, not a byte left": Outside(
        process_faults.fill_disk(0.0), process_faults.make_room, small_disk=True, exits=3
    ),
    "torn checkpoint": Outside(process_faults.kill_all, process_faults.tear, exits=-9),
    "flipped byte in a checkpoint": Outside(process_faults.kill_all, process_faults.flip, exits=-9),
}
QUICK = (CLEAN, CONTROL, "NaN gradient, 1 step", *["rate x30, 5 steps"] * (not SMOKE), "kill -9 of the worker")


# ---- a run ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A run: its kind, processes, fault and seed."""

    kind: str
    processes: int
    fault: str
    seed: int

    def folder(self, folder: Path) -> Path:
        words = f"{self.fault} {self.processes} {self.seed}"
        return folder / self.kind / "".join(letter if letter.isalnum() else "-" for letter in words)

    def __str__(self) -> str:
        return f"{self.kind}, {self.processes} processes, seed {self.seed}, {self.fault}"


def command(case: Case, recipe: Path, run: Path) -> list[str]:
    kind, training = USED[case.kind], TRAININGS[case.kind]
    settings = [
        *("train.device=cpu", "train.precision=fp32", f"train.num_processes={case.processes}"),
        *(f"method.learning_rate={training.rate}", f"train.max_steps={training.steps}", f"train.seed={case.seed}"),
        *(f"train.global_batch_size={kind.batch}", f"train.micro_batch_size={kind.batch // case.processes}"),
        *("train.logging_steps=1", "train.save_steps=20", "train.eval_strategy=steps"),
        *(f"train.eval_steps={training.steps // 4}", "evaluate.baselines=false", "evaluate.generate_rows=0"),
        *["train.hang_timeout=15s"] * (case.fault == "hung process"),
    ]
    words = ("evaluate", str(recipe), "--run-folder", str(run))
    return [sys.executable, "-m", "bench.faulty_command", *words, *(f"--set={setting}" for setting in settings)]


def do(folder: Path, case: Case) -> dict[str, Any]:
    """A run, from the first command to what it left."""
    fault = FAULTS[case.fault]
    recipe = prepared(folder, case.kind, USED[case.kind]) / "recipe.yaml"
    run = case.folder(folder)
    shutil.rmtree(run, ignore_errors=True)
    planted = Fault(footprints=str(recipe.parent))
    if isinstance(fault, Inside):
        planted = replace(planted, act=fault.act, first=TRAININGS[case.kind].middle, steps=fault.steps)
        exits = [exit_code(case, recipe, run, planted)]
    else:
        with process_faults.own_disk(run) if fault.small_disk else nullcontext():
            exits = [exit_code(case, recipe, run, planted, fault.strike)]
            if exits[0] != 0:
                fault.mend(run)
                exits.append(exit_code(case, recipe, run, planted))
    return {"exits": exits, **remains(run)}


def exit_code(
    case: Case, recipe: Path, run: Path, planted: Fault, strike: process_faults.Strike | None = None
) -> int | str:
    """Give the command, strike once half of the steps are done, and wait for its exit code."""
    variables = environment(OMP_NUM_THREADS="1") | planted.variables()
    with Path(f"{run}.log").open("a", encoding="utf-8") as log:
        process = psutil.Popen(command(case, recipe, run), stdout=log, stderr=log, env=variables)
        deadline = time.monotonic() + LONGEST_SECONDS
        while process.poll() is None:
            if time.monotonic() > deadline:
                process_faults.kill_all(process, run)
                process.wait()
                return "hangs"
            steps = (read_completed_steps(attempt) for attempt in run.glob("attempts/*"))
            if strike is not None and max(steps, default=0) >= TRAININGS[case.kind].middle:
                strike(process, run)
                strike = None
            time.sleep(0.05)
    return process.returncode if strike is None else f"{process.returncode} before the fault"


def remains(run: Path) -> dict[str, Any]:
    """What a run left behind, before files that only take room are deleted."""
    alive = [process for process in psutil.process_iter(["cmdline"]) if is_of(run, process)]
    for process in alive:
        process.kill()
    model = run / "models" / "full" / "model.safetensors"
    remaining = {
        "skipped": [event["step"] for event in events(run) if event["kind"] == "skipped"],
        "rollbacks": list(Plan.load(run / "plan" / "full.json").rollbacks),
        "weights": hashlib.sha256(model.read_bytes()).hexdigest() if model.exists() else "",
        "alive": len(alive),
    }
    for name in ("models", "checkpoints", "data"):
        shutil.rmtree(run / name, ignore_errors=True)
    return remaining


def is_of(run: Path, process: psutil.Process) -> bool:
    """Whether a training process of the run is alive 3 s after its last command ended."""
    if not any(f"{run}/" in word for word in process.info["cmdline"] or ()):
        return False
    return bool(psutil.wait_procs([process], timeout=3)[1])


# ---- all of them ---------------------------------------------------------------------------------------------------


def lost(folder: Path, case: Case) -> tuple[float, float]:
    """How much better the clean run is, and the standard error of that over the test rows, in the metric's units."""
    clean = replace(case, fault=CLEAN)
    files = [next(each.folder(folder).glob("scores/full-*.npz"), None) for each in (case, clean)]
    if None in files:
        return math.nan, math.nan
    scored, reference = map(Resampled.load, filter(None, files))
    sign = 1 if Plan.load(clean.folder(folder) / "plan" / "full.json").greater_is_better else -1
    return float(sign * (reference.value - scored.value)) + 0.0, float(np.std(reference.draws - scored.draws))


def cases(kind: str, processes: int, seed: int, faults: tuple[str, ...]) -> Iterator[Case]:
    """The clean run first, then the control, then the faults that this machine can have."""
    for name in faults:
        fault = FAULTS[name]
        if isinstance(fault, Outside) and processes not in fault.processes:
            continue
        if isinstance(fault, Outside) and fault.small_disk and os.geteuid() != 0:
            print(f"  {kind}, {name}: skipped, because mounting a disk needs root", flush=True)
            continue
        yield Case(kind, processes, name, seed)


def measure(folder: Path, quick: bool) -> Iterator[Figure]:
    records, recovered, same, surprises = Records(folder / "faults.jsonl"), [], [], 0
    kinds, numbers, seeds = (("prompts-llama",), (1,), (1,)) if quick else (TRAININGS, (1, 2), (1, 2, 3))
    for kind, processes, seed in itertools.product(kinds, numbers, seeds):
        clean, allowed = "", 0.0
        for case in cases(kind, processes, seed, QUICK if quick else tuple(FAULTS)):
            fault = FAULTS[case.fault]
            outcome = records.get(str(case), do, folder, case)
            loss, error = lost(folder, case)
            expected = fault.exits if isinstance(fault, Outside) else 0
            surprises += outcome["exits"][0] != expected or outcome["exits"][-1] != 0 or outcome["alive"] > 0
            print(f"  {case}: lost {loss:+.4f} ± {error:.4f}, {json.dumps(outcome)[:100]}", flush=True)
            if case.fault == CLEAN:
                clean = outcome["weights"]
            elif case.fault == CONTROL:
                allowed = max(0.0, float(np.nan_to_num(loss)))
            elif isinstance(fault, Outside):
                same.append(outcome["weights"] == clean and bool(clean))
            else:
                recovered.append(outcome["exits"][-1] == 0 and loss <= allowed + error + 1e-9)
    name = f"runs that recover from a fault in the training, of {len(recovered)}"
    yield Figure(name, sum(recovered) / len(recovered), "share", at_least=1.0 if quick else 0.88)
    name = f"runs with the clean run's weights after a signal, a full disk or a damaged checkpoint, of {len(same)}"
    yield Figure(name, sum(same) / len(same), "share", at_least=1.0)
    yield Figure(
        "runs with a fault that end with an unexpected exit code or leave processes", surprises, "runs", at_most=0
    )


if __name__ == "__main__":
    script(measure, __doc__)
