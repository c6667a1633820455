"""Duplicates: what is found of planted ones, and how fast, against datasketch, rensa and pandas.

    FULLTUNE_BENCH_DATA=... python bench/duplicates.py near [--repeats 5]
    FULLTUNE_BENCH_DATA=... python bench/duplicates.py exact [--rows 300000] [--repeats 5]
    FULLTUNE_BENCH_DATA=... python bench/duplicates.py leaks
    FULLTUNE_BENCH_DATA=... python bench/duplicates.py large FOLDER [--rows 1000000]

`near` needs `pip install datasketch rensa`, which the project does not depend on; `exact` needs pandas, which
`datasets` brings.

Texts are Wikipedia sentences, Banking77's rows and docstrings of the standard library, in lower case. A planted text is
one of them after edits of letters and words; how many of the 5-grams of characters it shares with it (Jaccard) is
counted, not estimated. As many pairs share 70 to 80, 80 to 90 and 90 to 100 %; as many again share 50 to 65 %.

- `near`: rows are to be put into clusters of which members share 70 %, by one thread. Each contestant starts in a fork
  of its own, in turn. The rivals make the same 5-grams, get as many bands as give them the same recall, and are run
  with and without a look at the signatures of the pairs that their index proposes. A row that is said to be a near
  duplicate is right when it shares 70 % with another row of its cluster, planted or not.
- `exact`: rows that stand in a file before. pandas has `duplicated` alone, of texts as they are and of texts that are
  brought into the form in which the audit compares them.
- `leaks`: `fulltune data` on a train and a test file; half of the plants are equal texts in other letters.
- `large`: `fulltune data --no-labels` on many short rows, its peak memory, and what each check takes.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import itertools
import json
import multiprocessing
import os
import random
import resource
import statistics
import sys
import sysconfig
import tempfile
import time
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from audit_texts import CHECKS, seconds, texts_of
from corpus import noisy, sentences
from data_stage import MODEL, measured
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from fulltune.audit import texts as audit
from fulltune.audit.languages import spoken
from fulltune.audit.rows import NEAR, AuditedRows, stands_before
from fulltune.data import groups as near
from fulltune.data.groups import draw
from fulltune.tasks import Target, task_named
from fulltune.tasks.columns import normalised

os.environ["RAYON_NUM_THREADS"] = "1"  # of rensa
THRESHOLD = 0.7
NUM_PLANTED = 1500
BINS = ((0.7, 0.8), (0.8, 0.9), (0.9, 1.0))
DISTRACTORS = (0.5, 0.65)
LEAST_CHARACTERS = 30
TIMED = 20_000


# ---- planted texts -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """Two texts that share some of their 5-grams."""

    one: str
    other: str
    jaccard: float


def grams(text: str) -> set[str]:
    return {text[place : place + 5] for place in range(max(1, len(text) - 4))}


def jaccard(one: str, other: str) -> float:
    mine, theirs = grams(one), grams(other)
    shared = len(mine & theirs)
    return shared / (len(mine) + len(theirs) - shared)


def real_texts() -> list[str]:
    """Different texts in a drawn order."""
    if "FULLTUNE_BENCH_DATA" not in os.environ:
        sys.exit("FULLTUNE_BENCH_DATA is not set: the data of this benchmark are not part of the project")
    sets = texts_of(Path(os.environ["FULLTUNE_BENCH_DATA"]))
    root = Path(sysconfig.get_path("stdlib"))
    files = (file for file in sorted(root.rglob("*.py")) if not {"site-packages", "test", "tests"} & set(file.parts))
    docstrings = [text for file in files for text in sentences(file, 6, 30)]
    texts = dict.fromkeys(map(normalised, [*sets["wiki_sentences"], *sets["banking77"], *docstrings]))
    drawn = [text for text in texts if len(text) >= LEAST_CHARACTERS]
    random.Random(0).shuffle(drawn)
    return drawn


def edited(text: str, words: list[str], chance: random.Random) -> str:
    """A text with one letter or one word left out, put in or replaced."""
    parts: list[str] = text.split() if chance.random() < 0.5 else list(text)
    is_text = len(parts) == len(text)
    place = chance.randrange(len(parts))
    new = chance.choice("abcdefghijklmnopqrstuvwxyz") if is_text else chance.choice(words)
    parts[place : place + chance.randrange(2)] = [new] if chance.random() < 0.7 else []
    return normalised(("" if is_text else " ").join(parts))


def pairs(texts: Iterator[str], bounds: tuple[float, float], count: int, chance: random.Random) -> list[Pair]:
    """Pairs that share so many 5-grams, of other texts each."""
    found: list[Pair] = []
    words = sorted({word for text in itertools.islice(texts, 1000) for word in text.split()})
    for text in texts:
        if len(found) == count:
            return found
        wanted, other = chance.uniform(*bounds), text
        while other and jaccard(text, other) > wanted:
            other = edited(other, words, chance)
        if other and bounds[0] <= (shared := jaccard(text, other)) < bounds[1]:
            found.append(Pair(text, other, shared))
    sys.exit(f"too few texts for {count} pairs")


# ---- near duplicates -----------------------------------------------------------------------------------------------

Pairs = np.ndarray
"""Rows that are said to be nearly the same: int64 [pairs, 2]."""


@dataclass(frozen=True)
class Settings:
    """A rival's: as few hashes, and as wide bands, as have the recall of fulltune."""

    hashes: int
    bands: int
    is_verified: bool
    """Pairs that agree in a band are near only where their signatures say so."""

    def __str__(self) -> str:
        return f"{self.hashes} hashes, {self.bands} bands{', verified' if self.is_verified else ''}"


