"""Attempts over several machines: machine 0 starts them, the others take part; what has ended on one ends on all."""

from __future__ import annotations

import contextlib
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from fulltune.errors import FulltuneError, InterruptedRun, SetupError
from fulltune.recipe.fields import Recipe
from fulltune.records.run import MachineUsed
from fulltune.records.training import LostMachine, Outcome
from fulltune.system import hardware, machines
from fulltune.system.hardware import Machine
from fulltune.system.machines import (
    GO_ON,
    POLL_SECONDS,
    AttemptEnd,
    Heartbeat,
    MachineAddress,
    Member,
    Peer,
    SharedAttempt,
)
from fulltune.system.memory import kernel_kills
from fulltune.system.run_folder import change_environment
from fulltune.text import format_seconds, listed
from fulltune.train.parent import spawn
from fulltune.train.parent.child import forwarding_signals
from fulltune.train.request import Request

GRACE_SECONDS = 30.0
"""When an attempt has ended on another machine: how long the processes here have to end by themselves."""
_LOOKING = "looking at this machine and the recipe's files"


@contextlib.contextmanager
def leading(place: MachineAddress, recipe: Recipe, phase: Callable[[str], None]) -> Iterator[MachineGroup]:
    """Machine 0's sign of life for the block; how the block ends is the others' end, too."""
    phase(_LOOKING)
    own = machines.member(recipe, place, hardware.here(), uuid.uuid4().hex)
    others = {rank: Peer(place.file_of(recipe, rank)) for rank in range(1, recipe.train.num_machines)}

    def all_know() -> bool:
        return all(heard.answers(own.token) for heard in others.values())

    with machines.heartbeat(place.file_of(recipe, 0), own, all_know) as sign:
        yield MachineGroup(place, sign, others)


class MachineGroup:
    """All machines of a job, seen from machine 0."""

    def __init__(self, place: MachineAddress, sign: Heartbeat, others: Mapping[int, Peer]) -> None:
        self._place, self._sign, self._others = place, sign, others
        self._has_begun = False

    def begin(self, phase: Callable[[str], None]) -> None:
        """Have all machines there and alike."""
        self._phase = phase
        _refuse_taken(self._place)
        self.gather()
        self._has_begun = True

    @property
    def members(self) -> list[Member]:
        """All machines, by rank, once they have answered."""
        return [self._sign.record, *(one.member for one in self._others.values() if one.member is not None)]

    @property
    def weakest(self) -> Machine:
        """What the plan can count on everywhere."""
        return hardware.weakest([one.machine for one in self.members])

    def gather(self) -> None:
        """Wait until all machines are there, and refuse those that would train something else."""
        until, named = time.monotonic() + self._place.wait_seconds, None
        missing = list(self._others)
        # A machine that was seen is not asked for again: a file server shows some changes late.
        while missing := [rank for rank in missing if not self._is_here(self._others[rank])]:
            if missing != named:
                self._phase(f"waiting for {_named(missing)} ({len(self._others) + 1} in all)")
                named = missing
            if time.monotonic() > until:
                raise self._not_here(missing)
            time.sleep(POLL_SECONDS)
        first, *others = self.members
        if problems := machines.differences(first, others):
            raise SetupError(problems)

    def start(self, request: Request, log: Path) -> spawn.Child:
        """A `Starter`: the attempt's processes on this machine, and word to the others that theirs are to begin."""
        try:
            self.gather()
        except InterruptedRun as error:
            reason, trial = error.problems[0], request.plan.trial
            never = Outcome(status="interrupted", reason=reason, trial=trial, attempt=request.attempt)
            never.save(request.folder / "outcome.json")
            raise
        _refuse_taken(self._place)
        own, *others = self.members
        begun = f"{own.token[:8]}-{request.folder.name}"
        # Machine 0 may know itself as the loopback: what leads to another machine counts.
        place, address = self._place, own.address
        if address != place.host:
            address = machines.own_address(others[0].address, place.port)
        child = spawn.in_new_process(request, log, meeting(place, begun, address))
        path = str((request.folder / "request.json").resolve())
        attempt = SharedAttempt(name=begun, request=path, instances=tuple(one.instance for one in others))
        self._sign.write(attempt=attempt)
        each = request.recipe.train.processes_per_machine
        used = tuple(
            MachineUsed(
                rank=one.rank,
                host=one.host,
                cpu=one.machine.cpu,
                num_cores=one.machine.num_cores,
                memory_bytes=one.machine.memory_bytes,
                devices=tuple(gpu.name for gpu in one.machine.gpus),
                ranks=tuple(range(each * one.rank, each * (one.rank + 1))),
            )
            for one in self.members
        )
        change_environment(Path(request.run_folder), machines=used)
        return _OnAllMachines(child, self._sign, begun, {self._others[one.rank]: one.instance for one in others})

    def _is_here(self, heard: Peer) -> bool:
        """It has answered this command."""
        is_silent = heard.silent_seconds > 4 * machines.HEARTBEAT_SECONDS
        if not heard.answers(self._sign.record.token) or is_silent or heard.member is None:
            return False
        if heard.member.exit_code is not None:
            raise ended_as(heard.member)
        return True

    def _not_here(self, missing: Sequence[int]) -> FulltuneError:
        waited = format_seconds(round(self._place.wait_seconds))
        if self._has_begun:
            labels = [one.label for one in self.members if one.rank in missing]
            return InterruptedRun(f"{listed(labels)} did not come back in {waited}; {GO_ON}")
        return SetupError(
            f"{_named(missing)} ({len(self._others) + 1} in all) not heard of for {waited}. Either the command was not "
            f"started there, with the same --rendezvous and version of fulltune, or {self._sign.path.parent} is not "
            "the same folder there: 'output' must lie on storage that all machines share. What the command says on "
            "those machines tells which"
        )


