"""What the other machines do: take part in the attempts that machine 0 starts (`machines.py`)."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fulltune.errors import FulltuneError, InterruptedRun, SetupError
from fulltune.recipe.fields import Recipe
from fulltune.system import hardware, machines, signals
from fulltune.system.machines import Ended, HeardFrom, Leader, Member, Part, Place, SignOfLife, Started
from fulltune.system.memory import kernel_kills
from fulltune.text import format_seconds
from fulltune.train.parent import spawn
from fulltune.train.parent.machines import GRACE_SECONDS, POLL_SECONDS, ended_as, meeting
from fulltune.train.request import Request


def follow(place: Place, recipe: Recipe, phase: Callable[[str], None]) -> None:
    """Take part in each attempt that machine 0 starts, until its command ends."""
    phase("looking at this machine and the recipe's files")
    own = machines.member(recipe, place, hardware.here())
    with machines.telling(place.file_of(recipe, place.rank), own) as sign:
        ended = Ended(exit_code=1, problems=("its command ended with an error of its own; see there",))
        try:
            with _Follower(place, sign, phase) as follower:
                follower.follow(HeardFrom(place.file_of(recipe, 0), Leader))
            ended = Ended(exit_code=0)
        except FulltuneError as error:
            ended = Ended(exit_code=error.exit_code, problems=error.problems)
            raise
        finally:
            with contextlib.suppress(OSError):  # a full disk: what is raised already says more
                sign.tell(ended=ended)


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
        if leader.is_unreadable:
            return SetupError(
                f"{leader.path}: another version of fulltune, or another user, is on machine 0; have the same on all"
            )
        return SetupError(
            f"machine 0 was not heard of for {waited}: it writes {leader.path} every {machines.BEAT_SECONDS:g} s. "
            "Either the command was not started there (--machine-rank 0, the same --rendezvous), or that file is not "
            "the same one here: 'output' must lie on storage that all machines share"
        )

    def _answer(self, told: Leader) -> bool:
        """Do what is to be done now; True when machine 0's command has ended well."""
        if told.token != self._sign.record.token:
            self._sign.tell(token=told.token)
            self._phase(f"found machine 0 ({told.host}); waiting for an attempt")
        self._attend(None if told.ended is not None else told.attempt)
        if told.ended is None or self._child is not None:
            return False
        if told.ended.exit_code == 0:
            return True
        raise ended_as(f"machine 0 ({told.host})", told.ended)

    def _attend(self, current: Started | None) -> None:
        """Watch this machine's part of an attempt, and end it when it is over elsewhere; or begin the one at hand."""
        if self._child is not None and (code := self._child.poll()) is not None:
            self._child, self._over_at = None, None
            out_of_memory = code != 0 and kernel_kills() > self._kills
            part = Part(attempt=self._attempt, code=code, out_of_memory=out_of_memory, was_asked=bool(self._asked))
            self._sign.tell(part=part)
            self._phase("waiting for machine 0")
        if self._child is not None:
            is_other = current is None or current.id != self._attempt
            if is_other or (self._folder / "outcome.json").exists():
                self._over_at = self._over_at or time.monotonic()
                if time.monotonic() - self._over_at > GRACE_SECONDS:
                    spawn.end(self._child)
        elif current is not None and current.id != self._attempt and not self._asked:
            self._begin(current)

    def _begin(self, started: Started) -> None:
        if self._sign.record.instance not in started.instances:  # it began without this command
            return
        path = Path(started.request)
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
        self._attempt, self._kills, self._folder = started.id, kernel_kills(), path.parent
        log = path.with_name(f"log-machine{self._place.rank}.txt")
        address = self._sign.record.address
        self._child = spawn.in_new_process(request, log, meeting(self._place, started.id, address))
        if self._asked:  # meanwhile
            self._pass_on()

    def _pass_on(self) -> None:
        """Tell the processes what this command was told; the third signal ends them at once."""
        if self._child is not None:
            (spawn.ask_to_stop if len(self._asked) < 3 else spawn.end)(self._child)
