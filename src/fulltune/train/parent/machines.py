"""Attempts over several machines: machine 0 starts them, and an attempt that has ended on one machine ends on all."""

from __future__ import annotations

import contextlib
import signal
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fulltune.errors import FulltuneError, InterruptedRun, SetupError
from fulltune.recipe.fields import Recipe
from fulltune.records.run import MachinesUsed, MachineUsed, RankUsed
from fulltune.records.training import LostPart, Outcome
from fulltune.system import hardware, machines, signals
from fulltune.system.hardware import Machine
from fulltune.system.machines import Ended, HeardFrom, Leader, Member, Part, Place, SignOfLife, Started
from fulltune.text import format_seconds, listed
from fulltune.train.parent import spawn
from fulltune.train.request import Request

POLL_SECONDS = 0.2
GRACE_SECONDS = 30.0
"""When an attempt has ended on another machine: how long the processes here have to end by themselves."""
_LINGER_SECONDS = 10.0
"""A command that ends before all machines have answered: how long it stays to tell them."""


@dataclass(frozen=True)
class Lead:
    """Machine 0's command, which the others follow."""

    place: Place
    token: str
    sign: SignOfLife[Leader]


_INTERRUPTED = Ended(
    exit_code=InterruptedRun.exit_code,
    problems=("interrupted; the same command on all machines continues the run",),
)


@contextlib.contextmanager
def _told_of_a_stop(sign: SignOfLife[Leader]) -> Iterator[None]:
    """Have the others told of a signal that ends this command at once, outside of an attempt."""
    called: dict[int, Any] = {number: signal.getsignal(number) for number in signals.ENDING}

    def tell(number: int, frame: Any) -> None:
        sign.tell(ended=_INTERRUPTED)
        called[number](number, frame)

    # From Python it may be the caller's own way.
    before = signals.answer(tell, [number for number, handler in called.items() if callable(handler)])
    try:
        yield
    finally:
        signals.put_back(before)


@contextlib.contextmanager
def leading(place: Place, recipe: Recipe) -> Iterator[Lead]:
    """Machine 0's sign of life for the block; how the block ends is the others' end, too."""
    token = uuid.uuid4().hex
    others = [HeardFrom(place.file_of(recipe, rank), Member) for rank in range(1, recipe.train.num_machines)]
    with (
        machines.telling(place.file_of(recipe, 0), Leader(token=token, host=socket.gethostname())) as sign,
        _told_of_a_stop(sign),
    ):
        ended = Ended(exit_code=0)
        try:
            yield Lead(place, token, sign)
        except FulltuneError as error:
            ended = Ended(exit_code=error.exit_code, problems=error.problems)
            raise
        except KeyboardInterrupt:
            ended = _INTERRUPTED
            raise
        except Exception as error:
            ended = Ended(exit_code=1, problems=(f"ended with {type(error).__name__}: {error}",))
            raise
        finally:
            with contextlib.suppress(OSError):  # a full disk: what is raised already says more
                sign.tell(ended=ended)
                until = time.monotonic() + _LINGER_SECONDS
                while time.monotonic() < until and not all(
                    (told := one.look()) is not None and told.token == token for one in others
                ):
                    time.sleep(POLL_SECONDS)


