"""Whether a run is the same wherever its state lies: the curves, stopped and continued, a process killed.

    python bench/placements.py curves FOLDER [--only fsdp2:2 ...] [--families encoder ...]
    python bench/placements.py resume FOLDER [--only "ddp:2 -> fsdp2:2" ...] [--families encoder ...]
    python bench/placements.py kill FOLDER [--times 10] [--seed 0] [--only fsdp2:2 ...] [--families encoder ...]

Tiny random models in fp32 on the CPU, 50 steps of 8 rows in micro batches of 2, in real processes
(`tests/invariant/placed.py`). A place is `placement:processes:offload`, such as `zero3:2:all`. Each command prints one
table, with all contestants run in turn, and exits 1 when one is not as it should be.

*curves*: without dropout, against one process; at most 1e-4 in a step's loss. *resume*: stopped by SIGTERM at about
step 12 and continued in another place, against the unbroken run of the first place; the same place must give it bit by
bit, another one within 1e-5 in the loss of each later step. *kill*: with dropout, one training process is killed at a
random step; the command goes on by itself, and must give the unbroken run of that place bit by bit.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.invariant import placed
from tests.invariant.placed import Curve, Place

CURVES_MOST, RESUMED_MOST = 1e-4, 1e-5
CURVES = ("ddp:2", "fsdp2:2", "fsdp2:4", "zero2:2", "zero3:2", "zero3:2:all")
PATHS = (
    *(f"{kind}:{one} -> {kind}:{other}" for kind in ("ddp", "fsdp2") for one, other in ((2, 2), (2, 4))),
    *(f"{kind}:2 -> single" for kind in ("ddp", "fsdp2")),
    *(f"single -> {kind}:2" for kind in ("ddp", "fsdp2")),
    *("ddp:2 -> fsdp2:2", "fsdp2:2 -> ddp:2", "fsdp2:4 -> fsdp2:2", "fsdp2:4 -> ddp:2", "single -> fsdp2:4"),
    "zero3:2 -> zero3:2",
)
KILLED = ("ddp:2", "fsdp2:2", "zero3:2")
STOP_STEP = 12


class Table:
    """A markdown table whose lines are printed as they come."""

    def __init__(self, *columns: str) -> None:
        self.failed = 0
        self._print(columns)
        self._print(["---"] * len(columns))

    def line(self, cells: Sequence[object], wrong: bool = False) -> None:
        self.failed += wrong
        self._print([*cells[:-1], f"**{cells[-1]}**" if wrong else cells[-1]])

    @staticmethod
    def _print(cells: Sequence[object]) -> None:
        print(f"| {' | '.join(str(cell) for cell in cells)} |", flush=True)


class References:
    """Unbroken runs, each made when it is first asked for."""

    def __init__(self, folder: Path, dropout: bool) -> None:
        self._folder, self._dropout = folder, dropout
        self._known: dict[tuple[str, str], Curve] = {}

    def of(self, family: str, place: str) -> Curve:
        if (family, place) not in self._known:
            folder = self._folder / family / f"unbroken-{named(place)}"
            placed.train(folder, placed.FAMILIES[family], Place(place), dropout=self._dropout)
            self._known[family, place] = placed.read(folder)
        return self._known[family, place]


class Stopped:
    """Runs that were stopped, each made when it is first asked for, and put back as it was each time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._steps: dict[tuple[str, str], int] = {}

    def at(self, family: str, place: str) -> tuple[Path, int]:
        """The folder, in which the run can be continued, and the step that it was stopped at."""
        folder = self._folder / family / f"stopped-{named(place)}"
        kept = folder.with_name(f"{folder.name}-kept")
        if (family, place) not in self._steps:
            self._steps[family, place] = placed.stop_at(folder, placed.FAMILIES[family], Place(place), STOP_STEP)
            folder.rename(kept)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(kept, folder, symlinks=True)
        return folder, self._steps[family, place]


def named(place: str) -> str:
    """A place as a folder's name."""
    return place.replace(":", "-")


def lacks(path: str) -> str | None:
    """What one of a path's places needs and is not here."""
    return next((found for place in path.split(" -> ") if (found := Place(place).lacks)), None)


def cells(found: placed.Differences) -> list[str]:
    return [f"{value:.1e}" for value in (found.loss, found.norm, found.score, found.weight)]


