"""Planned and measured peak memory of training processes, over many models and settings, on the CPU.

Each cell is a whole `fulltune train` of three steps in processes of its own: weights read from safetensors, checks, dry
run, steps, an evaluation, a checkpoint, the finished model. Planned is the highest phase of its plan; measured is what
the run reports, the growth of the resident memory from before the weights are read to its peak, of the process with the
most. The constants of `fulltune.plan.memory` were fitted on other cells.
"""

from __future__ import annotations

import json
import random
import shutil
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.public_data import MINILM, SMOLLM2, is_installed
from bench.random_models import TASKS, TIED, Cell, sized, write_recipe
from bench.results import Figure
from bench.runs import SMOKE, Records, fulltune, run, script

SCORED = (
    Cell("minilm", MINILM, rows=16, length=128),
    Cell("minilm-bf16", MINILM, rows=32, length=96, precision="bf16"),
    Cell("smollm2", SMOLLM2, task="causal-lm", rows=1, length=128, precision="bf16"),
    sized("bert-wide", "bert", (768, 3, 20000), (4, 128)),
    sized("bert-deep", "bert", (256, 12, 30000), (8, 128)),
    sized("bert-long", "bert", (256, 4, 30000), (3, 512)),
    sized("bert-bf16", "bert", (384, 6, 30000), (12, 128), precision="bf16"),
    sized("bert-checkpointing", "bert", (512, 6, 24000), (8, 128), checkpointing=True),
    sized("bert-no-dropout", "bert", (384, 6, 30000), (8, 128), config={"attention_probs_dropout_prob": 0.0}),
    sized("roberta", "roberta", (512, 4, 30000), (6, 128)),
    sized("roberta-accumulation", "roberta", (384, 6, 30000), (6, 96), accumulation=3),
    sized("distilbert", "distilbert", (512, 6, 24000), (8, 96)),
    sized("distilbert-8bit", "distilbert", (512, 6, 40000), (8, 96), optim="adamw_8bit"),
    sized("gpt2", "gpt2", (512, 4, 20000), (3, 128)),
    sized("gpt2-bf16", "gpt2", (384, 6, 30000), (4, 128), precision="bf16"),
    sized("gpt2-checkpointing", "gpt2", (512, 8, 16000), (3, 192), checkpointing=True),
    sized("gpt2-chunked", "gpt2", (512, 4, 40000), (4, 192), chunked=True),
    sized("llama-untied", "llama", (384, 4, 30000), (4, 128)),
    sized("llama-tied", "llama", (512, 4, 30000), (3, 128), config=TIED),
    sized("llama-accumulation", "llama", (384, 6, 24000), (2, 160), accumulation=4, precision="bf16"),
    sized("llama-adafactor", "llama", (640, 6, 24000), (3, 128), optim="adafactor"),
    sized("llama-bf16-weights", "llama", (768, 4, 24000), (3, 160), weights_dtype="bf16", precision="bf16"),
    sized("llama-packed", "llama", (384, 6, 20000), (4, 128), packed=True),
    sized("llama-all", "llama", (512, 8, 32000), (4, 192), checkpointing=True, chunked=True, optim="adamw_8bit"),
    sized("qwen2", "qwen2", (512, 4, 24000), (3, 128), precision="bf16"),
    sized("qwen2-chunked", "qwen2", (384, 6, 50000), (4, 160), chunked=True, config=TIED),
    sized("mistral", "mistral", (512, 4, 24000), (3, 128)),
    sized("mistral-checkpointing", "mistral", (384, 10, 24000), (3, 160), checkpointing=True, precision="bf16"),
    sized("t5", "t5", (512, 2, 20000), (4, 96)),
    sized("t5-bf16", "t5", (384, 4, 24000), (6, 64), precision="bf16"),
    sized("bart", "bart", (512, 2, 24000), (4, 96)),
    sized("bart-checkpointing", "bart", (384, 4, 24000), (4, 128), checkpointing=True),
)


