"""Run the parts, each in a process of its own with a time limit, and keep finished ones in `gpu_day.json`."""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import runs
from bench.gpu_day.here import Here
from bench.gpu_day.parts import STAND_IN_MINUTES, Decision
from bench.results import ROOT

from fulltune.files import append_line, read_json_lines, write_json, write_text
from fulltune.selfcheck import mask_names
from fulltune.text import counted
from fulltune.train.parent import spawn

FILE, PAGE = "gpu_day.json", "gpu_day.md"
FINISHED = "done"
LEAST_SECONDS = 10
"""No part starts with less time than this left of the whole run."""
Figures = Mapping[str, float | int | str | None]
"""Values by name, each name ending in its unit; None: not measured."""


@dataclass(frozen=True)
class Rows:
    """The file that a part writes its measurements to at once, so that a stopped part keeps them."""

    path: Path
    ends: float
    """The time on `time.monotonic` at which the part is stopped."""

    @property
    def left_seconds(self) -> float:
        return self.ends - time.monotonic()

    def add(self, case: str, figures: Figures, ok: bool | None = None, note: str = "") -> None:
        """Write one measurement.

        Args:
            case: Name of the measurement.
            figures: Measured values; all rows of a part have the same names.
            ok: Whether it is as expected; None: nothing was expected, or it was not measured.
            note: A sentence for the page, without names and paths.
        """
        row = {"case": case, "figures": dict(figures), "ok": ok, "note": mask_names(note) if note else ""}
        append_line(self.path, row)


def empty_day() -> dict[str, Any]:
    return {"here": None, "decisions": {}, "results": {}}


def load(folder: Path) -> dict[str, Any]:
    """Load the parts that earlier runs finished. An unreadable file is renamed, and the day starts empty."""
    path = folder / FILE
    if not path.exists():
        return empty_day()
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(saved, dict) and isinstance(saved.get("results"), dict):
            return saved
    except ValueError:  # half a file, which is put aside like one of another form
        pass
    aside = path.replace(path.with_suffix(".broken"))
    print(f"{path} cannot be read; it is kept as {aside.name}, and every part runs again")
    return empty_day()


def result_of(day: Mapping[str, Any], part: str, key: str) -> dict[str, Any] | None:
    """Return a part's last result on this card with these versions, if there is one."""
    return day["results"].get(f"{part} | {key}")


def is_good(result: Mapping[str, Any]) -> bool:
    """Whether a part finished and all of its measurements were as expected."""
    return result["status"] == FINISHED and not any(row["ok"] is False for row in result["rows"])


def to_run(day: Mapping[str, Any], decisions: Sequence[Decision], key: str, again: Sequence[str]) -> list[Decision]:
    """Return the parts to run: those that are not finished or are wanted again, without skipped ones.

    Args:
        day: Results of earlier runs.
        decisions: How each part runs on this machine.
        key: `Here.key` of this machine.
        again: Names of parts to run again.
    """

    def is_open(decision: Decision) -> bool:
        result = result_of(day, decision.part.name, key)
        return result is None or result["status"] != FINISHED or decision.part.name in again

    return [decision for decision in decisions if decision.how != "skip" and is_open(decision)]


