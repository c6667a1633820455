"""Attempts over several machines: machine 0 starts them, the others take part; what has ended on one ends on all."""

from __future__ import annotations

import contextlib
import signal
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fulltune.errors import FulltuneError, InterruptedRun, SetupError
from fulltune.recipe.fields import Recipe
from fulltune.records.run import MachineUsed
from fulltune.records.training import LostPart, Outcome
from fulltune.system import hardware, machines, signals
from fulltune.system.hardware import Machine
from fulltune.system.machines import HeardFrom, Leader, Member, Part, Place, SignOfLife
from fulltune.system.memory import kernel_kills
from fulltune.system.run_folder import change_environment
from fulltune.text import format_seconds, listed
from fulltune.train.parent import spawn
from fulltune.train.request import Request

POLL_SECONDS = 0.2
GRACE_SECONDS = 30.0
"""When an attempt has ended on another machine: how long the processes here have to end by themselves."""
_LINGER_SECONDS = 10.0
"""A command that ends before all machines have answered: how long it stays to tell them."""


_INTERRUPTED = InterruptedRun("interrupted; the same command on all machines continues the run")


@contextlib.contextmanager
def _told_of_a_stop(sign: SignOfLife[Leader]) -> Iterator[None]:
    """Have the others told of a signal that ends this command at once, outside of an attempt."""
    called: dict[int, Any] = {number: signal.getsignal(number) for number in signals.ENDING}

    def tell(number: int, frame: Any) -> None:
        sign.tell(**_ended_by(_INTERRUPTED))
        called[number](number, frame)

    # From Python it may be the caller's own way.
    before = signals.answer(tell, [number for number, handler in called.items() if callable(handler)])
    try:
        yield
    finally:
        signals.put_back(before)


@contextlib.contextmanager
def leading(place: Place, recipe: Recipe) -> Iterator[MachineGroup]:
    """Machine 0's sign of life for the block; how the block ends is the others' end, too."""
    record = Leader(token=uuid.uuid4().hex, host=socket.gethostname())
    with machines.telling(place.file_of(recipe, 0), record) as sign, _told_of_a_stop(sign):
        group, ended = MachineGroup(place, recipe, sign), _ended_by(None)
        try:
            yield group
        except KeyboardInterrupt:
            ended = _ended_by(_INTERRUPTED)
            raise
        except Exception as error:
            ended = _ended_by(error)
            raise
        finally:
            with contextlib.suppress(OSError):  # a full disk: what is raised already says more
                sign.tell(**ended)
                until = time.monotonic() + _LINGER_SECONDS
                while time.monotonic() < until and not group.all_have_answered:
                    time.sleep(POLL_SECONDS)


def _ended_by(error: BaseException | None) -> dict[str, Any]:
    """What a machine says of how its command ended."""
    if error is None:
        return {"exit_code": 0}
    if isinstance(error, FulltuneError):
        return {"exit_code": error.exit_code, "problems": error.problems}
    return {"exit_code": 1, "problems": (f"ended with {type(error).__name__}: {error}",)}


