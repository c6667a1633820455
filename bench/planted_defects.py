"""How much of what is planted each check of `fulltune data` finds, and how many untouched texts it lists.

    FULLTUNE_BENCH_DATA=... python bench/planted_defects.py [--each 50] [--kinds]

Texts of Banking77, GSM8K, WNUT-17, tiny Shakespeare and Wikipedia are drawn with a seed, and each kind of defect is put
into as many of them; a text that the check lists as it stands is counted as such and not planted in. Rows that stand
twice are found by `fulltune data` itself, in a file of Banking77's texts. --kinds prints every kind, else those of
which less than nine in ten are found.
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import public_data
from declined_answers import REFUSALS
from private_defects import PRIVATE
from row_defects import EDITS, OF_CONVERSATIONS, conversation, jaccard
from text_defects import OF_TEXTS

from fulltune.audit import texts as audit
from fulltune.audit.rows import chat_faults

_ROWS = 6000
_WHOLE = {"empty", "no words", "repetition"}


@dataclass(frozen=True)
class Counted:
    """What came of one kind of defect."""

    check: str
    kind: str
    planted: int
    found: int
    untouched: int
    listed: int
    """Of the untouched texts."""


def clean_texts(data: Path, check: str) -> list[str]:
    """Texts of all sets; of refusals the answers alone, since only these are looked at."""
    texts = public_data.all_texts()
    groups = [texts["gsm8k answers"]] if check == "refusal" else list(texts.values())
    # As many of each set, however large it is.
    return [text for group in groups for text in random.Random(0).sample(group, 1000) if len(text.split()) >= 5]


def of_texts(data: Path, each: int) -> Iterable[Counted]:
    for check, kinds in {**OF_TEXTS, **PRIVATE, "refusal": REFUSALS}.items():
        clean = clean_texts(data, check)
        for number, (kind, plant) in enumerate(kinds.items()):
            draw = random.Random(number)
            chosen = draw.sample(clean, each)
            sound = [text for text in chosen if not audit.flaws(text, (check,))]
            found = sum(bool(audit.flaws(plant(text, draw), (check,))) for text in sound)
            yield Counted(check, kind, len(sound), found, each, each - len(sound))


def of_conversations(data: Path, each: int) -> Iterable[Counted]:
    texts = public_data.all_texts()
    for number, (kind, (calls, plant)) in enumerate(OF_CONVERSATIONS.items()):
        draw = random.Random(number)
        sound = [conversation(draw, texts["banking77"], texts["gsm8k answers"], calls) for _ in range(each)]
        listed = sum(bool(chat_faults(turns)) for turns in sound)
        found = sum(bool(chat_faults(plant(copy.deepcopy(turns), draw))) for turns in sound)
        yield Counted("chat fault", kind, each, found, each, listed)


def of_rows(data: Path, each: int) -> Iterable[Counted]:
    """Duplicates, conflicting labels and leaks: one file with all of them, looked at by the command."""
    draw = random.Random(0)
    with (data / "banking77" / "train.csv").open(encoding="utf-8", newline="") as lines:
        rows = draw.sample([(row["text"], row["category"]) for row in csv.DictReader(lines)], _ROWS)
    labels = sorted({label for _, label in rows})
    test, train = rows[: _ROWS // 3], [list(row) for row in rows[_ROWS // 3 :]]
    before = _issues(train, test)
    kinds: list[str] = ["" for _ in train]
    originals = draw.sample(range(len(train)), 4 * each)
    planted: list[tuple[str, list[str]]] = []
    for number, place in enumerate(originals):
        text, label = train[place]
        name = ("as it stands", "in capitals", "other white space")[number % 3]
        text = EDITS[name](text, draw)
        if number % 2:
            planted.append((f"duplicate: {name}", [text, label]))
        else:
            other = draw.choice([one for one in labels if one != label])
            planted.append((f"conflicting labels: {name}", [text, other]))
    for name, edit in EDITS.items():
        for text, label in draw.sample(test, each * (4 if "word" in name or "letter" in name else 1)):
            changed = edit(text, draw)
            planted.append((_kind_of_leak(name, jaccard(text, changed)), [changed, label]))
    kinds += [kind for kind, _ in planted]
    after = _issues([*train, *(row for _, row in planted)], test)
    counted = set[str]()
    for kind in sorted(dict.fromkeys(kind for kind, _ in planted), reverse=True):
        check = kind.partition(":")[0]
        places = [place for place, one in enumerate(kinds) if one == kind]
        found = sum(bool(after.get(place, set()) & _names(check)) for place in places)
        # The same rows for all kinds of a check: counted with the first.
        untouched = 0 if check in counted else len(train)
        listed = sum(check in them for them in before.values()) if untouched else 0
        counted.add(check)
        yield Counted(check, kind.partition(": ")[2], len(places), found, untouched, listed)


def _names(check: str) -> set[str]:
    return {"leak", "near leak"} if check in ("leak", "near leak") else {check}


def _kind_of_leak(name: str, shared: float) -> str:
    if shared == 1:
        return f"leak: {name}"
    bounds = (
        (0.9, "0.9 and more"),
        (0.85, "0.85 to 0.9"),
        (0.8, "0.8 to 0.85"),
        (0.75, "0.75 to 0.8"),
        (0.7, "0.7 to 0.75"),
    )
    return (
        f"near leak: {next((said for bound, said in bounds if shared >= bound), 'below 0.7')} of the 5-grams in common"
    )


def _issues(train: list[list[str]], test: list[tuple[str, str]]) -> dict[int, set[str]]:
    """Place of a train row to the checks that list it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        half = len(test) // 2
        for part, rows in (("train", train), ("eval", test[:half]), ("test", test[half:])):
            with (folder / f"{part}.jsonl").open("w", encoding="utf-8") as out:
                out.writelines(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows)
        files = "train: train.jsonl, eval: eval.jsonl, test: test.jsonl"
        recipe = f"model: {public_data.MINILM}\ntask: text-classification\ndata: {{{files}}}\n"
        (folder / "recipe.yaml").write_text(recipe, encoding="utf-8")
        command = [sys.executable, "-m", "fulltune.cli.app", "data", str(folder / "recipe.yaml"), "--no-labels"]
        done = subprocess.run([*command, "--run-folder", str(folder / "run")], capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stdout + done.stderr)
        found: dict[int, set[str]] = {}
        for line in (folder / "run" / "data" / "issues.jsonl").read_text("utf-8").splitlines():
            issue = json.loads(line)
            if issue["split"] == "train":
                found.setdefault(int(issue["place"].rpartition(":")[2]) - 1, set()).add(issue["check"])
        return found


