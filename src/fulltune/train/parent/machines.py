from __future__ import annotations

import contextlib
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

from fulltune.errors import FulltuneError, InterruptedRun, SetupError
from fulltune.recipe.fields import Recipe
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
from fulltune.system.memory import count_oom_kills
from fulltune.system.run_folder import change_environment
from fulltune.text import counted, format_bytes, format_seconds, listed
from fulltune.train.parent import spawn
from fulltune.train.parent.child import forwarding_signals
from fulltune.train.request import Request

GRACE_SECONDS = 30.0
"""Seconds that this machine's processes may continue after another machine's have ended."""
_CHECKING = "checking this machine and the recipe's files"


@contextlib.contextmanager
def lead_machines(machine: MachineAddress, recipe: Recipe, report: Callable[[str], None]) -> Iterator[MachineGroup]:
    """Send machine 0's heartbeats and yield the group of all machines. Leaving also ends the other commands."""
    report(_CHECKING)
    own = machines.own_member(recipe, machine, hardware.measure_machine(), uuid.uuid4().hex)
    others = {rank: Peer(machine.file_of(recipe, rank)) for rank in range(1, recipe.train.num_machines)}
    with machines.send_heartbeats(
        machine.file_of(recipe, 0), own, lambda: all(peer.repeats_token(own.token) for peer in others.values())
    ) as heartbeat:
        yield MachineGroup(machine, heartbeat, others)


class MachineGroup:
    """All machines of a run, observed from machine 0."""

    def __init__(self, machine: MachineAddress, heartbeat: Heartbeat, others: Mapping[int, Peer]) -> None:
        self._machine, self._heartbeat, self._others = machine, heartbeat, others
        self._has_begun = False

    def wait_before_first_attempt(self, report: Callable[[str], None]) -> None:
        """Check the rendezvous port, then wait for all machines."""
        self._report = report
        _check_port(self._machine)
        self.wait_for_machines()
        self._has_begun = True

    @property
    def members(self) -> list[Member]:
        return [self._heartbeat.record, *(other.member for other in self._others.values() if other.member is not None)]

    @property
    def weakest(self) -> Machine:
        """The smallest amount of each resource over all machines."""
        return hardware.weakest_machine([member.machine for member in self.members])

    def wait_for_machines(self) -> None:
        """Wait until all machines answer; raise an error if one stays silent, has ended or has a different setup."""
        until, named = time.monotonic() + self._machine.wait_seconds, None
        missing = list(self._others)
        # A machine is waited for only once, as a file server may show changes late.
        while missing := [rank for rank in missing if not self._is_ready(self._others[rank])]:
            if missing != named:
                self._report(f"waiting for {_machine_names(missing)} ({len(self._others) + 1} in all)")
                named = missing
            if time.monotonic() > until:
                raise self._absence_error(missing)
            time.sleep(POLL_SECONDS)
        first, *others = self.members
        if problems := machines.describe_differences(first, others):
            raise SetupError(problems)

    def start(self, request: Request, log: Path) -> spawn.WorkerProcess:
        """Start an attempt's processes on all machines; return a handle to all of them."""
        try:
            self.wait_for_machines()
        except InterruptedRun as error:
            reason, trial = error.problems[0], request.plan.trial
            outcome = Outcome(status="interrupted", reason=reason, trial=trial, attempt=request.attempt)
            outcome.save(request.folder / "outcome.json")
            raise
        _check_port(self._machine)
        own, *others = self.members
        name = f"{own.token[:8]}-{request.folder.name}"
        # Machine 0 may know itself as the loopback; the others need the address that they can reach.
        machine, address = self._machine, own.address
        if address != machine.host:
            address = machines.own_address(others[0].address, machine.port)
        child = spawn.start_in_new_process(request, log, rendezvous_address(machine, name, address))
        path = str((request.folder / "request.json").resolve())
        attempt = SharedAttempt(name=name, request=path, instances=tuple(other.instance for other in others))
        self._heartbeat.write(attempt=attempt)
        used = {member.label: _describe_hardware(member.machine) for member in self.members}
        change_environment(Path(request.run_folder), machines=used)
        return _AttemptOnAllMachines(
            child, self._heartbeat, name, {self._others[other.rank]: other.instance for other in others}
        )

    def _is_ready(self, peer: Peer) -> bool:
        """Return whether a machine answers; if its command has ended, raise its error."""
        is_silent = peer.silent_seconds > 4 * machines.HEARTBEAT_SECONDS
        if not peer.repeats_token(self._heartbeat.record.token) or is_silent or peer.member is None:
            return False
        if peer.member.exit_code is not None:
            raise error_of_member(peer.member)
        return True

    def _absence_error(self, missing: Sequence[int]) -> FulltuneError:
        """Return the error for machines that did not answer in time."""
        waited = format_seconds(round(self._machine.wait_seconds))
        if self._has_begun:
            labels = [member.label for member in self.members if member.rank in missing]
            return InterruptedRun(f"{listed(labels)} did not come back in {waited}; {GO_ON}")
        return SetupError(
            f"{_machine_names(missing)} ({len(self._others) + 1} in all) did not answer in {waited}. Start the command "
            "there, with the same --rendezvous and version of fulltune, and check that "
            f"{self._heartbeat.path.parent} is the same folder there: 'output' must be on storage that all machines "
            "share. The command's output on those machines shows the cause"
        )


