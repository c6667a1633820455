"""`fulltune predict --file`: constant memory over many rows, and its speed against `pipeline()` of transformers.

Rows are short texts of 3 to 25 words in a csv with an `id`; the model is a classifier of three classes with a random
head. Memory is that of the whole command over a tenth of the rows and over all. Speed is measured in one process with
the same threads, from csv to csv with label and all probabilities, without loading the model; `pipeline()` gets a
generator, the batch size that fulltune uses, and `top_k=None`.
"""

from __future__ import annotations

import csv
import json
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bench.public_data import MINILM
from bench.results import Figure
from bench.runs import SMOKE, Records, fresh, fulltune, interleaved, median_ratio, script, seconds_and_peak

LABELS = ("bad", "good", "neither")
TEXT = "the of and to in is that it was for on are with as his they at be this from have or by one had not but"


def write_model(folder: Path, name: str) -> Path:
    """Write a classifier as training leaves it."""
    import torch

    from fulltune.models.base import Base
    from fulltune.models.load import load_model
    from fulltune.recipe.model import ModelBlock
    from fulltune.tasks import Target, text_classification

    base = Base.from_block(ModelBlock(name=name))
    tokenizer = base.processor
    columns = {"text": "text", "label": "label"}
    changes = text_classification.config_changes(Target("single_label", columns, LABELS), tokenizer)
    torch.manual_seed(0)
    model = load_model(base, changes, head_is_new=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    notes: dict[str, Any] = {"task": "text-classification", "problem_type": "single_label", "columns": columns}
    notes |= {"labels": LABELS, "joint": "", "num_choices": 0, "stride": None, "max_length": 128, "temperature": 1.3}
    (folder / "fulltune.json").write_text(json.dumps(notes), encoding="utf-8")
    return folder


def write_rows(file: Path, count: int) -> None:
    draw, words = random.Random(0), TEXT.split()
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["id", "text"])
        for number in range(count):
            writer.writerow([f"row-{number}", " ".join(draw.choices(words, k=draw.randint(3, 25)))])


def peak_bytes(model: Path, rows: int) -> int:
    """Peak memory of the command over this many rows, each of which must be answered."""
    file, output = model.parent / "rows.csv", model.parent / "answers.csv"
    write_rows(file, rows)
    _, peak = seconds_and_peak(fulltune("predict", model, "--file", file, "-o", output, "--force"))
    with output.open(encoding="utf-8") as stream:
        answered = sum(1 for _ in stream) - 1
    if answered != rows:
        raise ValueError(f"{answered} answers for {rows} rows")
    return peak


def ours(model: Path, file: Path, output: Path) -> Callable[[], float]:
    from fulltune import predict
    from fulltune.cli import predict as cli_predict

    predictor = predict.load_predictor(model)
    return timed(
        lambda: cli_predict.write_answers(
            predictor, cli_predict.read_input([], file, predictor.notes), output, 128, lambda event: None
        )
    )


def theirs(model: Path, file: Path, output: Path) -> Callable[[], float]:
    from transformers import pipeline

    classify: Any = pipeline("text-classification", model=str(model), device="cpu")

    def answer() -> None:
        with file.open(encoding="utf-8", newline="") as rows_in, output.open("w", encoding="utf-8", newline="") as out:
            rows = list(csv.DictReader(rows_in))
            writer = csv.writer(out)
            writer.writerow([*rows[0], "label", *LABELS])
            answers = classify((row["text"] for row in rows), batch_size=32, top_k=None, truncation=True)
            for row, answered in zip(rows, answers, strict=True):
                probabilities = {label["label"]: label["score"] for label in answered}
                writer.writerow([*row.values(), answered[0]["label"], *(probabilities[name] for name in LABELS)])

    return timed(answer)


def timed(work: Callable[[], object]) -> Callable[[], float]:
    def seconds() -> float:
        began = time.monotonic()
        work()
        return time.monotonic() - began

    return seconds


def same_labels(ours: Path, theirs: Path) -> float:
    with ours.open() as one, theirs.open() as other:
        pairs = list(zip(csv.DictReader(one), csv.DictReader(other), strict=True))
    return sum(mine["predicted_label"] == their["label"] for mine, their in pairs) / len(pairs)


def measure(folder: Path, quick: bool) -> Iterator[Figure]:
    from tests import tiny

    records = Records(folder / "measured.jsonl")
    tiny_model = write_model(fresh(folder / "tiny"), str(tiny.save_model(folder / "base", "bert")))
    rows = 100 if SMOKE else 10_000 if quick else 1_000_000
    few, many = (records.get(f"peak over {count}", peak_bytes, tiny_model, count) for count in (rows // 10, rows))
    name = f"peak memory of predict over {rows:,} rows over that of a tenth of them"
    yield Figure(name, many / few, "x", at_most=1.1)
    model, file = write_model(fresh(folder / "minilm"), MINILM), folder / "timed.csv"
    write_rows(file, 60 if SMOKE else 600 if quick else 6000)
    outputs = folder / "ours.csv", folder / "theirs.csv"
    contestants = {"fulltune": ours(model, file, outputs[0]), "pipeline": theirs(model, file, outputs[1])}
    seconds = interleaved(contestants, 3 if quick else 5, records)
    ratio = median_ratio(seconds["pipeline"], seconds["fulltune"])
    yield Figure("speed of predict over pipeline(), MiniLM-L6, short texts", ratio, "x", at_least=1.0)
    if all(output.exists() for output in outputs):
        yield Figure("rows with pipeline()'s label", same_labels(*outputs), "share", at_least=0.999)


if __name__ == "__main__":
    script(measure, __doc__)
