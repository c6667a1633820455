"""Speed and memory of a training's data stage, from a csv to tokenised splits on disk, against `datasets`.

Each contestant is a process of its own with nothing cached. fulltune is `pipeline.prepare`, which checks every row,
keeps duplicates in one split and counts labels and tokens. datasets is `load_dataset("csv")`, `class_encode_column`,
`train_test_split` twice and `map(batched=True)` on all cores, with the same tokenizer.
"""

from __future__ import annotations

import functools
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from bench.public_data import MINILM, joined_sentences
from bench.results import Figure
from bench.runs import SMOKE, Records, fresh, interleaved, median_ratio, script, seconds_and_peak

PROGRAM = (
    "import sys; from fulltune import api, pipeline; pipeline.prepare(api.job(sys.argv[1], run_folder=sys.argv[2]))"
)
SCORED = 500
"""Eval rows and test rows of datasets; fulltune takes its default share."""


def with_datasets(file: Path, folder: Path) -> None:
    from datasets import load_dataset

    from fulltune.models.base import Base
    from fulltune.recipe.model import ModelBlock

    tokenizer = Base.from_block(ModelBlock(name=MINILM)).processor
    rows = load_dataset("csv", data_files=str(file), split="train", cache_dir=str(folder / "cache"))
    rows = rows.class_encode_column("label")
    rest = rows.train_test_split(test_size=SCORED, seed=42, stratify_by_column="label")
    parts = rest["train"].train_test_split(test_size=SCORED, seed=42, stratify_by_column="label")
    for name, part in (("train", parts["train"]), ("eval", parts["test"]), ("test", rest["test"])):
        done = part.map(
            lambda batch: tokenizer(batch["text"], truncation=True, max_length=512),
            batched=True,
            num_proc=os.cpu_count() if name == "train" else None,
        )
        done.save_to_disk(str(folder / name))


def measure(folder: Path, quick: bool) -> Iterator[Figure]:
    rows, repeats = (2_000 if SMOKE else 20_000, 1) if quick else (200_000, 5)
    file = folder / "rows.csv"
    if not file.exists():
        joined_sentences(file, rows)

    def seconds_and_bytes(name: str) -> tuple[float, int]:
        work = fresh(folder / name)
        recipe = work / "recipe.yaml"
        recipe.write_text(f"model: {MINILM}\ntask: text-classification\ndata: {{train: {file}}}\noutput: runs\n")
        ours = [sys.executable, "-c", PROGRAM, str(recipe), str(work / "run")]
        theirs = [sys.executable, "-m", "bench.data_stage", str(file), str(work)]
        measured = seconds_and_peak(ours if name == "fulltune" else theirs, HF_HOME=str(work / "hf"))
        shutil.rmtree(work)
        return measured

    contestants = {name: functools.partial(seconds_and_bytes, name) for name in ("fulltune", "datasets")}
    values = interleaved(contestants, repeats, Records(folder / "seconds.jsonl"))
    (seconds, peaks), (other_seconds, other_peaks) = (zip(*values[name], strict=True) for name in contestants)
    ratio = median_ratio(other_seconds, seconds)
    yield Figure(
        f"speed of the data stage with its checks over datasets, {rows:,} rows",
        ratio,
        "x",
        at_least=1.0,
    )
    memory = max(peaks) / max(other_peaks)
    yield Figure(f"peak memory of the data stage over that of datasets, {rows:,} rows", memory, "x", at_most=1.0)


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1].endswith(".csv"):
        with_datasets(Path(sys.argv[1]), Path(sys.argv[2]))
    else:
        script(measure, __doc__)
