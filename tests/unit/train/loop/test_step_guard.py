"""The guard of single steps as tables of numbers: skipped, stopped, or not."""

from __future__ import annotations

import json
import math
import random
from dataclasses import asdict
from typing import Any

import pytest

from fulltune.train.loop.step_guard import (
    BASELINE_STEPS,
    MAX_RECENTLY_SKIPPED,
    MIN_CLEAN_STEPS,
    RECENT_STEPS,
    StepHistory,
    StepVerdict,
    judge_step,
)

INF, NAN = math.inf, math.nan


def after(steps: int, loss: float = 1.0, norm: float | None = 2.0) -> StepHistory:
    """What is remembered after so many clean steps, whose losses and norms differ by a tenth or so."""
    draw, history = random.Random(0), StepHistory()
    for step in range(1, steps + 1):
        values = loss * draw.gauss(1, 0.1), None if norm is None else norm * math.exp(draw.gauss(0, 0.2))
        verdict = judge_step(history, step, *values)
        assert verdict.action == "go on"
        history = verdict.history
    return history


def several(
    history: StepHistory, steps: list[tuple[float, float | None]], first: int = 201, **options: Any
) -> list[StepVerdict]:
    """These steps one after the other, until one stops."""
    verdicts: list[StepVerdict] = []
    for number, (loss, norm) in enumerate(steps, start=first):
        verdicts.append(judge_step(verdicts[-1].history if verdicts else history, number, loss, norm, **options))
        if verdicts[-1].action == "stop":
            break
    return verdicts


@pytest.mark.parametrize(
    ("loss", "norm", "scaled", "action"),
    [
        (1.0, 2.0, False, "go on"),
        (0.0, 0.0, False, "go on"),
        (1.0, None, False, "go on"),
        (NAN, None, False, "skip"),
        (INF, None, False, "skip"),
        (-INF, 1.0, True, "skip"),
        (1.0, NAN, False, "skip"),
        (1.0, INF, False, "skip"),
        (1.0, INF, True, "go on"),  # the loss scale is to blame, and the scaler skips it
        (NAN, INF, True, "skip"),
        (9.0, 2.0, False, "go on"),  # hard rows
        (1.0, 200.0, False, "go on"),  # clipped
        (0.0, 200.0, False, "go on"),
        (9.0, 200.0, False, "skip"),
        (9.0, None, False, "go on"),
    ],
)
@pytest.mark.parametrize("own", [False, True])
def test_step_is_skipped_when_it_is_not_finite_or_loss_and_norm_are_both_far_above_the_usual(
    loss: float, norm: float | None, scaled: bool, action: str, own: bool
) -> None:
    history = after(200)
    verdict = judge_step(history, 201, loss, norm, is_loss_scaled=scaled, finite_only=own)
    is_finite = math.isfinite(loss) and (norm is None or math.isfinite(norm))
    assert verdict.action == ("go on" if own and is_finite else action)
    assert bool(verdict.reason) == (verdict.action == "skip")
    if verdict.action == "skip":
        assert (verdict.history.losses, verdict.history.log_norms) == (history.losses, history.log_norms), (
            "it was not clean"
        )
        assert verdict.history.skipped == (201,)


@pytest.mark.parametrize(
    ("loss", "norm", "rows", "action"),
    [
        (2.0, 4.0, 16, "skip"),
        (2.0, 4.0, 2, "go on"),  # two rows of sixteen: both may be so by chance
        (9.0, 4.0, 2, "go on"),
        (9.0, 200.0, 2, "skip"),
    ],
)
def test_step_with_few_rows_may_be_farther_off(loss: float, norm: float, rows: int, action: str) -> None:
    history = judge_step(after(199), 200, 1.0, 2.0, rows=16).history
    # A run that goes on in between judges alike.
    again = StepHistory.from_json(json.loads(json.dumps(asdict(history))))
    assert judge_step(again, 201, loss, norm, rows=rows).action == action


def test_nothing_is_suspect_where_the_loss_was_0_from_the_beginning() -> None:
    clean = several(StepHistory(), [(0.0, 1e-6 * (1 + step % 3)) for step in range(MIN_CLEAN_STEPS)], first=1)
    verdict = several(clean[-1].history, [(1e-4, 1.0)] * (2 * RECENT_STEPS), first=MIN_CLEAN_STEPS + 1)
    assert {one.action for one in clean + verdict} == {"go on"}


def test_nothing_is_suspect_before_there_is_something_to_compare_with() -> None:
    assert judge_step(after(MIN_CLEAN_STEPS - 1), 40, 9.0, 200.0).action == "go on"
    assert judge_step(after(MIN_CLEAN_STEPS), 40, 9.0, 200.0).action == "skip"
    assert judge_step(StepHistory(), 1, NAN, 1.0).action == "skip"


