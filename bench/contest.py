"""What the speed scripts share: contestants in processes of their own, in turn, and the table of medians.

Each process loads the model, runs two passes without a timer (so that nobody pays for the first call of a kernel),
then trains over the same rows, once. The time is that of the optimizer steps: no start-up, evaluation or saving.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Timed = dict[str, float]
Row = Mapping[str, Any]


def options(description: str | None, steps: int, repeats: int = 5) -> argparse.Namespace:
    """`--repeats`, `--steps`, `--only`, `--folder`, and what the parent tells its children."""
    if "FULLTUNE_BENCH_DATA" not in os.environ:
        sys.exit("FULLTUNE_BENCH_DATA is not set: the data of this benchmark are not part of the project")
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--only", nargs="*", default=None, help="names of contestants")
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--contestant", default=None, help=argparse.SUPPRESS)
    return parser.parse_args()


def prepared(recipe: Path, folder: Path) -> Path:
    """A run folder with data and plan, made by fulltune: everyone trains on these rows."""
    command = [sys.executable, "-m", "fulltune.cli.app", "plan", str(recipe), "--run-folder", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return folder


def rows_of(run: Path) -> list[dict[str, Any]]:
    """The train rows, tokenised by fulltune, as plain lists: `input_ids` and `labels`."""
    from fulltune.inference.store import Rows

    rows = Rows(run / "data" / "train")
    plain = []
    for row in rows:
        ids, labels = row["input_ids"].tolist(), row["labels"]
        plain.append({"input_ids": ids, "labels": labels if isinstance(labels, int) else labels.tolist()})
    return plain


def batches_of(rows: Sequence[Row], size: int, epochs: int = 1) -> list[list[int]]:
    """The batches that fulltune makes, for the bare loop: neither has less padding."""
    from fulltune.train.loop.sampler import GlobalBatchSampler

    sampler = GlobalBatchSampler([len(row["input_ids"]) for row in rows], size, size, 42, True)
    return list(sampler.steps(0, epochs * sampler.steps_per_epoch))


def timed(train: Callable[[], None], rows: Sequence[Row]) -> Timed:
    """Time a training over all rows."""
    started = time.perf_counter()
    train()
    return measured(time.perf_counter() - started, rows)


def measured(seconds: float, rows: Sequence[Row]) -> Timed:
    """What a contestant reports."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    tokens = sum(len(row["input_ids"]) for row in rows)
    return {
        "examples_per_second": len(rows) / seconds,
        "tokens_per_second": tokens / seconds,
        "peak_mb": peak / 1e6,
        "seconds": seconds,
    }


def wait_for_gpu() -> None:
    """Until what was queued is done."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def train_with(trainer: Any, rows: Sequence[Row]) -> Timed:
    """Time the steps of a `transformers.Trainer`."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            wait_for_gpu()
            self.began = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == state.max_steps:  # earlier it would keep the next step waiting
                wait_for_gpu()
                self.ended = time.perf_counter()

    clock = Clock()
    trainer.add_callback(clock)
    trainer.train()
    return measured(clock.ended - clock.began, rows)


def train_with_fulltune(recipe: Path, run: Path, rows: Sequence[Row]) -> Timed:
    """Time the steps of fulltune's worker, from the lines that it writes."""
    from fulltune import api
    from fulltune.records.plan import Plan
    from fulltune.train.hooks import Hooks
    from fulltune.train.request import Request
    from fulltune.train.worker import main as worker

    job = api.job(recipe, run_folder=run, listener=lambda event: None)
    plan = Plan.load(run / "plan" / "full.json")
    for name in ("attempts", "checkpoints", "models"):
        shutil.rmtree(run / name, ignore_errors=True)
    request = Request(run_folder=str(run), recipe=job.recipe, plan=plan, attempt=1, checkpoint=None, parent_pid=None)
    request.folder.mkdir(parents=True)
    request.checkpoints.mkdir(parents=True)
    outcome = worker.run(request, Hooks())
    if outcome.status != "done" or outcome.steps != plan.total_steps:
        sys.exit(f"{outcome.status}: {outcome.reason}")
    lines = [json.loads(line) for line in (request.folder / "metrics.jsonl").open(encoding="utf-8")]
    began = next(line["seconds"] for line in lines if line.get("name") == "training")
    ended = next(line["seconds"] for line in lines if line["kind"] == "train" and line["step"] == plan.total_steps)
    for line in lines:
        for check in line.get("checks", ()):
            print(f"{check['name']}: {check['result']}", file=sys.stderr)
    return measured(ended - began, rows)


def run_all(
    script: str, contestants: Sequence[str], chosen: argparse.Namespace, run: Path, figure: str, ours: str = "fulltune"
) -> None:
    """Run the contestants in turn, `--repeats` times, and print medians and ratios to fulltune."""
    names = [name for name in contestants if chosen.only is None or name in chosen.only]
    found: dict[str, list[Timed]] = {name: [] for name in names}
    for repeat in range(chosen.repeats):
        for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
            command = [sys.executable, script, "--contestant", name, "--folder", str(run)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(f"{name}\n{done.stderr}")
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
            print(json.dumps({"repeat": repeat + 1, "contestant": name, **found[name][-1]}), flush=True)
    medians = {name: statistics.median(one[figure] for one in all_of) for name, all_of in found.items()}
    print(f"\n{'contestant':<22} {figure.replace('_', ' '):>20} {'lowest to highest':>20} {'ours':>7} {'peak MB':>8}")
    for name, all_of in found.items():
        values = sorted(one[figure] for one in all_of)
        # In one repetition the machine is the same for all: the ratio is the median of theirs.
        pairs = zip(found.get(ours, []), all_of, strict=False)
        ratios = [one[figure] / other[figure] for one, other in pairs]
        ratio = f"{statistics.median(ratios):.2f}x" if ratios else ""
        peak = statistics.median(one["peak_mb"] for one in all_of)
        spread = f"{values[0]:.1f} to {values[-1]:.1f}"
        print(f"{name:<22} {medians[name]:>20.1f} {spread:>20} {ratio:>7} {peak:>8.0f}")


def folder_of(chosen: argparse.Namespace, name: str) -> Path:
    return Path(chosen.folder or tempfile.mkdtemp(prefix=f"{name}-")).absolute()
