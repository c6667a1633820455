"""Defects of rows: how much of what is planted each check of `fulltune data` finds, and what it lists of clean texts.

Texts of Banking77, GSM8K, WNUT-17, tiny Shakespeare and Wikipedia are drawn with a seed, and each kind of defect is put
into as many of them; a text that the check lists as it is counts as listed and gets no defect. Duplicates, conflicting
labels and leaks are looked for by the command in a file of Banking77's texts. The checks know these kinds, so that the
shares flatter.
"""

from __future__ import annotations

import copy
import json
import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.private_defects import PRIVATE
from bench.public_data import MINILM, all_texts, read_csv, source
from bench.results import Figure
from bench.row_defects import EDITS, OF_CONVERSATIONS, conversation, jaccard
from bench.runs import SMOKE, fresh, fulltune, run, script
from bench.text_defects import OF_TEXTS, REFUSALS

from fulltune.audit import texts as audit
from fulltune.audit.rows import chat_faults

BARS = {
    "broken encoding": 0.72,
    "control characters": 1.0,
    "empty": 0.8,
    "no words": 0.82,
    "markup": 0.6,
    "placeholder": 0.67,
    "chat tokens": 0.9,
    "repetition": 0.74,
    "secret": 0.95,
    "personal data": 0.63,
    "phone number": 0.65,
    "refusal": 0.83,
    "chat fault": 0.88,
    "duplicate": 1.0,
    "conflicting labels": 1.0,
    "leak": 1.0,
    "near leak": 0.99,
}
"""Least share of the planted defects that each check finds; in quick runs, with few texts, a tenth less."""


@dataclass
class Counts:
    """What came of the kinds of defects of one check."""

    planted: int = 0
    found: int = 0
    clean: int = 0
    listed: int = 0
    """Of the clean texts."""

    def add(self, planted: int, found: int, clean: int = 0, listed: int = 0) -> None:
        self.planted, self.found = self.planted + planted, self.found + found
        self.clean, self.listed = self.clean + clean, self.listed + listed


def clean_texts(texts: dict[str, list[str]], check: str) -> list[str]:
    """1,000 texts of each set, however large it is; of refusals the answers alone, since only these are looked at."""
    groups = [texts["gsm8k answers"]] if check == "refusal" else list(texts.values())
    chosen = (random.Random(0).sample(group, min(1000, len(group))) for group in groups)
    return [text for group in chosen for text in group if len(text.split()) >= 5]


def of_texts(texts: dict[str, list[str]], each: int, counts: dict[str, Counts]) -> None:
    for check, kinds in {**OF_TEXTS, **PRIVATE, "refusal": REFUSALS}.items():
        clean = clean_texts(texts, check)
        for number, plant in enumerate(kinds.values()):
            draw = random.Random(number)
            chosen = draw.sample(clean, each)
            sound = [text for text in chosen if not audit.find_flaws(text, (check,))]
            found = sum(bool(audit.find_flaws(plant(text, draw), (check,))) for text in sound)
            counts[check].add(len(sound), found, each, each - len(sound))


def of_conversations(texts: dict[str, list[str]], each: int, counts: dict[str, Counts]) -> None:
    for number, (calls, plant) in enumerate(OF_CONVERSATIONS.values()):
        draw = random.Random(number)
        sound = [conversation(draw, texts["banking77"], texts["gsm8k answers"], calls) for _ in range(each)]
        listed = sum(bool(chat_faults(turns)) for turns in sound)
        found = sum(bool(chat_faults(plant(copy.deepcopy(turns), draw))) for turns in sound)
        counts["chat fault"].add(each, found, each, listed)


def of_rows(folder: Path, each: int, rows: int, counts: dict[str, Counts]) -> None:
    """Duplicates, conflicting labels and leaks in one file."""
    draw = random.Random(0)
    chosen = draw.sample([(row["text"], row["category"]) for row in read_csv(source("banking77/train.csv"))], rows)
    labels = sorted({label for _, label in chosen})
    test, train = chosen[: rows // 3], [list(row) for row in chosen[rows // 3 :]]
    before = issues(folder, train, test)
    planted: list[tuple[str, list[str]]] = []
    for number, place in enumerate(draw.sample(range(len(train)), 4 * each)):
        text, label = train[place]
        text = EDITS[("as it stands", "in capitals", "other white space")[number % 3]](text, draw)
        if number % 2:
            planted.append(("duplicate", [text, label]))
        else:
            planted.append(("conflicting labels", [text, draw.choice([other for other in labels if other != label])]))
    for edit in EDITS.values():
        for text, label in draw.sample(test, each):
            changed = edit(text, draw)
            shared = jaccard(text, changed)
            if shared >= 0.8:  # below it no near leak is promised
                planted.append(("leak" if shared == 1 else "near leak", [changed, label]))
    after = issues(folder, [*train, *(row for _, row in planted)], test)
    for place, (check, _) in enumerate(planted, start=len(train)):
        is_leak = check.endswith("leak")
        counts[check].add(1, bool(after[place] & ({"leak", "near leak"} if is_leak else {check})))
    for check in ("duplicate", "conflicting labels", "leak", "near leak"):
        counts[check].add(0, 0, len(train), sum(check in found for found in before.values()))


def issues(folder: Path, train: list[list[str]], test: list[tuple[str, str]]) -> dict[int, set[str]]:
    """Position of a train row to the checks that list it."""
    folder, half = fresh(folder), len(test) // 2
    for name, rows in (("train", train), ("eval", test[:half]), ("test", test[half:])):
        lines = (json.dumps({"text": text, "label": label}) + "\n" for text, label in rows)
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    files = "train: train.jsonl, eval: eval.jsonl, test: test.jsonl"
    recipe = folder / "recipe.yaml"
    recipe.write_text(f"model: {MINILM}\ntask: text-classification\ndata: {{{files}}}\n", encoding="utf-8")
    run(fulltune("data", recipe, "--no-labels", "--run-folder", folder / "run"))
    listed: dict[int, set[str]] = defaultdict(set)
    for line in (folder / "run" / "data" / "issues.jsonl").read_text("utf-8").splitlines():
        issue = json.loads(line)
        if issue["split"] == "train":
            listed[int(issue["place"].rpartition(":")[2]) - 1].add(issue["check"])
    return listed


def measure(folder: Path, quick: bool) -> Iterator[Figure]:
    texts, each, counts = all_texts(), 10 if quick else 50, defaultdict[str, Counts](Counts)
    of_texts(texts, each, counts)
    of_conversations(texts, each, counts)
    of_rows(folder / "rows", each, 300 if SMOKE else 1500 if quick else 6000, counts)
    for check, of_check in counts.items():
        print(f"  {check}: {of_check}", flush=True)
        share, bar = of_check.found / of_check.planted, BARS[check] - 0.1 * quick
        yield Figure(f"planted defects that are found: {check}", share, "share", at_least=bar)
    clean = sum(counted.clean for counted in counts.values())
    listed = sum(counted.listed for counted in counts.values())
    yield Figure("texts without a planted defect that are listed", listed / clean, "share", at_most=0.005)


if __name__ == "__main__":
    script(measure, __doc__)
