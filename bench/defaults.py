"""What the defaults of full fine-tuning rest on: one setting at a time, on tuning sets only.

    python bench/defaults.py run FOLDER [--sets topics] [--rows 250 1000] [--settings default decay-0.9] [--minutes 60]
    python bench/defaults.py table

Tuning sets are sentences of docstrings (`bench/corpus.py`) and the quickstart's topics: no bar is measured on them, and
nothing here reads the sets of `bench/quality.py`. Language models, which have no new head, by the loss of the answers:
rows of the chat example, and GSM8K (it needs FULLTUNE_BENCH_DATA). Each run leaves all else to the plan; it is a line
of `defaults_points.jsonl`, with what came out of each test row, and is not done again. FOLDER holds the rows.
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import quality_contestants as contestants
import quality_table as tables
from evidence import MINILM, SETS, SMOLLM, docstrings, gsm8k, shuffled, with_each_label, write_csv
from quality import data_hash, prepared_at, versions
from quality_contestants import Point

POINTS = Path(__file__).with_name("defaults_points.jsonl")
RATE, DECODER_RATE = 2e-4, 5e-5
"""The default rates of these models when this was measured."""
TOPICS = MINILM + "task: text-classification\ndata: {train: train.csv, test: test.csv, text: text, label: label}\n"
CHAT = SMOLLM + (
    "task: causal-lm\ndata: {train: train.jsonl, test: test.jsonl, messages: messages, max_length: 128}\n"
    "evaluate: {generate_rows: 0, baselines: false}\n"
)

SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "default": {},
    "random-head": {"method": {"head_init": "random"}},
    "head-x5": {"method": {"head_learning_rate": 5 * RATE}},
    "head-x10": {"method": {"head_learning_rate": 10 * RATE}},
    "decay-0.9": {"method": {"layerwise_lr_decay": 0.9}},
    "decay-0.8": {"method": {"layerwise_lr_decay": 0.8}},
    "rate-half": {"method": {"learning_rate": RATE / 2}},
    "rate-double": {"method": {"learning_rate": 2 * RATE}},
    "lora-x2": {"method": {"kind": "lora", "learning_rate": 2 * RATE}},
    "lora-x4": {"method": {"kind": "lora", "learning_rate": 4 * RATE}},
    "lora-x10": {"method": {"kind": "lora", "learning_rate": 10 * RATE}},
    "batch-16": {"train": {"global_batch_size": 16}},
    "neftune-5": {"train": {"extra.neftune_noise_alpha": 5}},
    "smoothing-0.1": {"train": {"label_smoothing_factor": 0.1}},
    "keep-last": {"train": {"load_best_model_at_end": False}},
    "rate-1e-4": {"method": {"learning_rate": 1e-4}},
    "rate-1.6e-4": {"method": {"learning_rate": 1.6e-4}},
    "rate-3.2e-4": {"method": {"learning_rate": 3.2e-4}},
    "epochs-1": {"train": {"num_train_epochs": 1}},
    "epochs-3": {"train": {"num_train_epochs": 3}},
    "epochs-5": {"train": {"num_train_epochs": 5}},
    "epochs-10": {"train": {"num_train_epochs": 10}},
    "epochs-20": {"train": {"num_train_epochs": 20}},
}


def topics(folder: Path, rows: int) -> None:
    """The quickstart's rows, of train so many."""
    from fulltune.quickstart import write_docstring_topics

    train, test = write_docstring_topics(folder / "whole")
    with train.open(encoding="utf-8") as file:
        found = shuffled(list(csv.DictReader(file)))  # they stand by topic
    write_csv(folder / "train.csv", with_each_label(found, "label")[: rows or None])
    test.rename(folder / "test.csv")