def _describe_hardware(machine: Machine) -> str:
    devices = listed([gpu.name for gpu in machine.gpus]) or machine.cpu
    return f"{devices}, {counted(machine.num_cores, 'core')}, {format_bytes(machine.memory_bytes)}"


def _machine_names(ranks: Sequence[int]) -> str:
    return f"{'machines' if len(ranks) > 1 else 'machine'} {listed([str(rank) for rank in ranks])}"


def error_of_member(member: Member) -> FulltuneError:
    """Return the error with which another machine's command ended."""
    problems = [f"{member.label}: {problem}" for problem in member.problems]
    problems = problems or [f"{member.label}: the command there has ended"]
    if member.exit_code == InterruptedRun.exit_code:
        return InterruptedRun(problems)
    error = FulltuneError(problems)
    error.exit_code = member.exit_code or 1
    return error


def _check_port(machine: MachineAddress) -> None:
    """Raise `SetupError` if the rendezvous port is in use."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", machine.port))
        except OSError as error:
            raise SetupError(
                f"--rendezvous: port {machine.port} of this machine cannot be used ({error.strerror}); end the process "
                "that uses it, or choose another port on all machines"
            ) from None


class _AttemptOnAllMachines:
    """A running attempt on all machines. If another machine is lost, the attempt's processes here are killed."""

    def __init__(
        self, child: spawn.WorkerProcess, heartbeat: Heartbeat, attempt: str, others: Mapping[Peer, str]
    ) -> None:
        """Watch `child` on this machine and the attempt on `others`, which maps machines to instance ids."""
        self._child, self._heartbeat, self._attempt = child, heartbeat, attempt
        self._running = dict(others)
        self._over_at = 0.0
        self._was_ended = False
        self.pid, self.args = child.pid, child.args
        self.lost: list[LostMachine] = []

    def poll(self) -> int | None:
        """Return the exit code once the attempt has ended on all machines, else None."""
        code: int | None = self._child.poll()
        for peer, instance in list(self._running.items()):
            is_over, lost = _status_elsewhere(peer, self._attempt, instance)
            if is_over:
                del self._running[peer]
            self.lost += [lost] if lost else []
        if code is None:
            self._over_at = self._over_at or (time.monotonic() if self.lost else 0.0)
            # A lost machine cannot end the connection; if processes ended elsewhere, those here notice by themselves.
            is_gone = any(part.kind == "machine" for part in self.lost)
            if is_gone or (self._over_at and time.monotonic() - self._over_at > GRACE_SECONDS):
                spawn.kill_workers(self._child)
                self._was_ended = True
            return None
        if code and self._heartbeat.record.attempt is not None:
            self._heartbeat.write(attempt=None)  # ends it on all machines
        if self._running:
            return None
        return 1 if self._was_ended else code

    def wait(self) -> int:
        while (code := self.poll()) is None:
            time.sleep(POLL_SECONDS)
        return code


def _status_elsewhere(peer: Peer, attempt: str, instance: str) -> tuple[bool, LostMachine | None]:
    """Return whether an attempt ended on another machine (command `instance`), and how that was lost, or None."""
    member = peer.read()
    assert member is not None  # it has answered
    lost = partial(LostMachine, rank=member.rank, host=member.host)
    if member.instance != instance:
        return True, lost(reason="was restarted")
    if member.last_part is not None and member.last_part.attempt == attempt:
        return True, member.last_part.lost
    if member.exit_code is not None:
        is_stopped = member.exit_code == InterruptedRun.exit_code
        kind: Literal["interrupted", "machine"] = "interrupted" if is_stopped else "machine"
        return True, lost(kind=kind, reason=f"ended with code {member.exit_code}")
    if peer.silent_seconds > machines.LOST_SECONDS:
        return True, lost(reason=f"sent no heartbeat for {format_seconds(round(peer.silent_seconds))}")
    return False, None


def rendezvous_address(machine: MachineAddress, attempt: str, address: str) -> MachineAddress:
    """Return torchrun's rendezvous address. Machine 0 listens only on `address`."""
    return replace(machine, host=machine.host if machine.rank else address, attempt=attempt, address=address)


