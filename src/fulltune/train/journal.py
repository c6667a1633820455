from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import get_args

from fulltune.files import read_json_lines, replace_atomically
from fulltune.records.events import Evaluated, Event, JournalEntry, PhaseBegan, StepLogged, parse_event
from fulltune.records.plan import Phase
from fulltune.records.training import Outcome
from fulltune.train.request import Request, attempt_folders

PHASE_FILE = "phase"
HEARTBEAT_FILE = "heartbeat"
NEXT_ATTEMPT_EVENT = "next attempt"
PROBING = "fitting a linear probe of the pretrained model"
CHOOSING = "choosing hard negatives with the untouched model"
CHECKS, TRAINING = "checking, with a dry run at the longest length", "training"
SCORING = "scoring the eval rows before step 1"


def read_phase(folder: Path) -> Phase | None:
    """Return an attempt's last recorded phase, or None."""
    path = folder / PHASE_FILE
    text = path.read_text(encoding="ascii") if path.exists() else ""
    return next((phase for phase in get_args(Phase) if phase == text), None)


def read_completed_steps(folder: Path) -> int:
    """Return the number of steps completed at an attempt's last heartbeat, or 0 without one."""
    with contextlib.suppress(FileNotFoundError):  # the worker may be removing it
        text = (folder / HEARTBEAT_FILE).read_text(encoding="ascii")
        return int(text) if text.isdigit() else 0
    return 0


class Journal:
    """Writes events to `journal.jsonl`, one JSON line each, and the heartbeat. If `path` is None, nothing is
    written."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._heartbeat = None if path is None else path.with_name(HEARTBEAT_FILE)
        self.phase: Phase = "loading"
        self._beating = threading.Lock()

    def set_phase(self, phase: Phase) -> None:
        """Set the current phase and write it to the phase file."""
        if phase == self.phase:
            return
        self.phase = phase
        if self.path is not None:
            self.path.with_name(PHASE_FILE).write_text(phase, encoding="ascii")

    @contextlib.contextmanager
    def phase_within(self, phase: Phase) -> Iterator[None]:
        """Set the phase for a block, and restore the previous one unless the block raises."""
        before = self.phase
        self.set_phase(phase)
        yield
        self.set_phase(before)

    def write_heartbeat(self, steps: int) -> None:
        """Write a heartbeat with the number of completed steps. The parent kills a process whose heartbeat stops."""
        if self._heartbeat is not None:
            # A reader must not find it empty. It says nothing after a crash of the machine, so it is not flushed.
            with self._beating, replace_atomically(self._heartbeat) as part:  # threads of streaming write it, too
                part.write_text(str(steps), encoding="ascii")

    def remove_heartbeat(self) -> None:
        """Remove the heartbeat, so that the parent stops watching it."""
        if self._heartbeat is not None:
            self._heartbeat.unlink(missing_ok=True)

    def write(self, event: str, detail: str) -> None:
        """Append an event with the current time."""
        if self.path is None:  # not the first process
            return
        entry = JournalEntry(time=datetime.now(UTC).isoformat(timespec="seconds"), event=event, detail=detail)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry.model_dump(), ensure_ascii=False) + "\n")


def trial_seconds(folder: Path, trial: str) -> float:
    """Return a trial's duration in seconds over all attempts, from importing libraries to saving the model, excluding
    repeated steps, checks and what is done once for all trials."""
    *earlier, last = attempt_folders(folder, trial)
    begins = [event for event in _recorded_events(last) if isinstance(event, PhaseBegan)]
    uncounted = (PROBING, CHOOSING, CHECKS)
    excluded = sum(end.seconds - begin.seconds for begin, end in pairwise(begins) if begin.name in uncounted)
    seconds = Outcome.load(last / "outcome.json").train_seconds - excluded
    until = Request.load(last / "request.json").first_step
    for attempt in reversed(earlier):
        if not until:
            break
        events = _recorded_events(attempt)
        phases = (event for event in events if isinstance(event, PhaseBegan))
        begin = next((phase.seconds for phase in phases if phase.name in (SCORING, TRAINING)), None)
        done = [one.seconds for one in events if isinstance(one, StepLogged | Evaluated) and one.step <= until]
        seconds += max(0.0, done[-1] - begin) if done and begin is not None else 0.0
        until = Request.load(attempt / "request.json").first_step
    return round(seconds, 3)


def _recorded_events(attempt: Path) -> list[Event]:
    # A killed process or a full disk may have truncated a line; the report mentions it.
    return [event for line in read_json_lines(attempt / "metrics.jsonl") if (event := parse_event(line)) is not None]