class MachineGroup:
    """All machines of a job, seen from machine 0."""

    def __init__(self, place: Place, recipe: Recipe, sign: SignOfLife[Leader]) -> None:
        self._place, self._recipe, self._sign = place, recipe, sign
        ranks = range(1, recipe.train.num_machines)
        self._others = {rank: HeardFrom(place.file_of(recipe, rank), Member) for rank in ranks}
        self._folder, self._phase = Path(), lambda name: None

    def begin(self, run_folder: Path, phase: Callable[[str], None]) -> None:
        """Look at this machine, and have all of them there and alike."""
        phase("looking at this machine and the recipe's files")
        self._folder, self._phase = run_folder, phase
        _refuse_taken(self._place)
        self._own = machines.member(self._recipe, self._place, hardware.here(), self._sign.record.token)
        self.gather()

    @property
    def all_have_answered(self) -> bool:
        return all(map(self._has_answered, self._others))

    def _has_answered(self, rank: int) -> bool:
        told = self._others[rank].look()
        return told is not None and told.token == self._sign.record.token

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
        until, said = time.monotonic() + self._place.wait_seconds, None
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

    def keep(self) -> None:
        """Write down which machines take part in an attempt, with their ranks, for the report."""
        each = self._recipe.train.processes_per_machine
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
        change_environment(self._folder, machines=used)

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
        _refuse_taken(self._place)
        instances = {one.rank: one.instance for one in self.members[1:]}
        begun = f"{self._sign.record.token[:8]}-{request.folder.name}"
        path = str((request.folder / "request.json").resolve())
        # Machine 0 may know itself as the loopback: what leads to another machine counts.
        place, address = self._place, self._own.address
        if address != place.host:
            address = machines.own_address(self.members[1].address, place.port)
        child = spawn.in_new_process(request, log, meeting(place, begun, address))
        self._sign.tell(attempt=begun, request=path, instances=tuple(instances.values()))
        self.keep()
        return _OnAllMachines(child, self, begun, instances)

    def say_over(self) -> None:
        """The attempt has ended here, and is to end on all machines."""
        self._sign.tell(attempt="")

    def part_of(self, rank: int, attempt: str, instance: str) -> Part | LostPart | None:
        """How a machine's part of an attempt ended, or that the machine was lost; None: it goes on."""
        told = self._others[rank].look()
        assert told is not None  # it has answered
        if told.instance != instance:
            return LostPart(rank=rank, host=told.host, reason="was started anew")
        part = told.part if told.part is not None and told.part.attempt == attempt else None
        if part is None and told.exit_code is not None:
            kind: Any = "interrupted" if told.exit_code == InterruptedRun.exit_code else "machine"
            return LostPart(rank=rank, host=told.host, kind=kind, reason=f"ended with code {told.exit_code}")
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
        if told is not None and told.exit_code is not None:
            raise ended_as(told.label, told)
        return True

    def _is_missing(self, rank: int) -> bool:
        return not self._has_answered(rank) or self._others[rank].silent_seconds > 4 * machines.BEAT_SECONDS

    def _why_missing(self, missing: Sequence[int]) -> str:
        waited = format_seconds(round(self._place.wait_seconds))
        known = [one.told.label for rank in missing if self._has_answered(rank) and (one := self._others[rank]).told]
        if known:
            return f"{listed(known)} did not come back in {waited}"
        return (
            f"{_named(missing)} ({len(self._others) + 1} in all) not heard of for {waited}. Either the command was not "
            f"started there, with the same --rendezvous and version of fulltune, or {self._sign.path.parent} is not "
            "the same folder there: 'output' must lie on storage that all machines share. What the command says on "
            "those machines tells which"
        )


def _named(ranks: Sequence[int]) -> str:
    return f"machine{'s' * (len(ranks) > 1)} {listed([str(rank) for rank in ranks])}"


def ended_as(label: str, told: Leader | Member) -> FulltuneError:
    """Another machine's end as this one's."""
    problems = [f"{label}: {problem}" for problem in told.problems] or [f"{label}: its command has ended"]
    if told.exit_code == InterruptedRun.exit_code:
        return InterruptedRun(problems)
    error = FulltuneError(problems)
    error.exit_code = told.exit_code or 1
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


class _OnAllMachines:
    """A started attempt: it ends here soon after it has ended elsewhere, and tells what became of the other parts."""

    def __init__(self, child: Any, group: MachineGroup, attempt: str, instances: Mapping[int, str]) -> None:
        self._child, self._group = child, group
        self._attempt, self._instances = attempt, instances
        self._ended: dict[int, Part | LostPart] = {}
        self._over_at: float | None = None
        self._was_ended = self._is_said = False
        self.pid, self.args = child.pid, child.args
        self.lost: tuple[LostPart, ...] = ()

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
        self.lost = tuple(part for part in self._ended.values() if isinstance(part, LostPart))
        return code


def meeting(place: Place, attempt: str, address: str) -> Place:
    """Where this machine's torchrun finds the others', and they find it: machine 0 listens on its address alone."""
    return replace(place, host=place.host if place.rank else address, attempt=attempt, address=address)


# ---- the other machines ------------------------------------------------------------------------------------------


def follow(place: Place, recipe: Recipe, phase: Callable[[str], None]) -> None:
    """Take part in each attempt that machine 0 starts, until its command ends."""
    phase("looking at this machine and the recipe's files")
    own = machines.member(recipe, place, hardware.here())
    with machines.telling(place.file_of(recipe, place.rank), own) as sign:
        ended = _ended_by(None)
        try:
            with _Follower(place, sign, phase) as follower:
                follower.follow(HeardFrom(place.file_of(recipe, 0), Leader))
        except BaseException as error:
            ended = _ended_by(error)
            raise
        finally:
            with contextlib.suppress(OSError):  # a full disk: what is raised already says more
                sign.tell(**ended)


