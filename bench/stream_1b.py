"""A shape of 1.1 B parameters, streamed from disk in at most 2 GiB in fp32, killed three times, against a resident run.

TinyLlama's shape, random weights that are saved once, and 200 steps on the plays of Shakespeare. The streamed run is
killed with SIGKILL, all of its processes, three times at random moments; each time the same command is given again. The
resident run has the same seed and rows and holds everything in memory (about 18 GiB). FOLDER/losses.csv has the losses
of every step side by side. Needs FULLTUNE_BENCH_DATA, and about 45 GB of a disk in FOLDER.

A step has 64 tokens, two rows of 32: in fp32 a step reads 24 bytes and writes 16 per parameter, 26 and 18 GB, whatever
its tokens, which takes longer than computing 64 of them (0.6 TFLOP). `--steps N` is for less patience.
"""

from __future__ import annotations

import csv
import random
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from bench.limited import GIB, DiskUse, limited
from bench.results import Figure
from bench.runs import SMOKE, Records, events, fresh, fulltune, script
from bench.stream_shapes import config, parameters, saved, write_recipe, write_text

ROWS, LENGTH = 2, 32
CEILING = 2 * GIB
RESIDENT_CEILING = 22 * GIB
KILLS = 1 if SMOKE else 3


def losses(run_folder: Path) -> dict[int, float]:
    """The loss of each step; that of a step which was done again is the last one."""
    return {event["step"]: event["loss"] for event in events(run_folder) if event["kind"] == "train"}


def step_seconds(run_folder: Path) -> float:
    """The median time between two steps of one attempt, without those with an evaluation between them, in which a
    streamed run makes the last step's update; NaN before two are done."""
    lines = [event for event in events(run_folder) if event["kind"] in ("train", "eval")]
    steps = [pair for pair in pairwise(lines) if {event["kind"] for event in pair} == {"train"}]
    taken = [after["seconds"] - before["seconds"] for before, after in steps if after["step"] == before["step"] + 1]
    return statistics.median([seconds for seconds in taken if seconds > 0] or [float("nan")])


def kill_moment(run_folder: Path, step: int, share: float) -> Callable[[], bool]:
    """Whether this step is done, and since then this share of a step's time has passed."""
    reached: list[float] = []

    def is_now() -> bool:
        if not reached:
            if max(losses(run_folder), default=0) < step:
                return False
            seconds = step_seconds(run_folder)
            reached.append(time.monotonic() + share * (seconds if seconds == seconds else 0.0))
        return time.monotonic() >= reached[0]

    return is_now


def trained(folder: Path, recipe: Path, ceiling: int, kills: Mapping[int, float]) -> dict[str, Any]:
    """Train under a ceiling, killed after these steps and resumed; the large files are removed behind it."""
    run_folder, log = fresh(folder) / "run", folder / "log"
    command = fulltune("train", recipe, "--run-folder", run_folder)
    ended = [limited(command, ceiling, log, stop=kill_moment(run_folder, *kill)) for kill in sorted(kills.items())]
    disk = DiskUse(run_folder)
    ended.append(limited(command, ceiling, log, stop=disk))
    problems = [one for one in ended if one.over] or [ended[-1]] * (ended[-1].code != 0)
    if problems:
        sys.exit(f"{log}: ended with {problems[0]}:\n{log.read_text(encoding='utf-8')[-3000:]}")
    answer = {
        "losses": losses(run_folder),
        "seconds": step_seconds(run_folder),
        "peak": max(one.peak_bytes for one in ended),
        "total": max(one.total_bytes for one in ended),
        "written": sum(one.written_bytes for one in ended),
        "has_state": disk.has_state,
        "killed": sum(one.code == -9 for one in ended),
    }
    shutil.rmtree(run_folder)
    return answer


def drawn_kills(steps: int) -> dict[int, float]:
    """Steps after which a run is killed, and the share of the next step's time that it still gets."""
    draw = random.Random(0)
    return {step: draw.random() for step in sorted(draw.sample(range(2, steps - 2), KILLS))}


def side_by_side(one: Mapping[str, float], other: Mapping[str, float]) -> tuple[list[list[float]], float]:
    """Step and both losses, and their largest difference: infinite unless both have the same steps."""
    rows = [[int(step), one[step], other[step]] for step in sorted(one.keys() & other.keys(), key=int)]
    same = one.keys() == other.keys() and rows
    return rows, max(abs(first - second) for _, first, second in rows) if same else float("inf")


def measure(folder: Path, quick: bool, steps: int | None = None) -> Iterator[Figure]:
    layers, hidden, usual_steps = (2, 128, 6) if SMOKE else (4, 512, 20) if quick else (22, 2048, 200)
    steps = steps or usual_steps
    if steps < KILLS + 4:
        sys.exit(f"--steps: expected {KILLS + 4} or more, found {steps}")
    records = Records(folder / f"measured-{layers}-{steps}.jsonl")
    model = saved(folder, layers, hidden)
    write_text(folder, 6 * ROWS * LENGTH * steps)
    usual = {"max_steps": steps, "global_batch_size": ROWS}
    stream = {"placement": "stream", "stream": {"host_memory": "1960MiB"}}
    recipes = {
        "resident": write_recipe(folder / "resident.yaml", model, LENGTH, placement="single", **usual),
        "streamed": write_recipe(folder / "streamed.yaml", model, LENGTH, **stream, **usual),
    }
    resident = records.get("resident", trained, folder / "resident", recipes["resident"], RESIDENT_CEILING, {})
    streamed = records.get("streamed", trained, folder / "streamed", recipes["streamed"], CEILING, drawn_kills(steps))
    if not streamed["has_state"]:
        sys.exit("the streamed run had no training state on the disk, so it was not streamed")
    # JSON's keys are texts.
    curves = [{str(step): loss for step, loss in one["losses"].items()} for one in (resident, streamed)]
    rows, difference = side_by_side(*curves)
    with (folder / "losses.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["step", "resident", "streamed"], *rows])
    for name, one in (("resident", resident), ("streamed", streamed)):
        print(
            f"{name}: {one['peak'] / GIB:.2f} GiB, all processes {one['total'] / GIB:.2f} GiB, {one['seconds']:.2f} s "
            f"a step, {one['written'] / 1e9:.1f} GB written",
            flush=True,
        )
    size = f"{parameters(config(layers, hidden)) / 1e9:.2g} B parameters in fp32"
    name = f"largest difference of a step's loss, {size} streamed against resident, {steps} steps"
    yield Figure(name, difference, "nats", at_most=1e-6)
    yield Figure("times the streamed run was killed and resumed", streamed["killed"], "times", at_least=KILLS)
    yield Figure(f"peak memory of a process, {size} streamed", streamed["peak"] / GIB, "GiB", at_most=CEILING / GIB)
    values = list(curves[1].values())
    part = max(len(values) // 10, 2)
    fall = statistics.mean(values[:part]) - statistics.mean(values[-part:])
    yield Figure(f"fall of the streamed run's loss in {steps} steps", fall, "nats", at_least=0.1 if quick else 1)


if __name__ == "__main__":
    script(measure, __doc__, steps="optimizer steps instead of 200 (--quick: 20)")
