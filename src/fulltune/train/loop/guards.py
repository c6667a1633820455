"""Guards of a whole run: pure functions from what was seen to what to do. Those of a step are in `step_guard.py`."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fulltune.records.training import Moved
from fulltune.text import format_seconds, parse_seconds


@dataclass(frozen=True)
class GuardDecision:
    """What to do, and why."""

    action: Literal["go on", "warn", "stop"]
    reason: str = ""
    readings: int = 0
    """Of a loss that diverged: so many of the first readings were still good."""


GO_ON = GuardDecision("go on")


def nothing_learned(moved: Moved, reached: bool, largest_grad_norm: float | None) -> GuardDecision:
    """Stop when no parameter changed: no gradient reached one, each gradient was 0, or the rate was too small."""
    if moved.num_values_moved > 0:
        return GO_ON
    if not reached:
        reason = "no parameter received a gradient: does the loss depend on the model?"
    elif moved.num_tensors_with_gradient == 0 or largest_grad_norm == 0:
        reason = (
            "every gradient was 0, so no parameter moved: the loss does not change with the model's outputs (a loss "
            "that is multiplied by 0, or from which all rows or tokens are dropped)"
        )
    else:
        reason = "no parameter moved: the learning rate is too small for the weights' type, or the run too short"
    return GuardDecision("stop", reason)


WINDOW = 10
"""Logged losses that are taken together: single ones jump."""
_FELL = 0.75
_SURE = 4.0
"""Standard errors of a window's mean."""
_FAR, _FAR_MORE, _NONE_NEAR = 3.0, 1.0, 1.5
_ABOVE, _ABOVE_UNEVALUATED, _ABOVE_MORE = 1.25, 2.0, 0.1
_LEAST_READINGS = 4


def diverged(losses: Sequence[float], learning_rate: float, untrained: float | None = None) -> GuardDecision:
    """Stop a loss that does not come down again by itself, by all logged losses and the dry run's."""
    fell = fell_and_rose(losses, learning_rate, untrained)
    return fell if fell.action == "stop" else ran_away(losses, learning_rate, untrained)


def fell_and_rose(losses: Sequence[float], learning_rate: float, untrained: float | None = None) -> GuardDecision:
    """Stop when the loss had fallen well, more than batches differ by chance, and the median of its last `2 * WINDOW`
    readings is back where it began, and where guessing is."""
    first, now = statistics.fmean(losses[:WINDOW] or [0.0]), statistics.median(losses[-2 * WINDOW :] or [0.0])
    if len(losses) < 4 * WINDOW or first <= 0 or now < max(first, untrained or 0.0):
        return GO_ON
    windows = (losses[place : place + WINDOW] for place in range(len(losses) - WINDOW + 1))
    place, low = min(enumerate(windows), key=lambda window: statistics.fmean(window[1]))
    lowest, error = statistics.fmean(low), math.hypot(*map(statistics.stdev, (losses[:WINDOW], low))) / WINDOW**0.5
    if lowest > _FELL * first or first - lowest < _SURE * error:
        return GO_ON
    return GuardDecision(
        "stop",
        f"the loss diverged: it fell from {first:.3g} to {lowest:.3g}, but the median of the last {2 * WINDOW} values "
        f"is {now:.3g}. {_cause(learning_rate, 'third')}",
        place + WINDOW,
    )


def ran_away(losses: Sequence[float], learning_rate: float, untrained: float | None = None) -> GuardDecision:
    """Stop when of the last `2 * WINDOW` losses the median is above three times the beginning and at least 1 above it,
    and not one is below one and a half times the beginning."""
    begin, last = _beginning(losses, untrained), losses[-2 * WINDOW :]
    if len(losses) <= 2 * WINDOW or not _is_far(begin, last):
        return GO_ON
    return GuardDecision("stop", _far(begin, last, learning_rate), len(losses) - 2 * WINDOW)


