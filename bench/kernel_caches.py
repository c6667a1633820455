"""Compiled kernels that a worker keeps: memory and time of the same run with `spawn.KERNEL_CACHES`, and with the 1,024
that the libraries keep by default, on batches of many lengths.

    FULLTUNE_BENCH_DATA=... python bench/kernel_caches.py FOLDER [--pairs 3] [--steps 150] [--precision bf16]

MiniLM-L6 on Banking77: whole runs of the command line, in turn.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from clean_steps import prepared

from fulltune.train.parent.spawn import KERNEL_CACHES

ARMS = {"few": {}, "1024": dict.fromkeys(KERNEL_CACHES, "1024")}


def run(folder: Path, name: str, steps: int, precision: str) -> tuple[float, float]:
    """Peak memory in MiB, and seconds of training."""
    place = prepared(folder, "classes-minilm")
    settings = {"max_steps": steps, "precision": precision, "device": "cpu", "eval_steps": steps}
    settings |= {"global_batch_size": 32, "micro_batch_size": 32, "eval_strategy": "steps", "eval_on_start": "false"}
    command = [sys.executable, "-m", "fulltune.cli.app", "train", str(place / "recipe.yaml")]
    command += ["--run-folder", str(place / name), *(f"--set=train.{key}={value}" for key, value in settings.items())]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ | ARMS[name.split("-")[0]])
    (outcome,) = (json.loads(one.read_text()) for one in (place / name).glob("attempts/*/outcome.json"))
    return outcome["peak_memory_bytes"] / 2**20, outcome["train_seconds"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--precision", default="bf16")
    given = parser.parse_args()
    found: dict[str, list[tuple[float, float]]] = {arm: [] for arm in ARMS}
    for pair in range(given.pairs):
        for arm in ARMS if pair % 2 else reversed(ARMS):
            found[arm].append(
                run(given.folder.absolute(), f"{arm}-{given.precision}-{pair}", given.steps, given.precision)
            )
            print(arm, found[arm][-1], flush=True)
    memory = {arm: statistics.median(mib for mib, _ in runs) for arm, runs in found.items()}
    times = [few / many for (_, few), (_, many) in zip(*found.values(), strict=True)]
    print(f"peak {memory['few']:.0f} MiB where 1,024 have {memory['1024']:.0f}; ", end="")
    print(f"time {statistics.median(times):.3f} (ratio; {', '.join(f'{one:.3f}' for one in sorted(times))})")


if __name__ == "__main__":
    main()
