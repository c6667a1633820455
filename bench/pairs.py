"""Pairs of texts read apart, jointly, or as the program chooses, against what costs no training.

    FULLTUNE_BENCH_DATA=data python -m bench.pairs [--quick] [--folder F] [--rows N] [--seeds 3]

Two sources, each with a class and a number: questions of Banking77 (the same intent or not; how many words of the
intents' names are the same), and docstrings of installed packages (summary and body of one function or not; of one
function 1, of one module 0.5, of two packages 0). With 180, 500 and 5,000 train rows and three seeds, which also draw
the rows: full fine-tuning with `model.pairs` apart, joint and auto, LoRA apart, a ridge or logistic regression on the
frozen vectors of both texts, and the cosine of the untouched vectors. `--quick` takes 180 rows, one seed and 400 test
rows. Runs with the way that auto chose are auto's own, which is the same training. Prints a Markdown table.
"""

from __future__ import annotations

import ast
import hashlib
import json
import random
import statistics
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from bench.public_data import MINILM, read_csv, source, write_csv
from bench.results import Figure
from bench.runs import SMOKE, Records, fresh, fulltune, run, script

Pair = tuple[str, str, str, str]
"""Two texts, the label, and the file of the first text."""
COLUMNS = ("text", "text_pair", "label", "file")
SIZES = (180, 500, 5_000)
SETS = tuple((origin, kind) for origin in ("banking77", "docstrings") for kind in ("class", "number"))
SETS = SETS[-1:] if SMOKE else SETS
WAYS = ("auto", "apart", "joint", "lora", "frozen", "cosine")
PACKAGES = ("accelerate", "peft") if SMOKE else ("numpy", "scipy", "sklearn", "torch", "transformers")
TEST_ROWS = 1_000
RECIPE = f"""\
model: {{name: {MINILM}, pairs: auto}}
task: text-classification
data: {{train: train.csv, test: test.csv, text: text, text_pair: text_pair, label: label}}
train: {{device: cpu{", num_train_epochs: 1" * SMOKE}}}
preserve: {{drift: false}}
output: .
"""


def banking77(kind: str, count: int, split: str, seed: int) -> list[Pair]:
    """Two questions each, of one of the 77 intents or of two."""
    drawn = random.Random(f"{split} {seed}")
    texts: dict[str, list[str]] = {}
    for row in read_csv(source(f"banking77/{split}.csv")):
        texts.setdefault(row["category"], []).append(row["text"])
    words = {name: set(name.lower().replace("?", "").split("_")) for name in sorted(texts)}
    pairs: list[Pair] = []
    while len(pairs) < count:
        first, share = drawn.choice(list(words)), drawn.random()
        alike = {name: len(words[first] & other) / len(words[first] | other) for name, other in words.items()}
        others = [name for name in words if name != first]
        if kind == "class":
            second = first if share < 1 / 2 else drawn.choice(others)
            label = "same" if second == first else "other"
        else:  # the same, similar and other intents
            near = [name for name in others if alike[name]]
            far = [name for name in others if not alike[name]]
            second = first if share < 1 / 3 else drawn.choice(near or far if share < 2 / 3 else far)
            label = f"{alike[second]:.3f}"
        one, other = drawn.choice(texts[first]), drawn.choice(texts[second])
        if one != other:
            pairs.append((one, other, label, ""))
    return pairs


