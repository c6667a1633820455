"""Faults in real runs"""

from __future__ import annotations

import argparse
import collections
import functools
import hashlib
import itertools
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import process_faults
import psutil
from bench.faulty_command import Planted
from clean_steps import KINDS, prepared
from public_data import banking77

from fulltune.records.plan import Plan
from fulltune.stats.bootstrap import Resampled
from fulltune.train.journal import steps_of

LAUNCHER = Path(__file__).with_name("planted.py")
UNGUARDED = [
    *("train.skip_suspect_steps=false", "train.max_rollbacks=0", "train.eval_on_start=false"),
    "train.load_best_model_at_end=false",  # transformers' default: else a run is scored from before its fault
]
ARMS: dict[str, list[str]] = {
    "guard": [],
    "clipping": [*UNGUARDED, "train.max_grad_norm=1"],
    "no clipping": [*UNGUARDED, "train.max_grad_norm=0"],
}
LONGEST_SECONDS = 1200
"""A command that takes longer hangs, and is killed."""


@dataclass(frozen=True)
class Wanted:
    """How a kind of runs is trained; what is planted comes at the middle."""

    rate: float
    steps: int
    batch: int = 16

    @property
    def middle(self) -> int:
        return self.steps // 2 + 5


WANTED = {
    "prompts-llama": Wanted(3e-3, 260),
    "written-t5": Wanted(3e-3, 260),
    "classes-minilm": Wanted(5e-5, 160, batch=4),
    "numbers-bert": Wanted(1e-3, 260),  # an encoder whose runs are short
}


USED = {name: replace(KINDS[name], batch=wanted.batch, rows=1000) for name, wanted in WANTED.items()}
USED["classes-minilm"] = replace(USED["classes-minilm"], write=functools.partial(banking77, scored_share=1 / 3))


@dataclass(frozen=True)
class Inside:
    """A fault in the training processes: a function of `tests/train/faults.py`, and for how many steps."""

    act: str
    steps: int = 1
    arms: tuple[str, ...] = tuple(ARMS)
    exits: int = 0
    """What the first command should end with."""


@dataclass(frozen=True)
class Outside:
    """A fault of the surroundings: `strike` gets the running command and its run folder, `mend` the folder after it."""

    strike: process_faults.Strike
    mend: Callable[[Path], None] = lambda run: None
    small_disk: bool = False
    processes: tuple[int, ...] = (1, 2)
    arms: tuple[str, ...] = ("guard",)
    exits: int = 0


CONTROL = "control: one update left out"
FAULTS: dict[str, Inside | Outside] = {
    "clean": Inside("", 0, arms=("guard",)),
    CONTROL: Inside("update_left_out", arms=("guard",)),
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
    "out of memory": Inside("no_memory", arms=("guard",)),
    "kill -9 of the parent": Outside(process_faults.kill_parent, exits=-9),
    "kill -9 of the worker": Outside(process_faults.kill_started),
    "kill -9 of one process of two": Outside(process_faults.kill_last, processes=(2,)),
    "SIGTERM of the parent": Outside(process_faults.ask_parent, exits=75),
    "hung process": Outside(process_faults.stop_last),
    "full disk": Outside(process_faults.fill(0.5), process_faults.make_room, small_disk=True, exits=3),
    "full disk, not a byte left": Outside(process_faults.fill(0.0), process_faults.make_room, small_disk=True, exits=3),
    "torn checkpoint": Outside(process_faults.kill_all, process_faults.tear, exits=-9),
    "flipped byte in a checkpoint": Outside(process_faults.kill_all, process_faults.flip, exits=-9),
}


