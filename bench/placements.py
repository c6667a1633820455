"""Whether a training is the same however it is placed: its curve, stopped and resumed elsewhere, with a process killed.

Tiny random models in fp32 on the CPU, 50 steps of 8 rows in micro batches of 2, in real processes
(`tests/invariant/placed.py`). A place is `placement:processes:offload`, such as `zero3:2:all`; those that need
DeepSpeed are skipped where it is missing. Curves are without dropout, against one process. Resumed runs were stopped
by SIGTERM at about step 12 and continue in another place. With dropout one process is killed at a random step, and the
command must finish with the unbroken run's weights. Two machines are two commands that share a rendezvous
(`tests/invariant/two_machines.py`); one of the agents, or a whole machine, is killed.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

from bench.results import Figure
from bench.runs import SMOKE, Records, fresh, script
from tests.invariant import placed
from tests.invariant.placed import FAMILIES, Curve, Place
from tests.invariant.two_machines import two_machines

CURVES = ("ddp:2", "fsdp2:2", "fsdp2:4", "zero2:2", "zero3:2", "zero3:2:all")
RESUMED = (
    *(f"{kind}:{first} -> {kind}:{second}" for kind in ("ddp", "fsdp2") for first, second in ((2, 2), (2, 4))),
    *(f"{kind}:2 -> single" for kind in ("ddp", "fsdp2")),
    *(f"single -> {kind}:2" for kind in ("ddp", "fsdp2")),
    *("ddp:2 -> fsdp2:2", "fsdp2:2 -> ddp:2", "fsdp2:4 -> fsdp2:2", "fsdp2:4 -> ddp:2", "single -> fsdp2:4"),
    "zero3:2 -> zero3:2",
)
KILLED = ("ddp:2", "fsdp2:2", "zero3:2")
STOP_STEP = 12
ENCODER, DDP = FAMILIES["encoder"], Place("ddp:2")


def is_here(places: str) -> bool:
    return all(Place(place).lacks is None for place in places.split(" -> "))


def folder_of(folder: Path, family: str, *words: object) -> Path:
    name = "-".join(map(str, words)).replace(":", "-").replace(" -> ", "-to-")
    return folder / family / name


def unbroken(folder: Path, family: str, place: str, dropout: bool = False) -> Curve:
    """The curve of an unbroken run, which is made once."""
    run = folder_of(folder, family, "unbroken", place, dropout)
    if not (run / "run" / "models").exists():
        placed.train(fresh(run), FAMILIES[family], Place(place), dropout=dropout)
    return placed.read(run)


def curve_difference(folder: Path, family: str, place: str) -> float:
    """Largest difference of a step's loss from that of one process."""
    return placed.differences(unbroken(folder, family, "single"), unbroken(folder, family, place)).loss


def resumed_difference(folder: Path, family: str, places: str) -> float:
    """Largest difference of a step's loss after resuming; infinite where the same place is not bit by bit the same."""
    first, second = places.split(" -> ")
    run = fresh(folder_of(folder, family, "resumed", places))
    placed.stop_at(run, FAMILIES[family], Place(first), STOP_STEP)
    from_step = placed.continued_from(run, FAMILIES[family], Place(second))
    differences = placed.differences(unbroken(folder, family, first), placed.read(run), after=from_step)
    return float("inf") if first == second and not differences.none else differences.loss


def killed_is_same(folder: Path, family: str, place: str, number: int) -> bool:
    """Whether a run with a killed process ends with the unbroken run's curve and weights, bit by bit."""
    draw, run = random.Random(number), fresh(folder_of(folder, family, "killed", place, number))
    placed.kill_one(run, FAMILIES[family], Place(place), draw, draw.randint(1, 45), dropout=True)
    curve = placed.read(run)
    return placed.differences(unbroken(folder, family, place, dropout=True), curve).none and curve.attempts == 2


def over_machines(folder: Path, place: Place, dropout: bool) -> Curve:
    """The curve of an unbroken run over two machines, which is made once."""
    if not (folder / "run" / "models").exists():
        with two_machines(fresh(folder), ENCODER, place, dropout=dropout) as job:
            codes = job.wait_for()
            assert codes == [0, 0], f"{job.said(0)}\n{job.said(1)}"
    return placed.read(folder)


def machines_difference(folder: Path, place: str) -> float:
    other = over_machines(folder_of(folder, "machines", place), Place(place), False)
    return placed.differences(unbroken(folder, "encoder", "single"), other).loss


def lost_is_same(folder: Path, lost: str, number: int) -> bool:
    """Whether a job that loses an agent, or a machine that is started again, ends like the unbroken one, bit by bit."""
    reference = over_machines(folder / "machines" / "unbroken", DDP, True)
    draw, run = random.Random(number), fresh(folder_of(folder, "machines", lost, number))
    with two_machines(run, ENCODER, DDP, dropout=True) as job:
        job.at_step(draw.randrange(2, 45), draw)
        if lost == "agent":
            job.agent(draw.randrange(2)).kill()
        else:
            job.kill_machine(1)
            job.start(1)
        if job.wait_for() != [0, 0]:
            return False
    curve = placed.read(run)
    return placed.differences(reference, curve).none and curve.attempts >= 2


def measure(folder: Path, quick: bool) -> Iterator[Figure]:
    records = Records(folder / "measured.jsonl")
    families = ("encoder",) if quick else tuple(FAMILIES)
    curves = ("ddp:2",) if SMOKE else ("ddp:2", "fsdp2:2") if quick else tuple(filter(is_here, CURVES))
    differences = [
        records.get(f"{family} {place}", curve_difference, folder, family, place)
        for family in families
        for place in curves
    ]
    name = f"largest difference of a step's loss from one process's: {', '.join(curves)}"
    yield Figure(name, max(differences), "nats", at_most=1e-4)
    paths = ("ddp:2 -> single",) if SMOKE else ("fsdp2:2 -> ddp:2",) if quick else tuple(filter(is_here, RESUMED))
    differences = [records.get(places, resumed_difference, folder, "encoder", places) for places in paths]
    name = f"largest difference of a step's loss after resuming in another placement, {len(paths)} pairs of placements"
    yield Figure(name, max(differences), "nats", at_most=1e-5)
    times, killed = (1, ("ddp:2",)) if quick else (10, tuple(filter(is_here, KILLED)))
    same = [
        records.get(f"{place} killed, {number}", killed_is_same, folder, "encoder", place, number)
        for place in killed
        for number in range(times)
    ]
    name = f"runs that end with the unbroken run's weights after one of their processes was killed, of {len(same)}"
    yield Figure(name, sum(same), "runs", at_least=len(same))
    if quick:
        return
    places = ("ddp:2", "fsdp2:2")
    differences = [records.get(f"machines {place}", machines_difference, folder, place) for place in places]
    name = "largest difference of a step's loss of two machines from one process's"
    yield Figure(name, max(differences), "nats", at_most=1e-4)
    same = [
        records.get(f"{lost} lost, {number}", lost_is_same, folder, lost, number)
        for lost in ("agent", "machine")
        for number in range(5)
    ]
    name = f"runs over two machines with the unbroken run's weights after one lost its agent or all, of {len(same)}"
    yield Figure(name, sum(same), "runs", at_least=len(same))


if __name__ == "__main__":
    script(measure, __doc__)
