"""Data that lies elsewhere: killed runs go on with the same rows; memory and time of a million rows of the Hub.

The stores are servers on this machine. Memory is that of the data stage, from the Hub against from the disk. Time is
that of reading all rows, from a copy by fulltune against `load_dataset(streaming=True)`, both from an empty cache.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
from bench import kill_resume
from bench.data_stage import PROGRAM
from bench.public_data import MINILM, joined_sentences
from bench.results import Figure
from bench.runs import (
    SMOKE,
    Records,
    environment,
    events,
    fresh,
    interleaved,
    median_ratio,
    run,
    script,
    seconds_and_peak,
)
from pyarrow import csv, parquet
from tests import tiny
from tests.hub import Hub, serve_hub
from tests.web import Site, serve

SHARDS = 3
OURS = """
import sys
from fulltune.data.readers.read import locate_data_files
from fulltune.data.remote.fetch import fetch
print(sum(1 for _ in locate_data_files(fetch(sys.argv[1], lambda event: None).files).rows()))
"""
THEIRS = """
import sys, datasets
print(sum(1 for _ in datasets.load_dataset(sys.argv[1], split="train", revision="main", streaming=True)))
"""


def write_recipe(folder: Path, model: str, sources: list[str], settings: str = "") -> Path:
    recipe = fresh(folder) / "recipe.yaml"
    source = f"task: text-classification\ndata: {{train: {json.dumps(sources)}, max_length: 32}}\n"
    recipe.write_text(f"model: {model}\n{source}{settings}output: runs\n", encoding="utf-8")
    return recipe


def kill_after_requests(command: list[str], site: Site, cache: Path, seconds: float | None) -> float:
    """Run a command, and kill it `seconds` after its first request (None: never); returns how long it ran since."""
    site.requests.clear()
    began = time.monotonic()
    process = subprocess.Popen(
        command, env=environment(FULLTUNE_CACHE=str(cache)), start_new_session=True, **kill_resume.QUIET
    )
    while process.poll() is None and not site.requests:
        time.sleep(0.005)
    began = time.monotonic()
    while process.poll() is None and (seconds is None or time.monotonic() - began < seconds):
        time.sleep(0.005)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return time.monotonic() - began


def prepared(folder: Path, sources: list[str], site: Site, kill_at: float | None) -> tuple[str, float]:
    """Prepare rows, killed once; returns the prepared files' checksums, and the seconds after the first request."""
    recipe, cache = write_recipe(folder, MINILM, sources), folder / "cache"
    command = [sys.executable, "-c", PROGRAM, str(recipe), str(folder / "run")]
    seconds = kill_after_requests(command, site, cache, kill_at)
    run(command, FULLTUNE_CACHE=str(cache))
    return (folder / "run" / "data" / "checksums.json").read_text(), seconds


def trained(folder: Path, model: str, sources: list[str], kills: int, draw: random.Random) -> str:
    """Train, killed at random steps; returns the losses of all steps."""
    settings = "train: {max_steps: 40, save_steps: 4, logging_steps: 1, global_batch_size: 8, precision: fp32}\n"
    recipe, cache = write_recipe(folder, model, sources, settings), str(folder / "cache")
    command = kill_resume.command(recipe, folder / "run")
    for step in sorted(draw.sample(range(5, 36), kills)):
        process = subprocess.Popen(
            command, env=environment(FULLTUNE_CACHE=cache), start_new_session=True, **kill_resume.QUIET
        )
        while kill_resume.last_step(folder / "run") < step and process.poll() is None:
            time.sleep(0.02)
        with contextlib.suppress(ProcessLookupError):  # it may have ended
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    run(command, FULLTUNE_CACHE=cache)
    losses = {event["step"]: event["loss"] for event in events(folder / "run") if event["kind"] == "train"}
    return json.dumps(losses)