def test_three_steps_in_a_row_that_are_not_finite_stop() -> None:
    verdicts = several(after(200), [(NAN, 1.0)] * 5)
    assert [one.action for one in verdicts] == ["skip", "skip", "stop"]
    assert verdicts[-1].since == 201
    assert verdicts[-1].reason == (
        "the loss is nan, and the previous 2 steps were skipped too; the weights are still good. Usual causes: a "
        "learning rate that is too high, rows without a trained token, values out of range, or a dtype with too small "
        "a range"
    )
    verdicts = several(after(200), [(NAN, 1.0), (NAN, 1.0), (1.0, 2.0)] * 6)
    assert [one.action for one in verdicts] == ["skip", "skip", "go on"] * 2 + ["stop"], "the fifth of twenty"


def test_too_many_suspect_steps_stop() -> None:
    verdicts = several(after(200), [(9.0, 200.0), (1.0, 2.0)] * 10)
    assert "4 of the previous 20 steps" in verdicts[-1].reason
    assert sum(one.action == "skip" for one in verdicts) == MAX_RECENTLY_SKIPPED - 1
    assert verdicts[-1].action == "stop"
    assert verdicts[-1].since == 201
    seldom: list[tuple[float, float | None]] = [(9.0, 200.0), *[(1.0, 2.0)] * 6]
    assert {one.action for one in several(after(200), seldom * 10)} == {"skip", "go on"}


@pytest.mark.parametrize(
    ("losses", "stops"),
    [
        ([3.0] * RECENT_STEPS, True),
        ([3.0] * (RECENT_STEPS - 1) + [0.9], False),  # one is as before
        ([1.2] * RECENT_STEPS, False),  # a little
        ([0.2] * RECENT_STEPS, False),
        ([3.0] * (RECENT_STEPS - 1), False),
    ],
)
def test_loss_that_rises_and_stays_stops_from_where_it_rose(losses: list[float], stops: bool) -> None:
    verdicts = several(after(200), [(loss, 2.0) for loss in losses])
    assert (verdicts[-1].action == "stop") == stops
    if stops:
        assert verdicts[-1].since == 201
        assert verdicts[-1].reason.startswith("the loss rose and stays high: ")
        among: list[tuple[float, float | None]] = [(loss, 2.0) for loss in losses]
        among[3:3] = [(9.0, 200.0)] * 2
        assert several(after(200), among)[-1].since == 201, "skipped steps are between them"
    assert several(after(200), [(loss, 2.0) for loss in losses], finite_only=True)[-1].action == "go on"


def test_skipped_steps_of_another_training_are_forgotten() -> None:
    """A Trainer that trains again, or from an earlier checkpoint."""
    history = StepHistory(skipped=(50, 51, 52))
    for step in (1, 41, 50):
        assert judge_step(history, step, 1.0, 2.0).history.skipped == ()
        assert judge_step(history, step, NAN, 2.0).history.skipped == (step,)


@pytest.mark.parametrize(("rise", "stops"), [(0.0, False), (2.0, True)])
def test_loss_that_falls_fast_hides_no_rise(rise: float, stops: bool) -> None:
    """From 4 to 2 in 84 steps, with noise of 0.1: around their median these spread by half."""
    drawn = random.Random(0)
    falling = [(4 - step / 42 + drawn.gauss(0, 0.1), 2.0) for step in range(BASELINE_STEPS + RECENT_STEPS)]
    after_it = [(2.0 + rise + drawn.gauss(0, 0.1), 2.0) for _ in range(RECENT_STEPS)]
    assert (several(StepHistory(), [*falling, *after_it])[-1].action == "stop") == stops


def test_what_a_model_has_learned_by_heart_is_no_reason_to_skip_a_hard_row() -> None:
    """The loss began at 1 and is 0.001 by now; a loss of 0.2 is 200 times the usual one."""
    history = StepHistory(
        (*after(MIN_CLEAN_STEPS).losses, *[0.001] * BASELINE_STEPS)[-BASELINE_STEPS:],
        (-3.0,) * BASELINE_STEPS,
        first=1.0,
    )
    assert judge_step(history, 300, 0.2, 2.0).action == "go on"
    assert judge_step(history, 300, 4.0, 2.0).action == "skip"


def test_what_is_remembered_is_bounded_and_comes_back_as_it_was_saved() -> None:
    history = judge_step(after(1000), 1001, NAN, 1.0).history
    assert (len(history.losses), len(history.log_norms)) == (BASELINE_STEPS + RECENT_STEPS, BASELINE_STEPS)
    assert StepHistory.from_json(json.loads(json.dumps(asdict(history)))) == history
    for own in (False, True):
        later = several(history, [(1.0, 2.0)] * RECENT_STEPS, first=1002, finite_only=own)[-1].history
        assert later.skipped == (), "clean for long enough"
