"""What the scripts of the suite share: commands, their time and memory, repeats in turn, kept measurements."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.results import ROOT, Figure, number

Measure = Callable[..., Iterator[Figure]]
"""A part of the suite: from its folder, and whether it shall be quick, to figures."""
SMOKE = "FULLTUNE_BENCH_SMOKE" in os.environ
"""Whether parts, which are quick then, are only to reach their ends with tiny models and rows (`bench/smoke.py`)."""


def script(measure: Measure, description: str | None, **numbers: str) -> None:
    """The command line of a part: `--quick`, `--folder F`, `--figures FILE`; exits 1 where a bar is missed.

    `numbers` are further options with their help: whole numbers of 1 or more, which `measure` takes by name.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rows, steps and repeats: minutes")
    parser.add_argument("--folder", type=Path, help="keeps what was measured; the same folder resumes")
    parser.add_argument("--figures", type=Path, help="also write the figures as JSON lines")
    for name, meaning in numbers.items():
        parser.add_argument(f"--{name}", type=_count, metavar="N", help=meaning)
    options = parser.parse_args()
    more = {name: getattr(options, name) for name in numbers if getattr(options, name) is not None}
    os.environ |= environment()
    with contextlib.ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fulltune-bench-")))
        folder.mkdir(parents=True, exist_ok=True)
        figures = []
        for figure in measure(folder.resolve(), options.quick, **more):
            mark = "passed" if figure.passed else "MISSED"
            print(f"{mark}: {figure.name}: {number(figure.value, figure.unit)} ({figure.bar})", flush=True)
            figures.append(figure)
    if options.figures:
        lines = "".join(json.dumps(vars(figure)) + "\n" for figure in figures)
        options.figures.write_text(lines, encoding="utf-8")
    sys.exit(0 if figures and all(figure.passed for figure in figures) else 1)


def _count(text: str) -> int:
    if (count := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, found {text}")
    return count


def environment(**more: str) -> dict[str, str]:
    """Variables of processes that run this checkout, without network."""
    paths = os.pathsep.join((str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")))
    return os.environ | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"} | more


def fulltune(verb: str, *words: object) -> list[str]:
    """A command of this checkout."""
    # A tiny model that gets worse is not stopped.
    usual = ["--set=evaluate.bootstrap_samples=100", "--set=train.eval_on_start=false"]
    more = usual if SMOKE and verb in ("train", "evaluate", "run") else []
    return [sys.executable, "-m", "fulltune.cli.app", verb, *map(str, words), *more]


def run(command: Sequence[str], **variables: str) -> str:
    """Run a command, return its output, and end the program where it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment(**variables))
    if done.returncode:
        sys.exit(f"{' '.join(command)[:300]}\nended with {done.returncode}: {(done.stdout + done.stderr)[-3000:]}")
    return done.stdout


def events(run_folder: Path) -> list[dict[str, Any]]:
    """The journal of all attempts of a run, without lines that were cut off."""
    lines = []
    for path in sorted(run_folder.glob("attempts/*/metrics.jsonl")):
        lines += [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    return lines


def fresh(folder: Path) -> Path:
    """The folder, empty."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


class Records:
    """Measurements that are kept in a file, one JSON line each, so that an interrupted part resumes behind the last."""

    def __init__(self, path: Path) -> None:
        self._path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self.values: dict[str, Any] = {line["key"]: line["value"] for line in map(json.loads, lines)}

    def get(self, key: str, measure: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """The kept value of this key, or that of a call, which JSON can hold."""
        if key not in self.values:
            self.values[key] = measure(*arguments, **named)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, "value": self.values[key]}) + "\n")
            print(f"  {key}: {json.dumps(self.values[key])[:150]}", flush=True)
        return self.values[key]


def interleaved(contestants: Mapping[str, Callable[[], Any]], repeats: int, records: Records) -> dict[str, list[Any]]:
    """Measure each contestant `repeats` times in turn, each repeat beginning with another one."""
    names = list(contestants)
    values: dict[str, list[Any]] = {name: [] for name in names}
    for repeat in range(repeats):
        turn = repeat % len(names)
        for name in names[turn:] + names[:turn]:
            values[name].append(records.get(f"{name}, repeat {repeat + 1}", contestants[name]))
    return values


def median_ratio(values: Sequence[float], others: Sequence[float]) -> float:
    """The median of the ratios within each repeat: in one repeat the machine is the same for both."""
    return statistics.median(value / other for value, other in zip(values, others, strict=True))


def seconds_and_peak(command: Sequence[str], **variables: str) -> tuple[float, int]:
    """Wall time of a command, and the peak of its memory in bytes over all of its processes.

    Memory is the sum of proportional set sizes (shared pages are divided among those that map them), sampled five times
    a second.
    """
    began, peak = time.monotonic(), 0
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, start_new_session=True, env=environment(**variables)
        )
        while process.poll() is None:
            peak = max(peak, _proportional_bytes(process.pid))
            time.sleep(0.02 if SMOKE else 0.2)
        if process.returncode:
            log.seek(0)
            sys.exit(f"{' '.join(command)[:300]}\n{log.read().decode()[-3000:]}")
    return time.monotonic() - began, peak


def _proportional_bytes(session: int) -> int:
    total = 0
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, ValueError, StopIteration):
                if os.getsid(int(entry.name)) == session:
                    lines = (entry / "smaps_rollup").read_text().splitlines()
                    total += next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    return total
