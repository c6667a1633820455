"""Attempts over several machines: machine 0 starts them, the others take part.

Machine 0 runs the whole line and says in its file which attempt all machines take part in (`system/machines.py`). On
each of them torchrun starts the machine's processes, and these meet in one rendezvous (c10d). What becomes of a
machine's part stands in its own file, so an attempt ends on all of them when it has ended on one, and a machine that
was lost is told from processes that failed.
"""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fulltune.errors import FulltuneError, InterruptedRun, SetupError
from fulltune.recipe.fields import Recipe
from fulltune.records.run import MachinesUsed, MachineUsed, RankUsed
from fulltune.records.training import LostPart
from fulltune.system import hardware, machines
from fulltune.system.hardware import Machine
from fulltune.system.machines import Ended, HeardFrom, Leader, Member, Part, Place, SignOfLife, Started
from fulltune.text import format_seconds, listed
from fulltune.train.parent import spawn
from fulltune.train.request import Request

POLL_SECONDS = 0.2
GRACE_SECONDS = 30.0
"""When an attempt has ended on another machine: how long the processes here have to end by themselves."""
_LAST_WORDS_SECONDS = 30.0
"""When an attempt has failed here: how long the others have to say how it ended there."""
_SILENT_SECONDS = 20.0
"""A machine that has not done so by then, and gave no sign of life for so long, was lost."""


class MachineGroup:
    """All machines of a job, seen from machine 0.

    Args:
        place: This machine's.
        recipe: The recipe, which all of them must have read.
        run_folder: Which machines took part is kept there.
        machine: This machine's hardware.
        phase: Told what is waited for.
    """

    def __init__(
        self, place: Place, recipe: Recipe, run_folder: Path, machine: Machine, phase: Callable[[str], None]
    ) -> None:
        self.place, self._recipe, self._folder, self._phase = place, recipe, run_folder, phase
        self._token = uuid.uuid4().hex
        self.own = machines.member(recipe, place, machine, self._token)
        self._others = [HeardFrom(place.file_of(recipe, rank), Member) for rank in range(1, recipe.train.num_machines)]
        self._sign = SignOfLife(place.file_of(recipe, 0), Leader(token=self._token, host=self.own.host))

    @property
    def members(self) -> list[Member]:
        """All machines, by rank, once they have answered."""
        return [self.own, *(one.told for one in self._others if one.told is not None)]

    @property
    def weakest(self) -> Machine:
        """What the plan can count on everywhere."""
        return hardware.weakest([one.machine for one in self.members])

    def wait_for_all(self) -> None:
        """Until all machines are there.

        Raises:
            SetupError: When some are missing after the time that was given.
        """
        until, said = time.monotonic() + self.place.wait_seconds, None
        missing = list(range(1, len(self._others) + 1))
        while True:
            # A machine that was seen is not asked for again: a file server shows some changes late.
            missing = [rank for rank in missing if not self._answers(self._others[rank - 1])]
            if not missing:
                return
            if missing != said:
                self._phase(f"waiting for {_named(missing)} ({len(self._others) + 1} in all)")
                said = missing
            if time.monotonic() > until:
                raise SetupError(self._why_missing(missing))
            time.sleep(POLL_SECONDS)

    def check(self) -> None:
        """Refuse machines that would train something else, and keep which ones there are.

        Raises:
            SetupError: With each difference.
        """
        first, *others = self.members
        if problems := machines.differences(first, others):
            raise SetupError(problems)
        self.keep()

    def keep(self, attempt: Path | None = None) -> None:
        """Write down which machines take part, for the report; with the ranks that they had in an attempt."""
        ranks = [] if attempt is None else [RankUsed.load(file) for file in attempt.glob("rank-*.json")]
        used = [
            MachineUsed(
                rank=one.rank,
                host=one.host,
                cpu=one.machine.cpu,
                num_cores=one.machine.num_cores,
                memory_bytes=one.machine.memory_bytes,
                devices=tuple(gpu.name for gpu in one.machine.gpus),
                ranks=tuple(sorted(of.rank for of in ranks if of.machine == one.rank)),
            )
            for one in self.members
        ]
        MachinesUsed(rendezvous=self.place.rendezvous, machines=tuple(used)).save(self._folder / "machines.json")

    def start(self, request: Request, log: Path) -> spawn.Child:
        """A `Starter`: the attempt's processes on this machine, and word to the others that theirs are to begin.

        Raises:
            InterruptedRun: When a machine that was lost has not come back in time.
        """
        try:
            self.wait_for_all()
        except SetupError as error:
            raise InterruptedRun([*error.problems, "the same command on all machines continues the run"]) from None
        started = Started(id=f"{self._token[:8]}-{request.folder.name}", request=str(request.folder / "request.json"))
        instances = {one.rank: one.instance for one in self.members[1:]}
        # Machine 0 may know itself as the loopback: what leads to another machine counts.
        address = machines.own_address(self.members[1].address, self.place.port)
        child = spawn.in_new_process(request, log, meeting(self.place, started.id, address))
        self._sign.tell(attempt=started)
        return _OnAllMachines(child, self, request, started.id, instances)

    def end(self, exit_code: int, problems: Sequence[str] = ()) -> None:
        """The last word to the others, after which nothing more is said."""
        self._sign.tell(ended=Ended(exit_code=exit_code, problems=tuple(problems)))
        self._sign.end()

    def part_of(self, rank: int, attempt: str, instance: str) -> Part | LostPart | None:
        """How a machine's part of an attempt ended, or that the machine was lost; None: it goes on."""
        watched = self._others[rank - 1]
        told = watched.look()
        assert told is not None  # it has answered
        if told.instance != instance:
            return LostPart(rank=rank, host=told.host, reason="was started anew")
        if told.part is None or told.part.attempt != attempt:
            return self.silent_for(rank, machines.GONE_SECONDS)
        if told.part.out_of_memory:
            return LostPart(rank=rank, host=told.host, kind="out_of_memory", reason="the kernel killed a process")
        if told.part.code < 0:
            return LostPart(rank=rank, host=told.host, kind="killed", reason="torchrun was killed")
        return told.part

    def silent_for(self, rank: int, seconds: float) -> LostPart | None:
        """That a machine was lost, when it gave no sign of life for so long."""
        watched = self._others[rank - 1]
        if watched.silent_seconds < seconds or watched.told is None:
            return None
        silent = format_seconds(round(watched.silent_seconds))
        return LostPart(rank=rank, host=watched.told.host, reason=f"gave no sign of life for {silent}")

    def _answers(self, one: HeardFrom[Member]) -> bool:
        told = one.look()
        return told is not None and told.token == self._token and one.silent_seconds < 4 * machines.BEAT_SECONDS

    def _why_missing(self, missing: Sequence[int]) -> str:
        known = {rank: one.told.host for rank, one in enumerate(self._others, start=1) if one.told is not None}
        hosts = "".join(f"; machine {rank} was {known[rank]}" for rank in missing if rank in known)
        return (
            f"{_named(missing)} ({len(self._others) + 1} in all) not heard of for "
            f"{format_seconds(round(self.place.wait_seconds))}{hosts}. Either the command was not started there, or "
            f"{self._sign.path.parent} is not the same folder there: 'output' must lie on storage that all machines "
            "share. What the command says on those machines tells which"
        )


