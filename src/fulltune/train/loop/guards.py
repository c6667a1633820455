"""Guards: pure functions from what was seen to what to do. Their tests are tables of numbers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fulltune.records.training import Moved


@dataclass(frozen=True)
class Reading:
    """What a guard sees at one optimizer step, before the weights change."""

    step: int
    loss: float
    grad_norm: float | None
    loss_scaled: bool = False
    """fp16: an infinite gradient norm only means that the loss scale is too high; the scaler skips the step."""


@dataclass(frozen=True)
class Verdict:
    """What to do, and why."""

    action: Literal["go on", "warn", "stop"]
    reason: str = ""


GO_ON = Verdict("go on")


def not_finite(reading: Reading) -> Verdict:
    """Stop before a loss or gradient that is not a number reaches the weights."""
    if not math.isfinite(reading.loss):
        return Verdict(
            "stop",
            f"the loss is {reading.loss} at step {reading.step}, before the update: the weights are still good. "
            "Usual causes: a learning rate that is too high, rows without a trained token, values out of range",
        )
    if reading.grad_norm is not None and not math.isfinite(reading.grad_norm) and not reading.loss_scaled:
        return Verdict(
            "stop",
            f"the gradient norm is {reading.grad_norm} at step {reading.step}, before the update: the weights are "
            "still good. Usual causes: a learning rate that is too high, or a type with too small a range",
        )
    return GO_ON


def gradient_not_finite(step: int, tensor: str, num_updated: int, num_tensors: int) -> Verdict:
    """The same where each tensor is updated in the backward pass: those before this one have moved already."""
    moved = (
        f"{num_updated} of {num_tensors} tensors were updated before it in this step, so these weights are neither "
        "the old ones nor the new ones: the last checkpoint holds the good ones"
        if num_updated
        else "no tensor was updated in this step: the weights are still good"
    )
    return Verdict(
        "stop",
        f"the gradient of {tensor} is not finite at step {step}, found before {tensor} was updated; {moved}. "
        "Usual causes: a learning rate that is too high, or a type with too small a range",
    )


def nothing_learned(moved: Moved, reached: bool, largest_grad_norm: float | None) -> Verdict:
    """Stop when no parameter changed at all.

    Args:
        moved: With AdamW counted only where a gradient was not 0.
        reached: Some parameter had a gradient, be it of zeros.
        largest_grad_norm: Of all steps; None where no norm was computed.
    """
    if moved.num_values_moved > 0:
        return GO_ON
    if not reached:
        return Verdict("stop", "no parameter received a gradient: does the loss depend on the model?")
    if moved.num_tensors_with_gradient == 0 or largest_grad_norm == 0:
        return Verdict(
            "stop",
            "every gradient was 0, so no parameter moved: the loss does not change with the model's outputs (a loss "
            "that is multiplied by 0, or from which all rows or tokens are left out)",
        )
    return Verdict(
        "stop", "no parameter moved: the learning rate is too small for the weights' type, or the run too short"
    )


WINDOW = 10
"""Logged losses that are taken together: single ones jump."""
_FELL = 0.75


def came_apart(losses: Sequence[float], learning_rate: float) -> Verdict:
    """Stop when the loss had fallen well, and is back where it began: it does not come down again by itself.

    Judged over the last `2 * WINDOW` logged losses, so that a spike that passes stops nothing. MiniLM-L6 with LoRA at
    6.3e-3 fell from 4.3 to 1.6, spiked to 7.7, and then gave one class for the rest of the run (docs/log.md).

    Args:
        losses: All that were logged, oldest first.
        learning_rate: At its highest, for the message.
    """
    first, now = statistics.fmean(losses[:WINDOW] or [0.0]), statistics.median(losses[-2 * WINDOW :] or [0.0])
    if len(losses) < 4 * WINDOW or first <= 0 or now < first:
        return GO_ON
    lowest = min(statistics.fmean(losses[place : place + WINDOW]) for place in range(len(losses) - WINDOW + 1))
    if lowest > _FELL * first:
        return GO_ON
    return Verdict(
        "stop",
        f"the loss came apart: it had fallen from {first:.3g} to {lowest:.3g}, and the median of the last "
        f"{2 * WINDOW} logged ones is {now:.3g}. Usual cause: a learning rate that is too high (here "
        f"{learning_rate:g}); take a third of it",
    )


_FAR, _FAR_MORE, _NONE_NEAR = 3.0, 1.0, 1.5
_ABOVE, _ABOVE_UNEVALUATED, _ABOVE_MORE = 1.25, 2.0, 0.1
_LEAST_READINGS = 4


def ran_away(losses: Sequence[float], learning_rate: float, untrained: float | None = None) -> Verdict:
    """Stop when the loss has left the place where it began, upwards and far, and no reading comes near it any more.

    Over the last `2 * WINDOW` readings: their median is above three times the beginning and at least 1 above it, and
    not one is below one and a half times the beginning. So a spike that passes stops nothing, nor does a model that is
    trained already, whose loss of 0.01 rises to 0.05 or, now and then, to more. The beginning is one reading and not a
    mean, because the rate does its damage within the first steps.

    Args:
        losses: Oldest first; the first one is of step 1, before any update, or of the first steps.
        learning_rate: At its highest, for the message.
        untrained: Another loss before any update, that of the dry run; the larger one counts, because one batch may be
            easy by chance.
    """
    if len(losses) <= 2 * WINDOW:
        return GO_ON
    begin, last = _beginning(losses, untrained), losses[-2 * WINDOW :]
    return Verdict("stop", _far(begin, last, learning_rate)) if _is_far(begin, last) else GO_ON


def ended_high(
    losses: Sequence[float], eval_losses: Sequence[float], learning_rate: float, untrained: float | None = None
) -> Verdict:
    """Judge a run that is over by the later half of its readings, at most `2 * WINDOW`; from 4 readings on.

    Stop when they are as far above the beginning as in `ran_away`, no evaluation's loss was below it, and it is no
    chance of a few batches: from `2 * WINDOW` readings on, or where every evaluation is far above it as well. What
    would be saved is worse than nothing. Warn when they are that far above it otherwise; and when their median is above
    the beginning by a quarter and by 0.1, and no evaluation was better. Where nothing was evaluated it takes twice the
    beginning. Where losses of batches differ by factors, a beginning that is low by chance can give a false warning.

    MiniLM-L6 with 3 labels ended at 2e-5 to 3e-3 below its beginning of 1.10; the medians were 1.5 at 0.01, 1.8 at
    0.03, 3.6 at 0.1, 52 at 0.9, with an accuracy of chance (docs/log.md).

    Args:
        losses: As for `ran_away`.
        eval_losses: Of each evaluation; empty where there was none.
        learning_rate: As for `ran_away`.
        untrained: As for `ran_away`.
    """
    if len(losses) < _LEAST_READINGS:
        return GO_ON
    begin, last = _beginning(losses, untrained), losses[-min(2 * WINDOW, len(losses) // 2) :]
    was_better = any(loss < begin for loss in eval_losses)
    if _is_far(begin, last):
        is_sure = len(losses) >= 2 * WINDOW or (bool(eval_losses) and min(eval_losses) > _NONE_NEAR * begin)
        return Verdict("stop" if is_sure and not was_better else "warn", _far(begin, last, learning_rate))
    now = statistics.median(last)
    times = _ABOVE if eval_losses else _ABOVE_UNEVALUATED
    if was_better or begin <= 0 or now <= max(times * begin, begin + _ABOVE_MORE):
        return GO_ON
    return Verdict(
        "warn",
        f"the loss ended higher than it began: {begin:.3g} before the first update, {now:.3g} as the median of the "
        f"last {len(last)} readings. {_cause(learning_rate)}",
    )


def _beginning(losses: Sequence[float], untrained: float | None) -> float:
    return losses[0] if untrained is None else max(losses[0], untrained)


def _is_far(begin: float, last: Sequence[float]) -> bool:
    is_above = statistics.median(last) > max(_FAR * begin, begin + _FAR_MORE)
    return begin > 0 and is_above and min(last) > _NONE_NEAR * begin


def _far(begin: float, last: Sequence[float], learning_rate: float) -> str:
    return (
        f"the loss ran away: it began at {begin:.3g}, and the last {len(last)} readings lie between {min(last):.3g} "
        f"and {max(last):.3g}. {_cause(learning_rate)}"
    )


def _cause(learning_rate: float) -> str:
    return f"Usual cause: a learning rate that is too high (here {learning_rate:g}); take a tenth of it"


def stopped_improving(values: Sequence[float], greater_is_better: bool, patience: int, threshold: float) -> bool:
    """True when the last `patience` evaluations brought nothing better than the best one before them.

    Args:
        values: The eval metric at each evaluation, in order.
        greater_is_better: Direction of the metric.
        patience: Evaluations without improvement that are tolerated.
        threshold: How much better counts as better.
    """
    best, since = None, 0
    for value in values:
        gain = 0.0 if best is None else (value - best if greater_is_better else best - value)
        if best is None or gain > threshold:
            best, since = value, 0
        else:
            since += 1
    return since >= patience
