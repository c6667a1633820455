"""The best model that these rows can give: fulltune against plain training, LoRA, SetFit and what costs no training.

    FULLTUNE_BENCH_DATA=... python bench/quality.py run FOLDER [--sets banking77] [--rows 500 2000] [--minutes 60]
    python bench/quality.py table       # what is there, and the bars

All contestants get the same rows, and choose by the same eval rows. A searched rate is one of four, the best on the
eval rows with seed 1; the other seeds train with it. Sets: Banking77 and WNUT-17 as in `bench/evidence.py`, pairs and
numbers made by `bench/functions.py`, docstrings by `bench/corpus.py`. `run` prints its forecast first and does one run
at a time, the most important ones first; each is a line of `quality_points.jsonl`, with what came out of each test row,
and is not done again. FOLDER holds rows and what is being made.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import functions
import quality_contestants as contestants
import quality_table as tables
from evidence import CLASSES, MINILM, SETS, banking77, docstrings, wnut17
from quality_contestants import FROZEN, Point

POINTS = Path(__file__).with_name("quality_points.jsonl")
SEARCHED = {
    "trainer-searched": (1e-4, 2.5e-4, 6.3e-4, 1.6e-3),
    "fulltune-searched": (5e-5, 1.25e-4, 3.2e-4, 8e-4),
    "lora-probe": (3.2e-4, 8e-4, 2e-3, 5e-3),
    "lora-random": (3.2e-4, 8e-4, 2e-3, 5e-3),
}
"""Rates that are tried: as many for each."""
CONTESTANTS = (
    *FROZEN,
    *("trainer-default", "trainer-searched", "setfit", "lora-random", "lora-probe", "fulltune", "fulltune-searched"),
)
IN_TURN = ("trainer-searched", "fulltune", "fulltune-searched", "lora-probe", "lora-random", "trainer-default")
"""At each point, after what costs no training."""
NEEDS_HEAD_STARTS = ("fulltune", "fulltune-searched", "lora-probe")
PAIRS = "task: text-classification\ndata: {train: train.csv, eval: eval.csv, test: test.csv, label: label}\n"


@dataclass(frozen=True)
class Wanted:
    """A point and who is measured at it."""

    name: str
    rows: int
    seeds: int
    write: Callable[[Path, int], None]
    recipe: str
    metric: str
    epochs: float
    others: tuple[str, ...] = IN_TURN
    free: tuple[str, ...] = ("frozen-logreg", "frozen-centroid")


def _functions(kind: str) -> Callable[[Path, int], None]:
    return lambda folder, rows: functions.write(kind, folder)


def _banking77(rows: int, seeds: int, *more: str) -> Wanted:
    recipe, epochs = SETS["banking77"].recipe, SETS["banking77"].epochs(rows)
    return Wanted("banking77", rows, seeds, banking77, recipe, "accuracy", epochs, (*IN_TURN, *more))


def _wnut17(rows: int) -> Wanted:
    one = SETS["wnut17"]
    return Wanted("wnut17", rows, 3, wnut17, one.recipe, "f1", one.epochs(rows))


WANTED = (
    _banking77(500, 5, "setfit"),
    _banking77(2000, 3, "setfit"),
    _wnut17(1000),
    Wanted(
        *("pairs", 1500, 3, _functions("pairs"), MINILM + PAIRS, "accuracy", 5),
        free=("frozen-logreg", "frozen-centroid", "frozen-twin"),
    ),
    Wanted(
        *("lengths", 1500, 3, _functions("lengths"), MINILM + CLASSES.format(label="log_words"), "r2", 5),
        free=("frozen-logreg",),
    ),
    _banking77(0, 3),
    _wnut17(0),
    Wanted(
        *("docstrings", 100_000, 1, docstrings, SETS["docstrings"].recipe, "accuracy", 1),
        others=("fulltune", "lora-probe"),
        free=("frozen-logreg",),
    ),
)
"""In the order of their importance."""


# ---- what is there, and what is left ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """A run that is wanted."""

    wanted: Wanted
    contestant: str
    seed: int
    """0: nothing is drawn."""
    rate: float | None
    search: bool


def read() -> list[dict[str, Any]]:
    """The lines that are there, oldest first."""
    if not POINTS.exists():
        return []
    return [json.loads(line) for line in POINTS.read_text(encoding="utf-8").splitlines()]


def jobs(chosen: Sequence[Wanted], names: Sequence[str]) -> Iterator[Job]:
    """All that is wanted, the most important first; the rate of further seeds is not known yet and left out."""
    for wanted in chosen:
        yield from (Job(wanted, name, 0, None, False) for name in wanted.free if name in names)
    for wanted in chosen:
        for name in wanted.others:
            if name not in names:
                continue
            first = 1
            if name in SEARCHED:
                yield from (Job(wanted, name, 1, rate, True) for rate in SEARCHED[name])
                first = 2
            yield from (Job(wanted, name, seed, None, False) for seed in range(first, wanted.seeds + 1))


def possible(names: Sequence[str]) -> list[str]:
    """Without those that this fulltune cannot be yet."""
    if contestants.head_starts():
        return list(names)
    left_out = [name for name in names if name in NEEDS_HEAD_STARTS]
    if left_out:
        print(f"left out, this fulltune has no `method.head_init`: {', '.join(left_out)}")
    return [name for name in names if name not in left_out]


def prepared(wanted: Wanted, folder: Path) -> Point:
    """The files of a point, and fulltune's data and plan."""
    return prepared_at(folder, wanted.name, wanted.rows, wanted.epochs, wanted.metric, wanted.recipe, wanted.write)