class MachineGroup:
    """All machines of a job, seen from machine 0."""

    def __init__(
        self, lead: Lead, recipe: Recipe, run_folder: Path, machine: Machine, phase: Callable[[str], None]
    ) -> None:
        self._lead, self._folder, self._phase = lead, run_folder, phase
        self._own = machines.member(recipe, lead.place, machine, lead.token)
        ranks = range(1, recipe.train.num_machines)
        self._others = {rank: HeardFrom(lead.place.file_of(recipe, rank), Member) for rank in ranks}

    @property
    def members(self) -> list[Member]:
        """All machines, by rank, once they have answered."""
        return [self._own, *(one.told for one in self._others.values() if one.told is not None)]

    @property
    def weakest(self) -> Machine:
        """What the plan can count on everywhere."""
        return hardware.weakest([one.machine for one in self.members])

    def gather(self) -> None:
        """Wait until all machines are there, and refuse those that would train something else."""
        until, said = time.monotonic() + self._lead.place.wait_seconds, None
        missing = list(self._others)
        # A machine that was seen is not asked for again: a file server shows some changes late.
        while missing := [rank for rank in missing if not self._is_here(rank)]:
            if missing != said:
                self._phase(f"waiting for {_named(missing)} ({len(self._others) + 1} in all)")
                said = missing
            if time.monotonic() > until:
                raise SetupError(self._why_missing(missing))
            time.sleep(POLL_SECONDS)
        first, *others = self.members
        if problems := machines.differences(first, others):
            raise SetupError(problems)

    def keep(self, attempt: Path) -> None:
        """Write down which machines take part in an attempt, with their ranks, for the report."""
        ranks = [RankUsed.load(file) for file in attempt.glob("rank-*.json")]
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
        MachinesUsed(rendezvous=self._lead.place.rendezvous, machines=tuple(used)).save(self._folder / "machines.json")

    def start(self, request: Request, log: Path) -> spawn.Child:
        """A `Starter`: the attempt's processes on this machine, and word to the others that theirs are to begin."""
        try:
            self.gather()
        except SetupError as error:
            if not any(self._is_missing(rank) for rank in self._others):
                raise
            reason = f"{'; '.join(error.problems)}; the same command on all machines continues the run"
            trial, attempt = request.plan.trial, request.attempt
            never = Outcome(status="interrupted", reason=reason, trial=trial, attempt=attempt)
            never.save(request.folder / "outcome.json")
            raise InterruptedRun(reason) from None
        _refuse_taken(self._lead.place)
        instances = {one.rank: one.instance for one in self.members[1:]}
        started = Started(
            id=f"{self._lead.token[:8]}-{request.folder.name}",
            request=str((request.folder / "request.json").resolve()),
            instances=tuple(instances.values()),
        )
        # Machine 0 may know itself as the loopback: what leads to another machine counts.
        place, address = self._lead.place, self._own.address
        if address != place.host:
            address = machines.own_address(self.members[1].address, place.port)
        child = spawn.in_new_process(request, log, meeting(place, started.id, address))
        self._lead.sign.tell(attempt=started)
        self.keep(request.folder)
        return _OnAllMachines(child, self, request, started.id, instances)

    def say_over(self) -> None:
        """The attempt has ended here, and is to end on all machines."""
        self._lead.sign.tell(attempt=None)

    def part_of(self, rank: int, attempt: str, instance: str) -> Part | LostPart | None:
        """How a machine's part of an attempt ended, or that the machine was lost; None: it goes on."""
        told = self._others[rank].look()
        assert told is not None  # it has answered
        if told.instance != instance:
            return LostPart(rank=rank, host=told.host, reason="was started anew")
        part = told.part if told.part is not None and told.part.attempt == attempt else None
        if part is None and told.ended is not None:
            kind: Any = "interrupted" if told.ended.exit_code == InterruptedRun.exit_code else "machine"
            return LostPart(rank=rank, host=told.host, kind=kind, reason=f"ended with code {told.ended.exit_code}")
        if part is None:
            silent = self._others[rank].silent_seconds
            said = f"gave no sign of life for {format_seconds(round(silent))}"
            return LostPart(rank=rank, host=told.host, reason=said) if silent > machines.GONE_SECONDS else None
        if part.was_asked:
            return LostPart(rank=rank, host=told.host, kind="interrupted", reason="was told to stop")
        if part.out_of_memory:
            return LostPart(rank=rank, host=told.host, kind="out_of_memory", reason="the kernel killed a process")
        if part.code:
            kind = "killed" if part.code < 0 else "failed"
            return LostPart(rank=rank, host=told.host, kind=kind, reason=f"torchrun ended with code {part.code}")
        return part

    def _is_here(self, rank: int) -> bool:
        """It has answered this command."""
        if self._is_missing(rank):
            return False
        told = self._others[rank].told
        if told is not None and told.ended is not None:
            raise ended_as(told.label, told.ended)
        return True

    def _is_missing(self, rank: int) -> bool:
        told = self._others[rank].look()
        is_answer = told is not None and told.token == self._lead.token
        return not is_answer or self._others[rank].silent_seconds > 4 * machines.BEAT_SECONDS

    def _why_missing(self, missing: Sequence[int]) -> str:
        waited = format_seconds(round(self._lead.place.wait_seconds))
        subject = f"{_named(missing)} ({len(self._others) + 1} in all)"
        known = [
            one.told.label
            for rank in missing
            if (one := self._others[rank]).told and one.told.token == self._lead.token
        ]
        if known:
            return f"{listed(known)} did not come back in {waited}"
        if any(self._others[rank].is_unreadable for rank in missing):
            return f"{subject}: another version of fulltune, or another user, is there; have the same on all machines"
        return (
            f"{subject} not heard of for {waited}. Either the command was not started there, with the same "
            f"--rendezvous, or {self._lead.sign.path.parent} is not the same folder there: 'output' must lie on "
            "storage that all machines share. What the command says on those machines tells which"
        )


