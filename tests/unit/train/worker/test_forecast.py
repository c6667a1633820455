"""The time of a run from timed passes and the order of the rows."""

from __future__ import annotations

import pytest

from fulltune.train.loop.sampler import GlobalBatchSampler
from fulltune.train.worker.forecast import (
    Readings,
    Schedule,
    Shape,
    Speed,
    Timings,
    extra_seconds,
    forecast,
    quadratic_share,
    speed,
    times_between,
)


@pytest.mark.parametrize(
    ("longest", "typical", "expected"),
    [
        (Readings(100, (11.0,)), Readings(50, (6.0,)), Speed(1.0, 0.1)),
        (Readings(100, (11.0,)), None, Speed(0.0, 0.11)),
        # The longest one was faster, or a line through both would begin below 0: what was measured at the mean counts.
        (Readings(100, (5.0,)), Readings(50, (6.0,)), Speed(0.0, 0.12)),
        (Readings(100, (20.0,)), Readings(50, (5.0,)), Speed(0.0, 0.1)),
        (Readings(50, (5.0,)), Readings(50, (6.0,)), Speed(0.0, 0.12)),
    ],
)
def test_speed_is_a_line_through_both_passes_or_through_the_origin(
    longest: Readings, typical: Readings | None, expected: Speed
) -> None:
    found = speed(longest, typical)

    assert (found.fixed, found.per_work) == pytest.approx((expected.fixed, expected.per_work))


def test_work_grows_with_the_square_of_the_length_by_what_attention_adds() -> None:
    assert Shape(4, 10).work(0.0) == 40
    assert Shape(4, 10).work(0.1) == 80
    # MiniLM-L6: 6 layers of width 384, 10.6 million parameters besides the embeddings.
    assert quadratic_share(6, 384, 10_600_000) == pytest.approx(0.000435, rel=0.01)


@pytest.mark.parametrize(
    ("first", "last", "eval_steps", "save_steps", "evaluations", "saves"),
    [
        (0, 10, 5, 5, 2, 2),
        (0, 10, 4, 4, 3, 3),  # 4, 8 and the last
        (0, 10, 5, 3, 2, 5),  # 3, 5, 6, 9, 10
        (5, 10, 5, 5, 1, 1),  # resumed
        (10, 10, 5, 5, 0, 0),  # nothing is left
        (0, 10, 0, 0, 1, 1),
        (0, 3, 100, 100, 1, 1),
    ],
)
def test_evaluations_and_saves_are_counted_as_the_trainer_does_them(
    first: int, last: int, eval_steps: int, save_steps: int, evaluations: int, saves: int
) -> None:
    assert times_between(first, last, eval_steps) == evaluations
    assert times_between(first, last, eval_steps, save_steps) == saves


def test_forecast_adds_up_passes_steps_evaluations_and_saves() -> None:
    schedule = Schedule(
        steps=2,
        train={Shape(4, 10): 3, Shape(4, 5): 1},
        evaluation={Shape(8, 10): 2},
        evaluations=3,
        saves=4,
        num_processes=2,
        test_share=1.5,
    )
    timings = Timings(
        train=Speed(0.5, 0.01),
        evaluation=Speed(0.1, 0.001),
        step_seconds=0.25,
        new_shape_seconds=0.125,
        save_seconds=1.5,
        start_seconds=10.0,
    )

    found = forecast(schedule, timings, 0.0)

    passes = 4 * 0.5 + 0.01 * (3 * 40 + 20)
    assert found.train_seconds == pytest.approx(passes + 2 * 0.25 + 2 * 0.125 + 10)
    assert found.eval_seconds == pytest.approx(3 * 2 * (0.1 + 0.08))
    assert found.save_seconds == 6.0
    assert [part.seconds for part in found.around] == pytest.approx([1.5 * 2 * (0.1 + 0.08)])
    assert found.tokens == 2 * 140
    assert found.tokens_per_second == pytest.approx(280 / found.train_seconds, abs=0.1)
    assert found.source == "dry-run step"


@pytest.mark.parametrize(("total", "expected"), [(1.0, 0.5), (100.0, 5.0), (1e6, 20.0)])
def test_extra_passes_take_a_twentieth_of_the_run_within_bounds(total: float, expected: float) -> None:
    assert extra_seconds(total) == expected


# ---- the sampler knows every pass ------------------------------------------------------------------------------


@pytest.mark.parametrize("num_processes", [1, 2])
@pytest.mark.parametrize("grouped", [True, False])
def test_passes_are_those_that_training_will_take(num_processes: int, grouped: bool) -> None:
    lengths = [5 + 7 * i % 23 for i in range(43)]
    sampler = GlobalBatchSampler(lengths, 8, 2, 3, grouped, num_processes)
    taken = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        taken += list(sampler)
    sampler.set_epoch(1)

    found = [part for step in sampler.passes(0, 18) for part in step]

    together = range(0, len(taken), num_processes)
    longest = [max(lengths[i] for part in taken[at : at + num_processes] for i in part) for at in together]
    assert [max(lengths[i] for i in part) for part in found] == longest
    assert sampler.epoch == 1
    # Steps 5 to 8 go over the end of the first epoch of 6 steps.
    assert list(sampler.passes(4, 8)) == list(sampler.passes(0, 18))[4:8]
