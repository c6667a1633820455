"""The part about speed: fulltune against transformers' Trainer and TRL, in turn, on the same rows and the same card.

Each contestant is a process of its own, `python -m bench.gpu_day.speed NAME RUN PRECISION`, that trains once over the
rows that fulltune has tokenised. The time is that of the steps, with two passes before it; padding does not count.
"""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench import training_speed
from bench.gpu_day.cell import save_random
from bench.gpu_day.day import Rows
from bench.gpu_day.here import Here
from bench.gpu_day.parts import half_precision
from bench.random_models import TIED, Cell, sized, write_recipe
from bench.results import ROOT
from bench.runs import fresh

OURS = "fulltune"
LEAST_REPEATS, MOST_REPEATS = 2, 5
RACES = {
    "llama 150 M": (
        sized("speed-llama", "llama", (576, 30, 49152), (8, 512), config=TIED, heads=9),
        (OURS, "trainer-tuned", "trl"),
        30,
    ),
    "bert 110 M": (
        sized("speed-bert", "bert", (768, 12, 30000), (32, 128)),
        (OURS, "trainer", "trainer-tuned"),
        40,
    ),
}
"""Model, contestants and steps; tuned contestants group rows of similar length."""
TINY = {"tiny llama": (sized("tiny", "llama", (64, 2, 2000), (4, 48)), (OURS, "trainer-tuned", "trl"), 4)}


def compare(here: Here, folder: Path, rows: Rows) -> None:
    """Repeat each race with the contestants in turn, and take medians of the ratios within a repetition."""
    fresh(folder)
    precision = half_precision(here) if here.cards else "fp32"
    for number, (case, (cell, names, steps)) in enumerate((RACES if here.cards else TINY).items()):
        run = _prepared(here, replace(cell, precision=precision), steps, folder / f"{number}")
        names_here = [name for name in names if name != "trl" or "trl" in here.packages]
        missing = "" if "trl" in names_here or "trl" not in names else "TRL is not installed"
        repeats = (LEAST_REPEATS, MOST_REPEATS) if here.cards else (1, 1)
        half = rows.left_seconds * (0.55 if number == 0 else 1)
        _race(here, case, names_here, run, precision, repeats, rows, rows.left_seconds - half, missing)


def _race(
    here: Here,
    case: str,
    names: list[str],
    run: Path,
    precision: str,
    repeats: tuple[int, int],
    rows: Rows,
    leave_seconds: float,
    missing: str,
) -> None:
    """Repeat while there is time; add a row for each repetition, and a last one with the medians."""
    others = [name for name in names if name != OURS]
    ratios: dict[str, list[float]] = {name: [] for name in others}
    took = 0.0
    for repeat in range(repeats[1]):
        before = rows.left_seconds
        if repeat >= repeats[0] and before - leave_seconds < 1.2 * took:
            break
        turn = repeat % len(names)
        speeds = {name: _contestant(name, run, precision) for name in names[turn:] + names[:turn]}
        took = before - rows.left_seconds
        for name in others:
            ratios[name].append(speeds[OURS] / speeds[name])
        figures: dict[str, Any] = {f"{name}_tokens_per_second": speeds[name] for name in names}
        figures |= {f"against_{name}_ratio": ratios[name][-1] for name in others}
        if here.cards:
            rows.add(f"{case}, {precision}, repetition {repeat + 1}", figures)
        else:
            note = "each ran for a few steps on the CPU, which says nothing of their speed"
            rows.add(f"{case}, the same code", dict.fromkeys(figures), None, "; ".join(filter(None, (note, missing))))
    if here.cards:
        medians = {f"against_{name}_ratio": statistics.median(ratios[name]) for name in others}
        rows.add(f"{case}, {precision}, median", medians, None, missing)