def curves(options: argparse.Namespace) -> int:
    table = Table("family", "placement", "loss", "gradient norm", "eval metrics", "weights", "values moved", "s", "")
    references = References(options.folder, dropout=False)
    for family in options.families:
        began = time.monotonic()
        one = references.of(family, "single")
        assert len(set(dict(one.losses).values())) == len(one.losses)
        table.line(
            [
                family,
                "single",
                "",
                "",
                "",
                "",
                moved(one),
                f"{time.monotonic() - began:.0f}",
                f"{fall(one)} in the loss",
            ]
        )
        for place in chosen(options, CURVES):
            if said := lacks(place):
                table.line([family, place, "", "", "", "", "", "", said])
                continue
            began = time.monotonic()
            other = references.of(family, place)
            found = placed.differences(one, other)
            wrong = found.loss > CURVES_MOST
            seconds = f"{time.monotonic() - began:.0f}"
            table.line([family, place, *cells(found), moved(other), seconds, "FAR" if wrong else "same"], wrong)
    return table.failed


def moved(curve: Curve) -> str:
    found = curve.outcome.parameter_changes
    assert found is not None
    return f"{found.num_values_changed:,} of {found.num_values_with_gradient:,}"


def fall(curve: Curve) -> str:
    """From the first loss to the last one: equal curves mean something where they fall."""
    return f"{curve.losses[0][1]:.2f} to {curve.losses[-1][1]:.2f}"


def resume(options: argparse.Namespace) -> int:
    table = Table("family", "placement", "stopped after", "loss", "gradient norm", "eval metrics", "weights", "")
    references, stopped = References(options.folder, dropout=False), Stopped(options.folder)
    for family in options.families:
        for path in chosen(options, PATHS):
            if said := lacks(path):
                table.line([family, path, "", "", "", "", "", said])
                continue
            first, second = path.split(" -> ")
            folder, step = stopped.at(family, first)
            from_step = placed.continued_from(folder, placed.FAMILIES[family], Place(second))
            found = placed.differences(references.of(family, first), placed.read(folder), after=from_step)
            wrong = not found.none if first == second else found.loss > RESUMED_MOST
            said = "bit by bit" if found.none else "DIFFERENT" if wrong else "same"
            table.line([family, path, step, *cells(found), said if step == from_step else f"{said} {from_step}"], wrong)
    return table.failed


def kill(options: argparse.Namespace) -> int:
    table = Table("family", "placement", "killed", "after step", "attempts", "loss", "weights", "")
    references, draw = References(options.folder, dropout=True), random.Random(options.seed)
    for family in options.families:
        for place in chosen(options, KILLED):
            if said := lacks(place):
                table.line([family, place, "", "", "", "", "", said])
                continue
            unbroken = references.of(family, place)
            for number in range(options.times):
                folder = options.folder / family / f"{named(place)}-killed-{number}"
                step = draw.randint(1, 45)
                [struck] = placed.kill_one(folder, placed.FAMILIES[family], Place(place), draw, step, dropout=True)
                curve = placed.read(folder)
                found = placed.differences(unbroken, curve)
                same = found.none and curve.attempts == 2
                said = "bit by bit" if same else "DIFFERENT"
                line = [family, place, f"process {struck.rank}", struck.step, curve.attempts, *cells(found)[::3], said]
                table.line(line, not same)
                shutil.rmtree(folder)
    return table.failed


def chosen(options: argparse.Namespace, values: Sequence[str]) -> Iterator[str]:
    return (value for value in values if not options.only or value in options.only)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["curves", "resume", "kill"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--families", nargs="*", choices=list(placed.FAMILIES), default=None)
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    commands: dict[str, Callable[[argparse.Namespace], int]] = {"curves": curves, "resume": resume, "kill": kill}
    known = {"curves": CURVES, "resume": PATHS, "kill": KILLED}[options.command]
    if wrong := sorted({*options.only} - {*known}):
        parser.error(f"--only: {', '.join(wrong)}: expected some of {', '.join(known)}")
    if options.families is None:
        options.families = list(placed.FAMILIES) if options.command == "curves" else ["encoder"]
    if options.folder.exists():
        parser.error(f"{options.folder} is there: its runs would be continued; name a new folder")
    return 1 if commands[options.command](options) else 0


if __name__ == "__main__":
    sys.exit(main())
