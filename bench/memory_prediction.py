"""Planned and measured peak memory of training processes, over many models and settings, on the CPU.

    python -m bench.memory_prediction fit FOLDER   # constants of plan/memory.py that the calibration cells ask for

Each cell is a whole `fulltune train` of three steps in processes of its own: weights read from safetensors, checks, dry
run, steps, an evaluation, a checkpoint, the finished model. Planned is the highest phase of its plan; measured is what
the run reports, the growth of the resident memory from before the weights are read to its peak, of the process with the
most. The constants of `fulltune.plan.memory` were fitted on the calibration cells; the bars are about the others.
"""

from __future__ import annotations

import itertools
import json
import random
import shutil
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.public_data import MINILM, SMOLLM2
from bench.random_models import TASKS, TIED, Cell, sized, write_recipe
from bench.results import Figure
from bench.runs import Records, fulltune, run, script

CALIBRATION = (
    sized("c1", "bert", (384, 6, 30000), (8, 128)),
    sized("c2", "bert", (512, 4, 20000), (8, 160), precision="bf16"),
    sized("c3", "roberta", (384, 4, 40000), (6, 128), checkpointing=True),
    sized("c4", "distilbert", (512, 4, 24000), (6, 128), accumulation=2),
    sized("c5", "gpt2", (384, 4, 24000), (4, 128)),
    sized("c6", "gpt2", (384, 6, 16000), (4, 160), precision="bf16", checkpointing=True),
    sized("c7", "llama", (384, 6, 24000), (4, 128), precision="bf16"),
    sized("c8", "llama", (512, 3, 16000), (4, 128), accumulation=2, config=TIED),
    sized("c9", "qwen2", (384, 8, 20000), (4, 128), checkpointing=True),
    sized("c10", "llama", (512, 4, 32000), (3, 256), chunked=True, config=TIED),
    sized("c11", "t5", (384, 3, 16000), (4, 96)),
    sized("c12", "mistral", (512, 4, 24000), (2, 256), weights_dtype="bf16", precision="bf16"),
    sized("c13", "bart", (384, 3, 20000), (4, 96), precision="bf16"),
    sized("c14", "llama", (512, 6, 16000), (4, 128), optim="adamw_8bit"),
    # Larger ones: what grows with the model is told from what does not.
    sized("c15", "bert", (768, 6, 30000), (16, 160)),
    sized("c16", "llama", (576, 24, 40000), (2, 160), precision="bf16", config=TIED, heads=9),
    sized("c17", "gpt2", (768, 8, 40000), (6, 192), precision="bf16"),
    sized("c18", "qwen2", (768, 10, 40000), (4, 256), checkpointing=True),
    sized("c19", "t5", (768, 4, 32000), (6, 160), precision="bf16"),
)
"""The constants were fitted on these."""
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


def measured(cell: Cell, placement: str, processes: int, folder: Path) -> dict[str, Any]:
    """Train a cell; returns the planned and the measured peak in bytes, and what the plan was made of."""
    recipe, run_folder = write_recipe(cell, placement, processes, folder), folder / "run"
    run(fulltune("train", recipe, "--run-folder", run_folder), OMP_NUM_THREADS="1")
    outcome = json.loads(next(run_folder.glob("attempts/*/outcome.json")).read_text(encoding="utf-8"))
    names = ("full", "shapes", "footprint")
    plan, shapes, footprint = (json.loads((run_folder / "plan" / f"{name}.json").read_text("utf-8")) for name in names)
    growth = max(outcome["memory_growth_per_process"] or [outcome["memory_growth_bytes"]])
    shutil.rmtree(folder)
    return {
        "planned": max(plan["memory"]["phases"].values()),
        "growth": growth,
        "cell": asdict(cell),
        "shapes": shapes,
        "footprint": footprint,
        "longest": plan["longest_tokens"],
    }