def prepared_at(
    folder: Path, name: str, rows: int, epochs: float, metric: str, recipe: str, write: Callable[[Path, int], None]
) -> Point:
    """The same of any set."""
    place, recipe = folder / f"{name}-{rows or 'all'}", f"{recipe}output: .\n"
    if not (place / "recipe.yaml").exists():
        place.mkdir(parents=True, exist_ok=True)
        write(place, rows)
        (place / "recipe.yaml").write_text(recipe, encoding="utf-8")
    return Point(name, rows, epochs, metric, recipe, place)


def short_hash(*parts: Any) -> str:
    return hashlib.sha1(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:10]


def data_hash(point: Point) -> str:
    """Of the rows of all splits, in their order."""
    found = hashlib.sha1()
    for file in sorted(one for one in point.folder.iterdir() if one.suffix in (".csv", ".conll", ".jsonl")):
        found.update(file.read_bytes())
    return found.hexdigest()[:10]


def same(line: dict[str, Any], job: Job, point: Point) -> bool:
    """Whether a line is this run, its rate apart."""
    told = (line["set"], line["rows"], line["contestant"], line["seed"], line["search"])
    if told != (point.name, point.rows, job.contestant, job.seed, job.search):
        return False
    return (line["settings"], line["data"]) == (settings_hash(job.contestant, point), data_hash(point))


def settings_hash(contestant: str, point: Point) -> str:
    return short_hash(contestants.settings(contestant, point), point.recipe)


def left(job: Job, point: Point, lines: Sequence[dict[str, Any]]) -> Job | None:
    """The run with its rate; None: it is there, or no rate gave a model."""
    if job.contestant in SEARCHED and not job.search:
        trials = [line for line in lines if same(line, replace(job, seed=1, search=True), point)]
        missing = set(SEARCHED[job.contestant]) - {line["rate"] for line in trials}
        rate = tables.best_rate(trials)
        if rate is None and not missing:
            return None
        job = replace(job, rate=None if missing else rate)
    there = [line for line in lines if same(line, job, point) and (job.rate is None or line["rate"] == job.rate)]
    return None if there else job


# ---- how long --------------------------------------------------------------------------------------------------

START_SECONDS = {"trainer": 3.0, "lora": 30.0, "fulltune": 30.0, "setfit": 5.0, "frozen": 5.0}
ROW_SECONDS = {"banking77": 0.011, "wnut17": 0.018, "pairs": 0.018, "lengths": 0.025, "docstrings": 0.011}
"""Of a train row in an epoch of full fine-tuning, on one core with bf16; only for the first forecast."""


def forecast_seconds(job: Job, lines: Sequence[dict[str, Any]]) -> float:
    """Of a run: as long as others of this contestant at this point, else by rows and epochs."""
    wanted = job.wanted
    place = (wanted.name, wanted.rows, job.contestant)
    known = [line["whole_seconds"] for line in lines if (line["set"], line["rows"], line["contestant"]) == place]
    if known:
        return statistics.median(known)
    rows = wanted.rows or {"banking77": 9003, "wnut17": 3394}[wanted.name]
    kind = job.contestant.split("-")[0]
    passes = {"frozen": 2.0, "setfit": 30.0}.get(kind, wanted.epochs)
    if job.contestant == "trainer-default":
        passes = 5.0  # three, in smaller batches
    return START_SECONDS[kind] + ROW_SECONDS[wanted.name] * (rows * passes + 2000)


def show_forecast(found: Sequence[Job], lines: Sequence[dict[str, Any]]) -> None:
    """Runs and minutes that are left, by point and contestant."""
    total = 0.0
    by_place: dict[tuple[str, str], list[float]] = {}
    for job in found:
        place = (tables.title(job.wanted.name, job.wanted.rows), job.contestant)
        by_place.setdefault(place, []).append(forecast_seconds(job, lines))
    for (where, contestant), each in by_place.items():
        print(f"  {where:<20} {contestant:<18} {len(each):>2} runs {sum(each) / 60:>7.1f} min")
        total += sum(each)
    print(f"forecast: {len(found)} runs, {total / 60:.0f} min", flush=True)


