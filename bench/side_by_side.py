"""Several tasks on one base: one full model for each, or what LoRA trained for each over one base in memory.

    python bench/side_by_side.py RUN RUN ... [--method lora] [--rows 500]

Each RUN is a finished comparison with `models/full` and `models/METHOD` on the same base. Both ways are loaded in a
process of their own, 1 to all of the runs, and answer test rows of the runs in turn, as a service for several tasks
would. Weights on disk are without those of the base, which the parts need once.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from fulltune import predict
from fulltune.inference.store import load_texts
from fulltune.system.memory import Meter


def measured(runs: list[Path], method: str, rows: int) -> dict[str, float]:
    """Load the models and answer; in this process."""
    names = [f"task{number}" for number in range(len(runs))]
    texts = [load_texts(run / "data" / "test")[: max(1, rows // len(runs))] for run in runs]
    predict.load(runs[0], method).predict(texts[0][:1])  # what is loaded once: libraries, kernels
    meter = Meter("cpu")
    began = time.perf_counter()
    if method == "full":
        models = {name: predict.load(run, method) for name, run in zip(names, runs, strict=True)}
    else:
        models = predict.load_side_by_side(dict(zip(names, runs, strict=True)), method)
    loaded = time.perf_counter()
    held = meter.held_bytes() - meter.base_bytes
    for number in range(max(len(part) for part in texts)):
        for name, part in zip(names, texts, strict=True):
            if number < len(part):
                models[name].predict([part[number]])
    answered = time.perf_counter() - loaded
    return {
        "held": held,
        "growth": meter.growth_bytes(),
        "load_seconds": loaded - began,
        "milliseconds_per_row": 1000 * answered / sum(len(part) for part in texts),
        "disk": sum(path.stat().st_size for run in runs for path in (run / "models" / method).glob("*.safetensors")),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--method", default="lora")
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--here", action="store_true", help="measure --method in this process and print JSON")
    given = parser.parse_args()
    if given.here:
        print(json.dumps(measured(given.runs, given.method, given.rows)))
        return
    print("| tasks | models | memory held | peak | loading | a row, one at a time | weights on disk |")
    print("|---:|---|---:|---:|---:|---:|---:|")
    for count in range(1, len(given.runs) + 1):
        for method in ("full", given.method):
            command = [sys.executable, __file__, *map(str, given.runs[:count]), "--rows", str(given.rows)]
            done = subprocess.run([*command, "--method", method, "--here"], capture_output=True, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            sizes = [f"{found[name] / 2**20:,.1f} MiB" for name in ("held", "growth", "disk")]
            print(
                f"| {count} | {method} | {sizes[0]} | {sizes[1]} | {found['load_seconds']:.2f} s "
                f"| {found['milliseconds_per_row']:.1f} ms | {sizes[2]} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
