"""Runs that are killed with SIGKILL at random moments and resumed end with the weights of the unbroken run.

Real weights (MiniLM-L6), fp32 on a CPU, dropout, a checkpoint every 4 steps. In turn the command itself is killed, what
it started (the training process, or torchrun), the last training process, and all of them; then the same command is
given again.
"""

from __future__ import annotations

import csv
import hashlib
import random
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from bench import process_faults
from bench.public_data import MINILM
from bench.results import Figure
from bench.runs import SMOKE, Records, environment, events, fresh, fulltune, run, script

RECIPE = f"""\
model: {{{{name: {MINILM}}}}}
task: text-classification
data: {{{{train: train.csv, max_length: 32}}}}
method: {{{{kind: full, learning_rate: 1e-4}}}}
train: {{{{num_train_epochs: 3, global_batch_size: 16, micro_batch_size: 8, precision: fp32, device: cpu,
        num_processes: {{processes}},
        logging_steps: 1, save_steps: 4, eval_strategy: steps, eval_steps: 10}}}}
output: .
"""
STRIKES: dict[str, process_faults.Strike] = {
    "the command": process_faults.kill_parent,
    "what it started": process_faults.kill_started,
    "the last process": process_faults.kill_last_rank,
    "all": process_faults.kill_all,
}
QUIET: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}


def write_rows(path: Path, count: int = 300) -> None:
    draw = random.Random(0)
    words = ["river", "stone", "cloud", "paper", "lamp", "garden", "music", "train", "winter", "glass"]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for _ in range(count):
            label = draw.choice(["good", "bad"])
            chosen = draw.choices(words, k=draw.randint(4, 20))
            chosen[draw.randrange(len(chosen))] = "happy" if label == "good" else "broken"
            writer.writerow([" ".join(chosen), label])


def command(recipe: Path, run_folder: Path) -> list[str]:
    return fulltune("train", recipe, "--run-folder", run_folder)


def weights(run_folder: Path) -> str:
    return hashlib.sha256((run_folder / "models" / "full" / "model.safetensors").read_bytes()).hexdigest()


def last_step(run_folder: Path) -> int:
    return max((event["step"] for event in events(run_folder) if event["kind"] == "train"), default=0)


def killed(number: int) -> str:
    return list(STRIKES)[number % len(STRIKES)]


def kill_once(recipe: Path, run_folder: Path, number: int, total: int) -> str:
    """Kill a run after a random step and resume it; returns the hash of its weights, or what went wrong."""
    draw, strike = random.Random(number), STRIKES[killed(number)]
    step = draw.randint(1, total - 1)
    fresh(run_folder)
    process = psutil.Popen(command(recipe, run_folder), env=environment(), **QUIET)
    while last_step(run_folder) < step and process.poll() is None:
        time.sleep(0.02)
    time.sleep(draw.random() * 0.3)
    started = process.children(recursive=True)
    strike(process, run_folder)
    process.wait()
    # They notice within a second or so that the command is gone.
    if psutil.wait_procs(started, timeout=10)[1]:
        return "processes still running"
    again = subprocess.run(command(recipe, run_folder), env=environment(), check=False, **QUIET)
    return weights(run_folder) if again.returncode == 0 else f"exit code {again.returncode}"


def measure(folder: Path, quick: bool) -> Iterator[Figure]:
    write_rows(folder / "train.csv", 60 if SMOKE else 300)
    for processes, kills in ((1, 1 if SMOKE else 2),) if quick else ((1, 25), (2, 25)):
        records = Records(folder / f"{processes}.jsonl")
        recipe = folder / f"recipe-{processes}.yaml"
        recipe.write_text(RECIPE.format(processes=processes), encoding="utf-8")
        unbroken = folder / f"unbroken-{processes}"
        if not (unbroken / "models").exists():
            run(command(recipe, fresh(unbroken)))
        expected, total = weights(unbroken), last_step(unbroken)
        ends = []
        for number in range(kills):
            place = folder / f"killed-{processes}-{number}"
            ends.append(records.get(f"{killed(number)}, {number}", kill_once, recipe, place, number, total))
        name = f"killed runs that end with the unbroken run's weights, of {kills} with {processes} processes"
        yield Figure(name, ends.count(expected), "runs", at_least=kills)


if __name__ == "__main__":
    script(measure, __doc__)