def million_rows(folder: Path, hub: Hub, rows: int) -> list[str]:
    """Parquet shards on the disk, and the same ones on the Hub; returns the paths."""
    file = folder / f"{rows}.csv"
    if not file.exists():
        joined_sentences(file, rows)
    table, paths = csv.read_csv(file, parse_options=csv.ParseOptions(newlines_in_values=True)), list[str]()
    for shard in range(4):
        paths.append(str(folder / f"train-{shard}.parquet"))
        part = table.slice(shard * len(table) // 4, len(table) // 4)
        parquet.write_table(part, paths[-1], row_group_size=10_000)
    hub.push("o/sentences", {Path(path).name: Path(path).read_bytes() for path in paths})
    pa.default_memory_pool().release_unused()
    return paths


def measure(folder: Path, quick: bool) -> Iterator[Figure]:
    records, draw = Records(folder / "remote.jsonl"), random.Random(0)
    kills, trainings, rows = (1, 1, 400) if SMOKE else (4, 2, 50_000) if quick else (20, 10, 1_000_000)
    with serve() as site:
        for shard in range(SHARDS):
            kill_resume.write_rows(folder / "shard.csv", 40 if SMOKE else 4000)
            site.files[f"/train-{shard}.csv"] = (folder / "shard.csv").read_bytes()
        sources = [f"{site.address}/train-{shard}.csv" for shard in range(SHARDS)]
        site.pause = 0.02
        whole, seconds = prepared(folder / "whole", sources, site, None)
        killed, resumed, same = folder / "killed", folder / "resumed", 0
        for number in range(kills):
            at = draw.uniform(0, seconds)
            files, _ = records.get(f"kill {number + 1}", prepared, killed, sources, site, at)
            same += files == whole
        yield Figure(f"killed preparations with the same files, of {kills}", same, "runs", at_least=kills)
        site.pause, same = 0.0, 0
        model = str(tiny.save_model(folder / "model", "bert"))
        unbroken = records.get("unbroken", trained, folder / "unbroken", model, sources, 0, draw)
        for number in range(trainings):
            draws = random.Random(number)
            losses = records.get(f"training {number + 1}", trained, resumed, model, sources, 2, draws)
            same += losses == unbroken
        yield Figure(
            f"trainings with two resumes and the same losses, of {trainings}", same, "runs", at_least=trainings
        )
    with serve_hub(folder / "hub-cache") as hub:
        paths = million_rows(folder, hub, rows)
        at_hub = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}

        def prepare(source: list[str]) -> tuple[float, int]:
            work = folder / "work"
            command = [sys.executable, "-c", PROGRAM, str(write_recipe(work, MINILM, source)), str(work / "run")]
            return seconds_and_peak(command, **at_hub, HF_HOME=str(work / "hf"), FULLTUNE_CACHE=str(work / "cache"))

        def read(program: str, source: str) -> float:
            work = fresh(folder / "work")
            command = [sys.executable, "-c", program, source]
            return seconds_and_peak(command, **at_hub, HF_HOME=str(work / "hf"), FULLTUNE_CACHE=str(work / "cache"))[0]

        hub_address = "hf://datasets/o/sentences"
        peaks = interleaved({"disk": lambda: prepare(paths), "Hub": lambda: prepare([hub_address])}, 1, records)
        ratio = max(peak for _, peak in peaks["Hub"]) / max(peak for _, peak in peaks["disk"])
        yield Figure(
            f"peak memory of preparing {rows:,} rows of the Hub over those of the disk", ratio, "x", at_most=1.1
        )
        readers = {"fulltune": lambda: read(OURS, hub_address), "datasets": lambda: read(THEIRS, "o/sentences")}
        times = interleaved(readers, 1, records)
        ratio = median_ratio(times["datasets"], times["fulltune"])
        yield Figure(f"speed of reading {rows:,} rows of the Hub over streaming by datasets", ratio, "x", at_least=1.0)


if __name__ == "__main__":
    script(measure, __doc__)
