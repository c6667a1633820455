"""The lines of `metrics.jsonl`, over all attempts of a trial, as one continuous curve."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fulltune.records.events import Evaluated, Event, StepLogged, StepSkipped, UpdatesMeasured
from fulltune.report.format.plots import Point


@dataclass(frozen=True)
class History:
    """What was measured during training, by series name and in order of steps."""

    train: dict[str, tuple[Point, ...]]
    """`loss`, `learning_rate`, `grad_norm`, where they were logged."""
    evaluation: dict[str, tuple[Point, ...]]
    """One series per metric on the eval rows."""
    restarts: tuple[int, ...]
    """First logged step of every attempt after the first."""

    skipped: tuple[int, ...] = ()
    """Steps whose update was left out, and that were not done again."""

    updates: UpdatesMeasured | None = None
    """The last measurement."""

    @property
    def has_points(self) -> bool:
        return bool(self.train or self.evaluation)


def after_start(points: Sequence[Point]) -> tuple[Point, ...]:
    """Without the evaluation before step 1."""
    return tuple(point for point in points if point[0] > 0)


def before_start(points: Sequence[Point]) -> float | None:
    """What was measured before step 1."""
    return next((value for step, value in points if step == 0), None)


_TRAIN_SERIES = ("loss", "learning_rate", "grad_norm")


def merge(attempts: Sequence[tuple[int | None, Sequence[Event]]]) -> History:
    """Join the attempts of one trial into one curve.

    A later attempt starts from a checkpoint (or anew), so whatever an earlier one did from that step on was thrown
    away: those points are not part of the model's history and are dropped.

    Args:
        attempts: Of each attempt, in order, the steps that were done where it began (None: not known, it is told by
            its first line) and its events.

    Returns:
        The history; series without any value are absent.
    """
    train: dict[int, Mapping[str, Any]] = {}
    evaluation: dict[int, Mapping[str, Any]] = {}
    restarts: list[int] = []
    updates = [event for _, events in attempts for event in events if isinstance(event, UpdatesMeasured)]
    measured = updates[-1] if updates else None
    skipped: set[int] = set()
    for done, events in attempts:
        rows = [event for event in events if isinstance(event, StepLogged | Evaluated)]
        if not rows:
            continue
        # One that begins with an evaluation does that of the step it goes on from.
        first = rows[0].step + isinstance(rows[0], Evaluated) if done is None else done + 1
        if train or evaluation:
            restarts = [*(step for step in restarts if step < first), first]
        train = {step: line for step, line in train.items() if step < first}
        skipped = {step for step in skipped if step < first} | {
            event.step for event in events if isinstance(event, StepSkipped)
        }
        evaluation = {step: line for step, line in evaluation.items() if step < first}
        for row in rows:
            if isinstance(row, Evaluated):
                evaluation[row.step] = row.metrics
            else:
                train[row.step] = {name: getattr(row, name) for name in _TRAIN_SERIES}
    names = dict.fromkeys(name for metrics in evaluation.values() for name in metrics)
    return History(
        _series(train, _TRAIN_SERIES), _series(evaluation, names), tuple(restarts), tuple(sorted(skipped)), measured
    )


def _series(rows: Mapping[int, Mapping[str, Any]], names: Iterable[str]) -> dict[str, tuple[Point, ...]]:
    found = {
        name: tuple(
            (step, float(row[name])) for step, row in sorted(rows.items()) if isinstance(row.get(name), int | float)
        )
        for name in names
    }
    return {name: points for name, points in found.items() if points}
