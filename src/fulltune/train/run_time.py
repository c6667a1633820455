"""How long a run took, over all attempts that led to its weights, as if nothing had stopped it on the way."""

from __future__ import annotations

import json
from pathlib import Path

from fulltune.records.events import Evaluated, Event, PhaseBegan, StepLogged, event_of
from fulltune.records.training import Outcome
from fulltune.train.request import Request, attempt_folders

CHECKS, TRAINING = "checking, with one dry-run step at the longest length", "training"
"""Phases as they stand in `metrics.jsonl`."""


def run_seconds(folder: Path, trial: str) -> float:
    """Seconds from the first import of its process to the saved model, without the checks before step 1.

    The checks are left out because only the first run of a method in a command has the dry run. Where the last attempt
    went on from a checkpoint, the steps that earlier ones did up to it count as well.

    Args:
        folder: The run folder.
        trial: Finished.
    """
    *earlier, last = attempt_folders(folder, trial)
    seconds = Outcome.load(last / "outcome.json").train_seconds - _checks_seconds(_events(last))
    until = Request.load(last / "request.json").first_step
    for attempt in reversed(earlier):
        if not until:
            break
        seconds += _seconds_of_steps(_events(attempt), until)
        until = Request.load(attempt / "request.json").first_step
    return round(seconds, 3)


def _events(attempt: Path) -> list[Event]:
    path = attempt / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [event for line in lines if (event := event_of(json.loads(line))) is not None]


def _phase(events: list[Event], name: str) -> float | None:
    """Seconds after the start at which a phase began."""
    return next((event.seconds for event in events if isinstance(event, PhaseBegan) and event.name == name), None)


def _checks_seconds(events: list[Event]) -> float:
    began = _phase(events, CHECKS)
    if began is None:
        return 0.0
    after = [event.seconds for event in events if isinstance(event, PhaseBegan) and event.seconds > began]
    return min(after, default=began) - began


def _seconds_of_steps(events: list[Event], until: int) -> float:
    """From the start of training to the last line of these steps."""
    began = _phase(events, TRAINING)
    done = [event.seconds for event in events if isinstance(event, StepLogged | Evaluated) and event.step <= until]
    return 0.0 if began is None or not done else max(0.0, done[-1] - began)
