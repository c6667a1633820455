"""How often does the run guard call a clean step suspect? Whole runs with nothing planted, of many kinds.

    FULLTUNE_BENCH_DATA=... python bench/clean_steps.py run FOLDER [--kinds ...] [--seeds 1 2]
    python bench/clean_steps.py count FOLDER

`run` trains each kind with the guard off, logs each step's loss and gradient norm, and keeps them in
`FOLDER/steps.jsonl`, so that `count` can ask the guard of today about all of them again: steps that it would skip, and
how often it would go back. Kinds in `TUNING` were looked at while the thresholds were settled; the others were not.
Tiny models are random ones of two layers; MiniLM-L6 is real.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # for the tests' tiny models

from public_data import MINILM, answer_lengths, banking77, shakespeare, wnut17
from tests import tiny

from fulltune.train.loop import step_guard

CLASSES = "task: text-classification\ndata: {train: train.csv, eval: eval.csv, test: test.csv, label: category}\n"
TAGS = "task: token-classification\ndata: {train: train.conll, eval: eval.conll, test: test.conll}\n"
NUMBERS = (
    "task: text-classification\n"
    "data: {train: train.csv, eval: eval.csv, test: test.csv, text: text, label: log_words}\n"
)
ANSWERS = "task: {task}\ndata: {{train: train.csv, {columns}, max_length: 128, truncation_strategy: drop}}\n"
PROMPTS = ANSWERS.format(task="causal-lm", columns="prompt: text, completion: category")
WRITTEN = ANSWERS.format(task="seq2seq", columns="source: text, target: category")
RAW = "task: causal-lm\ndata: {train: input.txt, text_rows: section, max_length: 128}\n"


@dataclass(frozen=True)
class Kind:
    """A kind of run."""

    model: str
    """A tiny model's kind, or `minilm`."""
    recipe: str
    write: Callable[[Path, int], None]
    rows: int
    rates: tuple[float, ...]
    steps: int = 1000
    method: str = "full"
    batch: int = 32


TINY_RATES = (1e-3, 3e-3)
KINDS = {
    "classes-bert": Kind("bert", CLASSES, banking77, 2000, TINY_RATES),
    "classes-roberta-few": Kind("roberta", CLASSES, banking77, 200, (1e-3,)),
    "classes-minilm": Kind("minilm", CLASSES, banking77, 2000, (5e-5, 2e-4, 8e-4), 315),
    "classes-minilm-few": Kind("minilm", CLASSES, banking77, 200, (2e-4,), 300, batch=16),
    "classes-minilm-lora": Kind("minilm", CLASSES, banking77, 2000, (8e-4,), 315, "lora"),
    "tags-distilbert": Kind("distilbert", TAGS, wnut17, 1000, TINY_RATES),
    "tags-minilm": Kind("minilm", TAGS, wnut17, 1000, (2e-4,), 320),
    "numbers-bert": Kind("bert", NUMBERS, answer_lengths, 1500, TINY_RATES),
    "prompts-llama": Kind("llama", PROMPTS, banking77, 1000, TINY_RATES, batch=16),
    "prompts-qwen2-few": Kind("qwen2", PROMPTS, banking77, 100, (3e-3,), batch=8),
    "raw-gpt2": Kind("gpt2", RAW, shakespeare, 1500, TINY_RATES, batch=8),
    "raw-opt": Kind("opt", RAW, shakespeare, 1500, (1e-3,), batch=8),
    "written-t5": Kind("t5", WRITTEN, banking77, 1000, TINY_RATES, batch=16),
    "written-bart": Kind("bart", WRITTEN, banking77, 1000, (1e-3,), batch=16),
    "prompts-mistral-8": Kind("mistral", PROMPTS, banking77, 2000, (1e-3,), batch=4),
}
TUNING = ("classes-bert", "classes-minilm", "prompts-llama", "classes-minilm-few", "tags-distilbert")