def _named(ranks: Sequence[int]) -> str:
    return f"{'machines' if len(ranks) > 1 else 'machine'} {listed([str(rank) for rank in ranks])}"


def ended_as(told: Member) -> FulltuneError:
    """Another machine's end as this one's."""
    problems = [f"{told.label}: {problem}" for problem in told.problems] or [f"{told.label}: its command has ended"]
    if told.exit_code == InterruptedRun.exit_code:
        return InterruptedRun(problems)
    error = FulltuneError(problems)
    error.exit_code = told.exit_code or 1
    return error


def _refuse_taken(place: MachineAddress) -> None:
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


class _OnAllMachines:
    """A started attempt: it ends here soon after it has ended elsewhere, and tells what became of the other parts."""

    def __init__(self, child: Any, sign: Heartbeat, attempt: str, others: Mapping[Peer, str]) -> None:
        self._child, self._sign, self._attempt = child, sign, attempt
        self._running = dict(others)
        self._over_at = 0.0
        self._was_ended = False
        self.pid, self.args = child.pid, child.args
        self.lost: list[LostMachine] = []

    def poll(self) -> int | None:
        """The exit code, once the attempt is over on all machines: the others end their processes, or are lost."""
        code: int | None = self._child.poll()
        for heard, instance in list(self._running.items()):
            is_over, lost = _part_of(heard, self._attempt, instance)
            if is_over:
                del self._running[heard]
            self.lost += [lost] if lost else []
        if code is None:
            self._over_at = self._over_at or (time.monotonic() if self.lost else 0.0)
            # Nobody waits for a machine that is gone; of others' processes these here learn by themselves.
            is_gone = any(part.kind == "machine" for part in self.lost)
            if is_gone or (self._over_at and time.monotonic() - self._over_at > GRACE_SECONDS):
                spawn.end(self._child)
                self._was_ended = True
            return None
        if code and self._sign.record.attempt is not None:
            self._sign.write(attempt=None)  # it is to end on all machines
        if self._running:
            return None
        return 1 if self._was_ended else code

    def wait(self) -> int:
        while (code := self.poll()) is None:
            time.sleep(POLL_SECONDS)
        return code


def _part_of(heard: Peer, attempt: str, instance: str) -> tuple[bool, LostMachine | None]:
    """Whether a machine's part of an attempt is over, and what was lost with it."""
    told = heard.read()
    assert told is not None  # it has answered
    lost = partial(LostMachine, rank=told.rank, host=told.host)
    if told.instance != instance:
        return True, lost(reason="was started anew")
    if told.last_part is not None and told.last_part.attempt == attempt:
        return True, told.last_part.lost
    if told.exit_code is not None:
        kind: Any = "interrupted" if told.exit_code == InterruptedRun.exit_code else "machine"
        return True, lost(kind=kind, reason=f"ended with code {told.exit_code}")
    if heard.silent_seconds > machines.LOST_SECONDS:
        return True, lost(reason=f"gave no sign of life for {format_seconds(round(heard.silent_seconds))}")
    return False, None


