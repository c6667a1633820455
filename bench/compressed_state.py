"""Compressed states of a streamed training against fp32: what they change in quality.

Full fine-tuning of MiniLM-L6 on 2,000 rows of Banking77 and of SmolLM2-135M on 300 rows of GSM8K, three seeds each, in
memory: a streamed run has the same losses bit for bit. The difference of the means on the test rows is given in
standard errors over the seeds. Needs FULLTUNE_BENCH_DATA; `--folder F` resumes.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from bench.public_data import MINILM, SMOLLM2, banking77, gsm8k
from bench.results import Figure
from bench.runs import SMOKE, Records, fresh, fulltune, run, script

SEEDS = (42, 43, 44)
STATES = {
    "fp32": ("fp32", "adamw_torch_fused"),
    "compressed": ("bf16", "adamw_8bit"),
    "8-bit moments": ("fp32", "adamw_8bit"),
}
"""Data type of the weights, and optimizer."""
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "banking77": ("accuracy", {"model": MINILM, "task": "text-classification"}),
    "gsm8k": ("loss", {"model": SMOLLM2, "task": "causal-lm"}),
}


def scored(folder: Path, case: str, state: str, seed: int, quick: bool) -> float:
    """The metric of a finished run on the test rows."""
    metric, blocks = CASES[case]
    rows = {"banking77": 40 if SMOKE else 200 if quick else 2000, "gsm8k": 32 if quick else 300}[case]
    {"banking77": banking77, "gsm8k": gsm8k}[case](fresh(folder), rows)
    dtype, optim = STATES[state]
    columns = {"prompt": "question", "completion": "answer"} if case == "gsm8k" else {}
    recipe = blocks | {
        "model": {"name": blocks["model"], "weights_dtype": dtype},
        "data": {part: str(next(folder.glob(f"{part}.*"))) for part in ("train", "eval", "test")} | columns,
        "method": {"kind": "full"} | ({"learning_rate": 5e-5} if case == "gsm8k" else {}),
        "train": {"optim": optim, "seed": seed, "num_train_epochs": 1 if SMOKE else 2 if case == "gsm8k" else 3},
        "evaluate": {"baselines": False, "generate_rows": 0},
        "preserve": {"drift": False},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    run(fulltune("run", folder / "recipe.yaml", "--run-folder", folder / "run"))
    [scores] = (folder / "run").glob("scores/full-*.json")
    value: float = json.loads(scores.read_text(encoding="utf-8"))["metrics"][metric]["value"]
    return value


def measure(folder: Path, quick: bool) -> Iterator[Figure]:
    records = Records(folder / f"measured{'-quick' * quick}.jsonl")
    for case, (metric, _) in list(CASES.items())[: 1 if SMOKE else None]:
        values = {
            state: [
                records.get(f"{case} {state} {seed}", scored, folder / "run", case, state, seed, quick)
                for seed in SEEDS[: 2 if quick else 3]
            ]
            for state in list(STATES)[: 2 if SMOKE else None]
        }
        for state, of_seeds in values.items():
            print(f"{case}, {state}: {metric} {', '.join(f'{value:.4f}' for value in of_seeds)}", flush=True)
        exact = values.pop("fp32")
        for state, of_seeds in values.items():
            apart = abs(statistics.mean(exact) - statistics.mean(of_seeds))
            error = sum(statistics.variance(part) / len(part) for part in (exact, of_seeds)) ** 0.5
            name = f"{metric} changed by the state '{state}' over its standard error, {case}, {len(of_seeds)} seeds"
            yield Figure(name, apart / max(error, 1e-9), "x", at_most=1)


if __name__ == "__main__":
    script(measure, __doc__)
