"""Outliers: how many sentences of other sets are found among the rows of one, and what is listed where none was put.

    FULLTUNE_BENCH_DATA=... python bench/outliers.py settle FOLDER --seeds 1 2
    FULLTUNE_BENCH_DATA=... python bench/outliers.py plant FOLDER --seeds 21 22 23
    FULLTUNE_BENCH_DATA=... python bench/outliers.py real FOLDER

`settle` prints average precision of what can be compared (cosines as they are, centred, standardised) and how many rows
each fence lists, with and without rounds; by it the rule was chosen. `plant` prints what the rule of `fulltune data`
finds with other draws, and how rows of a class fare of which three are left. `real` lists what it finds in whole sets
(of GSM8K in 1,500 questions), writes it down for a person to read, prints how it did on what was read
(`readings/outliers.jsonl`), and takes the time of 20,000 rows. MiniLM-L6, each different text once.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from audit_texts import texts_of
from evidence import HERE, MINILM, data

from fulltune.audit.untouched import far_out, nearest

READ = HERE / "readings" / "outliers.jsonl"
SOURCES = ("wiki_sentences", "shakespeare", "wnut17", "gsm8k questions")
BASES = (("banking77", 2000), ("banking77", 9000), ("wiki_sentences", 2000), ("wiki_sentences", 9000))
PLANTED = (20, 50, 100)
RARE = 3
DRAWN = 1500
"""Texts of each other set, drawn once, that are planted."""
Fence = Callable[[np.ndarray], float]


def embedded(texts: Sequence[str]) -> np.ndarray:
    """Mean last hidden states of the untouched model, of length 1: float32 [texts, hidden]."""
    from fulltune.inference.run import GenericText
    from fulltune.models.base import Base
    from fulltune.models.load import load
    from fulltune.recipe.model import ModelBlock

    base = Base.of(ModelBlock(name=MINILM.removeprefix("model: ").strip()), "text-classification")
    model = load(base, {"num_labels": 2}, head_is_new=True)
    text = GenericText.of(list(texts), base.processor, False, "fp32", 128, 32)
    return np.asarray(text.read(model), np.float32)


class Sets:
    """The texts of each set and what the untouched model makes of them, made once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.all = {name: list(dict.fromkeys(texts)) for name, texts in texts_of(data()).items()}
        with (data() / "banking77" / "train.csv").open(encoding="utf-8", newline="") as file:
            self.labels = {row["text"]: row["category"] for row in csv.DictReader(file)}
        self.all["banking77"] = list(self.labels)

    def texts(self, name: str, most: int | None = None) -> list[str]:
        """All of a set, or some drawn at random."""
        texts = self.all[name]
        if most is None or most >= len(texts):
            return texts
        return [texts[at] for at in np.random.default_rng(0).choice(len(texts), most, replace=False)]

    def states(self, name: str, most: int | None = None) -> np.ndarray:
        """float32 [texts, hidden], each of length 1."""
        place = self.folder / f"{name}-{most or 'all'}.npy"
        if not place.exists():
            np.save(place, embedded(self.texts(name, most)))
        return np.asarray(np.load(place))