class _Follower:
    """What this machine does of what machine 0 says; its processes end with the block."""

    def __init__(self, place: Place, sign: SignOfLife[Member], phase: Callable[[str], None]) -> None:
        self._place, self._sign, self._phase = place, sign, phase
        self._child: Any = None
        self._attempt, self._kills, self._folder = "", 0, Path()
        self._over_at: float | None = None
        self._asked: list[int] = []

    def __enter__(self) -> _Follower:
        def ask(number: int, _: object) -> None:
            self._asked.append(number)
            self._pass_on()

        self._before = signals.answer(ask)
        return self

    def __exit__(self, *_: object) -> None:
        signals.put_back(self._before)
        if self._child is not None and self._child.poll() is None:
            spawn.end(self._child)
            self._child.wait()

    def follow(self, leader: HeardFrom[Leader]) -> None:
        """Until machine 0's command has ended well."""
        self._phase(f"waiting for machine 0 ({self._place.rendezvous})")
        until, host = time.monotonic() + self._place.wait_seconds, ""
        while True:
            told = leader.look()
            if told is not None and leader.is_alive and leader.silent_seconds < machines.GONE_SECONDS:
                until, host = time.monotonic() + self._place.wait_seconds, told.host
                if self._answer(told):
                    self._phase("machine 0 has finished")
                    return
            else:
                self._attend(None)  # machine 0 may come back, but not to this attempt
                if time.monotonic() > until:
                    raise self._not_heard_of(leader, host)
            if self._asked and self._child is None:
                raise InterruptedRun("interrupted; the same command on all machines continues the run")
            time.sleep(POLL_SECONDS)

    def _not_heard_of(self, leader: HeardFrom[Leader], host: str) -> FulltuneError:
        waited = format_seconds(round(self._place.wait_seconds))
        if host:
            return InterruptedRun(
                f"machine 0 ({host}) gave no sign of life and did not come back in {waited}; the same command on all "
                "machines continues the run"
            )
        return SetupError(
            f"machine 0 was not heard of for {waited}: it writes {leader.path} every {machines.BEAT_SECONDS:g} s. "
            "Either the command was not started there (--machine-rank 0, the same --rendezvous and version of "
            "fulltune), or that file is not the same one here: 'output' must lie on storage that all machines share"
        )

    def _answer(self, told: Leader) -> bool:
        """Do what is to be done now; True when machine 0's command has ended well."""
        if told.token != self._sign.record.token:
            self._sign.tell(token=told.token)
            self._phase(f"found machine 0 ({told.host}); waiting for an attempt")
        self._attend(told if told.exit_code is None and told.attempt else None)
        if told.exit_code is None or self._child is not None:
            return False
        if told.exit_code == 0:
            return True
        raise ended_as(f"machine 0 ({told.host})", told)

    def _attend(self, current: Leader | None) -> None:
        """Watch this machine's part of an attempt, and end it when it is over elsewhere; or begin the one at hand."""
        if self._child is not None and (code := self._child.poll()) is not None:
            self._child, self._over_at = None, None
            out_of_memory = code != 0 and kernel_kills() > self._kills
            part = Part(attempt=self._attempt, code=code, out_of_memory=out_of_memory, was_asked=bool(self._asked))
            self._sign.tell(part=part)
            self._phase("waiting for machine 0")
        if self._child is not None:
            is_other = current is None or current.attempt != self._attempt
            if is_other or (self._folder / "outcome.json").exists():
                self._over_at = self._over_at or time.monotonic()
                if time.monotonic() - self._over_at > GRACE_SECONDS:
                    spawn.end(self._child)
        elif current is not None and current.attempt != self._attempt and not self._asked:
            self._begin(current)

    def _begin(self, told: Leader) -> None:
        if self._sign.record.instance not in told.instances:  # it began without this command
            return
        path = Path(told.request)
        until = time.monotonic() + machines.GONE_SECONDS
        while not path.exists():
            if self._asked:
                return
            if time.monotonic() > until:
                raise SetupError(
                    f"{path}: machine 0 wrote this file, and it is not here: the run folder is not shared; 'output' "
                    "and --run-folder must lie on storage that all machines share"
                )
            time.sleep(POLL_SECONDS)
        request = Request.load(path)
        self._phase(f"taking part in attempt {request.attempt} of {request.plan.trial} (log: {path.parent})")
        self._attempt, self._kills, self._folder = told.attempt, kernel_kills(), path.parent
        log = path.with_name(f"log-machine{self._place.rank}.txt")
        address = self._sign.record.address
        self._child = spawn.in_new_process(request, log, meeting(self._place, told.attempt, address))
        if self._asked:  # meanwhile
            self._pass_on()

    def _pass_on(self) -> None:
        """Tell the processes what this command was told; the third signal ends them at once."""
        if self._child is not None:
            (spawn.ask_to_stop if len(self._asked) < 3 else spawn.end)(self._child)
