"""The forecast after a dry run whose first passes were cold: a script of seconds in place of a machine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest

from fulltune.records.plan import TimeNeed
from fulltune.train.worker import timing
from fulltune.train.worker.forecast import Readings
from fulltune.train.worker.passes import Passes
from fulltune.train.worker.timing import timed_forecast
from tests import plans

LENGTHS = np.array([10 + row // 8 for row in range(320)])
"""Forty global batches of eight rows, each of another length."""
TRAIN, FORWARD = 0.7, 0.25
"""Seconds of a warm pass, whatever its rows."""


class Machine:
    """Passes that take their time."""

    def __init__(self, cold_train: dict[int, float], cold_eval: dict[int, float]) -> None:
        self.cold = {"train": cold_train, "eval": cold_eval}
        self.passes = {"train": 0, "eval": 0}

    def take(self, kind: str, seconds: float) -> float:
        number = self.passes[kind]
        self.passes[kind] += 1
        return self.cold[kind].get(number, seconds)


class Scripted(Passes):
    """Passes whose seconds are a machine's."""

    def train(self, positions: Any, *, keep: bool = False) -> tuple[float, float]:
        return 1.0, self.rows.take("train", TRAIN)

    def score(self, positions: Any) -> float:
        return self.rows.take("eval", FORWARD)


def foreseen(machine: Machine, first_seconds: float = 9.0, total_steps: int = 40) -> TimeNeed:
    """The forecast of a run of 40 steps, each of one pass, with two evaluations of one batch."""
    batches = [list(range(8 * step, 8 * step + 8)) for step in range(40)]
    trainer: Any = SimpleNamespace(
        model=SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: SimpleNamespace())),
        sampler=SimpleNamespace(passes=lambda first, last: [[batch] for batch in batches[first:last]]),
    )
    passes = Scripted(
        trainer=trainer,
        rows=machine,
        plan=plans.plan(total_steps=total_steps, eval_steps=total_steps // 2, save_steps=total_steps // 2),
        model=None,
        optimizer=mock.Mock(),
        evaluate=lambda positions: None,
        lengths=LENGTHS,
        eval_lengths=LENGTHS[::20],
    )
    seconds = (first_seconds, TRAIN)
    return timed_forecast(passes, batches[-1], seconds, 0.1, first_step=0, test_share=0.0, folder=None)


@pytest.mark.parametrize(
    ("cold_train", "cold_eval"),
    [
        ({}, {}),
        ({0: 9.0}, {}),  # the typical batch, whose cold excess would be counted for each of the forty lengths
        ({}, {0: 9.0}),  # the first evaluation
        ({0: 9.0}, {0: 9.0}),
    ],
)
def test_forecast_after_cold_passes_is_that_of_warm_ones(
    cold_train: dict[int, float], cold_eval: dict[int, float]
) -> None:
    warm = foreseen(Machine({}, {}), first_seconds=TRAIN)

    found = foreseen(Machine(cold_train, cold_eval))

    assert warm.total_seconds == pytest.approx(40 * (TRAIN + 0.1) + 2 * FORWARD, rel=0.05)
    assert found.total_seconds == pytest.approx(warm.total_seconds, rel=0.02)


def test_what_each_shape_really_costs_the_first_time_is_counted() -> None:
    # Two different shapes both took 0.3 s more the first time: kernels are made for each.
    found = foreseen(Machine({0: 1.0, 2: 1.0}, {}))

    assert found.train_seconds == pytest.approx(40 * (TRAIN + 0.1) + 40 * 0.3, rel=0.02)


def test_a_warm_machine_is_not_asked_again() -> None:
    machine = Machine({}, {})
    foreseen(machine)

    assert machine.passes["train"] == 2
    assert machine.passes["eval"] <= 4


@pytest.mark.parametrize(
    ("seconds", "warm", "more"),
    [((9.0, 0.7, 0.7), 0.7, 8.3), ((9.0, 0.6, 0.8, 0.7), 0.7, 8.3), ((0.7,), 0.7, 0.0), ((0.6, 0.7), 0.7, 0.0)],
)
def test_first_reading_counts_only_where_it_is_the_only_one(
    seconds: tuple[float, ...], warm: float, more: float
) -> None:
    found = Readings(10.0, seconds)

    assert found.warm_seconds == pytest.approx(warm)
    assert found.first_time_seconds == pytest.approx(more)


def test_passes_that_were_counted_on_a_part_of_the_steps_stand_for_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "MOST_COUNTED_ROWS", 40 * plans.plan().global_batch_size)

    found = foreseen(Machine({}, {}), total_steps=400)

    assert found.train_seconds == pytest.approx(400 * (TRAIN + 0.1), rel=0.05)