def run(
    folder: Path,
    here: Here,
    decisions: Sequence[Decision],
    only: Sequence[str],
    again: Sequence[str],
    minutes: float,
    page: Callable[[Mapping[str, Any]], str],
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Run the parts that are not finished, and write JSON and page after each.

    Args:
        folder: Folder of the day.
        here: This machine.
        decisions: How each part runs on this machine.
        only: Names of the parts to consider.
        again: Names of parts to run again.
        minutes: Minutes of this command after which no part starts.
        page: Renders the page of the day.
        say: Prints a line to the terminal.

    Returns:
        The day's results.
    """
    day = load(folder)
    day["here"] = here.as_json() | {"key": here.key}
    day["decisions"] = {decision.part.name: {"how": decision.how, "reason": decision.reason} for decision in decisions}
    open_parts = to_run(day, decisions, here.key, again)
    ends = time.monotonic() + 60 * minutes
    for decision in (decision for decision in decisions if decision.part.name in only):
        name = decision.part.name
        known = result_of(day, name, here.key)
        if decision.how == "skip":
            say(line(name, "skipped", None, decision.reason))
        elif decision not in open_parts and known is not None:
            say(line(name, f"{known['status']} before", known["seconds"], brief(known["rows"])))
        else:
            left = ends - time.monotonic()
            result = _run_part(folder, decision, left, here)
            day["results"][f"{name} | {here.key}"] = result
            say(line(name, result["status"], result["seconds"], result["reason"] or brief(result["rows"])))
        _write(folder, day, page)
    return day


def _write(folder: Path, day: Mapping[str, Any], page: Callable[[Mapping[str, Any]], str]) -> None:
    write_json(folder / FILE, day)
    write_text(folder / PAGE, page(day))


def _run_part(folder: Path, decision: Decision, seconds_left: float, here: Here) -> dict[str, Any]:
    """Run a part in a process of its own, and end all processes that it started."""
    part = decision.part
    limit = min(60 * (part.minutes if decision.how == "card" else STAND_IN_MINUTES), seconds_left)
    base = {"part": part.name, "how": decision.how, "date": datetime.date.today().isoformat()}
    if seconds_left < LEAST_SECONDS:
        return base | {"status": "not begun", "reason": "the minutes of this run are over", "seconds": 0, "rows": []}
    rows = folder / "parts" / f"{part.name}.jsonl"
    rows.parent.mkdir(parents=True, exist_ok=True)
    rows.unlink(missing_ok=True)
    log = rows.with_suffix(".log")
    began = time.monotonic()
    with log.open("w", encoding="utf-8") as out:
        child = subprocess.Popen(
            command_of(part.name, folder, limit),
            cwd=ROOT,
            env=environment(here, part.cards),
            stdout=out,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            status, reason = _awaited(child, limit, log)
        finally:
            spawn.kill_workers(child)
            child.wait()
    seconds = round(time.monotonic() - began, 1)
    return base | {"status": status, "reason": reason, "seconds": seconds, "rows": read_json_lines(rows)}


def command_of(part: str, folder: Path, seconds: float) -> list[str]:
    """The command that runs a part."""
    words = ["--part", part, "--folder", str(folder), "--seconds", f"{seconds:.0f}"]
    return [sys.executable, "-m", "bench.gpu_day", *words]


def _awaited(child: subprocess.Popen[bytes], limit: float, log: Path) -> tuple[str, str]:
    try:
        code = child.wait(timeout=limit)
    except subprocess.TimeoutExpired:
        return "stopped", f"not finished within its {limit / 60:.1f} minutes; what it had measured is below"
    if code == 0:
        return FINISHED, ""
    output = [text.strip() for text in log.read_text(encoding="utf-8", errors="replace").splitlines() if text.strip()]
    return "failed", mask_names(f"ended with code {code}: {output[-1] if output else 'nothing was written'}")


def environment(here: Here, cards: int) -> dict[str, str]:
    """Return a part's environment: this code, no network, and only as many cards as the part needs.

    transformers' Trainer would take all cards that it sees.
    """
    variables = runs.environment()
    if len(here.cards) > 1:
        visible = here.hidden.split(",") if here.hidden else [str(index) for index in range(len(here.cards))]
        variables["CUDA_VISIBLE_DEVICES"] = ",".join(visible[:cards])
    return variables


def brief(rows: Sequence[Mapping[str, Any]]) -> str:
    """Summarise a part's rows in a few words."""
    wrong = sum(row["ok"] is False for row in rows)
    missing = sum(value is None for row in rows for value in row["figures"].values())
    words = [counted(len(rows), "row")] + [f"{wrong} not as they should be"] * bool(wrong)
    return ", ".join(words + [f"{counted(missing, 'figure')} not measured"] * bool(missing))


def line(name: str, status: str, seconds: float | None, text: str) -> str:
    """Format a part for the terminal, in 80 columns."""
    time_taken = "" if seconds is None else f"{seconds:.0f} s"
    head = f"{name:<11}{status:<12}{time_taken:>6}  "
    return textwrap.fill(text, 80, initial_indent=head, subsequent_indent=" " * len(head))