# ---- the other machines ------------------------------------------------------------------------------------------


def follow_machine_0(machine: MachineAddress, recipe: Recipe, report: Callable[[str], None]) -> None:
    """Take part in all attempts until machine 0's command ends; raise that command's error if it failed."""
    report(_CHECKING)
    own = machines.own_member(recipe, machine, hardware.measure_machine())
    with machines.send_heartbeats(machine.file_of(recipe, machine.rank), own) as heartbeat:
        leader = Peer(machine.file_of(recipe, 0))
        report(f"waiting for machine 0 ({machine.rendezvous})")
        while (member := _await_attempt(leader, machine, heartbeat, report)).exit_code is None:
            assert member.attempt is not None  # `_await_attempt` waits for it
            _run_attempt(member.attempt, leader, machine, heartbeat, report)
        if member.exit_code:
            raise error_of_member(member)
        report("machine 0 has finished")


def _await_attempt(
    leader: Peer, machine: MachineAddress, heartbeat: Heartbeat, report: Callable[[str], None]
) -> Member:
    """Wait until machine 0 has posted an attempt for this machine or has exited; return machine 0's record."""
    until = time.monotonic() + machine.wait_seconds
    while True:
        member, own = leader.read(), heartbeat.record
        if member is not None and leader.is_alive and leader.silent_seconds < machines.LOST_SECONDS:
            until = time.monotonic() + machine.wait_seconds
            if member.token != own.token:
                heartbeat.write(token=member.token)
                report(f"found machine 0 ({member.host}); waiting for an attempt")
            if member.exit_code is not None or own.must_still_end(member.attempt):
                return member
        elif time.monotonic() > until:
            raise _silence_error(leader, machine, heartbeat)
        time.sleep(POLL_SECONDS)


def _silence_error(leader: Peer, machine: MachineAddress, heartbeat: Heartbeat) -> FulltuneError:
    """Return the error to raise when machine 0 did not answer in time."""
    waited = format_seconds(round(machine.wait_seconds))
    if heartbeat.record.token and leader.member is not None:
        return InterruptedRun(f"{leader.member.label} sent no heartbeat and did not come back in {waited}; {GO_ON}")
    return SetupError(
        f"machine 0 did not answer in {waited}. Start the command there (--machine-rank 0, the same --rendezvous and "
        f"version of fulltune), and check that {leader.path}, which it writes every {machines.HEARTBEAT_SECONDS:g} s, "
        "is the same file here: 'output' must be on storage that all machines share"
    )


def _run_attempt(
    attempt: SharedAttempt, leader: Peer, machine: MachineAddress, heartbeat: Heartbeat, report: Callable[[str], None]
) -> None:
    """Run this machine's part of an attempt and report how it ended."""
    path, until = Path(attempt.request), time.monotonic() + machines.LOST_SECONDS
    while not path.exists():
        if time.monotonic() > until:
            raise SetupError(
                f"{path}: machine 0 wrote this file, but it is missing here; 'output' and --run-folder must be on "
                "storage that all machines share"
            )
        time.sleep(POLL_SECONDS)
    request = Request.load(path)
    report(f"taking part in attempt {request.attempt} of {request.plan.trial} (log: {path.parent})")
    kills, over_at = count_oom_kills(), 0.0
    log = path.with_name(f"log-machine{machine.rank}.txt")
    child = spawn.start_in_new_process(
        request, log, rendezvous_address(machine, attempt.name, heartbeat.record.address)
    )
    with forwarding_signals(child) as stop_signals:
        while (code := child.poll()) is None:
            now = leader.read()
            is_same = now is not None and now.exit_code is None and now.attempt == attempt
            is_gone = leader.silent_seconds > machines.LOST_SECONDS
            if not is_same or is_gone or (path.parent / "outcome.json").exists():
                over_at = over_at or time.monotonic()
            if over_at and time.monotonic() - over_at > GRACE_SECONDS:
                spawn.kill_workers(child)
            time.sleep(POLL_SECONDS)
    lost = partial(LostMachine, rank=machine.rank, host=heartbeat.record.host)
    part = None
    if stop_signals:
        part = lost(kind="interrupted", reason="was asked to stop")
    elif code and count_oom_kills() > kills:
        part = lost(kind="out_of_memory", reason="the kernel killed a process")
    elif code:
        part = lost(kind="killed" if code < 0 else "failed", reason=f"torchrun ended with code {code}")
    heartbeat.write(last_part=AttemptEnd(attempt=attempt.name, lost=part))
    if stop_signals:
        raise InterruptedRun(f"interrupted; {GO_ON}")
    report("waiting for machine 0")
