"""What happened in an attempt, for people: things that happen rarely."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import get_args

from fulltune.records.events import JournalEntry
from fulltune.records.plan import Phase

PHASE_FILE = "phase"
"""What the attempt was doing, for the parent of a process that was killed and could not say it."""
HEARTBEAT = "heartbeat"
"""Holds the number of steps that are done; written anew by the first process at each sign of life."""
NEXT = "next attempt"
"""The event with which the parent notes, in the journal of an attempt that failed, what it tries next and why."""


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
