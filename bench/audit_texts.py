"""Time of each check of `fulltune.audit` a row, and how many texts of real data sets each finds.

    FULLTUNE_BENCH_DATA=... python bench/audit_texts.py [--rows 20000] [--repeats 3] [--hits FOLDER]
        [--installed] [--wheels FOLDER]

The timed rows are sentences of all sets, cut to 20 words; each check's time is the smallest of the repeats. Hits are
counted over every whole text of every set; --hits writes what was found, one file a check, for a person to judge.
--installed adds docstrings, descriptions and messages of what is installed, --wheels the texts of packages with data;
the check of answers alone, `refusal`, is not told apart there.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import os
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import installed_texts

from fulltune.audit import texts as audit

CHECKS = tuple(dict.fromkeys((*audit.OF_TEXTS, *audit.OF_ANSWERS)))
NUM_WORDS = 20


def texts_of(data: Path) -> dict[str, list[str]]:
    """Every text of every set; of the plays and the annotated sentences, one a paragraph."""
    found = dict[str, list[str]]()
    for file in sorted((data / "banking77").glob("*.csv")):
        with file.open(encoding="utf-8", newline="") as lines:
            found.setdefault("banking77", []).extend(row["text"] for row in csv.DictReader(lines))
    for file in sorted((data / "gsm8k").glob("*.jsonl")):
        for line in file.read_text("utf-8").splitlines():
            row = json.loads(line)
            found.setdefault("gsm8k questions", []).append(row["question"])
            found.setdefault("gsm8k answers", []).append(row["answer"])
    for file in sorted((data / "wnut17").iterdir()):
        if file.suffix in (".conll", ".annotated"):
            found.setdefault("wnut17", []).extend(_sentences(file.read_text("utf-8").split("\n")))
    plays = (data / "shakespeare" / "input.txt").read_text("utf-8").split("\n\n")
    sentences = (data / "wiki_sentences" / "sentences.txt").read_text("utf-8").split("\n")
    return {**found, "shakespeare": plays, "wiki_sentences": [text for text in sentences if text]}


def _sentences(lines: list[str]) -> Iterator[str]:
    for filled, group in itertools.groupby(lines, key=lambda line: bool(line.strip())):
        if filled:
            yield " ".join(line.split("\t")[0] for line in group)


def timed_rows(texts: dict[str, list[str]], count: int) -> list[str]:
    """Rows of 20 words, as many from each set, in a drawn order."""
    rows = list[str]()
    for group in texts.values():
        words = [word for text in group for word in text.split(" ")][: NUM_WORDS * (count // len(texts) + 1)]
        rows += [" ".join(words[place : place + NUM_WORDS]) for place in range(0, len(words), NUM_WORDS)]
    random.Random(0).shuffle(rows)
    return [rows[place % len(rows)] for place in range(count)]


def seconds(rows: list[str], checks: tuple[str, ...], repeats: int) -> float:
    """The shortest of several passes of some checks over the rows."""
    taken = []
    for _ in range(repeats):
        started = time.perf_counter()
        for row in rows:
            audit.flaws(row, checks)
        taken.append(time.perf_counter() - started)
    return min(taken)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--hits", type=Path, help="folder for what was found")
    parser.add_argument("--installed", action="store_true", help="also texts that every installation has")
    parser.add_argument("--wheels", type=Path, help="folder with wheels whose texts are looked at, too")
    given = parser.parse_args()
    if "FULLTUNE_BENCH_DATA" not in os.environ:
        sys.exit("FULLTUNE_BENCH_DATA is not set: the data of this benchmark are not part of the project")
    texts = texts_of(Path(os.environ["FULLTUNE_BENCH_DATA"]))
    rows = timed_rows(texts, given.rows)
    texts |= installed_texts.texts() if given.installed else {}
    texts |= {"packages": installed_texts.of_wheels(given.wheels)} if given.wheels else {}
    for check in audit.missing():
        print(f"not made: {check} (pip install 'fulltune[audit]')")
    checks = tuple(check for check in CHECKS if check not in audit.missing())
    print(f"{len(rows):,} rows of {NUM_WORDS} words\n{'check':20} {'µs a row':>9}")
    for name, some in (*((check, (check,)) for check in checks), ("all", checks)):
        print(f"{name:20} {seconds(rows, some, given.repeats) / len(rows) * 1e6:9.2f}", flush=True)
    print(f"\n{'hits':20} " + " ".join(f"{name:>15}" for name in texts))
    print(f"{'texts':20} " + " ".join(f"{len(group):15,}" for group in texts.values()))
    for check in checks:
        found = {name: [(text, audit.flaws(text, (check,))) for text in group] for name, group in texts.items()}
        hits = {name: [(text, flaws[0]) for text, flaws in group if flaws] for name, group in found.items()}
        print(f"{check:20} " + " ".join(f"{len(group):15,}" for group in hits.values()), flush=True)
        if given.hits:
            given.hits.mkdir(parents=True, exist_ok=True)
            lines = [(name, flaw.reason, text, flaw.fixed) for name, group in hits.items() for text, flaw in group]
            file = given.hits / f"{check.replace(' ', '_')}.jsonl"
            file.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), "utf-8")


if __name__ == "__main__":
    main()
