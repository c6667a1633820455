"""How long a run took, over all attempts that led to its weights, as if nothing had stopped it on the way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fulltune.records.training import Outcome
from fulltune.train import checkpoints
from fulltune.train.request import Request

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
    attempts = sorted((folder / "attempts").glob(f"{trial}-[0-9]*"), key=_number)
    last = attempts[-1]
    seconds = Outcome.load(last / "outcome.json").train_seconds - _checks_seconds(_events(last))
    until = _began_at(last)
    for attempt in reversed(attempts[:-1]):
        if until is None:
            break
        seconds += _seconds_of_steps(_events(attempt), until)
        until = _began_at(attempt)
    return round(seconds, 3)


def _number(attempt: Path) -> int:
    return int(attempt.name.rpartition("-")[2])


def _began_at(attempt: Path) -> int | None:
    """The step of the checkpoint that an attempt went on from; None: from the pretrained weights."""
    checkpoint = Request.load(attempt / "request.json").checkpoint
    return None if checkpoint is None else checkpoints.step_of(Path(checkpoint))


def _events(attempt: Path) -> list[dict[str, Any]]:
    path = attempt / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def _phase(events: list[dict[str, Any]], name: str) -> float | None:
    """Seconds after the start at which a phase began."""
    return next((one["seconds"] for one in events if one["kind"] == "phase" and one["name"] == name), None)


def _checks_seconds(events: list[dict[str, Any]]) -> float:
    began = _phase(events, CHECKS)
    if began is None:
        return 0.0
    after = [one["seconds"] for one in events if one["kind"] == "phase" and one["seconds"] > began]
    return min(after, default=began) - began


def _seconds_of_steps(events: list[dict[str, Any]], until: int) -> float:
    """From the start of training to the last line of these steps."""
    began = _phase(events, TRAINING)
    done = [one["seconds"] for one in events if one["kind"] in ("train", "eval") and one["step"] <= until]
    return 0.0 if began is None or not done else max(0.0, done[-1] - began)
