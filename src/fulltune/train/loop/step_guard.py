"""The guard of a single step, as pure functions of losses and gradient norms: skip, stop or go on (docs/guards.md); and
guards of a whole run that judge no curve."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any, Literal

from fulltune.records.training import Moved
from fulltune.stats.curves import GO_ON, GuardDecision
from fulltune.text import format_seconds, parse_seconds

BASELINE_WINDOW = 64
"""The last clean steps, which a step is compared with. Twice as many detect half as well while the loss falls fast."""
LEAST = 32
"""Clean steps below which nothing is suspect but what is not finite."""
NORM_SCORE, LOSS_SCORE = 3.0, 6.0
"""Robust standard deviations above the median."""
LEAST_NORM_SPREAD = 0.15
"""Of the norm's logarithm, so that three of them are 1.6 times the median."""
LEAST_LOSS_SPREAD = 0.05
"""Of the loss, as a share of the median loss of the first clean steps: a model that has learned its rows by heart has
losses near 0, and a hard row is no spike."""
STAYS, STAY_SCORE = 20, 5.0
"""Stop if the median of the last `STAYS` losses is this many standard deviations above the baseline and none is below
it."""
LEAST_RISE = 0.1
"""And at least this far above it, as a share of the median loss of the first clean steps."""
MOST_IN_A_ROW = 3
"""Steps that are not finite, one after the other."""
MOST_SKIPPED = 5
"""Skipped steps among the last `STAYS`."""
MAD = 1.4826
"""Makes a median absolute deviation a standard deviation, of normal values."""


@dataclass(frozen=True)
class StepMemory:
    """What the guard remembers of the steps so far; it lies in each checkpoint."""

    losses: tuple[float, ...] = ()
    """Of the last clean steps, oldest first."""
    log_norms: tuple[float, ...] = ()
    """Natural logarithms of their gradient norms; none where there is no norm."""
    first: float | None = None
    """Median loss of the first `LEAST` clean steps, once there are so many. At 0 no later loss is judged: nothing
    says how far from 0 is far."""
    skipped: tuple[int, ...] = ()
    """The last steps that were skipped."""
    most_rows: float = 0.0
    """Of a step so far, per process."""

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> StepMemory:
        """The same as it was saved, among other values."""
        known: dict[str, Any] = {field.name: values[field.name] for field in fields(cls) if field.name in values}
        known |= {name: tuple(one) for name, one in known.items() if isinstance(one, list)}
        return cls(**known)


@dataclass(frozen=True)
class Judged:
    """What becomes of a step, why, and what is remembered."""

    action: Literal["go on", "skip", "stop"]
    seen: StepMemory
    reason: str = ""
    since: int | None = None
    """Of a stop: the step from which on the weights are not trusted."""
    is_finite: bool = True
    """Loss and norm are."""


def judge(
    seen: StepMemory,
    step: int,
    loss: float,
    norm: float | None,
    *,
    rows: float = 0.0,
    scaled: bool = False,
    finite_only: bool = False,
) -> Judged:
    """Judge a step before its update by what was seen before; with a `scaled` fp16 loss the scaler itself skips a norm
    that is not finite, and with `finite_only` any finite step passes: the loss may rise for good reasons."""
    seen = replace(seen, most_rows=max(seen.most_rows, rows))
    if scaled and math.isfinite(loss) and norm is not None and not math.isfinite(norm):
        return Judged("go on", seen)
    if what := _not_finite(loss, norm):
        causes = "rows without a trained token, values out of range or a type with too small a range"
        return replace(_skipped(seen, step, f"the {what}", causes, MOST_IN_A_ROW), is_finite=False)
    recently = tuple(one for one in seen.skipped if step - STAYS < one < step)
    if finite_only:
        return Judged("go on", replace(seen, skipped=recently))
    if reason := _suspect(seen, loss, norm, rows):
        return _skipped(seen, step, reason, "corrupted rows")
    log_norm = (math.log(norm),) if norm is not None and norm > 0 else ()
    losses = (*seen.losses, loss)
    first = statistics.median(losses) if seen.first is None and len(losses) == LEAST else seen.first
    # The steps that are judged below, too, have to be remembered.
    now = replace(
        seen,
        losses=losses[-BASELINE_WINDOW - STAYS :],
        log_norms=(*seen.log_norms, *log_norm)[-BASELINE_WINDOW:],
        first=first,
        skipped=recently,
    )
    if reason := _stayed_high(now):
        return Judged("stop", now, reason, step - STAYS - len(recently) + 1)
    return Judged("go on", now)


