"""Figures of the release suite: their JSON schema, the table of docs/evidence.md, the comparison of two releases.

A result is a line of JSON:

    {"part": "kill_resume", "name": "runs with the weights of the unbroken run, of 12 killed ones", "figure": 12.0,
     "unit": "runs", "bar": "at least 12", "passed": true, "quick": true, "commit": "1a2b3c4d5e", "date": "2026-11-29",
     "machine": {"cpu": "AMD EPYC 7B13", "cores": 2, "torch": "2.13.0"}}
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RELEASES = ROOT / "bench" / "releases"
"""A file of results for each release, `VERSION.jsonl`."""
PAGE = ROOT / "docs" / "evidence.md"
BEGIN, END = "<!-- release suite: begin -->", "<!-- release suite: end -->"
Result = Mapping[str, Any]


@dataclass(frozen=True)
class Figure:
    """A measured number with the bar that it must reach."""

    name: str
    """What was measured, as a claim of the table; the same in each release."""
    value: float
    unit: str
    at_least: float | None = None
    at_most: float | None = None

    def __post_init__(self) -> None:
        if self.at_least is None and self.at_most is None:
            raise ValueError(f"{self.name}: a figure without a bar")

    @property
    def passed(self) -> bool:
        """Whether the bar is reached; NaN never does."""
        lowest = float("-inf") if self.at_least is None else self.at_least
        highest = float("inf") if self.at_most is None else self.at_most
        return lowest <= self.value <= highest

    @property
    def bar(self) -> str:
        sides = (("at least", self.at_least), ("at most", self.at_most))
        return ", ".join(f"{side} {_shown(bound, self.unit)}" for side, bound in sides if bound is not None)


def result(part: str, figure: Figure, quick: bool, circumstances: Mapping[str, Any]) -> dict[str, Any]:
    """The line of a figure."""
    measured = {"figure": figure.value, "unit": figure.unit, "bar": figure.bar, "passed": figure.passed}
    return {"part": part, "name": figure.name, **measured, "quick": quick, **circumstances}


def circumstances() -> dict[str, Any]:
    """Commit, date and machine of a measurement made now; a commit with local changes ends in `+`."""
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run([*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True, check=False)
    changes = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=False)
    machine = {"cpu": _cpu_model(), "cores": os.cpu_count(), "torch": importlib.metadata.version("torch")}
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return {"commit": commit.stdout.strip() + "+" * bool(changes.stdout.strip()), "date": today, "machine": machine}


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def write(path: Path, lines: Iterable[Result]) -> None:
    """Replace the file in one move: an interruption loses nothing."""
    fresh = path.with_suffix(".new")
    fresh.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    fresh.replace(path)


def newest(folder: Path = RELEASES) -> Path | None:
    """The results of the last release: the file with the latest date."""
    return max(folder.glob("*.jsonl"), key=lambda path: max(line["date"] for line in read(path)), default=None)


# ---- the table of docs/evidence.md ---------------------------------------------------------------------------------


def number(value: float, unit: str) -> str:
    """A figure with its unit, as a reader sees it; shares are shown in percent."""
    return _shown(value, unit) if unit == "share" else f"{_shown(value, unit)} {unit}"


def _shown(value: float, unit: str) -> str:
    if unit == "share":
        return f"{100 * value:.4g}%"
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.3g}"


def table(results: Sequence[Result]) -> str:
    """Claim, figure, bar, command and date of each result as Markdown, and the machines below."""
    lines = ["| claim | figure | bar | command | date |", "|---|---:|---|---|---|"]
    for line in results:
        shown = number(line["figure"], line["unit"])
        figure = shown if line["passed"] else f"**{shown}, missed**"
        command = f"`python -m bench.{line['part']}{' --quick' * line['quick']}`"
        bar = line["bar"].replace("|", "\\|")
        lines.append(f"| {line['name']} | {figure} | {bar} | {command} | {line['date']} |")
    machines = {f"{line['machine']['cpu']}, {line['machine']['cores']} cores" for line in results}
    versions = {f"torch {line['machine']['torch']}, commit {line['commit']}" for line in results}
    return "\n".join([*lines, "", f"Measured on: {'; '.join(sorted(machines))}. With: {'; '.join(sorted(versions))}."])


def with_table(page: str, results: Sequence[Result]) -> str:
    """The page with the results between its two markers.

    Raises:
        ValueError: The page does not have each marker once, in order.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in after or END in after:
        raise ValueError(f"the page needs the markers {BEGIN} and {END}, once each and in this order")
    return f"{before}{BEGIN}\n\n{table(results)}\n\n{END}{after}"


def publish(file: Path, releases: Path = RELEASES, page: Path = PAGE) -> None:
    """Keep these results as those of the version in pyproject.toml, and write their table into the page."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    page.write_text(with_table(page.read_text(encoding="utf-8"), read(file)), encoding="utf-8")
    releases.mkdir(exist_ok=True)
    write(releases / f"{version}.jsonl", read(file))


# ---- two releases --------------------------------------------------------------------------------------------------


def differences(old: Sequence[Result], new: Sequence[Result]) -> list[str]:
    """A sentence for each figure with both values; a quick figure is compared with a quick one alone."""
    before = {(line["part"], line["name"], line["quick"]): line for line in old}
    sentences = []
    for line in new:
        key = line["part"], line["name"], line["quick"]
        shown = number(line["figure"], line["unit"])
        if key not in before:
            sentences.append(f"new: {line['part']}: {line['name']}: {shown}")
            continue
        known = before.pop(key)
        changed = line["passed"] != known["passed"]
        change = ("; passes now" if line["passed"] else "; MISSES ITS BAR NOW") if changed else ""
        sentences.append(f"{key[0]}: {key[1]}: {number(known['figure'], known['unit'])} -> {shown}{change}")
    return sentences + [f"not measured any more: {part}: {name}" for part, name, _ in before]
