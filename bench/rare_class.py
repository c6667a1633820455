"""One class in fifty, made from Banking77: F1 of that class, average precision and accuracy of four ways to train it.

One of the 77 intents is the class, all others together are the other class. Train and eval rows of the class are
thinned to one in fifty. The test rows keep the rows of the class that no other split has, so that its F1 has a usable
interval; the other class is thinned instead. The four ways are: plain, class weights, balanced sampling, and plain with
a fitted threshold, each with 2,000 rows and three seeds (`--quick`: one). All choose the checkpoint by average
precision. Prints a Markdown table.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.public_data import MINILM, read_csv, shuffled, source, write_csv
from bench.results import Figure
from bench.runs import SMOKE, Records, fulltune, run, script

RARE, OTHER = "card_payment_fee_charged", "other"
ONE_IN = 50
RECIPE = f"""\
model: {MINILM}
task: text-classification
data: {{train: train.csv, eval: eval.csv, test: test.csv, text: text, label: label}}
train: {{device: cpu, num_train_epochs: {1 if SMOKE else 4}}}
preserve: {{drift: false}}
evaluate: {{positive_label: {RARE}, metric: average_precision, baselines: false}}
output: .
"""
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "class_weights: balanced": {"train.class_weights": "balanced"},
    "sampling: balanced": {"train.sampling": "balanced"},
    "plain, threshold: fit": {"evaluate.threshold": "fit"},
}
METRICS = {"f1": "F1", "average_precision": "average precision", "accuracy": "accuracy"}
Rows = Sequence[dict[str, str]]


def write_splits(folder: Path, num_rows: int) -> None:
    """Write train rows, half as many eval rows and about as many test rows, one row in fifty of the class."""
    rows = shuffled(read_csv(source("banking77/train.csv")) + read_csv(source("banking77/test.csv")))
    texts = {row["text"]: row["category"] for row in rows}
    rare = [text for text, intent in texts.items() if intent == RARE]
    other = [text for text, intent in texts.items() if intent != RARE]
    sizes = {"train": num_rows, "eval": num_rows // 2}
    for name, size in sizes.items():
        _write(folder / f"{name}.csv", rare[: size // ONE_IN], other[: size - size // ONE_IN])
        rare, other = rare[size // ONE_IN :], other[size - size // ONE_IN :]
    # The rest is for the test: more of it narrows the intervals.
    count = min(len(rare), len(other) // (ONE_IN - 1), num_rows * 3 // 2 // ONE_IN)
    _write(folder / "test.csv", rare[:count], other[: count * (ONE_IN - 1)])


def _write(path: Path, rare: Sequence[str], other: Sequence[str]) -> None:
    labelled = [{"text": text, "label": RARE} for text in rare] + [{"text": text, "label": OTHER} for text in other]
    write_csv(path, shuffled(labelled))


def scores(recipe: Path, run_folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Train and score once; each metric's value and interval, and the threshold if one was fitted."""
    words = [f"--set={name}={value}" for name, value in settings.items()]
    trained = json.loads(run(fulltune("evaluate", recipe, "--run-folder", run_folder, "--json", *words)))[-1]
    intervals = {name: [trained["metrics"][name][part] for part in ("value", "low", "high")] for name in METRICS}
    threshold = trained["threshold"] and trained["threshold"]["value"]
    return {**intervals, "threshold": threshold and [threshold[part] for part in ("value", "low", "high")]}


def table(records: Records, seeds: Sequence[int]) -> str:
    """The mean of each metric over the seeds, with the intervals of the test rows: the mean of their ends."""
    lines = ["| way | " + " | ".join(METRICS.values()) + " |", "|---|" + "---:|" * len(METRICS)]
    for way in WAYS:
        kept = [records.values[key] for seed in seeds if (key := f"{way} {seed}") in records.values]
        cells = []
        for name in METRICS if kept else ():
            value, low, high = (100 * statistics.mean(one[name][part] for one in kept) for part in range(3))
            each = ", ".join(f"{100 * one[name][0]:.1f}" for one in kept)
            cells.append(f"{value:.1f} [{low:.1f}, {high:.1f}] ({each})")
        lines += [f"| {way} | {' | '.join(cells)} |"] if cells else []
    return "\n".join(lines)


def measure(folder: Path, quick: bool) -> Iterator[Figure]:
    recipe, records, seeds = folder / "recipe.yaml", Records(folder / "scores.jsonl"), (1,) if quick else (1, 2, 3)
    if not recipe.exists():
        write_splits(folder, 100 if SMOKE else 2000)
        recipe.write_text(RECIPE, encoding="utf-8")
    for seed in seeds:
        for number, (way, settings) in enumerate(WAYS.items()):
            place = folder / f"{number}-{seed}"
            records.get(f"{way} {seed}", scores, recipe, place, {"train.seed": seed, **settings})
    print(table(records, seeds), flush=True)
    f1 = {way: statistics.mean(records.values[f"{way} {seed}"]["f1"][0] for seed in seeds) for way in WAYS}
    for way in ("class_weights: balanced", "plain, threshold: fit"):
        gain = f1[way] - f1["plain"]
        yield Figure(f"F1 of a class of one in fifty gained by {way}", gain, "share", at_least=0)


if __name__ == "__main__":
    script(measure, __doc__)