# ---- doing it --------------------------------------------------------------------------------------------------


def versions() -> dict[str, str]:
    """Of what has a part in the figures."""
    names = ("torch", "transformers", "peft", "scikit-learn", "setfit", "sentence-transformers")
    here = Path(__file__).parent
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True)
    found = {"fulltune": commit.stdout.strip() or version("fulltune"), "python": platform.python_version()}
    for name in names:
        try:
            found[name] = version(name)
        except ModuleNotFoundError:
            continue
    return found


def do(job: Job, point: Point) -> dict[str, Any]:
    """The line of a run."""
    from fulltune.errors import GuardStop

    began = time.monotonic()
    line: dict[str, Any] = {
        "set": point.name,
        "rows": point.rows,
        "contestant": job.contestant,
        "seed": job.seed,
        "rate": job.rate,
        "search": job.search,
        "metric": point.metric,
        "value": None,
        "eval_value": None,
    }
    after = {
        "precision": point.precision,
        "settings": settings_hash(job.contestant, point),
        "data": data_hash(point),
        "versions": versions(),
    }
    try:
        found = contestants.run(job.contestant, point, job.seed, job.rate)
    except GuardStop as stop:  # a rate at which the loss runs away
        return {**line, "stopped": type(stop).__name__, "whole_seconds": _since(began), "seconds": None, **after}
    line |= {
        "value": round(contestants.value_of(point.metric, found.outcomes), 6),
        "eval_value": round(found.eval_value, 6),
        "seconds": round(found.seconds, 1),
        "whole_seconds": _since(began),
        "notes": dict(found.notes),
    }
    return {**line, **after, "outcomes": tables.packed(point.metric, found.outcomes)}


def _since(began: float) -> float:
    return round(time.monotonic() - began, 1)


def run(given: argparse.Namespace) -> None:
    """Do what is left, until it is done or the minutes are over."""
    began = time.monotonic()
    given.folder.mkdir(parents=True, exist_ok=True)
    chosen = [one for one in WANTED if one.name in given.sets and (given.rows is None or one.rows in given.rows)]
    points = {(one.name, one.rows): prepared(one, given.folder.absolute()) for one in chosen}
    wanted = [*jobs(chosen, possible(given.contestants))]

    lines = read()
    ignored = len(lines) if given.again else 0

    def next_of(job: Job) -> Job | None:
        return left(job, points[job.wanted.name, job.wanted.rows], read()[ignored:])

    show_forecast([job for job in wanted if next_of(job)], lines)
    for job in wanted:
        found, seconds = next_of(job), forecast_seconds(job, read())
        if found is None:
            continue
        where = f"{tables.title(job.wanted.name, job.wanted.rows)} {job.contestant} seed {job.seed} rate {found.rate}"
        if seconds > 60 * given.longest:
            print(f"left out, forecast {seconds / 60:.0f} min: {where}", flush=True)
            continue
        if given.minutes is not None and time.monotonic() - began + seconds > 60 * given.minutes:
            print(f"time is up before: {where}", flush=True)
            return
        line = do(found, points[job.wanted.name, job.wanted.rows])
        with POINTS.open("a", encoding="utf-8") as out:
            out.write(json.dumps(line) + "\n")
        values = [f"{line[name]:.4f}" if line[name] is not None else "none" for name in ("value", "eval_value")]
        print(f"{where}: {values[0]}, on eval rows {values[1]}, {line['whole_seconds']:.0f} s", flush=True)


def show() -> None:
    """Both tables and the bars."""
    lines, points = read(), [(one.name, one.rows, one.seeds) for one in WANTED]
    print(tables.table(lines, points, CONTESTANTS), end="\n\n")
    print(tables.rates(lines, points, CONTESTANTS), end="\n\n")
    print(tables.bars(lines, points))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="what", required=True)
    runs = verbs.add_parser("run")
    runs.add_argument("folder", type=Path)
    names = list(dict.fromkeys(one.name for one in WANTED))
    runs.add_argument("--sets", nargs="+", default=names, choices=names)
    runs.add_argument("--rows", nargs="+", type=int, help="only points with so many rows; 0: all rows")
    runs.add_argument("--contestants", nargs="+", default=list(CONTESTANTS), choices=CONTESTANTS)
    runs.add_argument("--minutes", type=float, help="begin no run that would end later")
    runs.add_argument("--longest", type=float, default=25.0, help="leave out runs whose forecast is longer, minutes")
    runs.add_argument("--again", action="store_true", help="also runs that are there; the newest line counts")
    verbs.add_parser("table")
    given = parser.parse_args()
    if given.what == "run":
        run(given)
    else:
        show()


if __name__ == "__main__":
    sys.exit(main())
