"""Wrong tags and wrong lists of labels: how many of those that are put in are found, and what is said about that.

    FULLTUNE_BENCH_DATA=... python bench/part_noise.py tags FOLDER [--seeds 1 2 3]
    FULLTUNE_BENCH_DATA=... python bench/part_noise.py labels FOLDER [--seeds 1 2 3]

`tags`: of a share of the entities in WNUT-17's train file the tags are taken away (missed), their type is replaced by
any other one, or one word is taken off or added at an end (boundary), a third each. `labels`: two Banking77 queries
are joined into a text with both their labels, 2,500 of these are drawn, and in a share of them a label is lost, one is
added, or one is replaced, a third each: by any other one (uniform), or by one of the three that are nearest (near).
Both judge as `fulltune data` does with the untouched MiniLM-L6. Claimed are missed entities, and labels too many. What
was wrong before counts as a false alarm here.
"""

from __future__ import annotations

import argparse
import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
from evidence import MINILM, data

from fulltune.audit.labels import Suspected, suspected_parts
from fulltune.probe.linear import Items
from fulltune.tasks.tags import spans, types

RATES = (0.0, 0.05, 0.1)
ROWS, NEAREST = 2500, 3
CELLS = ((0.0, "uniform"), (0.1, "uniform"), (0.1, "near"))
HEADER = (
    "| noise | seed | rows suspected | precision: said, true | recall where claimed: said, true | of all | doubtful |"
)


def tagged(folder: Path) -> tuple[Items, tuple[str, ...]]:
    """The words of WNUT-17's train rows, as the audit reads them."""
    from fulltune.audit.untouched import Reader, with_shapes
    from fulltune.cli import stages
    from fulltune.pipeline import Run

    files = {"train": "wnut17train.conll", "eval": "emerging.dev.conll", "test": "emerging.test.annotated"}
    block = ", ".join(f"{split}: {data()}/wnut17/{name}" for split, name in files.items())
    (folder / "tags.yaml").write_text(f"{MINILM}task: token-classification\ndata: {{{block}}}\n", encoding="utf-8")
    recipe, run = stages.open_run(folder / "tags.yaml", None, folder / "tags", False, "data")
    summary = stages.reach(recipe, run, "data", details=False).summary
    job = Run(recipe, run, listener=lambda event: None)
    reader = Reader(recipe, job.base, summary, run / "data", job.listener)
    items, _ = with_shapes(reader, *reader.items("train"))
    return items, summary.labels


def wrong_tags(items: Items, names: tuple[str, ...], rate: float, seed: int) -> np.ndarray:
    """The tags, those of some entities wrong."""
    drawn, numbers = np.random.default_rng(seed), {name: number for number, name in enumerate(names)}
    labels, kinds = items.labels.copy(), types(names)
    begins = np.flatnonzero(np.append(True, items.rows[1:] != items.rows[:-1]))
    entities = [
        (kind, begin + start, begin + end, begin, after)
        for begin, after in zip(begins, np.append(begins[1:], len(labels)), strict=True)
        for kind, start, end in spans([names[label] for label in items.labels[begin:after]])
    ]
    for number, at in enumerate(drawn.choice(len(entities), round(rate * len(entities)), replace=False)):
        kind, start, end, begin, after = entities[at]
        if number % 3 == 0:
            labels[start:end] = 0
        elif number % 3 == 1:
            other = drawn.choice([one for one in kinds if one != kind])
            labels[start:end] = [numbers[f"{names[label][:2]}{other}"] for label in labels[start:end]]
        elif end - start > 1 and drawn.random() < 0.5:
            labels[end - 1] = 0
        elif end < after and labels[end] == 0:
            labels[end] = numbers.get(f"I-{kind}", numbers[f"B-{kind}"])
        elif start > begin and labels[start - 1] == 0:
            labels[start - 1], labels[start] = numbers[f"B-{kind}"], numbers.get(f"I-{kind}", numbers[f"B-{kind}"])
    return labels