def errors(
    records: Records, cells: Sequence[Cell], folder: Path, placement: str = "single", processes: int = 1
) -> list[float]:
    """The plan's relative error of each cell; positive where it is too high."""
    found = []
    for cell in cells:
        key = f"{cell.name}, {placement} x {processes}"
        record = records.get(key, measured, cell, placement, processes, folder / "cell")
        found.append(record["planned"] / record["growth"] - 1)
        print(f"  {key}: {record['planned'] / 1e6:,.0f} MB planned, {found[-1]:+.1%}", flush=True)
    return found


def measure(folder: Path, quick: bool) -> Iterator[Figure]:
    records = Records(folder / "cells.jsonl")
    if not quick:
        errors(records, CALIBRATION, folder)
    cells = [cell for cell in SCORED if cell.name in QUICK] if quick else [*SCORED, *drawn(7), *drawn(11)]
    single = errors(records, cells, folder)
    name = f"planned peak memory of {len(cells)} trainings of one process"
    yield Figure(f"{name}, median error", statistics.median(map(abs, single)), "share", at_most=0.1 if quick else 0.06)
    yield Figure(f"{name}, lowest error", min(single), "share", at_least=-0.1)
    yield Figure(f"{name}, highest error", max(single), "share", at_most=0.16)
    within = sum(-0.02 <= error <= 0.12 for error in single) / len(single)
    if quick:
        return
    yield Figure(f"{name}, share between -2 and +12 %", within, "share", at_least=0.85)
    sharded = [error for processes in (2, 4) for error in errors(records, SHARDED, folder, "fsdp2", processes)]
    yield Figure(
        "planned memory of fsdp2's processes (2 and 4), largest error", max(map(abs, sharded)), "share", at_most=0.1
    )


# ---- fitting the constants -----------------------------------------------------------------------------------------


def need(record: Mapping[str, Any]) -> float:
    """The peak in bytes that a plan with today's constants has for a recorded cell of one process."""
    from fulltune.footprint.records import Footprint
    from fulltune.models.shapes import Shapes
    from fulltune.plan import memory
    from fulltune.records.plan import MemorySettings

    cell = Cell(**record["cell"])
    narrow = cell.weights_dtype == "bf16"
    settings = MemorySettings(
        micro_batch_size=cell.rows,
        longest_tokens=record["longest"],
        gradient_accumulation_steps=cell.accumulation,
        precision=cell.precision,
        weights_dtype=cell.weights_dtype,
        optim=cell.optim or ("adamw_bf16" if narrow else "adamw_torch_fused"),
        bf16_rounding="stochastic" if narrow else None,
        activation_checkpointing=cell.checkpointing,
        chunked_loss=cell.chunked,
        eval_batch_size=cell.rows,
    )
    return memory.need(
        Shapes.model_validate(record["shapes"]), Footprint.model_validate(record["footprint"]), settings
    ).peak


def fit(folder: Path) -> None:
    """Print the five best sets of constants for the calibration cells in this folder's records.

    Of a grid, these are the sets with which no cell is planned more than 1 % too low, by their squared relative errors.
    """
    from fulltune.plan import memory

    records = Records(folder / "cells.jsonl").values
    cells = [records[f"{cell.name}, single x 1"] for cell in CALIBRATION]
    found = []
    for first, gaps, state in itertools.product(range(20, 110, 10), range(0, 44, 4), range(0, 16, 2)):
        memory.FIRST_CALLS_BYTES, memory.HELD_SHARE, memory.STATE_SHARE = first * 2**20, gaps / 100, state / 100
        relative = [need(record) / record["growth"] - 1 for record in cells]
        if min(relative) >= -0.01:
            found.append((sum(error**2 for error in relative), first, gaps / 100, state / 100))
    print("squares, FIRST_CALLS_BYTES in MiB, HELD_SHARE, STATE_SHARE")
    for constants in sorted(found)[:5]:
        print("  ".join(f"{value:.3g}" for value in constants))


if __name__ == "__main__":
    if sys.argv[1:2] == ["fit"]:
        fit(Path(sys.argv[2]))
    else:
        script(measure, __doc__)
