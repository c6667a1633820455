"""What a search for a run's learning rate buys, and what it costs: `fulltune run --search` against its own usual rate.

    FULLTUNE_BENCH_DATA=... python bench/searched_runs.py run FOLDER [--seeds 1 2 3] [--sets topics pairs]
    python bench/searched_runs.py table

Sets as in `bench/defaults.py` and `bench/quality.py`. A search holds a whole run at the usual rate, so that one command
gives both: the difference on the same test rows, 0 where the usual rate was kept. Each is a line of
`searched_points.jsonl`, and is not done again.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import functions
from defaults import TOPICS, Tuning, topics
from evidence import MINILM, SETS, banking77, docstrings, wnut17
from quality import PAIRS, data_hash, prepared_at, versions

POINTS = Path(__file__).with_name("searched_points.jsonl")


WANTED = (
    Tuning("topics", 400, topics, TOPICS),
    Tuning("banking77", 500, banking77, SETS["banking77"].recipe),
    Tuning("docstrings", 1000, docstrings, SETS["docstrings"].recipe),
    Tuning("wnut17", 1000, wnut17, SETS["wnut17"].recipe, "f1"),
    Tuning("topics", 0, topics, TOPICS),
    Tuning("pairs", 1500, lambda folder, rows: functions.write("pairs", folder), MINILM + PAIRS),
)


def read() -> list[dict[str, Any]]:
    if not POINTS.exists():
        return []
    return [json.loads(line) for line in POINTS.read_text(encoding="utf-8").splitlines()]


def do(folder: Path, wanted: Tuning, seed: int) -> None:
    """One search, unless it is there."""
    point = prepared_at(folder, wanted.name, wanted.rows, 0.0, wanted.metric, wanted.recipe, wanted.write)
    key = {"set": wanted.name, "rows": wanted.rows, "seed": seed, "data": data_hash(point)}
    if any(key.items() <= line.items() for line in read()):
        return
    run = point.folder / f"searched-{seed}"
    chosen = [f"--set=train.seed={seed}", f"--set=evaluate.metric={wanted.metric}", "--set=evaluate.baselines=false"]
    program = [sys.executable, "-m", "fulltune.cli.app", "run", str(point.folder / "recipe.yaml"), "--search"]
    with (point.folder / f"searched-{seed}.txt").open("w", encoding="utf-8") as log:
        subprocess.run(
            [*program, "--run-folder", str(run), *chosen], check=True, stdout=log, stderr=log, env=os.environ
        )
    found = json.loads((run / "search.json").read_text(encoding="utf-8"))
    [scores] = [json.loads(path.read_text(encoding="utf-8")) for path in run.glob("scores/*-seed*.json")]
    bought = found["bought"] or {"value": 0.0, "low": 0.0, "high": 0.0}
    line = {
        **key,
        "rate": found["rate"]["chosen"],
        "usual": found["rate"]["usual"],
        "ceiling": found["ceiling"],
        "short": {one["learning_rate"]: one["metric"] for one in found["rate"]["tried"]},
        "whole": {one["learning_rate"]: one["metric"] for one in found["rate"]["whole"]},
        "metric": wanted.metric,
        "value": scores["metrics"][wanted.metric]["value"],
        "bought": [bought["value"], bought["low"], bought["high"]],
        "seconds": found["seconds"],
        "run_seconds": found["run_seconds"],
        "versions": versions(),
    }
    with POINTS.open("a", encoding="utf-8") as out:
        out.write(json.dumps(line) + "\n")
    print(f"{wanted.name} {wanted.rows} seed {seed}: {_in_words(line)}", flush=True)


def _in_words(line: dict[str, Any]) -> str:
    value, low, high = (100 * one for one in line["bought"])
    cost = line["seconds"] / line["run_seconds"]
    return f"{line['usual']:g} -> {line['rate']:g}, bought {value:+.1f} [{low:+.1f}, {high:+.1f}], {cost:.1f} runs"


def table() -> None:
    """By set: what was bought on the test rows, in points, and the cost in whole runs."""
    lines = read()
    print("| set | rows | seeds | usual rate | taken | bought [points], each with its 95 % interval | mean | runs |")
    print("|---|---:|---:|---:|---|---|---:|---:|")
    gains = []
    for wanted in WANTED:
        # The newest of each seed: docstrings are those of the packages that are installed, and change with them.
        newest = {line["seed"]: line for line in lines if (line["set"], line["rows"]) == (wanted.name, wanted.rows)}
        mine = [newest[seed] for seed in sorted(newest)]
        if not mine:
            continue
        bought = [100 * line["bought"][0] for line in mine]
        gains += bought
        each = "; ".join("{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * one for one in line["bought"])) for line in mine)
        taken = ", ".join(f"{line['rate']:g}" for line in mine)
        cost = statistics.mean(line["seconds"] / line["run_seconds"] for line in mine)
        print(
            f"| {wanted.name} | {wanted.rows or 'all'} | {len(mine)} | {mine[0]['usual']:g} | {taken} | {each} | "
            f"{statistics.mean(bought):+.2f} | {cost:.1f} |"
        )
    if len(gains) > 1:
        error = statistics.stdev(gains) / len(gains) ** 0.5
        print(f"mean over {len(gains)} searches: {statistics.mean(gains):+.2f} ± {error:.2f} points")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="what", required=True)
    runs = verbs.add_parser("run")
    runs.add_argument("folder", type=Path)
    runs.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    runs.add_argument("--sets", nargs="+", default=sorted({one.name for one in WANTED}))
    verbs.add_parser("table")
    given = parser.parse_args()
    if given.what == "table":
        table()
        return
    given.folder.mkdir(parents=True, exist_ok=True)
    for seed in given.seeds:
        for wanted in WANTED:
            if wanted.name in given.sets:
                do(given.folder.absolute(), wanted, seed)


if __name__ == "__main__":
    main()
