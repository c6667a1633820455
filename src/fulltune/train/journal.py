"""What happened in an attempt: things that happen rarely, phases, and how long a run took over all attempts."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import get_args

from fulltune.files import lines_of
from fulltune.records.events import Evaluated, Event, JournalEntry, PhaseBegan, StepLogged, event_of
from fulltune.records.plan import Phase
from fulltune.records.training import Outcome
from fulltune.train.request import Request, attempt_folders

PHASE_FILE = "phase"
"""What the attempt was doing, for the parent of a process that was killed and could not say it."""
HEARTBEAT = "heartbeat"
"""Holds the number of steps that are done; written anew by the first process at each sign of life."""
NEXT = "next attempt"
"""The event with which the parent notes, in the journal of an attempt that failed, what it tries next and why."""
PROBING = "fitting a linear probe of the untouched model"
CHECKS, TRAINING = "checking, with one dry-run step at the longest length", "training"
SCORING = "scoring the eval rows before step 1"
"""Phases as they stand in `metrics.jsonl`."""


def phase_of(folder: Path) -> Phase | None:
    """What an attempt was doing last; None when it had hardly begun."""
    path = folder / PHASE_FILE
    found = path.read_text(encoding="ascii") if path.exists() else ""
    return next((phase for phase in get_args(Phase) if phase == found), None)


def steps_of(folder: Path) -> int:
    """Steps that an attempt had done at its last sign of life."""
    path = folder / HEARTBEAT
    text = path.read_text(encoding="ascii") if path.exists() else ""
    return int(text) if text.isdigit() else 0


class Journal:
    """Things that happen rarely, one JSON line each in `journal.jsonl`, and signs of life beside it; no path: none."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._heartbeat = None if path is None else path.with_name(HEARTBEAT)
        self.phase: Phase = "loading"

    def at(self, phase: Phase) -> None:
        """Note what is being done from now on."""
        if phase == self.phase:
            return
        self.phase = phase
        if self.path is not None:
            self.path.with_name(PHASE_FILE).write_text(phase, encoding="ascii")

    @contextlib.contextmanager
    def during(self, phase: Phase) -> Iterator[None]:
        """The same for a while. An error leaves it as it is: that is where it happened."""
        before = self.phase
        self.at(phase)
        yield
        self.at(before)

    def alive(self, steps: int) -> None:
        """A sign of life, for the parent, which ends a process that gives none."""
        if self._heartbeat is not None:
            self._heartbeat.write_text(str(steps), encoding="ascii")

    def at_rest(self) -> None:
        """From here on nobody waits for signs of life."""
        if self._heartbeat is not None:
            self._heartbeat.unlink(missing_ok=True)

    def write(self, event: str, detail: str) -> None:
        if self.path is None:  # not the first process
            return
        entry = JournalEntry(time=datetime.now(UTC).isoformat(timespec="seconds"), event=event, detail=detail)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry.model_dump(), ensure_ascii=False) + "\n")


def run_seconds(folder: Path, trial: str) -> float:
    """Seconds from the first import to the saved model, without the probe and the checks before step 1, which only some
    runs of a comparison have; steps of earlier attempts up to the checkpoint that the last one resumed from count as
    well."""
    *earlier, last = attempt_folders(folder, trial)
    begins = [event for event in _events(last) if isinstance(event, PhaseBegan)]
    before = sum(after.seconds - one.seconds for one, after in pairwise(begins) if one.name in (PROBING, CHECKS))
    seconds = Outcome.load(last / "outcome.json").train_seconds - before
    until = Request.load(last / "request.json").first_step
    for attempt in reversed(earlier):
        if not until:
            break
        seconds += _seconds_of_steps(_events(attempt), until)
        until = Request.load(attempt / "request.json").first_step
    return round(seconds, 3)


def _events(attempt: Path) -> list[Event]:
    """What can be read of them: a process that was killed, or a full disk, may have cut a line; the report names it."""
    return [event for line in lines_of(attempt / "metrics.jsonl") if (event := event_of(line)) is not None]


def _seconds_of_steps(events: list[Event], until: int) -> float:
    """From the start of training, or of the evaluation before it, to the last line of these steps."""
    begins = [one.seconds for one in events if isinstance(one, PhaseBegan) and one.name in (SCORING, TRAINING)]
    done = [event.seconds for event in events if isinstance(event, StepLogged | Evaluated) and event.step <= until]
    return max(0.0, done[-1] - begins[0]) if begins and done else 0.0
