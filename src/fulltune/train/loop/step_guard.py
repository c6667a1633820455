"""Judges steps by loss and gradient norm, in pure functions (docs/concepts/guards.md)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any, Literal

from fulltune.records.training import ParameterChanges
from fulltune.stats.curves import GO_ON, GuardDecision
from fulltune.text import format_seconds, parse_seconds

BASELINE_WINDOW = 64
"""Number of clean steps that a step is compared with."""
MIN_CLEAN_STEPS = 32
"""With fewer clean steps, only non-finite values are suspect."""
NORM_SCORE, LOSS_SCORE = 3.0, 6.0
"""Norm and loss are outliers this many robust standard deviations above the median."""
MIN_NORM_SPREAD = 0.15
"""Smallest assumed standard deviation of the norm's logarithm."""
MIN_LOSS_SPREAD = 0.05
"""Smallest assumed standard deviation of the loss, as a share of its start."""
RECENT_STEPS, STAY_SCORE = 20, 5.0
"""A run stops if the median of the last `RECENT_STEPS` losses is `STAY_SCORE` standard deviations above the baseline,
and all are above it."""
MIN_RISE = 0.1
"""Smallest rise of the loss that stops a run, as a share of its start."""
MAX_NON_FINITE = 3
"""Consecutive non-finite steps that stop a run."""
MAX_SKIPPED = 5
"""Skipped steps among the last `RECENT_STEPS` that stop a run."""
MAD = 1.4826
"""Factor from the median absolute deviation to the standard deviation."""


@dataclass(frozen=True)
class StepHistory:
    """Losses and gradient norms of earlier steps, with which the guard compares a new step."""

    losses: tuple[float, ...] = ()
    """Losses of the last clean steps, oldest first."""
    log_norms: tuple[float, ...] = ()
    """Logarithms of the last clean steps' gradient norms."""
    first: float | None = None
    """Median loss of the first `MIN_CLEAN_STEPS` clean steps; if it is 0, later losses are not judged."""
    skipped: tuple[int, ...] = ()
    most_rows: float = 0.0
    """Largest number of rows seen in one step so far, per process."""

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> StepHistory:
        saved: dict[str, Any] = {field.name: values[field.name] for field in fields(cls) if field.name in values}
        saved |= {name: tuple(value) for name, value in saved.items() if isinstance(value, list)}
        return cls(**saved)


@dataclass(frozen=True)
class StepVerdict:
    """The guard's decision about a step, and the history including it."""

    action: Literal["go on", "skip", "stop"]
    history: StepHistory
    reason: str = ""
    since: int | None = None
    """For a stop, the first step after which the weights are not trusted."""
    is_finite: bool = True


def judge(
    history: StepHistory,
    step: int,
    loss: float,
    norm: float | None,
    *,
    rows: float = 0.0,
    scaled: bool = False,
    finite_only: bool = False,
) -> StepVerdict:
    """Judge a step before its update by comparing its loss and norm with those of earlier steps.

    With a `scaled` fp16 loss a non-finite norm passes, because the gradient scaler skips that step. With `finite_only`
    every finite step passes.
    """
    history = replace(history, most_rows=max(history.most_rows, rows))
    if scaled and math.isfinite(loss) and norm is not None and not math.isfinite(norm):
        return StepVerdict("go on", history)
    if non_finite := _non_finite_value(loss, norm):
        causes = "rows without a trained token, values out of range or a type with too small a range"
        return replace(_skip_or_stop(history, step, f"the {non_finite}", causes, MAX_NON_FINITE), is_finite=False)
    recently = tuple(skip for skip in history.skipped if step - RECENT_STEPS < skip < step)
    if finite_only:
        return StepVerdict("go on", replace(history, skipped=recently))
    if reason := _outlier_reason(history, loss, norm, rows):
        return _skip_or_stop(history, step, reason, "corrupted rows")
    log_norm = (math.log(norm),) if norm is not None and norm > 0 else ()
    losses = (*history.losses, loss)
    first = statistics.median(losses) if history.first is None and len(losses) == MIN_CLEAN_STEPS else history.first
    # Beside the baseline the history needs the recent steps that are compared with it below.
    extended = replace(
        history,
        losses=losses[-BASELINE_WINDOW - RECENT_STEPS :],
        log_norms=(*history.log_norms, *log_norm)[-BASELINE_WINDOW:],
        first=first,
        skipped=recently,
    )
    if reason := _lasting_rise_reason(extended):
        return StepVerdict("stop", extended, reason, step - RECENT_STEPS - len(recently) + 1)
    return StepVerdict("go on", extended)


