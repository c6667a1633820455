"""The forecast after a dry run whose first passes were cold: a script of seconds in place of a machine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest

from fulltune.records.plan import TimeNeed
from fulltune.train.worker import dry_run as dry_run_module
from fulltune.train.worker.forecast import Readings, Timed, is_cold, new_shape_seconds
from tests import plans

LENGTHS = np.array([10 + row // 8 for row in range(320)])
"""Forty global batches of eight rows, each of another length."""
TRAIN, FORWARD = 0.7, 0.25
"""Seconds of a warm pass, whatever its rows."""


class Machine:
    """A clock, and passes that take their time on it."""

    def __init__(self, cold_train: dict[int, float], cold_eval: dict[int, float]) -> None:
        self.now = 0.0
        self.cold = {"train": cold_train, "eval": cold_eval}
        self.passes = {"train": 0, "eval": 0}

    def take(self, kind: str, seconds: float) -> float:
        number = self.passes[kind]
        self.passes[kind] += 1
        spent = self.cold[kind].get(number, seconds)
        self.now += spent
        return spent


def foreseen(machine: Machine, first_seconds: float = 9.0) -> TimeNeed:
    """The forecast of a run of 40 steps, each of one pass, with two evaluations of one batch."""
    batches = [list(range(8 * step, 8 * step + 8)) for step in range(40)]
    trainer: Any = SimpleNamespace(
        args=SimpleNamespace(world_size=1, torch_compile=False),
        model=SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: SimpleNamespace())),
        sampler=SimpleNamespace(passes=lambda first, last: [[one] for one in batches[first:last]]),
    )
    run = dry_run_module._Run(
        trainer=trainer,
        rows=None,
        plan=plans.plan(total_steps=40, eval_steps=20, save_steps=20),
        model=None,
        optimizer=mock.Mock(),
        evaluate=lambda positions: machine.take("eval", FORWARD),
        lengths=LENGTHS,
        eval_lengths=LENGTHS[::20],
    )

    def timed_pass(run: Any, positions: Any, keep: bool = False) -> tuple[float, float]:
        return 1.0, machine.take("train", TRAIN)

    def now(run: Any) -> float:
        return machine.now

    with mock.patch.object(dry_run_module, "_now", now), mock.patch.object(dry_run_module, "_timed_pass", timed_pass):
        return dry_run_module._forecast(run, batches[-1], (first_seconds, TRAIN), 0.1, 0, None)


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

    assert found.warm == Timed(10.0, pytest.approx(warm))
    assert found.first_time_seconds == pytest.approx(more)


@pytest.mark.parametrize(("first", "both", "cold"), [(9.0, 0.7, True), (0.25, 0.7, False), (0.6, 0.7, False)])
def test_evaluation_slower_than_training_was_cold(first: float, both: float, cold: bool) -> None:
    assert is_cold(first, both) == cold


@pytest.mark.parametrize(("first_times", "expected"), [([8.3, 0.05], 0.05), ([8.3], 8.3), ([], 0.0)])
def test_what_a_new_shape_costs_is_the_least_that_one_cost(first_times: list[float], expected: float) -> None:
    assert new_shape_seconds(first_times) == expected