def _not_finite(loss: float, norm: float | None) -> str:
    if not math.isfinite(loss):
        return f"loss is {loss}"
    return f"gradient norm is {norm}" if norm is not None and not math.isfinite(norm) else ""


def _skipped(seen: StepMemory, step: int, reason: str, causes: str, in_a_row: int = STAYS) -> Judged:
    """Skip the step; stop where `in_a_row` consecutive ones, or too many of the last, were skipped already."""
    skipped = (*(one for one in seen.skipped if step - STAYS < one < step), step)
    now = replace(seen, skipped=skipped)
    row = sum(one > step - in_a_row for one in skipped)
    if len(skipped) < MOST_SKIPPED and row < in_a_row:
        return Judged("skip", now, reason)
    if row == in_a_row:
        which = f"the {row - 1} steps before it were skipped as well; the weights are still good"
    else:
        which = f"{len(skipped) - 1} of the {STAYS} steps before it were skipped as well"
    said = f"{reason}, and {which}. Usual causes: a learning rate that is too high, {causes}"
    return Judged("stop", now, said, skipped[0])


def _suspect(seen: StepMemory, loss: float, norm: float | None, rows: float) -> str:
    """Why a step is suspect; empty: it is not. The loss and the norm of fewer rows may be farther off."""
    if norm is None or norm <= 0 or not seen.first or len(seen.log_norms) < LEAST:
        return ""
    norms, losses = seen.log_norms, seen.losses[-BASELINE_WINDOW:]
    usual, spread = _usual(norms, LEAST_NORM_SPREAD)
    usual_loss, loss_spread = _usual(losses, LEAST_LOSS_SPREAD * abs(seen.first))
    wider = math.sqrt(seen.most_rows / rows) if rows else 1.0
    longer = math.log(wider)
    norm_off, loss_off = (math.log(norm) - usual - longer) / spread / wider, (loss - usual_loss) / loss_spread / wider
    if norm_off <= NORM_SCORE or loss_off <= LOSS_SCORE:
        return ""
    times = math.exp(math.log(norm) - usual)
    return f"gradient norm {times:.3g} times the median, loss {loss:.3g} where {usual_loss:.3g} is usual"


def _stayed_high(seen: StepMemory) -> str:
    """That the loss rose and stayed above what it was; empty: it did not."""
    before, last = seen.losses[:-STAYS], seen.losses[-STAYS:]
    if not seen.first or len(before) < LEAST:
        return ""
    losses = before[-BASELINE_WINDOW:]
    usual, now = statistics.median(losses), statistics.median(last)
    # From one step to the next: a loss that falls fast is spread widely around its median, without any noise.
    noise = MAD * statistics.median(abs(one - other) for one, other in pairwise(losses)) / math.sqrt(2)
    if min(last) <= usual or now - usual <= max(STAY_SCORE * noise, LEAST_RISE * abs(seen.first)):
        return ""
    return f"the loss rose and stays: {usual:.3g} was usual, and the median of the last {STAYS} steps is {now:.3g}"


def _usual(values: Sequence[float], least: float) -> tuple[float, float]:
    """Median and robust standard deviation, at least `least`."""
    middle = statistics.median(values)
    return middle, max(least, MAD * statistics.median(abs(one - middle) for one in values))


# ---- guards of a whole run that judge no curve --------------------------------------------------------------------


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