# ---- a run -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """What tells a run from the others."""

    kind: str
    processes: int
    fault: str
    arm: str
    seed: int

    @property
    def clean(self) -> Cell:
        """Of the run that it is compared with."""
        return replace(self, fault="clean", arm="guard")

    def folder(self, folder: Path) -> Path:
        words = f"{self.fault} {self.arm} {self.processes} {self.seed}"
        return folder / self.kind / "".join(one if one.isalnum() else "-" for one in words)

    def __str__(self) -> str:
        return f"{self.kind}, {self.processes} processes, seed {self.seed}, {self.fault}, {self.arm}"

    @classmethod
    def of(cls, line: dict[str, Any]) -> Cell:
        return cls(*(line[name] for name in cls.__dataclass_fields__))


def command(cell: Cell, recipe: Path, run: Path) -> list[str]:
    kind, wanted = USED[cell.kind], WANTED[cell.kind]
    chosen = [
        *("train.device=cpu", "train.precision=fp32", f"train.num_processes={cell.processes}"),
        *(f"method.learning_rate={wanted.rate}", f"train.max_steps={wanted.steps}", f"train.seed={cell.seed}"),
        *(f"train.global_batch_size={kind.batch}", f"train.micro_batch_size={kind.batch // cell.processes}"),
        *("train.logging_steps=1", "train.save_steps=20", "train.eval_strategy=steps"),
        *(f"train.eval_steps={wanted.steps // 4}", "evaluate.baselines=false", "evaluate.generate_rows=0"),
        *ARMS[cell.arm],
        *["train.hang_timeout=15s"] * (cell.fault == "hung process"),
    ]
    return [
        *(sys.executable, str(LAUNCHER), "evaluate", str(recipe), "--run-folder", str(run)),
        *(f"--set={one}" for one in chosen),
    ]


def do(folder: Path, cell: Cell, clean_weights: str) -> dict[str, Any]:
    """One run, from the first command to the line about it."""
    fault = FAULTS[cell.fault]
    recipe = prepared(folder, cell.kind, USED[cell.kind]) / "recipe.yaml"
    run = cell.folder(folder)
    shutil.rmtree(run, ignore_errors=True)
    Path(f"{run}.log").unlink(missing_ok=True)
    planted = Planted(guarded=cell.arm == "guard", footprints=str(recipe.parent))
    if isinstance(fault, Inside):
        planted = replace(planted, act=fault.act, first=WANTED[cell.kind].middle, steps=fault.steps)
        began = time.monotonic()
        exits = [ended(cell, recipe, run, planted)]
    else:
        with process_faults.disk(run) if fault.small_disk else nullcontext():
            began = time.monotonic()
            exits = [ended(cell, recipe, run, planted, fault.strike)]
            if exits[0] != 0:
                fault.mend(run)
                exits.append(ended(cell, recipe, run, planted))
    seconds = round(time.monotonic() - began, 1)
    return asdict(cell) | {"exits": exits, **left(run, clean_weights, exits[-1]), "seconds": seconds}