def report(counts: list[Counted], all_kinds: bool) -> None:
    """A line for each check, and one for each kind."""
    print("| check | kinds | of these found, 9 in 10 or more | planted | found | untouched texts | listed |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for check in dict.fromkeys(one.check for one in counts):
        of = [one for one in counts if one.check == check]
        well = sum(one.found >= 0.9 * one.planted for one in of)
        planted, found = sum(one.planted for one in of), sum(one.found for one in of)
        untouched, listed = sum(one.untouched for one in of), sum(one.listed for one in of)
        print(f"| {check} | {len(of)} | {well} | {planted:,} | {found:,} | {untouched:,} | {listed:,} |")
    print("\n| check | kind | planted | found |\n|---|---|---:|---:|")
    for one in counts:
        if all_kinds or one.found < 0.9 * one.planted:
            print(f"| {one.check} | {one.kind} | {one.planted:,} | {one.found:,} |")


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--each", type=int, default=50, help="texts of each kind")
    parser.add_argument("--kinds", action="store_true", help="every kind, also those that are found")
    given = parser.parse_args()
    if "FULLTUNE_BENCH_DATA" not in os.environ:
        sys.exit("FULLTUNE_BENCH_DATA is not set: the data of this benchmark are not part of the project")
    data = Path(os.environ["FULLTUNE_BENCH_DATA"])
    report([*of_texts(data, given.each), *of_conversations(data, given.each), *of_rows(data, given.each)], given.kinds)


if __name__ == "__main__":
    main()
