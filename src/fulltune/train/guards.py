"""Guards: pure functions from what was seen to what to do. Their tests are tables of numbers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fulltune.records import Moved


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

    action: Literal["go on", "stop"]
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


def nothing_learned(moved: Moved) -> Verdict:
    """Stop when no parameter changed at all."""
    if moved.num_tensors_with_gradient == 0:
        return Verdict("stop", "no parameter received a gradient: does the loss depend on the model?")
    if moved.num_values_moved == 0:
        return Verdict(
            "stop", "no parameter moved: the learning rate is too small for the weights' type, or the run too short"
        )
    return GO_ON


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
