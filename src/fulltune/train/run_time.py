"""How long a run took, over all attempts that led to its weights, as if nothing had stopped it on the way."""

from __future__ import annotations

from pathlib import Path

from fulltune.files import lines_of
from fulltune.records.events import Evaluated, Event, PhaseBegan, StepLogged, event_of
from fulltune.records.training import Outcome
from fulltune.train.request import Request, attempt_folders

PROBING = "fitting a linear probe of the untouched model"
CHECKS, TRAINING = "checking, with one dry-run step at the longest length", "training"
SCORING = "scoring the eval rows before step 1"
"""Phases as they stand in `metrics.jsonl`."""


def run_seconds(folder: Path, trial: str) -> float:
    """Seconds from the first import to the saved model, without the probe and the checks before step 1, which only some
    runs of a comparison have; steps of earlier attempts up to the checkpoint that the last one resumed from count as
    well."""
    *earlier, last = attempt_folders(folder, trial)
    seconds = Outcome.load(last / "outcome.json").train_seconds - _seconds_before(_events(last))
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


def _phase(events: list[Event], name: str) -> float | None:
    """Seconds after the start at which a phase began."""
    return next((event.seconds for event in events if isinstance(event, PhaseBegan) and event.name == name), None)


def _seconds_before(events: list[Event]) -> float:
    """Of the probe and the checks."""
    phases = [event for event in events if isinstance(event, PhaseBegan)]
    ends = [*phases[1:], phases[-1]] if phases else []
    return sum(
        after.seconds - phase.seconds
        for phase, after in zip(phases, ends, strict=True)
        if phase.name in (PROBING, CHECKS)
    )


def _seconds_of_steps(events: list[Event], until: int) -> float:
    """From the start of training, or of the evaluation before it, to the last line of these steps."""
    phases = [_phase(events, name) for name in (SCORING, TRAINING)]
    began = next((found for found in phases if found is not None), None)
    done = [event.seconds for event in events if isinstance(event, StepLogged | Evaluated) and event.step <= until]
    return 0.0 if began is None or not done else max(0.0, done[-1] - began)