def prepared(folder: Path, name: str, kind: Kind | None = None) -> Path:
    """The folder of a kind, by default the one with this name, with its rows, model and recipe."""
    kind, place = kind or KINDS[name], folder / name
    if not (place / "recipe.yaml").exists():
        place.mkdir(parents=True, exist_ok=True)
        kind.write(place, kind.rows)
        model = MINILM if kind.model == "minilm" else tiny.save_model(place / "model", kind.model)
        (place / "recipe.yaml").write_text(f"model: {model}\n{kind.recipe}", encoding="utf-8")
    return place


def train(folder: Path, name: str, rate: float, seed: int) -> dict[str, Any]:
    """One run's steps."""
    kind, place = KINDS[name], prepared(folder, name)
    run = place / f"{rate:g}-{seed}"
    settings = {
        "method.kind": kind.method,
        "method.learning_rate": rate,
        "train.max_steps": kind.steps,
        "train.global_batch_size": kind.batch,
        "train.logging_steps": 1,
        "train.eval_strategy": "steps",
        "train.eval_steps": kind.steps,
        "train.seed": seed,
        "train.skip_suspect_steps": False,
        "train.max_rollbacks": 0,
    }
    chosen = [f"--set={key}={value}" for key, value in settings.items()]
    program = [sys.executable, "-m", "fulltune.cli.app", "train", str(place / "recipe.yaml"), "--run-folder", str(run)]
    with (place / f"{rate:g}-{seed}.txt").open("w", encoding="utf-8") as log:
        ended = subprocess.run([*program, *chosen], check=False, stdout=log, stderr=log, env=os.environ)
    steps = []
    for path in sorted(run.glob("attempts/*/metrics.jsonl")):
        lines = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
        steps += [(line["loss"], line["grad_norm"]) for line in lines if line["kind"] == "train"]
    return {"kind": name, "rate": rate, "seed": seed, "ended": ended.returncode, "steps": steps}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "count"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    file = given.folder.absolute() / "steps.jsonl"
    if given.what == "count":
        count(file)
        return
    known = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []
    done = {(one["kind"], one["rate"], one["seed"]) for one in known}
    for seed, name in itertools.product(given.seeds, given.kinds):
        for rate in KINDS[name].rates:
            if (name, rate, seed) not in done:
                found = train(file.parent, name, rate, seed)
                with file.open("a", encoding="utf-8") as out:
                    out.write(json.dumps(found) + "\n")
                print(f"{name} {rate:g} seed {seed}: {len(found['steps'])} steps, exit {found['ended']}", flush=True)


def count(file: Path) -> None:
    """What the guard of today says of them: steps that it would skip, and times that it would go back."""
    print("| kind | rate | seed | steps | skipped | back | |")
    print("|---|---:|---:|---:|---:|---:|---|")
    totals = [0, 0, 0, 0]
    for line in file.read_text(encoding="utf-8").splitlines():
        run = json.loads(line)
        memory, skipped, back, said = step_guard.StepHistory(), 0, 0, ""
        for number, (loss, norm) in enumerate(run["steps"], start=1):
            judged = step_guard.judge(memory, number, loss, norm)
            memory = step_guard.StepHistory() if judged.action == "stop" else judged.history
            skipped, back = skipped + (judged.action == "skip"), back + (judged.action == "stop")
            said = said or judged.reason
        known = "" if run["kind"] in TUNING else "not looked at before"
        print(
            f"| {run['kind']} | {run['rate']:g} | {run['seed']} | {len(run['steps'])} | {skipped} | {back} | "
            f"{said or known} |"
        )
        totals = [one + more for one, more in zip(totals, (1, len(run["steps"]), skipped, back), strict=True)]
    runs, steps, skipped, back = totals
    print(f"{runs} runs, {steps:,} clean steps: {skipped} skipped, {back} times back")


if __name__ == "__main__":
    main()
