"""Does another version of fulltune train the same weights, in what time? For changes that should change nothing.

    FULLTUNE_BENCH_DATA=... python bench/two_versions.py OTHER_CHECKOUT/src [--pairs 5] [--steps 50] [--recipe FILE]

Each pair is two whole runs of MiniLM-L6 on Banking77 (batch 32), or of a recipe of your own, one process each, in turn:
`fulltune.run` of the other version and of the one this script belongs to. Ratios are this one over the other: of the
steps, of the whole run, and of the processors' seconds in it, which other work on the machine changes little.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import speed_banking77

HERE = Path(__file__).parents[1] / "src"
PROGRAM = "import sys, fulltune; fulltune.run(sys.argv[1], run_folder=sys.argv[2], listener=lambda event: None)"


def one_run(source: Path, recipe: Path, folder: Path) -> dict[str, float | str]:
    """A whole run by the version whose modules lie in `source`: its seconds, and what its weights hash to."""
    environment = os.environ | {"PYTHONPATH": str(source), "HF_HUB_OFFLINE": "1"}
    began, used = time.perf_counter(), _processor_seconds()
    subprocess.run([sys.executable, "-c", PROGRAM, str(recipe), str(folder)], env=environment, check=True)
    whole, processors = time.perf_counter() - began, _processor_seconds() - used
    (metrics,) = folder.glob("attempts/*/metrics.jsonl")
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    started = next(line["seconds"] for line in lines if line.get("name") == "training")
    ended = max(line["seconds"] for line in lines if line["kind"] == "train")
    weights = (folder / "models" / "full" / "model.safetensors").read_bytes()
    seconds: dict[str, float | str] = {"steps": ended - started, "whole": whole, "processors": processors}
    return seconds | {"weights": hashlib.sha256(weights).hexdigest()[:12]}


def _processor_seconds() -> float:
    """Of all processes that have ended below this one."""
    found = resource.getrusage(resource.RUSAGE_CHILDREN)
    return found.ru_utime + found.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("other", type=Path, help="the `src` folder of the other version")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--recipe", type=Path)
    chosen = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="two-versions-"))
    recipe = chosen.recipe or folder / "recipe.yaml"
    if chosen.recipe is None:
        speed_banking77.write_rows(folder, chosen.steps)
    pairs = []
    for number in range(chosen.pairs):
        versions = {"other": chosen.other.resolve(), "this": HERE}
        order = list(versions) if number % 2 else list(versions)[::-1]
        pair = {name: one_run(versions[name], recipe, folder / f"{name}-{number}") for name in order}
        print(json.dumps({"pair": number + 1, **pair}), flush=True)
        pairs.append(pair)
    for what in ("steps", "whole", "processors"):
        ratios = sorted(float(pair["this"][what]) / float(pair["other"][what]) for pair in pairs)
        print(f"{what}: median ratio {statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})")
    same = all(pair["this"]["weights"] == pair["other"]["weights"] for pair in pairs)
    print("the same weights in every pair" if same else "other weights")


if __name__ == "__main__":
    main()