def _named(ranks: Sequence[int]) -> str:
    return f"machine{'s' * (len(ranks) > 1)} {listed([str(rank) for rank in ranks])}"


@contextlib.contextmanager
def gathered(
    place: Place | None, recipe: Recipe, run_folder: Path, phase: Callable[[str], None]
) -> Iterator[MachineGroup | None]:
    """All machines of a job, there and alike, for the block; how it ends is told to them. None: there is only one.

    Raises:
        SetupError: When some are missing, or differ.
    """
    if place is None:
        yield None
        return
    phase("looking at this machine and the recipe's files")
    group = MachineGroup(place, recipe, run_folder, hardware.here(), phase)
    try:
        group.wait_for_all()
        group.check()
        yield group
    except FulltuneError as error:
        group.end(error.exit_code, error.problems)
        raise
    except KeyboardInterrupt:
        group.end(InterruptedRun.exit_code, ("interrupted; the same command on all machines continues the run",))
        raise
    except BaseException as error:
        group.end(1, (f"machine 0 ended with {type(error).__name__}: {error}",))
        raise
    group.end(0)


class _OnAllMachines:
    """A started attempt: it ends here soon after it has ended elsewhere, and tells what became of the other parts."""

    def __init__(
        self, child: Any, group: MachineGroup, request: Request, attempt: str, instances: Mapping[int, str]
    ) -> None:
        self._child, self._group, self._request = child, group, request
        self._attempt, self._instances = attempt, instances
        self._ended: dict[int, Part | LostPart] = {}
        self._failed_at: float | None = None
        self.pid, self.args = child.pid, child.args

    def poll(self) -> int | None:
        code: int | None = self._child.poll()
        if code is not None:
            return code
        self._look()
        if any(isinstance(part, LostPart) for part in self._ended.values()):
            spawn.end(self._child)
        elif any(part.code for part in self._ended.values() if isinstance(part, Part)):
            self._failed_at = self._failed_at or time.monotonic()
            if time.monotonic() - self._failed_at > GRACE_SECONDS:
                spawn.end(self._child)
        return None

    def wait(self) -> int:
        while (code := self.poll()) is None:
            time.sleep(POLL_SECONDS)
        until = time.monotonic() + _LAST_WORDS_SECONDS
        while code and len(self._ended) < len(self._instances) and time.monotonic() < until:
            self._look()
            time.sleep(POLL_SECONDS)
        for rank in self._instances if code else ():
            part = self._ended.get(rank) or self._group.silent_for(rank, _SILENT_SECONDS)
            if isinstance(part, LostPart):  # beside the outcomes, for `child.py`, which says what happened
                part.save(part.file_in(self._request.folder))
        self._group.keep(self._request.folder)
        return code

    def _look(self) -> None:
        for rank in self._instances.keys() - self._ended.keys():
            part = self._group.part_of(rank, self._attempt, self._instances[rank])
            if part is not None:
                self._ended[rank] = part


def meeting(place: Place, attempt: str, address: str) -> spawn.Meeting:
    """Where this machine's torchrun finds the others', and they find it."""
    conf = f"is_host={int(place.rank == 0)},join_timeout={max(60, round(place.wait_seconds))}"
    return spawn.Meeting(place.rank, place.rendezvous, attempt, conf, address)
