"""Whether a run over two machines is the one of a single process, also when an agent or a machine is lost.

    python bench/machines.py curves FOLDER [--only ddp:2 fsdp2:2]
    python bench/machines.py kill FOLDER [--what agent machine] [--times 5] [--seed 0]

Two commands on this machine take each other for two machines (`tests/invariant/two_machines.py`): a torchrun agent
each, one process each, one c10d rendezvous on loopback. Tiny random encoder in fp32, 50 steps of 8 rows in micro
batches of 2, a checkpoint every 4 steps. *curves*: without dropout, against one process; at most 1e-4 in a step's loss.
*kill*: with dropout; at a random step one of the two agents, or all of machine 1, which is started again, is killed;
the job must end with the unbroken run of two machines, bit by bit.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from bench.placements import Table
from tests.invariant import placed
from tests.invariant.placed import FAMILIES, Curve, Place
from tests.invariant.two_machines import two_machines

CURVES_MOST = 1e-4
ENCODER, DDP = FAMILIES["encoder"], Place("ddp:2")


def trained(folder: Path, place: Place, dropout: bool) -> Curve:
    """An unbroken run over two machines."""
    with two_machines(folder, ENCODER, place, dropout=dropout) as job:
        assert job.wait_for() == [0, 0], f"{job.said(0)}\n{job.said(1)}"
    return placed.read(folder)


def curves(folder: Path, places: list[str]) -> int:
    table = Table("machines", "loss", "gradient norm", "weights", "seconds")
    placed.train(folder / "one", ENCODER, Place("single"), precision="fp32")
    one = placed.read(folder / "one")
    for name in places:
        began = time.monotonic()
        found = placed.differences(one, trained(folder / name.replace(":", "-"), Place(name), dropout=False))
        seconds = f"{time.monotonic() - began:.0f}"
        cells = (name, f"{found.loss:.1e}", f"{found.norm:.1e}", f"{found.weight:.1e}", seconds)
        table.line(cells, wrong=found.loss > CURVES_MOST)
    return table.failed


def kill(folder: Path, kinds: list[str], times: int, seed: int) -> int:
    draw = random.Random(seed)
    unbroken = trained(folder / "unbroken", DDP, dropout=True)
    table = Table("killed", "of machine", "after step", "attempts", "differs from the unbroken run")
    for kind in kinds:
        for number in range(times):
            place = folder / f"{kind}-{number}"
            rank = draw.randrange(2) if kind == "agent" else 1
            with two_machines(place, ENCODER, DDP, dropout=True) as job:
                step = job.at_step(draw.randrange(2, 45), draw)
                if kind == "agent":
                    job.agent(rank).kill()
                else:
                    job.kill_machine(1)
                    job.start(1)
                codes = job.wait_for()
            if codes != [0, 0]:
                table.line((kind, rank, step, "-", f"ended with {codes}"), wrong=True)
                continue
            curve = placed.read(place)
            found = placed.differences(unbroken, curve)
            said = "no" if found.none else f"loss {found.loss:.1e}, weights {found.weight:.1e}"
            table.line((kind, rank, step, curve.attempts, said), wrong=not found.none or curve.attempts < 2)
    return table.failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("curves", "kill"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="+", default=["ddp:2", "fsdp2:2"])
    parser.add_argument("--what", dest="kinds", nargs="+", default=["agent", "machine"], choices=("agent", "machine"))
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    folder = asked.folder.resolve()
    if asked.command == "curves":
        return int(curves(folder, asked.only) > 0)
    return int(kill(folder, asked.kinds, asked.times, asked.seed) > 0)


if __name__ == "__main__":
    sys.exit(main())
