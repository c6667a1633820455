"""The release suite: what fulltune claims about itself, measured again on this machine.

    python -m bench release            # every part; hours
    python -m bench release --quick    # every part with fewer rows, steps and repeats
    python -m bench table              # keep the results for this version, and write them into docs/evidence.md
    python -m bench compare [OLD] NEW  # figures of two releases side by side; by default the last release's
    python -m bench smoke              # whether every part still runs to its end, with tiny models and rows; minutes

A part is a module of this folder (`bench/suite.py: PARTS`) whose `measure(folder, quick)` yields figures, each with a
bar that fails the release. The runner starts each part in a process of its own and appends its figures to
FOLDER/results.jsonl once the part has ended; the same command resumes with the parts that are not in there, and within
a part behind the last measurement that was kept (`runs.Records`). `python -m bench.PART [--quick]` runs one alone.
When a release is cut, `table` copies its results to `bench/releases/VERSION.jsonl` (`bench/results.py` has the schema)
and writes the page; the next release is compared with them. Beside the suite stands the day on a GPU, `gpu_day`. Data
sets: FULLTUNE_BENCH_DATA, see `bench/public_data.py`. A script that has no bar does not belong here: its figures stand
in the commit that made them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bench import results
from bench.smoke import smoke
from bench.suite import PARTS, release


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    measuring = commands.add_parser("release", help="measure what is not measured yet")
    measuring.add_argument("--quick", action="store_true")
    measuring.add_argument("--folder", type=Path, default=Path("runs/release"))
    measuring.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=", ".join(PARTS))
    measuring.add_argument(
        "--again", nargs="+", choices=PARTS, default=(), metavar="PART", help="parts to measure anew"
    )
    writing = commands.add_parser("table", help="keep results as this version's, and write them into docs/evidence.md")
    writing.add_argument("file", type=Path, nargs="?", default=Path("runs/release/results.jsonl"))
    comparing = commands.add_parser("compare", help="figures of two releases side by side")
    comparing.add_argument("files", type=Path, nargs="+", metavar="FILE")
    smoking = commands.add_parser("smoke", help="whether each part still runs to its end, in minutes")
    smoking.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART")
    options = parser.parse_args()
    if options.command == "smoke":
        return smoke(options.only)
    if options.command == "release":
        folder, last = options.folder.resolve(), results.newest()
        folder.mkdir(parents=True, exist_ok=True)
        code = release(folder, options.only, options.again, options.quick)
        if last is not None:
            compare(last, folder / "results.jsonl")
        return code
    if options.command == "compare":
        last = results.newest()
        files = options.files if len(options.files) > 1 or last is None else [last, *options.files]
        if len(files) != 2:
            parser.error("expected the results of two releases")
        compare(*files)
        return 0
    if not options.file.exists():
        parser.error(f"{options.file} does not exist; measure first: python -m bench release")
    results.publish(options.file)
    return 0


def compare(old: Path, new: Path) -> None:
    print(f"\n{old.stem} -> {new.stem}")
    print("\n".join(results.differences(results.read(old), results.read(new))))


if __name__ == "__main__":
    sys.exit(main())