def _prepared(here: Here, cell: Cell, steps: int, folder: Path) -> Path:
    """Prepare and plan a run over rows of many lengths."""
    device = "cuda" if here.cards else "cpu"
    extra = {"oversubscribe": False, "chunked_loss": None}
    recipe = write_recipe(
        cell, "single", 1, folder, save_random, device=device, max_steps=None, num_train_epochs=1, **extra
    )
    draw = random.Random(0)
    words = ("sun", "rain", "snow", "wind", "fog", "hail")
    with (folder / "train.jsonl").open("w", encoding="utf-8") as file:
        for number in range(steps * cell.rows):
            # A word is about three tokens of this tokenizer.
            text = " ".join(draw.choices(words, k=draw.randint(cell.length // 24, cell.length // 3)))
            if cell.task == "causal-lm":
                row = {"prompt": f"{number}:", "completion": text}
            else:
                row = {"text": f"{number} {text}", "label": ("one", "two")[number % 2]}
            file.write(json.dumps(row) + "\n")
    return training_speed.prepared(recipe, folder / "run")


def _contestant(name: str, run: Path, precision: str) -> float:
    """Run a contestant in a process of its own; returns its tokens per second."""
    command = [sys.executable, "-m", "bench.gpu_day.speed", name, str(run), precision]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stdout, done.stderr, file=sys.stderr)
        sys.exit(f"{name}: {(done.stderr.strip().splitlines() or ['nothing was written'])[-1]}")
    return json.loads(done.stdout.splitlines()[-1])["tokens_per_second"]


# ---- in a contestant's process -------------------------------------------------------------------------------------


def _trained(name: str, run: Path, precision: str) -> training_speed.Timed:
    rows = training_speed.rows_of(run)
    if name == OURS:
        return training_speed.train_with_fulltune(run.parent / "recipe.yaml", run, rows)
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    by_token = isinstance(rows[0]["labels"], list)
    kind: Any = AutoModelForCausalLM if by_token else AutoModelForSequenceClassification
    model = kind.from_pretrained(run.parent / "model", dtype=torch.float32).to(device).train()
    settings = json.loads((run.parent / "recipe.yaml").read_text(encoding="utf-8"))["train"]
    types = {"bf16": torch.bfloat16, "fp16": torch.float16}
    with torch.autocast(device, types.get(precision, torch.bfloat16), enabled=precision in types):
        batch = training_speed.collate(rows[: settings["micro_batch_size"]])
        for _ in range(2):  # nobody pays for the first call of a kernel
            model(**{name: tensor.to(device) for name, tensor in batch.items()}).loss.backward()
    model.zero_grad()
    arguments = {
        "output_dir": str(run / name),
        "num_train_epochs": 1,
        "per_device_train_batch_size": settings["micro_batch_size"],
        "use_cpu": device == "cpu",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": precision == "bf16",
        "fp16": precision == "fp16",
    }
    if name == "trainer-tuned":
        arguments |= {"train_sampling_strategy": "group_by_length", "optim": "adamw_torch_fused"}
    if name != "trl":
        return training_speed.train_with(_trainer(model, rows, arguments), rows)
    # Without activation checkpointing, which fulltune does not use here either.
    arguments |= {"gradient_checkpointing": False, "train_sampling_strategy": "group_by_length"}
    tokenizer = AutoTokenizer.from_pretrained(run.parent / "model")
    return training_speed.train_with(training_speed.trl(model, tokenizer, rows, arguments), rows)


def _trainer(model: Any, rows: list[dict[str, Any]], arguments: dict[str, Any]) -> Any:
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments

    columns = {name: [row[name] for row in rows] for name in ("input_ids", "labels")}
    return Trainer(
        model=model,
        args=TrainingArguments(**arguments),
        train_dataset=Dataset.from_dict(columns),
        data_collator=training_speed.collate,
    )


if __name__ == "__main__":
    print(json.dumps(_trained(sys.argv[1], Path(sys.argv[2]), sys.argv[3])), flush=True)
