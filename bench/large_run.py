"""A whole run over many rows: resident memory over time, as numbers and as a plot.

    python bench/large_run.py FILE.csv [--plot docs/memory-large-run.svg] [--set train.num_train_epochs=1 ...]

FILE has columns `text` and `label` (bench/corpus.py makes one). Trains MiniLM-L6 on it for one epoch, from reading to
the report, and samples the proportional set size (PSS) of all its processes once a second. A second call of the data
stage then shows what the cache saves.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from data_stage import MODEL, proportional_bytes

RECIPE = """\
model: {model}
task: text-classification
data: {{train: {file}}}
train: {{num_train_epochs: 1, save_steps: 1000}}
output: runs
"""
WIDTH, HEIGHT, LEFT, BOTTOM = 720, 260, 56, 30


def plot(samples: list[tuple[float, float]], phases: list[tuple[float, str]]) -> str:
    """Memory in MB over seconds as SVG, with a mark where each phase begins."""
    seconds, top = samples[-1][0], max(value for _, value in samples) * 1.1

    def x(second: float) -> float:
        return LEFT + (WIDTH - LEFT - 10) * second / seconds

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - BOTTOM - 10) * value / top

    line = " ".join(f"{x(second):.1f},{y(value):.1f}" for second, value in samples)
    parts = [f'<polyline points="{line}" fill="none" stroke="#2463a6" stroke-width="1.5"/>']
    step = 500 if top > 1500 else 250
    for value in range(0, int(top), step):
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - 10}" y1="{y(value):.1f}" y2="{y(value):.1f}" stroke="#ddd"/>'
            f'<text x="{LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value} MB</text>'
        )
    for number, (second, name) in enumerate(phases):
        height = 14 + 13 * (number % 5)
        parts.append(
            f'<line x1="{x(second):.1f}" x2="{x(second):.1f}" y1="10" y2="{HEIGHT - BOTTOM}" stroke="#bbb" '
            f'stroke-dasharray="3 3"/><text x="{x(second) + 3:.1f}" y="{height}">{name}</text>'
        )
    for share in range(5):
        second = seconds * share / 4
        anchor = "end" if share == 4 else "middle"
        parts.append(f'<text x="{x(second):.1f}" y="{HEIGHT - 10}" text-anchor="{anchor}">{second:,.0f} s</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        f'font-size="11"><title>Memory of all processes over time</title>'
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>{"".join(parts)}</svg>\n'
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--set", action="append", default=[], dest="settings")
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    recipe = folder / "large.yaml"
    recipe.write_text(RECIPE.format(model=MODEL, file=given.file.resolve()), encoding="utf-8")
    options = [part for setting in given.settings for part in ("--set", setting)]
    command = [sys.executable, "-m", "fulltune.cli.app", "run", str(recipe), "--run-folder", str(folder / "runs/one")]
    log = folder / "log.txt"
    started = time.monotonic()
    samples: list[tuple[float, float]] = [(0.0, 0.0)]
    phases: list[tuple[float, str]] = []
    names = ("reading", "planning", "training process", "loading", "checking", "training", "saving", "scoring")
    with log.open("w", encoding="utf-8") as out:
        process = subprocess.Popen(
            [*command, *options], stdout=out, stderr=out, start_new_session=True, env={**os.environ, "COLUMNS": "120"}
        )
        while process.poll() is None:
            now = time.monotonic() - started
            # The training process leads a session of its own.
            sessions = {process.pid, *_children(process.pid)}
            samples.append((now, sum(proportional_bytes(number) for number in sessions) / 1e6))
            lines = log.read_text(encoding="utf-8").splitlines()
            for name in names:
                if name not in [phase for _, phase in phases] and any(line.startswith(name) for line in lines):
                    phases.append((now, name))
            time.sleep(1)
    print(log.read_text(encoding="utf-8"))
    if process.returncode:
        sys.exit(process.returncode)
    thirds = len(samples) // 3
    print(
        json.dumps(
            {
                "seconds": round(samples[-1][0]),
                "peak_mb": round(max(value for _, value in samples)),
                "median_mb_by_third": [
                    round(sorted(value for _, value in samples[i * thirds : (i + 1) * thirds])[thirds // 2])
                    for i in range(3)
                ],
            }
        )
    )
    if given.plot:
        given.plot.write_text(plot(samples, phases), encoding="utf-8")
    again = time.monotonic()
    command[3], command[-1] = "data", str(folder / "runs/two")
    subprocess.run([*command, *options], check=True, capture_output=True)
    print(json.dumps({"data_stage_from_cache_seconds": round(time.monotonic() - again, 1)}))


def _children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in tasks.read_text().split()] if tasks.exists() else []


if __name__ == "__main__":
    main()
