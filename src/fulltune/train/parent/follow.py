"""What the other machines do: take part in the attempts that machine 0 starts (`machines.py`)."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fulltune.errors import FulltuneError, InterruptedRun, SetupError
from fulltune.recipe.fields import Recipe
from fulltune.system import hardware, machines
from fulltune.system.machines import HeardFrom, Leader, Member, Part, Place, SignOfLife, Started
from fulltune.system.out_of_memory import kernel_kills
from fulltune.text import format_seconds
from fulltune.train.parent import spawn
from fulltune.train.parent.machines import GRACE_SECONDS, POLL_SECONDS, meeting
from fulltune.train.request import Request


def follow(place: Place, recipe: Recipe, phase: Callable[[str], None]) -> None:
    """Take part in each attempt that machine 0 starts, until its command ends.

    Args:
        place: This machine's.
        recipe: As this machine reads it; machine 0 refuses another one than its own.
        phase: Told what is waited for.

    Raises:
        FulltuneError: With machine 0's exit code, when its command failed.
        SetupError: When machine 0 was not heard of in time.
        InterruptedRun: When it is heard of no more, or this machine's command was told to stop before it trained.
    """
    phase("looking at this machine and the recipe's files")
    leader = HeardFrom(place.file_of(recipe, 0), Leader)
    own = machines.member(recipe, place, hardware.here())
    phase(f"waiting for machine 0 ({place.rendezvous})")
    with machines.telling(place.file_of(recipe, place.rank), own) as sign, _Follower(place, sign, phase) as follower:
        until = time.monotonic() + place.wait_seconds
        while True:
            told = leader.look()
            if told is not None and leader.is_alive:
                if follower.answer(told):
                    return
                if leader.silent_seconds > machines.GONE_SECONDS:
                    raise InterruptedRun(
                        f"machine 0 ({told.host}) gave no sign of life for {format_seconds(machines.GONE_SECONDS)}; "
                        "the same command on all machines continues the run"
                    )
            elif time.monotonic() > until:
                raise SetupError(_why_no_leader(place, leader))
            time.sleep(POLL_SECONDS)


def _why_no_leader(place: Place, leader: HeardFrom[Leader]) -> str:
    return (
        f"machine 0 was not heard of for {format_seconds(round(place.wait_seconds))}: it writes {leader.path} every "
        f"{machines.BEAT_SECONDS:g} s. Either the command was not started there (--machine-rank 0, the same "
        "--rendezvous), or that file is not the same one here: 'output' must lie on storage that all machines share"
    )


class _Follower:
    """What this machine does of what machine 0 says; its processes end with the block."""

    def __init__(self, place: Place, sign: SignOfLife[Member], phase: Callable[[str], None]) -> None:
        self._place, self._sign, self._phase = place, sign, phase
        self._child: Any = None
        self._attempt, self._kills, self._folder = "", 0, Path()
        self._since_over: float | None = None
        self._asked: list[int] = []

    def __enter__(self) -> _Follower:
        def ask(number: int, _: object) -> None:
            self._asked.append(number)
            if self._child is not None:
                (spawn.ask_to_stop if len(self._asked) < 3 else spawn.end)(self._child)

        self._before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._child is not None and self._child.poll() is None:
            spawn.end(self._child)
            self._child.wait()

    def answer(self, told: Leader) -> bool:
        """Do what is to be done now; True when machine 0's command has ended well.

        Raises:
            FulltuneError: When it has ended otherwise.
            InterruptedRun: This machine's command was told to stop, and there is nothing to save.
        """
        if told.token != self._sign.record.token:
            self._sign.tell(token=told.token)
            self._phase(f"found machine 0 ({told.host}); waiting for an attempt")
        self._attend(told)
        if self._asked and self._child is None:
            raise InterruptedRun("interrupted; the same command on all machines continues the run")
        if told.ended is None or self._child is not None:
            return False
        if told.ended.exit_code == 0:
            return True
        error = FulltuneError([f"machine 0 ({told.host}): {problem}" for problem in told.ended.problems])
        error.exit_code = told.ended.exit_code
        raise error

    def _attend(self, told: Leader) -> None:
        """Start, watch and end this machine's part of the attempt at hand."""
        if self._child is not None and (code := self._child.poll()) is not None:
            out_of_memory = code != 0 and kernel_kills() > self._kills
            self._child, self._since_over = None, None
            self._sign.tell(part=Part(attempt=self._attempt, code=code, out_of_memory=out_of_memory))
            self._phase("waiting for machine 0")
        current = "" if told.attempt is None else told.attempt.id
        if self._child is not None:
            if told.ended is not None or current != self._attempt or (self._folder / "outcome.json").exists():
                self._since_over = self._since_over or time.monotonic()
                if time.monotonic() - self._since_over > GRACE_SECONDS:
                    spawn.end(self._child)
        elif told.attempt is not None and current != self._attempt and told.ended is None:
            self._begin(told.attempt)

    def _begin(self, started: Started) -> None:
        path = Path(started.request)
        until = time.monotonic() + machines.GONE_SECONDS
        while not path.exists():
            if time.monotonic() > until:
                raise SetupError(f"{path}: machine 0 wrote this file, and it is not here: 'output' is not shared")
            time.sleep(POLL_SECONDS)
        request = Request.load(path)
        self._phase(f"taking part in attempt {request.attempt} of {request.plan.trial} (log: {path.parent})")
        self._attempt, self._kills, self._folder = started.id, kernel_kills(), path.parent
        log = path.with_name(f"log-machine{self._place.rank}.txt")
        self._child = spawn.in_new_process(request, log, meeting(self._place, started.id, self._sign.record.address))