@cache
def documented() -> dict[tuple[str, str], list[tuple[str, str]]]:
    """By package and file, the summary and the first paragraph below it of each documented function and class."""
    paths = sysconfig.get_paths()
    roots = [(Path(paths["stdlib"]), "*.py"), (Path(paths["stdlib"]), "*/*.py")] if not SMOKE else []
    roots += [(Path(paths["purelib"]), f"{package}/**/*.py") for package in PACKAGES]
    texts: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for root, pattern in roots:
        for path in sorted(root.glob(pattern)):
            name = path.relative_to(root)
            if {"site-packages", "test", "tests"} & set(name.parts):
                continue
            try:
                tree = ast.parse(path.read_text(encoding="utf-8", errors="ignore"))
            except SyntaxError:
                continue
            for node in ast.walk(tree):
                if isinstance(node, ast.FunctionDef | ast.ClassDef) and (text := ast.get_docstring(node)):
                    summary, body = (" ".join(part.split()) for part in [*text.split("\n\n"), ""][:2])
                    if 5 <= len(summary.split()) <= 40 and 8 <= len(body.split()) <= 80:
                        texts.setdefault((name.parts[0], str(name)), []).append((summary, body))
    return texts


def docstrings(kind: str, count: int, split: str, seed: int) -> list[Pair]:
    """A summary and a body each; no file of a summary is in two splits."""
    drawn, texts = random.Random(f"{split} {seed}"), documented()
    is_test = {place: hashlib.sha256(place[1].encode()).digest()[0] % 4 == 0 for place in texts}
    places = sorted(place for place in texts if is_test[place] == (split == "test"))
    several = [place for place in places if len(texts[place]) > 1]
    ends = (1 / 2, 3 / 4) if kind == "class" else (1 / 3, 2 / 3)
    pairs: list[Pair] = []
    while len(pairs) < count:
        share = drawn.random()
        place = drawn.choice(several if share < ends[1] else places)
        summary, body = drawn.choice(texts[place])
        other = place if share < ends[1] else drawn.choice(places)
        alike = 1.0 if share < ends[0] else 0.5 if share < ends[1] else 0.0
        body = body if alike == 1 else drawn.choice(texts[other])[1]
        if alike < 1 and ((summary, body) in texts[place] or (not alike and other[0] == place[0])):
            continue
        label = f"{alike:g}" if kind == "number" else "same" if alike == 1 else "other"
        pairs.append((summary, body, label, place[1]))
    return pairs


def write_rows(folder: Path, origin: str, kind: str, rows: int, seed: int, tested: int) -> None:
    draw = {"banking77": banking77, "docstrings": docstrings}[origin]
    for split, count in (("train", rows), ("test", tested)):
        pairs = draw(kind, count, split, seed)
        write_csv(folder / f"{split}.csv", [dict(zip(COLUMNS, pair, strict=True)) for pair in pairs])
    grouped = RECIPE.replace("label: label", "label: label, group: file") if origin == "docstrings" else RECIPE
    (folder / "recipe.yaml").write_text(grouped, encoding="utf-8")


def trained(folder: Path, way: str, kind: str, seed: int) -> dict[str, Any]:
    """Train and score once: the metric with its interval, that of the frozen baseline, and how pairs were read."""
    settings = {"model.pairs": "apart" if way == "lora" else way, "train.seed": seed}
    settings |= {"method.kind": "lora"} if way == "lora" else {}
    settings |= {"data.problem_type": "regression"} if kind == "number" else {}
    place = fresh(folder / way)
    words = [f"--set={name}={value}" for name, value in settings.items()]
    run(fulltune("evaluate", folder / "recipe.yaml", "--run-folder", place, "--json", *words))
    name = "spearman" if kind == "number" else "accuracy"
    scores = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(place.glob("scores/*.json"))]
    values = {score["name"]: [score["metrics"][name][part] for part in ("value", "low", "high")] for score in scores}
    frozen = next((value for name, value in values.items() if "each text encoded separately" in name), None)
    choice = place / "pairs.json"
    outcome = json.loads(next(iter(sorted(place.glob("attempts/*/outcome.json")))).read_text(encoding="utf-8"))
    return {
        "trained": next(value for name, value in values.items() if "seed" in name),
        "frozen": frozen,
        "pairs": json.loads(choice.read_text(encoding="utf-8")) if choice.exists() else None,
        "best_step": outcome["best_step"],
    }


