"""Leaks in other words: what rules on sentence embeddings find in hand-written pairs, and between Banking77's files.

    python bench/paraphrases.py pairs
    FULLTUNE_BENCH_DATA=... python bench/paraphrases.py banking77 FOLDER

`pairs` prints what each rule does on tests/unit/data/paraphrases.tsv: the best precision where it finds 70 of the 100
paraphrases, and how many it finds at most where nine of ten finds are right. `banking77` prints how many train rows
each rule finds to say what a test row says, without those that are exact or near leaks, and how it did on those that
were read (`readings/banking77-paraphrases.jsonl`). MiniLM-L6, as in `fulltune data`.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from evidence import HERE, MINILM, data

from fulltune.data.near import joined, signatures
from fulltune.data.sampling import draw
from fulltune.inference.store import row_id
from fulltune.tasks.columns import normalised

PAIRS = HERE.parent / "tests" / "unit" / "data" / "paraphrases.tsv"
READ = HERE / "readings" / "banking77-paraphrases.jsonl"
NEIGHBOURS = 10
NEGATION = re.compile(r"no|not|never|none|nobody|nothing|nowhere|neither|nor|without|cannot|\w+n't")


def embedded(texts: Sequence[str]) -> np.ndarray:
    """Mean last hidden states of the untouched model, of length 1: float32 [texts, hidden]."""
    from fulltune.forgetting.drift import GenericText
    from fulltune.models.base import Base
    from fulltune.models.load import load
    from fulltune.recipe.model import ModelBlock

    base = Base.of(ModelBlock(name=MINILM.removeprefix("model: ").strip()), "text-classification")
    model = load(base, {"num_labels": 2}, head_is_new=True)
    text = GenericText.of(list(texts), base.processor, "single_label", "fp32", 128, 32)
    return np.asarray(text.read(model), np.float32)


def words(text: str) -> set[str]:
    return set(re.findall(r"\w+(?:'\w+)?", text.lower()))


def overlap(one: str, other: str) -> float:
    """Share of the words that both have."""
    return len(words(one) & words(other)) / max(1, len(words(one) | words(other)))


def differs(one: str, other: str) -> bool:
    """Whether a number or a negation stands in one of them alone."""
    numbers = [{word for word in words(text) if any(map(str.isdigit, word))} for text in (one, other)]
    negated = [any(map(NEGATION.fullmatch, words(text))) for text in (one, other)]
    return numbers[0] != numbers[1] or negated[0] != negated[1]


def centred(one: np.ndarray, other: np.ndarray, middle: np.ndarray) -> np.ndarray:
    """Cosines of rows, each less what all have in common."""
    left, right = one - middle, other - middle
    products = (left * right).sum(axis=1)
    return np.asarray(products / np.linalg.norm(left, axis=1) / np.linalg.norm(right, axis=1))


def crowd(cosines: np.ndarray) -> np.ndarray:
    """Mean cosine of each row with those nearest to it."""
    return np.asarray(np.partition(cosines, -NEIGHBOURS, axis=1)[:, -NEIGHBOURS:].mean(axis=1))


def pairs() -> None:
    """What each rule does on the pairs that were written by hand."""
    with PAIRS.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    same = np.array([row["kind"] == "paraphrase" for row in rows])
    states = embedded([row[side] for side in ("first", "second") for row in rows])
    one, other = states[: len(rows)], states[len(rows) :]
    all_cosines = one @ other.T
    places, cosines = np.arange(len(rows)), np.diag(all_cosines)
    mutual = (all_cosines.argmax(axis=1) == places) & (all_cosines.argmax(axis=0) == places)
    own = np.zeros(len(rows), bool)  # among pairs of the same kind: half of the pairs share their first text otherwise
    for kind in (same, ~same):
        part = all_cosines[np.ix_(kind, kind)]
        at = np.arange(len(part))
        own[kind] = (part.argmax(axis=1) == at) & (part.argmax(axis=0) == at)
    vetoed = np.array([differs(row["first"], row["second"]) for row in rows])
    few = np.array([overlap(row["first"], row["second"]) < 0.5 for row in rows])
    centre = centred(one, other, states.mean(axis=0))
    csls = 2 * cosines - crowd(all_cosines) - crowd(all_cosines.T)
    shown = "cosine at 5, 25, 50, 75, 95 %"
    for name, kind in (("paraphrases", same), ("others", ~same)):
        print(f"{name}: {shown}:", *(f"{one:.2f}" for one in np.quantile(cosines[kind], [0.05, 0.25, 0.5, 0.75, 0.95])))
    print("| rule | precision at a recall of 70 % | recall at a precision of 90 % |\n|---|---|---|")
    everything = np.ones(len(rows), bool)
    for name, score, kept in (
        ("cosine", cosines, everything),
        ("cosine, mutual nearest of all pairs", cosines, mutual),
        ("cosine, mutual nearest of its kind", cosines, own),
        ("CSLS", csls, everything),
        ("centred cosine", centre, everything),
        ("cosine, numbers and negations agree", cosines, ~vetoed),
        ("CSLS, numbers and negations agree", csls, ~vetoed),
        ("centred cosine, numbers and negations agree", centre, ~vetoed),
        ("cosine, mutual nearest of its kind, numbers and negations agree", cosines, own & ~vetoed),
        ("cosine, fewer than half of the words shared", cosines, few),
        ("centred cosine, fewer than half of the words shared", centre, few),
    ):
        print(f"| {name} | {_at_recall(score, kept, same)} | {_at_precision(score, kept, same)} |")
    for bound in (0.6, 0.7, 0.8, 0.9, 0.95):
        print(
            f"cosine >= {bound}: paraphrases {(cosines[same] >= bound).sum()}, others {(cosines[~same] >= bound).sum()}"
        )


def _at_recall(score: np.ndarray, kept: np.ndarray, same: np.ndarray) -> str:
    found = [kept & (score >= bound) for bound in np.unique(score[kept])]
    enough = [(one & same).sum() / one.sum() for one in found if (one & same).sum() >= 0.7 * same.sum()]
    return f"{max(enough):.0%}" if enough else f"finds {(kept & same).sum()} at most"


def _at_precision(score: np.ndarray, kept: np.ndarray, same: np.ndarray) -> str:
    found = [kept & (score >= bound) for bound in np.unique(score[kept])]
    enough = [(one & same).sum() for one in found if (one & same).sum() >= 0.9 * one.sum()]
    return f"{max(enough) / same.sum():.0%}" if enough else "never"


def banking77(folder: Path) -> None:
    """What each rule finds between the two files, and how it did where it was read."""
    rows: dict[str, list[dict[str, str]]] = {}
    states: dict[str, np.ndarray] = {}
    for name in ("train", "test"):
        with (data() / "banking77" / f"{name}.csv").open(encoding="utf-8", newline="") as file:
            rows[name] = list(csv.DictReader(file))
        place = folder / f"{name}.npy"
        if not place.exists():
            np.save(place, embedded([row["text"] for row in rows[name]]))
        states[name] = np.load(place)
    cosines = states["train"] @ states["test"].T
    nearest, values = cosines.argmax(axis=1), cosines.max(axis=1)
    texts = [normalised(row["text"]) for name in rows for row in rows[name]]
    keys = joined(np.array([draw(0, text) for text in texts], np.uint64), signatures(texts), 0.8)
    count = len(rows["train"])
    new = ~np.isin(keys[:count], keys[count:])
    csls = 2 * values - crowd(cosines) - crowd(cosines.T)[nearest]
    centre = centred(states["train"], states["test"][nearest], states["train"].mean(axis=0))
    mutual = cosines.argmax(axis=0)[nearest] == np.arange(count)
    told = [json.loads(line) for line in READ.read_text(encoding="utf-8").splitlines()]
    place = {row_id(row): at for at, row in reversed(list(enumerate(rows["train"])))}
    fresh = {place[one["row"]]: one["verdict"] for one in told if one["drawn"] == "at 0.95"}
    verdicts = {place[one["row"]]: one["verdict"] for one in told}
    print(f"{(~new).sum()} train rows are exact or near leaks; mean cosine of two train rows: ", end="")
    print(f"{float((states['train'].mean(axis=0) ** 2).sum()):.2f}")
    print("| rule | train rows | read: right, unclear, wrong |\n|---|---:|---|")
    rules = {f"cosine >= {bound}": values >= bound for bound in (0.85, 0.9, 0.95)}
    rules |= {f"{name}, mutual nearest": rule & mutual for name, rule in rules.items()}
    rules |= {f"CSLS >= {bound}": (values >= 0.85) & (csls >= bound) for bound in (0.1, 0.15, 0.2)}
    rules |= {f"centred cosine >= {bound}": (values >= 0.85) & (centre >= bound) for bound in (0.85, 0.9, 0.94)}
    for name, rule in rules.items():
        print(f"| {name} | {(rule & new).sum():,} | {_read(rule, verdicts)} |")
    print(f"cosine >= 0.95, 50 drawn from its rows that were not read before: {_read(rules['cosine >= 0.95'], fresh)}")


def _read(rule: np.ndarray, verdicts: Mapping[int, str]) -> str:
    counts = Counter(verdict for at, verdict in verdicts.items() if rule[at])
    return ", ".join(f"{counts[one]}" for one in ("right", "unclear", "wrong"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["pairs", "banking77"])
    parser.add_argument("folder", type=Path, nargs="?", default=Path())
    given = parser.parse_args()
    if given.what == "pairs":
        pairs()
    else:
        banking77(given.folder)


if __name__ == "__main__":
    main()
