"""All measurements that need a GPU, in one run of at most 25 minutes.

    make gpu-day
    python -m bench.gpu_day [--folder runs/gpu-day] [--again memory speed ...] [--only tests ...] [--minutes 25]

Each part runs in a process of its own and is kept in FOLDER/gpu_day.json once it is finished; the same command resumes
with those that are not. FOLDER/gpu_day.md is the page. Without a card every part runs on the CPU with tiny shapes, and
each figure that needs a card is "not measured". Exits 1 when a part failed or something is not as it should be.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

# The benches are no installed package: they are found by the path that was set above.
from bench.gpu_day import day, here, page, parts  # noqa: E402  # found by the path that was set above

NAMES = [part.name for part in parts.PARTS]


def _look(folder: Path) -> here.Here:
    """Look at this machine in another process, so that this one never holds memory of the card."""
    command = [sys.executable, "-m", "bench.gpu_day", "--look", "--folder", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"torch could not be asked for cards:\n{done.stderr[-2000:]}")
    return here.Here.of(json.loads(done.stdout.splitlines()[-1]))


def _run_part(name: str, folder: Path, seconds: float) -> None:
    """Run a part in this process."""
    from bench.gpu_day import checks, memory, processes, speed

    machine = here.Here.of(json.loads((folder / "here.json").read_text(encoding="utf-8")))
    work = {
        "tests": checks.tests,
        "selfcheck": checks.selfcheck,
        "quickstart": checks.quickstart,
        "precision": checks.precision,
        "speed": speed.compare,
        "memory": memory.grid,
        "ladder": memory.ladder,
        "large": memory.large,
        "processes": processes.two,
    }[name]
    rows = day.Rows(folder / "parts" / f"{name}.jsonl", time.monotonic() + seconds)
    work(machine, folder / "work" / name, rows)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_day", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/gpu-day"))
    described = f"of {', '.join(NAMES)}"
    parser.add_argument("--again", nargs="+", metavar="PART", choices=NAMES, default=[], help=f"again, {described}")
    parser.add_argument("--only", nargs="+", metavar="PART", choices=NAMES, default=NAMES, help=f"alone, {described}")
    parser.add_argument("--minutes", type=float, default=parts.MINUTES, help="after which no part begins")
    parser.add_argument("--part", choices=NAMES, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=600, help=argparse.SUPPRESS)
    parser.add_argument("--look", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    folder = options.folder.absolute()
    if folder.exists() and not folder.is_dir():
        parser.error(f"--folder: {options.folder} is a file; name a folder")
    if not 0 <= options.minutes < float("inf"):
        parser.error(f"--minutes: expected a number of 0 or more, found {options.minutes:g}")
    if options.look:
        print(json.dumps(here.look(folder).as_json()))
        return 0
    if options.part:
        _run_part(options.part, folder, options.seconds)
        return 0
    # A part that is running ends with this command, however it is told to end.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("told to stop; the same command resumes"))
    machine = _look(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "here.json").write_text(json.dumps(machine.as_json()), encoding="utf-8")
    where = ", ".join(card.name for card in machine.cards) or "no card: stand-ins on the CPU"
    print("\n".join(textwrap.wrap(f"gpu-day on {where}; at most {options.minutes:g} minutes", 80)))
    for note in here.notes(machine):
        print("\n".join(textwrap.wrap(note, 80, initial_indent="- ", subsequent_indent="  ")))
    decisions = parts.decide(machine)
    try:
        limits = options.only, options.again, options.minutes
        record = day.run(folder, machine, decisions, *limits, page.markdown, _say)
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command resumes")
    names = [decision.part.name for decision in decisions if decision.part.name in options.only]
    results = [day.result_of(record, name, machine.key) for name in names]
    print(f"the page: {options.folder / day.PAGE}")
    return 0 if all(result is None or day.is_good(result) for result in results) else 1


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