def few_docstrings(folder: Path, rows: int) -> None:
    """With as few eval rows as who has few rows can spare."""
    docstrings(folder, rows)
    with (folder / "eval.csv").open(encoding="utf-8") as file:
        write_csv(folder / "eval.csv", list(csv.DictReader(file))[: rows // 8])


def chat(folder: Path, rows: int) -> None:
    """The chat example's rows, of train so many."""
    from fulltune.quickstart import write_docstring_chat

    train, test = write_docstring_chat(folder / "whole")
    lines = shuffled(train.read_text(encoding="utf-8").splitlines())
    (folder / "train.jsonl").write_text("\n".join(lines[:rows]) + "\n", encoding="utf-8")
    test.rename(folder / "test.jsonl")


@dataclass(frozen=True)
class Tuning:
    """A tuning set with so many rows."""

    name: str
    rows: int
    """0: all."""
    write: Callable[[Path, int], None]
    recipe: str
    metric: str = "accuracy"


WANTED = (
    Tuning("docstrings", 1000, docstrings, SETS["docstrings"].recipe),
    Tuning("topics", 400, topics, TOPICS),
    Tuning("docstrings", 250, few_docstrings, SETS["docstrings"].recipe),
    Tuning("topics", 0, topics, TOPICS),
    Tuning("docstrings", 4000, docstrings, SETS["docstrings"].recipe),
    Tuning("chat", 200, chat, CHAT, "loss"),
    Tuning("gsm8k", 100, gsm8k, SETS["gsm8k"].recipe, "loss"),
)
_ENCODERS = (
    "random-head",
    "lora-x2",
    "lora-x4",
    "lora-x10",
    "head-x5",
    "head-x10",
    "decay-0.9",
    "decay-0.8",
    "rate-half",
    "rate-double",
    "epochs-20",
)
_DECODERS = ("neftune-5", "rate-1e-4", "rate-1.6e-4", "rate-3.2e-4", "epochs-1")


def read() -> list[dict[str, Any]]:
    if not POINTS.exists():
        return []
    return [json.loads(line) for line in POINTS.read_text(encoding="utf-8").splitlines()]


def jobs(given: argparse.Namespace) -> Iterator[tuple[Tuning, str, int]]:
    for seed in given.seeds:
        for wanted in WANTED:
            if wanted.name in given.sets and (given.rows is None or wanted.rows in given.rows):
                useless = _ENCODERS if wanted.metric == "loss" else _DECODERS
                names = [name for name in given.settings if name not in useless]
                yield from ((wanted, name, seed) for name in names if name != "frozen" or wanted.metric != "loss")


def do(point: Point, name: str, seed: int) -> dict[str, Any]:
    began = time.monotonic()
    line: dict[str, Any] = {"set": point.name, "rows": point.rows, "setting": name, "seed": seed}
    if point.metric == "loss":
        line |= _language(point, name, seed)
    else:
        found = _classifier(point, name, seed)
        line |= {
            "value": round(contestants.value_of(point.metric, found.outcomes), 6),
            "eval_value": round(found.eval_value, 6),
            "notes": dict(found.notes),
            "precision": point.precision,
            "outcomes": tables.packed(point.metric, found.outcomes),
        }
    after = {"seconds": round(time.monotonic() - began, 1), "data": data_hash(point), "versions": versions()}
    return line | after


def _classifier(point: Point, name: str, seed: int) -> contestants.Result:
    if name == "frozen":
        return contestants.run("frozen-logreg", point, seed, None)
    blocks = copy.deepcopy(SETTINGS[name])
    blocks["method"] = {"kind": "full"} | blocks.get("method", {})
    blocks["evaluate"] = {"metric": point.metric, "baselines": False}
    return contestants.trained(point, blocks, seed)


def _language(point: Point, name: str, seed: int) -> dict[str, Any]:
    """Loss of the answers, by fulltune's own scores."""
    from fulltune import api, load_recipe, pipeline

    folder = point.folder / "ours"
    shutil.rmtree(folder, ignore_errors=True)
    chosen = [f"{block}.{key}={value}" for block, values in SETTINGS[name].items() for key, value in values.items()]
    overrides = [*chosen, f"train.seed={seed}", "evaluate.baselines=false"]
    recipe = load_recipe(point.folder / "recipe.yaml", overrides)
    job = api.job(recipe, run_folder=folder, listener=lambda event: None)
    reached = pipeline.run(job, until="evaluate")
    [trained] = [one for one in reached.scores if one.kind == "trained"]
    assert reached.plan is not None
    notes = {"learning_rate": reached.plan.learning_rate, "epochs": reached.plan.num_train_epochs}
    shutil.rmtree(folder)
    return {"value": round(trained.metrics["loss"].value, 6), "notes": notes, "precision": reached.plan.precision}


def run(given: argparse.Namespace) -> None:
    """Do what is left, until it is done or the minutes are over."""
    began, points = time.monotonic(), {}
    for wanted, name, seed in jobs(given):
        seed = 0 if name == "frozen" else seed
        place = (wanted.name, wanted.rows)
        if place not in points:
            where = given.folder.absolute()
            points[place] = prepared_at(where, *place, 0.0, wanted.metric, wanted.recipe, wanted.write)
        point = points[place]
        told = (wanted.name, wanted.rows, name, seed, data_hash(point))
        if any((one["set"], one["rows"], one["setting"], one["seed"], one["data"]) == told for one in read()):
            continue
        if given.minutes is not None and time.monotonic() - began > 60 * given.minutes:
            print(f"time is up before: {told[:4]}", flush=True)
            return
        line = do(point, name, seed)
        with POINTS.open("a", encoding="utf-8") as out:
            out.write(json.dumps(line) + "\n")
        print(f"{told[:4]}: {line['value']:.4f}, {line['seconds']:.0f} s", flush=True)


def show() -> None:
    """Mean accuracy of the default, and what each other setting adds, with its standard error over rows and seeds."""
    lines = read()
    places = [(one.name, one.rows) for one in WANTED]
    print("| points | " + " | ".join(tables.title(*place) for place in places) + " |")
    print("|---" + "|---:" * len(places) + "|")
    for name in ("frozen", *SETTINGS):
        cells = [_cell(lines, place, name) for place in places]
        if any(cells):
            print(f"| {name} | " + " | ".join(cells) + " |")


def _cell(lines: Sequence[dict[str, Any]], place: tuple[str, int], name: str) -> str:
    if any(one["value"] and "outcomes" not in one for one in lines if (one["set"], one["rows"]) == place):
        losses = [one["value"] for one in lines if (one["set"], one["rows"], one["setting"]) == (*place, name)]
        return f"loss {statistics.mean(losses):.3f} ({len(losses)})" if losses else ""
    mine, default = _of(lines, place, name), _of(lines, place, "default")
    if not mine or not default:
        return ""
    if name in ("default", "frozen"):
        return f"{100 * np.mean([each.mean() for each in mine.values()]):.1f}"
    both = sorted(mine.keys() & default.keys())
    if not both:
        return ""
    found = tables.error_of(np.stack([mine[seed] - default[seed] for seed in both]))
    return f"{100 * found.value:+.1f} ± {100 * found.error:.1f} ({len(both)})"


def _of(lines: Sequence[dict[str, Any]], place: tuple[str, int], name: str) -> dict[int, np.ndarray]:
    """Outcomes of the rows, by seed."""
    return {
        one["seed"]: tables.unpacked("accuracy", one["outcomes"])
        for one in lines
        if (one["set"], one["rows"]) == place and one["setting"] == name
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="what", required=True)
    runs = verbs.add_parser("run")
    runs.add_argument("folder", type=Path)
    names = sorted({one.name for one in WANTED})
    runs.add_argument("--sets", nargs="+", default=names, choices=names)
    runs.add_argument("--rows", nargs="+", type=int, help="only sets with so many rows; 0: all rows")
    runs.add_argument("--settings", nargs="+", default=["frozen", *SETTINGS], choices=["frozen", *SETTINGS])
    runs.add_argument("--seeds", nargs="+", type=int, default=[1, 2])
    runs.add_argument("--minutes", type=float, help="begin no run later")
    verbs.add_parser("table")
    given = parser.parse_args()
    if given.what == "run":
        run(given)
    else:
        show()


if __name__ == "__main__":
    sys.exit(main())