def untouched(folder: Path, kind: str) -> float:
    """The metric of the cosine of the untouched model's vectors; classes are told by the threshold that fits the train
    rows best."""
    from sentence_transformers import SentenceTransformer

    from fulltune.models.base import find_model_path
    from fulltune.recipe.model import ModelBlock

    encoder = SentenceTransformer(str(find_model_path(ModelBlock(name=MINILM))), device="cpu")
    cosines, labels = [], []
    for split in ("train", "test"):
        rows = read_csv(folder / f"{split}.csv")
        first, second = (encoder.encode([row[name] for row in rows]) for name in ("text", "text_pair"))
        cosines.append((first * second).sum(axis=1) / np.linalg.norm(first, axis=1) / np.linalg.norm(second, axis=1))
        labels.append(np.array([row["label"] for row in rows]))
    if kind == "number":
        from scipy.stats import spearmanr

        return float(spearmanr(cosines[1], labels[1].astype(float)).statistic)
    is_same = [part == "same" for part in labels]
    threshold = max(cosines[0], key=lambda value: float(((cosines[0] >= value) == is_same[0]).mean()))
    return float(((cosines[1] >= threshold) == is_same[1]).mean())


def cell(folder: Path, records: Records, origin: str, kind: str, rows: int, seed: int, tested: int) -> dict[str, float]:
    """The metric of each way; `error` is the standard error of auto's on the test rows."""
    name = f"{origin} {kind} {rows} {seed}"
    place = folder / name.replace(" ", "-")
    if not (place / "recipe.yaml").exists():
        write_rows(fresh(place), origin, kind, rows, seed, tested)
    auto = records.get(f"{name} auto", trained, place, "auto", kind, seed)
    values = {"auto": auto, auto["pairs"]["pairs"]: auto}
    for way in ("apart", "joint", "lora"):
        if way not in values:
            values[way] = records.get(f"{name} {way}", trained, place, way, kind, seed)
    cosine = records.get(f"{name} cosine", untouched, place, kind)
    metrics = {way: value["trained"][0] for way, value in values.items()}
    _, low, high = auto["trained"]
    return {**metrics, "frozen": values["apart"]["frozen"][0], "cosine": cosine, "error": (high - low) / 3.92}


def measure(folder: Path, quick: bool, rows: int | None = None, seeds: int = 3) -> Iterator[Figure]:
    """Compare the ways on each set and number of rows."""
    records, tested = Records(folder / "scores.jsonl"), 20 if SMOKE else 400 if quick else TEST_ROWS
    sizes = (rows,) if rows else (40,) if SMOKE else SIZES[:1] if quick else SIZES
    lines = ["| set | rows | " + " | ".join(WAYS) + " |", "|---|---:|" + "---:|" * len(WAYS)]
    behind_frozen, behind_better = 0, 0
    for origin, kind in SETS:
        for size in sizes:
            drawn = range(1, (1 if quick else seeds) + 1)
            cells = [cell(folder, records, origin, kind, size, seed, tested) for seed in drawn]
            mean = {name: statistics.mean(values[name] for values in cells) for name in (*WAYS, "error")}
            behind_frozen += mean["auto"] < max(mean["frozen"], mean["cosine"])
            behind_better += mean["auto"] < max(mean["apart"], mean["joint"]) - mean["error"]
            lines.append(f"| {origin}, {kind} | {size:,} | " + " | ".join(f"{mean[way]:.3f}" for way in WAYS) + " |")
    print("\n".join(lines), flush=True)
    cases = len(SETS) * len(sizes)
    behind = f"pair sets of {cases} where auto is"
    untrained = "frozen regression and untouched cosine"
    yield Figure(f"{behind} below the better of {untrained}", behind_frozen, "sets", at_most=0)
    way = "more than a standard error below the better of apart and joint"
    yield Figure(f"{behind} {way}", behind_better, "sets", at_most=0)


if __name__ == "__main__":
    script(measure, __doc__, rows="train rows, instead of 180, 500 and 5,000", seeds="seeds, instead of 3")