def ended(
    cell: Cell, recipe: Path, run: Path, planted: Planted, strike: process_faults.Strike | None = None
) -> int | str:
    """Give the command, strike once half of the steps are done, and wait for its exit code."""
    variables = os.environ | planted.variables() | {"OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    with Path(f"{run}.log").open("a", encoding="utf-8") as log:
        process = psutil.Popen(command(cell, recipe, run), stdout=log, stderr=log, env=variables)
        deadline = time.monotonic() + LONGEST_SECONDS
        while process.poll() is None:
            if time.monotonic() > deadline:
                process_faults.kill_all(process, run)
                process.wait()
                return "hangs"
            steps = (steps_of(attempt) for attempt in run.glob("attempts/*"))
            if strike is not None and max(steps, default=0) >= WANTED[cell.kind].middle:
                strike(process, run)
                strike = None
            time.sleep(0.05)
    return process.returncode if strike is None else f"{process.returncode} before it was struck"


def left(run: Path, clean_weights: str, exit_code: int | str) -> dict[str, Any]:
    """What the run left, without what only takes room."""
    still = [one for one in psutil.process_iter(["cmdline"]) if is_of(run, one)]
    events = []
    for file in sorted(run.glob("attempts/*/metrics.jsonl")):
        events += [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    said = [line for line in Path(f"{run}.log").read_text(encoding="utf-8").splitlines() if line.strip()]
    score, model = next(run.glob("scores/full-*.json"), None), run / "models" / "full" / "model.safetensors"
    value = None
    if score is not None:
        record = json.loads(score.read_text(encoding="utf-8"))
        value = record["metrics"][record["main_metric"]]["value"]
    weights = hashlib.sha256(model.read_bytes()).hexdigest() if model.exists() else ""
    found = {
        "reason": "" if exit_code == 0 else " / ".join(said[-4:])[:200],
        "value": value,
        "skipped": [event["step"] for event in events if event["kind"] == "skipped"],
        "rollbacks": list(Plan.load(run / "plan" / "full.json").rollbacks),
        "attempts": len(list(run.glob("attempts/*/request.json"))),
        "weights": weights,
        "identical": bool(weights) and weights == (clean_weights or weights),
        "still running": len(still),
    }
    for one in still:
        one.kill()
    for name in ("models", "checkpoints", "data"):
        shutil.rmtree(run / name, ignore_errors=True)
    return found


def is_of(run: Path, process: psutil.Process) -> bool:
    """Whether a training process of the run is there 3 s after its last command ended."""
    if not any(f"{run}/" in word for word in process.info["cmdline"] or ()):
        return False
    return bool(psutil.wait_procs([process], timeout=3)[1])


# ---- all of them -----------------------------------------------------------------------------------------------


def read(folder: Path) -> dict[Cell, dict[str, Any]]:
    file = folder / "faults.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return {Cell.of(line): line for line in map(json.loads, lines)}


def compared(folder: Path, cell: Cell) -> tuple[float, float]:
    """How much better the clean run is, and the standard error of that over the test rows, in the metric's units."""
    files = [next(one.folder(folder).glob("scores/full-*.npz"), None) for one in (cell, cell.clean)]
    if None in files:
        return math.nan, math.nan
    mine, clean = map(Resampled.load, filter(None, files))
    sign = 1 if Plan.load(cell.clean.folder(folder) / "plan" / "full.json").greater_is_better else -1
    return float(sign * (clean.value - mine.value)) + 0.0, float(np.std(clean.draws - mine.draws))


@dataclass(frozen=True)
class Judged:
    """A run against its clean one."""

    line: dict[str, Any]
    lost: float
    error: float
    harmless: float = 0.0
    """What the control of the same kind, processes and seed lost: one update left out; at least 0."""

    def within(self, errors: int, *, of_control: bool = False) -> bool:
        allowed = errors * self.error + (self.harmless if of_control else 0.0)
        return self.line["exits"][-1] == 0 and self.lost <= allowed + 1e-9

    @property
    def odd_exits(self) -> str:
        """Exit codes, unless they are what they should be."""
        first, *again = self.line["exits"]
        is_usual = first == FAULTS[self.line["fault"]].exits and set(again) <= {0}
        return "" if is_usual else " then ".join(map(str, (first, *again)))

    @property
    def in_errors(self) -> float:
        return self.lost / self.error if self.error else math.copysign(math.inf, self.lost) if self.lost else 0.0

    def __str__(self) -> str:
        line = self.line
        went = f"exits {line['exits']}, skipped {line['skipped']}, back to {line['rollbacks']}"
        still = f", {line['still running']} STILL RUNNING" * bool(line["still running"])
        ended = f"lost {self.lost:+.4f} ± {self.error:.4f}{', identical' * line['identical']}"
        return f"{ended}, {went}{still} {line['reason']}"


def table(folder: Path) -> None:
    """Each fault by arm, the runs that did not recover, how many there were of each kind, and the arms."""
    groups: dict[tuple[str, str], list[Judged]] = collections.defaultdict(list)
    for cell, line in read(folder).items():
        harmless = compared(folder, replace(cell, fault=CONTROL, arm="guard"))[0]
        groups[cell.fault, cell.arm].append(Judged(line, *compared(folder, cell), max(0.0, np.nan_to_num(harmless))))
    within = "identical | within 1 SE | within 2 SE | within the control's loss and 1 SE"
    print(f"| fault | arm | runs | {within} | mean loss in SE | unexpected exit codes |")
    print("|---|---|---:|---:|---:|---:|---:|---:|---|")
    for fault, arm in itertools.product(FAULTS, ARMS):
        if runs := groups.get((fault, arm)):
            known = [one.in_errors for one in runs if math.isfinite(one.in_errors)]
            mean = f"{np.mean(known):+.2f}" + f" of {len(known)}" * (len(known) < len(runs)) if known else "-"
            odd = collections.Counter(one.odd_exits for one in runs if one.odd_exits)
            codes = ", ".join(f"{count} with {exits}" for exits, count in odd.items())
            print("| " + " | ".join(map(str, (fault, arm, len(runs), *counts(runs), mean, codes))) + " |")
    print("\nNot recovered, or not as expected:")
    for one in itertools.chain.from_iterable(groups.values()):
        if not one.within(1) or one.odd_exits or one.line["still running"]:
            print(f"- {Cell.of(one.line)}: {one}")
    print("\nRuns:")
    for where, count in collections.Counter((cell.kind, cell.processes, cell.seed) for cell in read(folder)).items():
        print("- {}, {} processes, seed {}: {}".format(*where, count))
    print()
    for arm, of in itertools.product(ARMS, (Inside, Outside)):
        faults = [one for one in FAULTS if isinstance(FAULTS[one], of) and not one.startswith(("clean", "control"))]
        if runs := [run for fault in faults for run in groups.get((fault, arm), ())]:
            same, recovered, _, like = counts(runs)
            said = f"{recovered} of {len(runs)} recovered, {same} of them identical"
            print(f"{arm}, faults from {of.__name__.lower()}: {said}; {like} lost no more than the control")


def counts(runs: list[Judged]) -> tuple[int, int, int, int]:
    """How many are identical, within one standard error, within two, and within one of what the control lost."""
    within = [sum(one.within(most) for one in runs) for most in (1, 2)]
    like = sum(one.within(1, of_control=True) for one in runs)
    return sum(one.line["identical"] for one in runs), *within, like


def run_all(folder: Path, given: argparse.Namespace) -> None:
    for seed, processes, kind, fault in itertools.product(given.seeds, given.processes, given.kinds, given.faults):
        of = FAULTS[fault]
        if isinstance(of, Outside) and processes not in of.processes:
            continue
        if isinstance(of, Outside) and of.small_disk and os.geteuid() != 0:
            print(f"{kind}, {fault}: left out, because mounting a disk needs root", flush=True)
            continue
        cells = [Cell(kind, processes, fault, arm, seed) for arm in given.arms if arm in of.arms]
        for cell in dict.fromkeys(one for its in cells for one in (its.clean, its)):
            if cell in (known := read(folder)):
                continue
            line = do(folder, cell, known.get(cell.clean, {}).get("weights", ""))
            with (folder / "faults.jsonl").open("a", encoding="utf-8") as out:
                out.write(json.dumps(line) + "\n")
            print(f"{cell}: {Judged(line, *compared(folder, cell))} ({line['seconds']} s)", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "table"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kinds", nargs="+", default=list(WANTED), choices=list(WANTED))
    parser.add_argument("--faults", nargs="+", default=list(FAULTS), choices=list(FAULTS))
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2], choices=[1, 2])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    given = parser.parse_args()
    folder = given.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    if given.what == "run":
        run_all(folder, given)
    else:
        table(folder)


if __name__ == "__main__":
    main()
