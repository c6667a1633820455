"""The parts of the release suite, and the runner that resumes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.results import ROOT, Figure, circumstances, read, result, write
from bench.runs import environment

PARTS = (
    "training_speed",
    "memory_prediction",
    "time_prediction",
    "accuracy",
    "data_stage",
    "predict_rows",
    "export",
    "serve_load",
    "kill_resume",
    "faults",
    "clean_steps",
    "guard_cost",
    "false_verdicts",
    "malformed_files",
    "planted_defects",
    "placements",
    "stream_depth",
    "stream_1b",
    "stream_7b",
    "stream_rivals",
    "compressed_state",
    "packed_chat",
    "remote_data",
    "chosen_by_answers",
    "rare_class",
    "pairs",
    "embedding",
    "reranking",
    "experts",
)
"""Modules of this folder, each with `measure(folder, quick)`."""

Start = Callable[[str, Path, bool], list[Figure] | None]
"""Runs a part; None: it failed, and what it measured does not count."""


def start(part: str, folder: Path, quick: bool) -> list[Figure] | None:
    """Run a part in a process of its own; its output goes to the terminal."""
    file = folder / "figures.jsonl"
    file.unlink(missing_ok=True)
    command = [sys.executable, "-m", f"bench.{part}", "--folder", str(folder), "--figures", str(file)]
    subprocess.run([*command, *["--quick"] * quick], cwd=ROOT, env=environment(), check=False)
    if not file.exists():
        return None
    return [Figure(**json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()]


def release(folder: Path, parts: Sequence[str], again: Sequence[str], quick: bool, start: Start = start) -> int:
    """Run the parts that `folder/results.jsonl` does not have yet.

    Args:
        folder: The release's; each part has a folder of its own in it, in which it resumes.
        parts: Names of `PARTS`.
        again: Parts that are measured anew although they are finished.
        quick: Whether parts are to take minutes instead of hours.
        start: Runs a part.

    Returns:
        The exit code: 1 if a part failed or a figure misses its bar.
    """
    file, failed = folder / "results.jsonl", []
    for part in parts:
        known = [line for line in read(file) if line["part"] == part and line["quick"] == quick]
        if known and part not in again:
            print(
                f"{part}: finished before, at commit {known[0]['commit']}; --again {part} measures it anew", flush=True
            )
            continue
        began, place = time.monotonic(), folder / f"{part}{'-quick' * quick}"
        if part in again and place.exists():
            place.rename(place.with_name(f"{place.name}-{time.time_ns()}"))
        place.mkdir(parents=True, exist_ok=True)
        print(f"{part}:", flush=True)
        figures = start(part, place, quick)
        print(
            f"{part}: {'failed' if figures is None else 'finished'} after {time.monotonic() - began:.0f} s", flush=True
        )
        if figures is None:
            failed.append(part)
            continue
        others = [line for line in read(file) if line["part"] != part or line["quick"] != quick]
        now = circumstances()
        write(file, [*others, *(result(part, figure, quick, now) for figure in figures)])
    chosen = [line for line in read(file) if line["part"] in parts and line["quick"] == quick]
    missed = [line for line in chosen if not line["passed"]]
    for line in missed:
        print(f"MISSED: {line['part']}: {line['name']}: {line['figure']:g} {line['unit']}, {line['bar']}")
    print(f"{len(chosen)} figures, {len(missed)} missed; parts that failed: {', '.join(failed) or 'none'}; {file}")
    return 1 if missed or failed else 0