def _named(ranks: Sequence[int]) -> str:
    return f"machine{'s' * (len(ranks) > 1)} {listed([str(rank) for rank in ranks])}"


def ended_as(label: str, ended: Ended) -> FulltuneError:
    """Another machine's end as this one's."""
    problems = [f"{label}: {problem}" for problem in ended.problems] or [f"{label}: its command has ended"]
    if ended.exit_code == InterruptedRun.exit_code:
        return InterruptedRun(problems)
    error = FulltuneError(problems)
    error.exit_code = ended.exit_code or 1
    return error


def _refuse_taken(place: Place) -> None:
    """Refuse a port that torchrun could not listen on."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", place.port))
        except OSError as error:
            raise SetupError(
                f"--rendezvous: port {place.port} of this machine cannot be taken ({error.strerror}); end what has it, "
                "or give all machines another one"
            ) from None


def gathered(lead: Lead | None, recipe: Recipe, run_folder: Path, phase: Callable[[str], None]) -> MachineGroup | None:
    """All machines of a job, there and alike. None: there is only one."""
    if lead is None:
        return None
    phase("looking at this machine and the recipe's files")
    _refuse_taken(lead.place)
    group = MachineGroup(lead, recipe, run_folder, hardware.here(), phase)
    group.gather()
    return group


class _OnAllMachines:
    """A started attempt: it ends here soon after it has ended elsewhere, and tells what became of the other parts."""

    def __init__(
        self, child: Any, group: MachineGroup, request: Request, attempt: str, instances: Mapping[int, str]
    ) -> None:
        self._child, self._group, self._request = child, group, request
        self._attempt, self._instances = attempt, instances
        self._ended: dict[int, Part | LostPart] = {}
        self._over_at: float | None = None
        self._was_ended = self._is_said = False
        self.pid, self.args = child.pid, child.args

    def poll(self) -> int | None:
        """The exit code, once the attempt is over on all machines: the others end their processes, or are lost."""
        code: int | None = self._child.poll()
        for rank in self._instances.keys() - self._ended.keys():
            part = self._group.part_of(rank, self._attempt, self._instances[rank])
            if part is not None:
                self._ended[rank] = part
        lost = [part for part in self._ended.values() if isinstance(part, LostPart)]
        if code is None:
            self._over_at = self._over_at or (time.monotonic() if lost else None)
            # Nobody waits for a machine that is gone; of others' processes these here learn by themselves.
            is_gone = any(part.kind == "machine" for part in lost)
            if is_gone or (self._over_at is not None and time.monotonic() - self._over_at > GRACE_SECONDS):
                spawn.end(self._child)
                self._was_ended = True
            return None
        if code and not self._is_said:
            self._group.say_over()
            self._is_said = True
        if len(self._ended) < len(self._instances):
            return None
        return 1 if self._was_ended else code

    def wait(self) -> int:
        while (code := self.poll()) is None:
            time.sleep(POLL_SECONDS)
        for part in self._ended.values():
            if isinstance(part, LostPart):  # beside the outcomes, for `child.py`, which says what happened
                part.save(part.file_in(self._request.folder))
        self._group.keep(self._request.folder)
        return code


def meeting(place: Place, attempt: str, address: str) -> spawn.Meeting:
    """Where this machine's torchrun finds the others', and they find it: machine 0 listens on its address alone."""
    endpoint = place.rendezvous if place.rank else replace(place, host=address).rendezvous
    return spawn.Meeting(place.rank, endpoint, attempt, max(60, round(place.wait_seconds)), address)
