"""Label errors: how many of those that are put into Banking77 are found, and what cleaning gives back.

    FULLTUNE_BENCH_DATA=... python bench/label_noise.py find FOLDER [--seeds 1 2 3]
    FULLTUNE_BENCH_DATA=... python bench/label_noise.py train FOLDER [--seeds 1 2 3]

2,000 train rows are drawn, and in a share of them the label is replaced: by any other one (uniform), or by one of the
three classes whose texts are nearest (near). `find` judges the labels as `fulltune data` does. `train` fine-tunes all
parameters of MiniLM-L6 on the clean rows, the noisy ones, and the noisy ones without the suspects (and with their label
replaced), and scores Banking77's own test file. Rows that look wrong in the clean data count as false alarms here, and
some of them are wrong.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from evidence import MINILM, data, write_csv

from fulltune.audit.untouched import DOUBT, Suspected, suspected
from fulltune.probe.linear import Items

ROWS = 2000
CELLS = ((0.0, "uniform"), (0.1, "uniform"), (0.1, "near"), (0.2, "uniform"), (0.2, "near"))
NEAREST = 3
TREATMENTS = ("clean", "noisy", "dropped", "relabelled", "both")
"""`both`: suspects with another label that is likelier by half get it, the others are left out."""


@dataclass(frozen=True)
class Noisy:
    """Rows of which some have a wrong label."""

    rows: list[dict[str, str]]
    names: list[str]
    features: np.ndarray
    right: np.ndarray
    given: np.ndarray

    @property
    def wrong(self) -> np.ndarray:
        return self.right != self.given

    def judged(self) -> Suspected:
        return suspected(Items("single_label", self.features, self.given, np.arange(len(self.given)), len(self.names)))


def features(folder: Path) -> tuple[list[dict[str, str]], np.ndarray]:
    """All train rows, and what the untouched MiniLM-L6 makes of them: made once."""
    with (data() / "banking77" / "train.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    place = folder / "features.npy"
    if not place.exists():
        from fulltune.inference.run import GenericText
        from fulltune.models.base import Base
        from fulltune.models.load import load
        from fulltune.recipe.model import ModelBlock

        base = Base.of(ModelBlock(name=MINILM.removeprefix("model: ").strip()), "text-classification")
        model = load(base, {"num_labels": 2}, head_is_new=True)
        text = GenericText.of([row["text"] for row in rows], base.processor, False, "fp32", 128, 32)
        np.save(place, text.read(model).astype(np.float32))
    return rows, np.load(place)


def noisy(folder: Path, rate: float, kind: str, seed: int) -> Noisy:
    """Rows drawn with a seed, a share of them with another label."""
    rows, states = features(folder)
    names, labels = np.unique([row["category"] for row in rows], return_inverse=True)
    drawn = np.random.default_rng(seed)
    chosen = drawn.choice(len(rows), ROWS, replace=False)
    centres = np.stack([states[labels == one].mean(axis=0) for one in range(len(names))])
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    likeness = centres @ centres.T
    np.fill_diagonal(likeness, -np.inf)
    right = labels[chosen]
    given = right.copy()
    for at in drawn.choice(ROWS, round(rate * ROWS), replace=False):
        others = np.delete(np.arange(len(names)), right[at])
        near = np.argsort(-likeness[right[at]])[:NEAREST]
        given[at] = drawn.choice(others if kind == "uniform" else near)
    return Noisy([rows[one] for one in chosen], names.tolist(), states[chosen], right, given)


def find(folder: Path, seeds: list[int]) -> None:
    """How many errors are found, and how many suspects are errors: said and true."""
    print("| noise | seed | suspects | precision: said, true | recall: said, true | errors: said, true |")
    print("|---|---:|---:|---|---|---|")
    for (rate, kind), seed in itertools.product(CELLS, seeds):
        them = noisy(folder, rate, kind, seed)
        found = them.judged()
        right = int((found.suspects & them.wrong).sum())
        count, errors = int(found.suspects.sum()), int(them.wrong.sum())
        print(
            f"| {rate:.0%} {kind} | {seed} | {count} | {found.about.precision:.2f}, {right / max(1, count):.2f} "
            f"| {found.about.recall:.2f}, {right / max(1, errors):.2f} | {found.about.wrong:.0f}, {errors} |",
            flush=True,
        )


def train(folder: Path, seeds: list[int], cells: list[tuple[float, str]]) -> None:
    """Test accuracy on clean, noisy and cleaned rows; a line of JSON for each run."""
    results = folder / "label_noise.jsonl"
    lines = results.read_text(encoding="utf-8").splitlines() if results.exists() else []
    done = {(one["rate"], one["kind"], one["treatment"], one["seed"]) for one in map(json.loads, lines)}
    for seed, (rate, kind), treatment in itertools.product(seeds, cells, TREATMENTS):
        key = (0.0, "", "clean", seed) if treatment == "clean" else (rate, kind, treatment, seed)
        if key in done:
            continue
        done.add(key)
        line = dict(zip(("rate", "kind", "treatment", "seed"), key, strict=True))
        line |= _trained(folder, noisy(folder, rate, kind, seed), treatment, "-".join(map(str, key)), seed)
        with results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(line, flush=True)


def _trained(folder: Path, them: Noisy, treatment: str, name: str, seed: int) -> dict[str, Any]:
    labels, kept = (them.right if treatment == "clean" else them.given).copy(), np.ones(ROWS, bool)
    if treatment in ("dropped", "relabelled", "both"):
        found = them.judged()
        sure = {"dropped": -np.inf, "relabelled": np.inf, "both": DOUBT}[treatment]
        changed = found.suspects & (found.margins < sure)
        labels[changed] = found.other[changed]
        kept = ~found.suspects | changed
    place = folder / name
    place.mkdir(parents=True, exist_ok=True)
    rows = [{"text": row["text"], "category": them.names[label]} for row, label in zip(them.rows, labels, strict=True)]
    write_csv(place / "train.csv", [row for row, is_kept in zip(rows, kept, strict=True) if is_kept])
    recipe = f"{MINILM}task: text-classification\ndata: {{train: train.csv, test: {data()}/banking77/test.csv}}\n"
    (place / "recipe.yaml").write_text(recipe, encoding="utf-8")
    settings = [f"train.seed={seed}", f"data.split_seed={seed}", "train.device=cpu", "train.precision=fp32"]
    settings += ["train.num_train_epochs=5", "evaluate.baselines=false", "preserve.drift=false"]
    command = [sys.executable, "-m", "fulltune.cli.app", "evaluate", str(place / "recipe.yaml")]
    command += ["--run-folder", str(place / "run"), *(f"--set={one}" for one in settings)]
    with (place / "log").open("w", encoding="utf-8") as log:
        subprocess.run(command, check=True, stdout=log, stderr=log, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    scores = [json.loads(one.read_text(encoding="utf-8")) for one in (place / "run" / "scores").glob("*.json")]
    accuracy = next(one["metrics"]["accuracy"]["value"] for one in scores if one["kind"] == "trained")
    return {"rows": int(kept.sum()), "still_wrong": int((labels != them.right)[kept].sum()), "accuracy": accuracy}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["find", "train"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--cells", nargs="+", default=["0.1-uniform", "0.1-near", "0.2-uniform", "0.2-near"])
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    if given.what == "find":
        find(given.folder, given.seeds)
    else:
        cells = [(float(rate), kind) for rate, _, kind in (one.partition("-") for one in given.cells)]
        train(given.folder.absolute(), given.seeds, cells)


if __name__ == "__main__":
    main()