def _non_finite_value(loss: float, norm: float | None) -> str | None:
    if not math.isfinite(loss):
        return f"loss is {loss}"
    return f"gradient norm is {norm}" if norm is not None and not math.isfinite(norm) else None


def _skip_or_stop(
    history: StepHistory, step: int, reason: str, causes: str, max_in_a_row: int = RECENT_STEPS
) -> StepVerdict:
    """Return a verdict that skips the step, or that stops after `max_in_a_row` skips in a row or `MAX_SKIPPED` recent
    ones."""
    skipped = (*(skip for skip in history.skipped if step - RECENT_STEPS < skip < step), step)
    extended = replace(history, skipped=skipped)
    in_a_row = sum(skip > step - max_in_a_row for skip in skipped)
    if len(skipped) < MAX_SKIPPED and in_a_row < max_in_a_row:
        return StepVerdict("skip", extended, reason)
    if in_a_row == max_in_a_row:
        others = f"the {in_a_row - 1} steps before it were skipped as well; the weights are still good"
    else:
        others = f"{len(skipped) - 1} of the {RECENT_STEPS} steps before it were skipped as well"
    reason = f"{reason}, and {others}. Usual causes: a learning rate that is too high, {causes}"
    return StepVerdict("stop", extended, reason, skipped[0])


def _outlier_reason(history: StepHistory, loss: float, norm: float | None, rows: float) -> str | None:
    if norm is None or norm <= 0 or not history.first or len(history.log_norms) < MIN_CLEAN_STEPS:
        return None
    median, spread = _median_and_spread(history.log_norms, MIN_NORM_SPREAD)
    losses = history.losses[-BASELINE_WINDOW:]
    median_loss, loss_spread = _median_and_spread(losses, MIN_LOSS_SPREAD * abs(history.first))
    wider = math.sqrt(history.most_rows / rows) if rows else 1.0
    norm_score = (math.log(norm) - median - math.log(wider)) / spread / wider
    loss_score = (loss - median_loss) / loss_spread / wider
    if norm_score <= NORM_SCORE or loss_score <= LOSS_SCORE:
        return None
    ratio = math.exp(math.log(norm) - median)
    return f"gradient norm {ratio:.3g} times the median, loss {loss:.3g} where {median_loss:.3g} is usual"


def _lasting_rise_reason(history: StepHistory) -> str | None:
    before, recent = history.losses[:-RECENT_STEPS], history.losses[-RECENT_STEPS:]
    if not history.first or len(before) < MIN_CLEAN_STEPS:
        return None
    baseline = before[-BASELINE_WINDOW:]
    usual, now = statistics.median(baseline), statistics.median(recent)
    # Noise is measured from step to step: a fast-falling loss varies widely around its median even without noise.
    noise = MAD * statistics.median(abs(a - b) for a, b in pairwise(baseline)) / math.sqrt(2)
    if min(recent) <= usual or now - usual <= max(STAY_SCORE * noise, MIN_RISE * abs(history.first)):
        return None
    return f"the loss rose and stays high: median {now:.3g} in the last {RECENT_STEPS} steps, {usual:.3g} before"


def _median_and_spread(values: Sequence[float], min_spread: float) -> tuple[float, float]:
    median = statistics.median(values)
    return median, max(min_spread, MAD * statistics.median(abs(value - median) for value in values))


# ---- guards of a run ---------------------------------------------------------------------------------------------


def check_parameters_moved(moved: ParameterChanges, reached: bool, largest_grad_norm: float | None) -> GuardDecision:
    """Return a decision to stop the run, with the reason, if no parameter value changed."""
    if moved.num_values_changed > 0:
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


def short_notice_warning(notice: str | None, stop_seconds: float) -> str | None:
    """Return a warning if `train.notice` is shorter than a step, an evaluation and a checkpoint together, else None."""
    if notice is None or stop_seconds <= parse_seconds(notice):
        return None
    return (
        f"train.notice: {notice} is less than a step, an evaluation and a checkpoint take (about "
        f"{format_seconds(stop_seconds)}): a run that is asked to stop may lose the steps since its last checkpoint; "
        "set a smaller train.save_steps to lose fewer"
    )


ROLLBACK_RATE_FACTOR = 0.5


def rate_factor(rollbacks: Sequence[int]) -> float:
    """Return the factor by which rollbacks to these steps multiply the planned learning rate. The first rollback to a
    checkpoint does not lower the rate, because most causes pass (docs/concepts/guards.md)."""
    is_first_free = bool(rollbacks) and rollbacks[0] > 0
    return float(ROLLBACK_RATE_FACTOR ** (len(rollbacks) - is_first_free))
