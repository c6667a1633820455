"""Whether another version of fulltune trains the same weights, and in what time: for changes that change nothing.

    FULLTUNE_BENCH_DATA=... python bench/two_versions.py OTHER_CHECKOUT/src [--pairs 5] [--steps 50] [--recipe FILE]

Each pair is two whole runs of MiniLM-L6 on Banking77 (batch 32), or of another recipe, one process each, in turn:
`fulltune.run` of the other version and of the one this script belongs to. Ratios are this version over the other: of
the steps, of the whole run, and of its CPU seconds, which other work on the machine changes little. Exits 1 when the
weights of a pair differ.
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

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "src")]

from bench import training_speed  # noqa: E402  # found by the path that was set above

HERE = Path(__file__).parents[1] / "src"
PROGRAM = "import sys, fulltune; fulltune.run(sys.argv[1], run_folder=sys.argv[2], listener=lambda event: None)"


def one_run(source: Path, recipe: Path, folder: Path) -> dict[str, float | str]:
    """Seconds of a whole run by the version whose modules lie in `source`, and the hash of its weights."""
    environment = os.environ | {"PYTHONPATH": str(source), "HF_HUB_OFFLINE": "1"}
    began, used = time.perf_counter(), _cpu_seconds()
    subprocess.run([sys.executable, "-c", PROGRAM, str(recipe), str(folder)], env=environment, check=True)
    run_seconds, cpu_seconds = time.perf_counter() - began, _cpu_seconds() - used
    (metrics,) = folder.glob("attempts/*/metrics.jsonl")
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    started = next(line["seconds"] for line in lines if line.get("name") == "training")
    ended = max(line["seconds"] for line in lines if line["kind"] == "train")
    weights = (folder / "models" / "full" / "model.safetensors").read_bytes()
    seconds: dict[str, float | str] = {"steps": ended - started, "whole": run_seconds, "cpu": cpu_seconds}
    return seconds | {"weights": hashlib.sha256(weights).hexdigest()[:12]}


def _cpu_seconds() -> float:
    """CPU seconds of all child processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("other", type=Path, help="the `src` folder of the other version")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--recipe", type=Path)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="two-versions-"))
    recipe = options.recipe or folder / "recipe.yaml"
    if options.recipe is None:
        training_speed.write_rows(folder, options.steps)
    pairs = []
    for number in range(options.pairs):
        versions = {"other": options.other.resolve(), "this": HERE}
        order = list(versions) if number % 2 else list(versions)[::-1]
        pair = {name: one_run(versions[name], recipe, folder / f"{name}-{number}") for name in order}
        print(json.dumps({"pair": number + 1, **pair}), flush=True)
        pairs.append(pair)
    for time_of in ("steps", "whole", "cpu"):
        ratios = sorted(float(pair["this"][time_of]) / float(pair["other"][time_of]) for pair in pairs)
        print(f"{time_of}: median ratio {statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})")
    same = all(pair["this"]["weights"] == pair["other"]["weights"] for pair in pairs)
    print("the same weights in every pair" if same else "other weights")
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