SHARDED = (
    sized("llama", "llama", (512, 8, 16000), (4, 128)),
    sized("llama-tied-bf16", "llama", (512, 10, 32000), (2, 128), precision="bf16", config=TIED),
    sized("bert-bf16-accumulation", "bert", (768, 5, 20000), (4, 128), precision="bf16", accumulation=2),
    sized("gpt2", "gpt2", (512, 9, 24000), (2, 128)),
)
"""Trained with fsdp2 by 2 and by 4 processes."""
QUICK = ("minilm-bf16", "gpt2", "llama-tied")


def drawn(seed: int, count: int = 14) -> list[Cell]:
    """Cells that nobody chose, large enough for 300 MB: below that the libraries' own noise is several percent."""
    random_ = random.Random(seed)
    cells = []
    for number in range(count):
        kind = random_.choice(list(TASKS))
        size = (random_.choice((384, 512, 640, 768)), random_.randint(2, 8), random_.randrange(16000, 40000, 8))
        rows, length = random_.randint(2, 8), random_.randrange(64, 200, 8)
        while rows * length > 900:
            rows -= 1
        writes = TASKS[kind] != "text-classification"
        cells.append(
            sized(
                f"drawn-{seed}-{number:02d}",
                kind,
                size,
                (rows, length),
                precision=random_.choice(("fp32", "bf16")),
                checkpointing=random_.random() < 0.3,
                accumulation=random_.choice((1, 1, 2)),
                optim=random_.choice((None, None, "adamw_8bit")),
                chunked=writes and random_.random() < 0.3,
            )
        )
    return cells


def measured(cell: Cell, placement: str, processes: int, folder: Path) -> dict[str, int]:
    """Train a cell; returns the planned and the measured peak in bytes."""
    recipe, run_folder = write_recipe(cell, placement, processes, folder), folder / "run"
    run(fulltune("train", recipe, "--run-folder", run_folder), OMP_NUM_THREADS="1")
    outcome = json.loads(next(run_folder.glob("attempts/*/outcome.json")).read_text(encoding="utf-8"))
    plan = json.loads((run_folder / "plan" / "full.json").read_text(encoding="utf-8"))
    growth = max(outcome["memory_growth_per_process"] or [outcome["memory_growth_bytes"]])
    shutil.rmtree(folder)
    return {"planned": max(plan["memory"]["phases"].values()), "growth": growth}


def errors(
    records: Records, cells: Sequence[Cell], folder: Path, placement: str = "single", processes: int = 1
) -> list[float]:
    """The plan's relative error of each cell; positive where it is too high."""
    relative = []
    for cell in cells:
        key = f"{cell.name}, {placement} x {processes}"
        record = records.get(key, measured, cell, placement, processes, folder / "cell")
        relative.append(record["planned"] / record["growth"] - 1)
        print(f"  {key}: {record['planned'] / 1e6:,.0f} MB planned, {relative[-1]:+.1%}", flush=True)
    return relative


def measure(folder: Path, quick: bool) -> Iterator[Figure]:
    records = Records(folder / "cells.jsonl")
    cells = [cell for cell in SCORED if cell.name in QUICK] if quick else [*SCORED, *drawn(7), *drawn(11)]
    cells = [sized("smoke", "bert", (64, 1, 1000), (2, 16))] if SMOKE else cells
    cells = [cell for cell in cells if is_installed(cell.kind)]
    single = errors(records, cells, folder)
    name = f"planned peak memory of {len(cells)} trainings of one process"
    yield Figure(f"{name}, median error", statistics.median(map(abs, single)), "share", at_most=0.1 if quick else 0.06)
    yield Figure(f"{name}, lowest error", min(single), "share", at_least=-0.02)
    yield Figure(f"{name}, highest error", max(single), "share", at_most=0.12)
    if quick:
        return
    sharded = [error for processes in (2, 4) for error in errors(records, SHARDED, folder, "fsdp2", processes)]
    yield Figure(
        "planned memory of fsdp2's processes (2 and 4), largest error", max(map(abs, sharded)), "share", at_most=0.1
    )


if __name__ == "__main__":
    script(measure, __doc__)