def drawn(sets: Sets, base: str, rows: int, source: str | None, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """States of rows of a set with some of another one behind them, and which these are."""
    draw = np.random.default_rng(seed)
    mine = sets.states(base)
    chosen = [mine[draw.choice(len(mine), rows, replace=False)]]
    if source is not None:
        other = sets.states(source, None if source == "banking77" else DRAWN)
        chosen.append(other[draw.choice(len(other), count, replace=False)])
    states = np.concatenate(chosen)
    return states, np.arange(len(states)) >= rows


def cells() -> Iterator[tuple[str, int, str | None, int]]:
    for base, rows in BASES:
        yield base, rows, None, 0
        for source in SOURCES if base == "banking77" else ("banking77",):
            yield from ((base, rows, source, count) for count in PLANTED)


# ---- settling --------------------------------------------------------------------------------------------------


def unit(states: np.ndarray) -> np.ndarray:
    return np.asarray(states / np.linalg.norm(states, axis=1, keepdims=True), np.float32)


def above(times: float, *, of_logarithms: bool) -> Fence:
    """So many spreads between the quartiles above the upper one."""

    def fence(distances: np.ndarray) -> float:
        values = np.log(np.maximum(distances, 1e-6)) if of_logarithms else distances
        lower, upper = np.quantile(values, [0.25, 0.75])
        found = upper + times * (upper - lower)
        return float(np.exp(found) if of_logarithms else found)

    return fence


FENCES = {
    "log 1.5": above(1.5, of_logarithms=True),
    "2.5": above(2.5, of_logarithms=False),
    "3": above(3, of_logarithms=False),
}


def rounds(states: np.ndarray, count: int, fence: Fence, most: int) -> np.ndarray:
    """What lies beyond a fence, once or again and again without what was found."""
    far = np.zeros(len(states), bool)
    for _ in range(most):
        distances = nearest(states, states[~far], count)
        further = (distances > fence(distances[~far])) & ~far
        if not further.any():
            break
        far |= further
    return far


def settle(folder: Path, seeds: list[int]) -> None:
    """Which features, how many neighbours, which fence, and whether in rounds."""
    from sklearn.metrics import average_precision_score

    sets = Sets(folder)
    print("| rows, planted, seed | average precision: as they are, centred, standardised | rule: planted of listed |")
    print("|---|---|---|")
    for base, rows, source, count in cells():
        if rows > 2000 or count not in (0, 20, 100):
            continue
        for seed in seeds:
            states, planted = drawn(sets, base, rows, source, count, seed)
            centre = states - states.mean(axis=0)
            forms = [states, unit(centre), unit(centre / np.maximum(states.std(axis=0), 1e-6))]
            scores = [nearest(form, form, 10) for form in forms] if count else []
            precisions = ", ".join(f"{average_precision_score(planted, one):.2f}" for one in scores)
            told = []
            for neighbours in (10, 20):
                for name, fence in FENCES.items():
                    found = [rounds(states, neighbours, fence, most) for most in (1, 10)]
                    pairs = ", ".join(f"{int((one & planted).sum())} of {int(one.sum())}" for one in found)
                    told.append(f"{neighbours}, {name}: {pairs}")
            print(f"| {rows} {base}, {count} {source}, {seed} | {precisions} | {'; '.join(told)} |", flush=True)


# ---- the rule --------------------------------------------------------------------------------------------------


def plant(folder: Path, seeds: list[int]) -> None:
    """What the rule finds of what was planted, and what else it lists."""
    sets = Sets(folder)
    print("| rows | planted | planted ones found | others listed |\n|---|---|---|---|")
    for base, rows, source, count in cells():
        found = []
        for seed in seeds:
            states, planted = drawn(sets, base, rows, source, count, seed)
            _, far, _, _ = far_out(states)
            found.append((int((far & planted).sum()), int((far & ~planted).sum())))
        right, others = (", ".join(str(one[at]) for one in found) for at in (0, 1))
        print(f"| {rows:,} {base} | {count} {source or ''} | {right if count else ''} | {others} |", flush=True)
    print("| rows of Banking77, of ten classes three each | of the 30 listed | others listed |\n|---|---|---|")
    classes = np.array([sets.labels[text] for text in sets.texts("banking77")])
    for rows in (2000, 9000):
        told = []
        for seed in seeds:
            draw = np.random.default_rng(seed)
            rare = draw.choice(np.unique(classes), 10, replace=False)
            few = np.concatenate([draw.choice(np.flatnonzero(classes == one), RARE, replace=False) for one in rare])
            rest = np.flatnonzero(~np.isin(classes, rare))
            rest = draw.choice(rest, min(len(rest), rows - len(few)), replace=False)
            states = sets.states("banking77")[np.concatenate([few, rest])]
            _, far, _, _ = far_out(states)
            told.append((int(far[: len(few)].sum()), int(far[len(few) :].sum())))
        print(f"| {rows:,} | {', '.join(str(one) for one, _ in told)} | {', '.join(str(one) for _, one in told)} |")


def key(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def real(folder: Path) -> None:
    """What is listed in whole sets, and how that did where it was read."""
    sets = Sets(folder)
    lines = READ.read_text(encoding="utf-8").splitlines() if READ.exists() else []
    verdicts = {one["text"]: one["verdict"] for one in map(json.loads, lines)}
    print("| set | texts | listed | read: odd, unclear, fits |\n|---|---:|---:|---|")
    for name in ("banking77", *SOURCES):
        most = DRAWN if name == "gsm8k questions" else None  # long texts
        texts, states = sets.texts(name, most), sets.states(name, most)
        distances, far, _, _ = far_out(states)
        order = [at for at in np.argsort(-distances) if far[at]]
        found = [{"set": name, "text": texts[at], "distance": round(distances[at], 4)} for at in order]
        with (folder / f"{name}.found.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(f"{json.dumps(one, ensure_ascii=False)}\n" for one in found)
        counts = Counter(verdicts.get(key(str(one["text"]))) for one in found)
        told = ", ".join(str(counts[one]) for one in ("odd", "unclear", "fits"))
        print(f"| {name} | {len(states):,} | {len(found)} | {told} |", flush=True)
    states = np.concatenate([sets.states(name) for name in ("banking77", "wiki_sentences")])[:20_000]
    began = time.process_time()
    far_out(states)
    print(f"{len(states):,} rows: {time.process_time() - began:.0f} s of a core")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["settle", "plant", "real"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", nargs="+", type=int, default=[21, 22, 23])
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    if given.what == "real":
        real(given.folder)
    else:
        {"settle": settle, "plant": plant}[given.what](given.folder, given.seeds)


if __name__ == "__main__":
    main()