def ended_high(
    losses: Sequence[float], eval_losses: Sequence[float], learning_rate: float, untrained: float | None = None
) -> GuardDecision:
    """Judge a finished run by the later half of its losses, at most `2 * WINDOW`: stop when they are surely far above
    the beginning, warn when they are a little."""
    if len(losses) < _LEAST_READINGS:
        return GO_ON
    begin, last = _beginning(losses, untrained), losses[-min(2 * WINDOW, len(losses) // 2) :]
    was_better = any(loss < begin for loss in eval_losses)
    if _is_far(begin, last):
        is_sure = len(losses) >= 2 * WINDOW or (bool(eval_losses) and min(eval_losses) > _NONE_NEAR * begin)
        return GuardDecision("stop" if is_sure and not was_better else "warn", _far(begin, last, learning_rate))
    now = statistics.median(last)
    times = _ABOVE if eval_losses else _ABOVE_UNEVALUATED
    if was_better or begin <= 0 or now <= max(times * begin, begin + _ABOVE_MORE):
        return GO_ON
    return GuardDecision(
        "warn",
        f"the loss ended higher than it began: {begin:.3g} before the first update, {now:.3g} as the median of the "
        f"last {len(last)} values. {_cause(learning_rate)}",
    )


MOST_BEHIND = 2
"""Evaluations in a row."""


def made_worse(
    behind: int, what: str, losses: Sequence[float], learning_rate: float, untrained: float | None = None
) -> GuardDecision:
    """Stop a run when `behind` evaluations in a row were worse than the one before step 1 and the train loss has not
    fallen; over-fitting, whose loss falls, is for early stopping."""
    begin, now = _beginning(losses, untrained), statistics.median(losses[-2 * WINDOW :] or [0.0])
    if behind < MOST_BEHIND or len(losses) < 2 * WINDOW or now < begin:
        return GO_ON
    return GuardDecision(
        "stop",
        f"training makes the model worse: {what} than before step 1, {behind} evaluations in a row, and the train loss "
        f"has not fallen ({begin:.3g} at the beginning, {now:.3g} now). {_cause(learning_rate)}",
    )


def ended_worse(
    what: str, losses: Sequence[float], learning_rate: float, untrained: float | None = None
) -> GuardDecision:
    """Judge a finished run whose kept evaluation is worse than the one before step 1 by more than two standard errors:
    stop where the train loss has not fallen either, else warn."""
    begin, last = _beginning(losses, untrained), losses[-min(2 * WINDOW, max(1, len(losses) // 2)) :]
    now, said = statistics.median(last or [0.0]), f"training made the model worse: {what} than before step 1"
    if len(losses) < _LEAST_READINGS or now < begin:
        return GuardDecision("warn", f"{said}. A lower learning rate (here {learning_rate:g}), or fewer epochs")
    fallen = f"the train loss has not fallen ({begin:.3g} at the beginning, {now:.3g} at the end)"
    return GuardDecision("stop", f"{said}, and {fallen}. {_cause(learning_rate)}")


def _beginning(losses: Sequence[float], untrained: float | None) -> float:
    return max([*losses[:1], *([] if untrained is None else [untrained])], default=0.0)


def _is_far(begin: float, last: Sequence[float]) -> bool:
    is_above = begin > 0 and statistics.median(last) > max(_FAR * begin, begin + _FAR_MORE)
    return is_above and min(last) > _NONE_NEAR * begin


def _far(begin: float, last: Sequence[float], learning_rate: float) -> str:
    return (
        f"the loss diverged: before any update it was at most {begin:.3g}, and the last {len(last)} values are "
        f"between {min(last):.3g} and {max(last):.3g}. {_cause(learning_rate)}"
    )


def without_cause(reason: str) -> str:
    """What was seen, without what usually causes it and what to do."""
    return reason.partition(". Usual cause")[0]


def _cause(learning_rate: float, share: str = "tenth") -> str:
    return f"Usual cause: a learning rate that is too high (here {learning_rate:g}); take a {share} of it"


def too_short(notice: str | None, stop_seconds: float) -> str:
    """That a run which is told to stop cannot save in time; empty: it can, or nobody has said how long it has."""
    if notice is None or stop_seconds <= parse_seconds(notice):
        return ""
    return (
        f"train.notice: {notice} is less than a step, an evaluation and a checkpoint take (about "
        f"{format_seconds(stop_seconds)}): a run that is told to stop may lose the steps since its last checkpoint; a "
        "smaller train.save_steps makes them few"
    )


RATE_SHARE = 0.5
"""Of the rate that is kept each time that a run goes back, but for the first time."""


def rate_factor(rollbacks: Sequence[int]) -> float:
    """What the planned rate is multiplied by after rollbacks to these steps: a half for each but a first one to a
    checkpoint, because most causes pass (docs/guards.md)."""
    passed = bool(rollbacks) and rollbacks[0] > 0
    return float(RATE_SHARE ** (len(rollbacks) - passed))


def stopped_improving(values: Sequence[float], greater_is_better: bool, patience: int, threshold: float) -> bool:
    """True when the last `patience` evaluations brought nothing better than the best one before them."""
    best, since = None, 0
    for value in values:
        gain = 0.0 if best is None else (value - best if greater_is_better else best - value)
        if best is None or gain > threshold:
            best, since = value, 0
        else:
            since += 1
    return since >= patience
