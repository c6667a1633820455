"""The part about two cards: an all-reduce by NCCL, and each placement against one process."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.gpu_day.cell import ZERO, save_random
from bench.gpu_day.day import Rows
from bench.gpu_day.here import Here
from bench.gpu_day.parts import half_precision
from bench.random_models import TIED, Cell, sized, write_recipe
from bench.results import ROOT
from bench.runs import fresh

from fulltune.plan.memory import CUDA_CONTEXT_BYTES

PLACES = (("single", 1), ("ddp", 2), ("fsdp2", 2), ("zero2", 2), ("zero3", 2))
LARGE = sized("llama 150 M", "llama", (576, 30, 49152), (4, 512), config=TIED, heads=9)
TINY = sized("tiny llama", "llama", (64, 2, 2000), (2, 32))
STAND_INS = PLACES[::2]
FIGURES = ("planned_bytes", "highest_bytes", "planned_error", "largest_loss_error", "tokens_per_second")
BOUND = {"fp32": 1e-3, "bf16": 0.05, "fp16": 0.05}
"""Largest relative difference of a loss; DeepSpeed also keeps its weights in 16 bits."""


def two(here: Here, folder: Path, rows: Rows) -> None:
    """Run an all-reduce, then the same three steps in each placement; one process accumulates two micro batches."""
    from fulltune import selfcheck

    fresh(folder)
    passed, text = selfcheck.check_all_reduce("cuda" if here.cards else "cpu")
    result = f"{'NCCL' if here.cards else 'on the CPU, gloo'}: {text}"
    rows.add("all-reduce of two processes", {"all_reduce": text if here.cards else None}, passed, result)
    precision = half_precision(here) if here.cards else "fp32"
    cell, alone = replace(LARGE if here.cards else TINY, precision=precision), dict[str, Any]()
    for placement, processes_here in PLACES if here.cards else STAND_INS:
        case = f"{cell.name}, {precision}, {placement} x {processes_here}"
        if placement in ZERO and "deepspeed" not in here.packages:
            rows.add(case, dict.fromkeys(FIGURES), None, "deepspeed is not installed")
            continue
        own_cell = replace(cell, accumulation=2) if processes_here == 1 else cell
        run = _trained(here, own_cell, placement, processes_here, folder / placement)
        if isinstance(run, str):
            rows.add(case, dict.fromkeys(FIGURES), False, run)
            continue
        alone = alone or run["losses"]
        largest = max(abs(run["losses"][step] / alone[step] - 1) for step in alone)
        figures = {name: run.get(name) for name in FIGURES} | {"largest_loss_error": largest}
        good = largest <= BOUND[precision]
        if here.cards:
            rows.add(case, figures, good)
        else:
            highest, planned = run["highest_bytes"] / 1e6, run["planned_bytes"] / 1e6
            note = f"on the CPU: losses off by {largest:.1e}; {planned:,.0f} MB planned, {highest:,.0f} MB measured"
            rows.add(case, dict.fromkeys(FIGURES), good, note)


def _trained(here: Here, cell: Cell, placement: str, processes: int, folder: Path) -> dict[str, Any] | str:
    """Train with the command line; returns figures, or a sentence about what went wrong."""
    device = "cuda" if here.cards else "cpu"
    recipe = write_recipe(
        cell, placement, processes, folder, save_random, device=device, oversubscribe=not here.cards, logging_steps=1
    )
    run = folder / "run"
    command = [sys.executable, "-m", "fulltune.cli.app", "train", str(recipe), "--run-folder", str(run)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stdout, done.stderr, file=sys.stderr)
        return (done.stderr.strip().splitlines() or ["nothing was written"])[-1]
    outcome = json.loads(next(run.glob("attempts/*/outcome.json")).read_text(encoding="utf-8"))
    plan = json.loads((run / "plan" / "full.json").read_text(encoding="utf-8"))
    planned = max(plan["memory"]["phases"].values())
    highest = max(outcome["memory_growth_per_process"] or [outcome["memory_growth_bytes"]])
    outside = CUDA_CONTEXT_BYTES if here.cards else 0  # what a process reports is its allocator's
    lines = (run / "attempts" / next(run.glob("attempts/*")).name / "metrics.jsonl").read_text(encoding="utf-8")
    steps = [line for line in map(json.loads, lines.splitlines()) if line["kind"] == "train"]
    return {
        "planned_bytes": planned,
        "highest_bytes": highest,
        "planned_error": (planned - outside) / highest - 1,
        "losses": {line["step"]: line["loss"] for line in steps},
        "tokens_per_second": outcome["tokens_per_second"],
    }