def with_fulltune(texts: Sequence[str], _: Settings | None) -> Pairs:
    found = near.clusters(near.signatures(texts), THRESHOLD)
    return np.stack([np.arange(len(found)), found], axis=1)[found != np.arange(len(found))]


def _datasketch(texts: Sequence[str], num_hashes: int) -> Any:
    from datasketch import MinHash

    return MinHash.bulk(([gram.encode() for gram in grams(text)] for text in texts), num_perm=num_hashes)


def with_datasketch(texts: Sequence[str], settings: Settings | None) -> Pairs:
    from datasketch import MinHashLSH

    assert settings is not None
    bands = (settings.bands, settings.hashes // settings.bands)
    index, found = MinHashLSH(num_perm=settings.hashes, params=bands), []
    signed = _datasketch(texts, settings.hashes)
    for row, one in enumerate(signed):
        others = index.query(one)
        if settings.is_verified:
            others = [other for other in others if one.jaccard(signed[other]) >= THRESHOLD]
        found += [(row, other) for other in others]
        index.insert(row, one, check_duplication=False)
    return np.array(found, np.int64).reshape(-1, 2)


def _rensa(texts: Sequence[str], num_hashes: int) -> Any:
    from rensa import RMinHash

    return RMinHash.from_token_sets([grams(text) for text in texts], num_hashes, 42)


def with_rensa(texts: Sequence[str], settings: Settings | None) -> Pairs:
    from rensa import RMinHashLSH

    assert settings is not None
    index, found = RMinHashLSH(THRESHOLD, settings.hashes, settings.bands), []
    signed = _rensa(texts, settings.hashes)
    index.insert_many(signed)
    for row, others in enumerate(index.query_all(signed)):
        found += [
            (row, other)
            for other in others
            if other < row and (not settings.is_verified or signed[row].jaccard(signed[other]) >= THRESHOLD)
        ]
    return np.array(found, np.int64).reshape(-1, 2)


def _numbers(name: str, texts: Sequence[str], num_hashes: int) -> np.ndarray:
    if name == "rensa":
        return np.array([one.digest() for one in _rensa(texts, num_hashes)])
    return np.array([one.hashvalues for one in _datasketch(texts, num_hashes)])


def settings_for(name: str, planted: list[Pair], others: list[Pair], recall: float) -> dict[bool, Settings | None]:
    """A rival's settings with and without verification.

    The fewest hashes whose recall is within a point of the given one, and that take at most a fifth of the distractors.
    """
    both = [*planted, *others]
    found: dict[bool, Settings | None] = {True: None, False: None}
    for hashes in range(160, 15, -8):
        signed = _numbers(name, [text for pair in both for text in (pair.one, pair.other)], hashes)
        equal = signed[::2] == signed[1::2]
        for width in (one for one in range(2, 17) if hashes % one == 0):
            proposed = equal.reshape(len(both), hashes // width, width).all(axis=2).any(axis=1)
            for is_verified in found:
                taken = proposed & (equal.mean(axis=1) >= THRESHOLD) if is_verified else proposed
                hits, wrong = taken[: len(planted)].mean(), taken[len(planted) :].mean()
                if abs(hits - recall) <= 0.01 and wrong <= 0.2:
                    found[is_verified] = Settings(hashes, hashes // width, is_verified)
    return found


@dataclass(frozen=True)
class Ran:
    """What a contestant found, and what it took."""

    found: Any
    seconds: float
    processor_seconds: float
    mib: float
    """Above what the process had at its start."""


def in_fork(work: Callable[[], Any]) -> Ran:
    """Run something in a process of its own."""
    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe(duplex=False)

    def run() -> None:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        started, started_cpu = time.perf_counter(), time.process_time()
        found = work()
        took = time.perf_counter() - started, time.process_time() - started_cpu
        theirs.send(Ran(found, *took, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024))

    process = context.Process(target=run)
    process.start()
    theirs.close()
    try:
        return mine.recv()
    except EOFError:
        sys.exit("a contestant ended without a result")
    finally:
        process.join()


def in_turn(contestants: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[Ran]]:
    ran: dict[str, list[Ran]] = {name: [] for name in contestants}
    for _ in range(repeats):
        for name, work in contestants.items():
            ran[name].append(in_fork(work))
    return ran


HEAD = f"{'processor s':>11} {'fulltune /':>10} {'wall s':>6} {'MiB':>5}"


def figures(ours: list[Ran], theirs: list[Ran]) -> str:
    """Medians over the rounds."""
    ratios = [one.processor_seconds / other.processor_seconds for one, other in zip(ours, theirs, strict=True)]
    spent, wall, mib = (
        statistics.median(getattr(one, of) for one in theirs) for of in ("processor_seconds", "seconds", "mib")
    )
    return f"{spent:11.2f} {statistics.median(ratios):10.2f} {wall:6.1f} {mib:5.0f}"


def clusters_of(pairs: Pairs, count: int) -> np.ndarray:
    graph = coo_array((np.ones(len(pairs), bool), (pairs[:, 0], pairs[:, 1])), shape=(count, count))
    return connected_components(graph, directed=False)[1]


def right_rows(labels: np.ndarray, texts: Sequence[str]) -> tuple[int, int]:
    """Rows that share a cluster, and those of them that share 70 % with another row of it."""
    members = defaultdict(list)
    for row, label in enumerate(labels.tolist()):
        members[label].append(row)
    said, right = 0, 0
    for rows in members.values():
        if len(rows) == 1:
            continue
        said += len(rows)
        of = {row: grams(texts[row]) for row in rows}
        for row in rows:
            shares = (len(of[row] & of[one]) / len(of[row] | of[one]) for one in rows if one != row)
            right += any(share >= THRESHOLD for share in shares)
    return said, right


def near_duplicates(repeats: int) -> None:
    for library in ("datasketch", "rensa"):
        importlib.import_module(library)  # here, so that no contestant's time has it
    texts, chance = real_texts(), random.Random(1)
    source = iter(texts)
    planted = [pairs(source, bounds, NUM_PLANTED, chance) for bounds in BINS]
    others = pairs(source, DISTRACTORS, NUM_PLANTED, chance)
    everything = [*itertools.chain(*planted), *others]
    rows = list(dict.fromkeys([*texts, *(pair.other for pair in everything)]))
    chance.shuffle(rows)
    place = {text: row for row, text in enumerate(rows)}
    print(f"{len(rows):,} different rows of {statistics.mean(map(len, rows)):.0f} characters")

    def recalls(labels: np.ndarray) -> list[float]:
        return [
            float(np.mean([labels[place[pair.one]] == labels[place[pair.other]] for pair in group]))
            for group in (*planted, [pair for group in planted for pair in group], others)
        ]

    first = in_fork(partial(with_fulltune, rows, None))
    recall = recalls(clusters_of(first.found, len(rows)))[len(BINS)]
    contestants: dict[str, tuple[Callable[..., Pairs], Settings | None]] = {"fulltune": (with_fulltune, None)}
    for name, work in (("datasketch", with_datasketch), ("rensa", with_rensa)):
        tuned = in_fork(partial(settings_for, name, [*itertools.chain(*planted)], others, recall)).found
        for settings in tuned.values():
            if settings is None:
                print(f"{name}: no settings have this recall")
            else:
                contestants[f"{name}: {settings}"] = (work, settings)
    ran = in_turn({name: partial(work, rows, settings) for name, (work, settings) in contestants.items()}, repeats)
    print(
        f"{'':44} {HEAD} {'70-80':>6} {'80-90':>6} {'90-100':>6} {'all':>6} {'50-65':>6} {'rows said':>9} {'right':>6}"
    )
    for name, runs in ran.items():
        labels = clusters_of(runs[0].found, len(rows))
        said, right = right_rows(labels, rows)
        by_bin = " ".join(f"{share:6.1%}" for share in recalls(labels))
        print(f"{name:44} {figures(ran['fulltune'], runs)} {by_bin} {said:9,} {right / said:6.1%}", flush=True)


# ---- equal rows ----------------------------------------------------------------------------------------------------


def equal_with_fulltune(rows: Sequence[dict[str, str]]) -> np.ndarray:
    """As `audited_rows.look` and `repeated` do it; equal leaks and conflicting labels need no more than this."""
    task, target = task_named("text-classification"), Target("single_label", {"text": "text", "label": "label"})
    audited = AuditedRows(Path(), task, target, frozenset(), None)
    keys, wholes = array("Q"), array("q")
    for row in rows:
        key = task.group_key(row, target)
        keys.append(draw(0, key))
        wholes.append(hash(audited.whole(row, key)))
    return stands_before(np.frombuffer(wholes, np.int64), np.ones(len(rows), bool))


def equal_with_pandas(frame: Any) -> np.ndarray:
    return frame.duplicated().to_numpy()


def equal_with_pandas_in_form(frame: Any) -> np.ndarray:
    return frame.apply(lambda column: column.str.lower().str.split().str.join(" ")).duplicated().to_numpy()


def exact(num_rows: int, repeats: int) -> None:
    import pandas

    texts, chance = real_texts(), random.Random(0)
    rows = [
        {"text": f"{chance.choice(texts).capitalize()} {chance.randrange(num_rows // 10_000 + 1)}", "label": "one"}
        for _ in range(num_rows)
    ]
    frame = pandas.DataFrame(rows)
    contestants: dict[str, tuple[Callable[..., np.ndarray], Any]] = {
        "fulltune": (equal_with_fulltune, rows),
        "pandas, texts as they are": (equal_with_pandas, frame),
        "pandas, in the form of the audit": (equal_with_pandas_in_form, frame),
    }
    ran = in_turn({name: partial(work, given) for name, (work, given) in contestants.items()}, repeats)
    print(f"{num_rows:,} rows\n{'':34} {HEAD} {'duplicates':>10}")
    for name, runs in ran.items():
        print(f"{name:34} {figures(ran['fulltune'], runs)} {int(runs[0].found.sum()):10,}")


# ---- leaks ---------------------------------------------------------------------------------------------------------


def shares_with_held_out(texts: Sequence[str], held_out: Sequence[str]) -> list[float]:
    """Of each text the largest share of 5-grams that it has in common with a held-out one."""
    of_gram: dict[str, list[int]] = defaultdict(list)
    sizes = [len(grams(text)) for text in held_out]
    for number, text in enumerate(held_out):
        for gram in grams(text):
            of_gram[gram].append(number)
    found = []
    for text in texts:
        mine = grams(text)
        shared = Counter(number for gram in mine for number in of_gram.get(gram, ()))
        found.append(max((count / (len(mine) + sizes[one] - count) for one, count in shared.items()), default=0.0))
    return found


def leaks() -> None:
    texts, chance = real_texts(), random.Random(2)
    source = iter(texts)
    count = NUM_PLANTED // 3
    planted = {bounds: pairs(source, bounds, count, chance) for bounds in (*BINS, DISTRACTORS)}
    # Few texts have letters that do not come back: `ß` is `SS`.
    equal = list(itertools.islice((text for text in source if normalised(text.title()) == text), count))
    near_ones = [pair for group in planted.values() for pair in group]
    held_out = [*equal, *(pair.one for pair in near_ones), *itertools.islice(source, 1000)]
    train = [*(f"  {text.title()} " for text in equal), *(pair.other for pair in near_ones), *source]
    chance.shuffle(train)
    chance.shuffle(held_out)
    half = len(held_out) // 2
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file, rows in (("train", train), ("eval", held_out[:half]), ("test", held_out[half:])):
            labelled = ((text, f"class {place % 20}") for place, text in enumerate(rows))
            write_rows(folder / f"{file}.csv", ("text", "label"), labelled)
        data = audited(folder, train="train.csv", eval="eval.csv", test="test.csv")[2]
        issues = [json.loads(line) for line in (data / "issues.jsonl").read_text("utf-8").splitlines()]
    said: dict[str, set[str]] = defaultdict(set)
    for one in issues:
        if one["check"] in ("leak", "near leak"):
            said[one["check"]].add(normalised(train[int(one["place"].rpartition(":")[2]) - 2]))
    print(f"{len(train):,} train rows, {len(held_out):,} held-out ones, {count} planted of each kind")
    print(f"equal texts found: {len(said['leak'] & set(equal)) / count:.1%}")
    print(f"leaks that are none: {len(said['leak'] - set(held_out))} of {len(said['leak'])}")
    for bounds, group in planted.items():
        hits = [pair.other in said["near leak"] for pair in group]
        print(f"near, sharing {bounds[0]:.0%} to {bounds[1]:.0%}: {statistics.mean(hits):.1%} found")
    shares = np.array(shares_with_held_out(sorted(said["near leak"]), held_out))
    for least in (0.7, 0.8):
        print(
            f"of {len(shares)} near leaks {np.mean(shares >= least):.1%} share {least:.0%} or more with a held-out row"
        )


# ---- many rows -----------------------------------------------------------------------------------------------------


def write_rows(path: Path, columns: Sequence[str], rows: Iterator[Sequence[str]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)


def audited(folder: Path, **files: str) -> tuple[float, int, Path]:
    """Run `fulltune data`: seconds, peak bytes of its processes together, and its `data` folder."""
    recipe = folder / "recipe.yaml"
    named = ", ".join(f"{split}: {folder / file}" for split, file in files.items())
    recipe.write_text(f"model: {MODEL}\ntask: text-classification\ndata: {{{named}}}\noutput: {folder / 'runs'}\n")
    command = [sys.executable, "-m", "fulltune.cli.app", "data", str(recipe), "--no-labels"]
    took, peak = measured(command, {**os.environ, "HF_HUB_OFFLINE": "1"})
    return took, peak, max((folder / "runs").iterdir()) / "data"


def large(folder: Path, num_rows: int) -> None:
    texts, chance = real_texts(), random.Random(0)
    rows = ((noisy(noisy(chance.choice(texts), chance), chance), f"class {row % 20}") for row in range(num_rows))
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / "rows.csv", ("text", "label"), rows)
    took, peak, found = audited(folder, train="rows.csv")
    said = json.loads((found / "audit.json").read_text("utf-8"))
    print(
        f"{num_rows:,} rows: {took:,.0f} s in all, the audit {said['seconds']:,.0f} s of it; all processes together "
        f"{peak / 2**20:,.0f} MiB at most; not made: {said['not_run']}",
        flush=True,
    )
    print({one["check"]: one["rows"] for one in said["checks"]})
    time_checks(folder / "rows.csv")


def time_checks(path: Path) -> None:
    with path.open(encoding="utf-8", newline="") as file:
        read = [row["text"] for row in csv.DictReader(file)]
    some, factor = read[:TIMED], len(read) / TIMED
    spoken("loads the model, which takes a second")
    print(f"processor seconds over {len(read):,} rows; but for clusters from the first {TIMED:,}")
    rows_of = [{"text": text, "label": "one"} for text in some]
    of_some: dict[str, Callable[[], object]] = {
        **{check: partial(seconds, some, (check,), 1) for check in CHECKS if check not in audit.missing()},
        "languages": lambda: list(map(spoken, some)),
        "equal rows, conflicting labels": lambda: equal_with_fulltune(rows_of),
        "near duplicates: signatures": lambda: near.signatures(list(map(normalised, some))),
    }
    for name, work in of_some.items():
        print(f"{name:32} {in_fork(work).processor_seconds * factor:8.1f}", flush=True)
    signed = near.signatures(list(map(normalised, read)))
    print(f"{'near duplicates: clusters':32} {in_fork(partial(near.clusters, signed, NEAR)).processor_seconds:8.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("near", "exact", "leaks", "large"):
        command = commands.add_parser(name)
        if name == "large":
            command.add_argument("folder", type=Path)
        if name in ("exact", "large"):
            command.add_argument("--rows", type=int, default=1_000_000 if name == "large" else 300_000)
        if name in ("near", "exact"):
            command.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    try:
        if given.command == "near":
            near_duplicates(given.repeats)
        elif given.command == "exact":
            exact(given.rows, given.repeats)
        elif given.command == "leaks":
            leaks()
        else:
            large(given.folder, given.rows)
    except ModuleNotFoundError as error:
        sys.exit(f"{error.name} is not installed; this benchmark alone needs it: pip install datasketch rensa pandas")


if __name__ == "__main__":
    main()