def joined(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Mean hidden states of pairs of queries, and their labels as 0 and 1: made once."""
    with (data() / "banking77" / "train.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    _, label = np.unique([row["category"] for row in rows], return_inverse=True)
    pairs = np.random.default_rng(0).permutation(len(rows))[: len(rows) // 2 * 2].reshape(-1, 2)
    labels = np.zeros((len(pairs), label.max() + 1), np.float32)
    labels[np.arange(len(pairs))[:, None], label[pairs]] = 1
    place = folder / "joined.npy"
    if not place.exists():
        from fulltune.forgetting.drift import GenericText
        from fulltune.models.base import Base
        from fulltune.models.load import load
        from fulltune.recipe.model import ModelBlock

        base = Base.of(ModelBlock(name=MINILM.removeprefix("model: ").strip()), "text-classification")
        model = load(base, {"num_labels": 2}, head_is_new=True)
        texts = [" ".join(rows[one]["text"] for one in pair) for pair in pairs]
        text = GenericText.of(texts, base.processor, False, "fp32", 128, 32)
        np.save(place, text.read(model).astype(np.float32))
    return np.load(place), labels


def wrong_labels(states: np.ndarray, right: np.ndarray, rate: float, kind: str, seed: int) -> np.ndarray:
    """The labels, some lost, added or replaced."""
    drawn, labels = np.random.default_rng(seed), right.copy()
    centres = np.stack([states[right[:, one] > 0].mean(axis=0) for one in range(right.shape[1])])
    centres = centres - centres.mean(axis=0)  # half of each is of any other label
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    likeness = centres @ centres.T
    for number, row in enumerate(drawn.choice(len(right), round(rate * len(right)), replace=False)):
        has = drawn.choice(np.flatnonzero(right[row]))
        lacks = np.flatnonzero(right[row] == 0)
        near = lacks[np.argsort(-likeness[has, lacks])[:NEAREST]]
        if number % 3 != 1:
            labels[row, has] = 0
        if number % 3 != 0:
            labels[row, drawn.choice(lacks if kind == "uniform" else near)] = 1
    return labels


def line(noise: str, seed: int, found: Suspected, wrong: np.ndarray, claimed: np.ndarray) -> str:
    """Said and true; `wrong` and `claimed` (errors of the kind that is claimed) as bool [items]."""
    rows, suspects = found.row_of_each, found.suspects
    said, right = np.unique(rows[suspects]), np.unique(rows[suspects & wrong])
    all_wrong, of_kind = np.unique(rows[wrong]), np.unique(rows[claimed])
    doubtful = np.setdiff1d(rows[found.doubtful], said)
    in_doubt = np.intersect1d(doubtful, rows[found.doubtful & wrong])
    return (
        f"| {noise} | {seed} | {len(said)} | {found.precision:.2f}, {len(right) / max(1, len(said)):.2f} | "
        f"{found.recall:.2f}, {len(np.intersect1d(right, of_kind)) / max(1, len(of_kind)):.2f} of {len(of_kind)} | "
        f"{len(right) / max(1, len(all_wrong)):.2f} of {len(all_wrong)} | {len(doubtful)}, wrong {len(in_doubt)} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["tags", "labels"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    print(HEADER, "|---|---:|---:|---|---|---|---|", sep="\n")
    if given.what == "tags":
        items, names = tagged(given.folder)
        for rate in RATES:
            for seed in given.seeds if rate else [0]:
                labels = wrong_tags(items, names, rate, seed)
                wrong = labels != items.labels
                found = suspected_parts(replace(items, labels=labels))
                print(line(f"{rate:.0%}", seed, found, wrong, wrong & (labels == 0)), flush=True)
        return
    states, right = joined(given.folder)
    for rate, kind in CELLS:
        for seed in given.seeds:
            few = np.sort(np.random.default_rng(seed).choice(len(right), ROWS, replace=False))
            labels = wrong_labels(states[few], right[few], rate, kind, seed)
            items = Items("multi_label", states[few], labels, np.arange(ROWS), right.shape[1])
            wrong = (labels != right[few]).ravel()
            found = suspected_parts(items)
            print(line(f"{rate:.0%} {kind}", seed, found, wrong, wrong & (labels.ravel() > 0)), flush=True)


if __name__ == "__main__":
    main()