def meeting(place: MachineAddress, attempt: str, address: str) -> MachineAddress:
    """Where this machine's torchrun finds the others', and they find it: machine 0 listens on its address alone."""
    return replace(place, host=place.host if place.rank else address, attempt=attempt, address=address)


# ---- the other machines ------------------------------------------------------------------------------------------


def follow(place: MachineAddress, recipe: Recipe, phase: Callable[[str], None]) -> None:
    """Take part in each attempt that machine 0 starts, until its command ends."""
    phase(_LOOKING)
    own = machines.member(recipe, place, hardware.here())
    with machines.heartbeat(place.file_of(recipe, place.rank), own) as sign:
        leader = Peer(place.file_of(recipe, 0))
        phase(f"waiting for machine 0 ({place.rendezvous})")
        while (told := _next(leader, place, sign, phase)).exit_code is None:
            assert told.attempt is not None  # it was waited for
            _take_part(told.attempt, leader, place, sign, phase)
        if told.exit_code:
            raise ended_as(told)
        phase("machine 0 has finished")


def _next(leader: Peer, place: MachineAddress, sign: Heartbeat, phase: Callable[[str], None]) -> Member:
    """What machine 0 says once there is an attempt that counts on this machine, or its command has ended."""
    until = time.monotonic() + place.wait_seconds
    while True:
        told, own = leader.read(), sign.record
        if told is not None and leader.is_alive and leader.silent_seconds < machines.LOST_SECONDS:
            until = time.monotonic() + place.wait_seconds
            if told.token != own.token:
                sign.write(token=told.token)
                phase(f"found machine 0 ({told.host}); waiting for an attempt")
            if told.exit_code is not None or own.is_awaited(told.attempt):
                return told
        elif time.monotonic() > until:
            raise _not_heard_of(leader, place, sign)
        time.sleep(POLL_SECONDS)


def _not_heard_of(leader: Peer, place: MachineAddress, sign: Heartbeat) -> FulltuneError:
    waited = format_seconds(round(place.wait_seconds))
    if sign.record.token and leader.member is not None:
        return InterruptedRun(f"{leader.member.label} gave no sign of life and did not come back in {waited}; {GO_ON}")
    return SetupError(
        f"machine 0 was not heard of for {waited}: it writes {leader.path} every {machines.HEARTBEAT_SECONDS:g} s. "
        "Either the command was not started there (--machine-rank 0, the same --rendezvous and version of "
        "fulltune), or that file is not the same one here: 'output' must lie on storage that all machines share"
    )


def _take_part(
    attempt: SharedAttempt, leader: Peer, place: MachineAddress, sign: Heartbeat, phase: Callable[[str], None]
) -> None:
    """This machine's part of an attempt, which ends soon after the attempt has ended elsewhere."""
    path, until = Path(attempt.request), time.monotonic() + machines.LOST_SECONDS
    while not path.exists():
        if time.monotonic() > until:
            raise SetupError(
                f"{path}: machine 0 wrote this file, and it is not here: the run folder is not shared; 'output' "
                "and --run-folder must lie on storage that all machines share"
            )
        time.sleep(POLL_SECONDS)
    request = Request.load(path)
    phase(f"taking part in attempt {request.attempt} of {request.plan.trial} (log: {path.parent})")
    kills, over_at = kernel_kills(), 0.0
    log = path.with_name(f"log-machine{place.rank}.txt")
    child = spawn.in_new_process(request, log, meeting(place, attempt.name, sign.record.address))
    with forwarding_signals(child) as asked:
        while (code := child.poll()) is None:
            now = leader.read()
            is_same = now is not None and now.exit_code is None and now.attempt == attempt
            is_gone = leader.silent_seconds > machines.LOST_SECONDS
            if not is_same or is_gone or (path.parent / "outcome.json").exists():
                over_at = over_at or time.monotonic()
            if over_at and time.monotonic() - over_at > GRACE_SECONDS:
                spawn.end(child)
            time.sleep(POLL_SECONDS)
    lost = partial(LostMachine, rank=place.rank, host=sign.record.host)
    part = None
    if asked:
        part = lost(kind="interrupted", reason="was told to stop")
    elif code and kernel_kills() > kills:
        part = lost(kind="out_of_memory", reason="the kernel killed a process")
    elif code:
        part = lost(kind="killed" if code < 0 else "failed", reason=f"torchrun ended with code {code}")
    sign.write(last_part=AttemptEnd(attempt=attempt.name, lost=part))
    if asked:
        raise InterruptedRun(f"interrupted; {GO_ON}")
    phase("waiting for machine 0")
