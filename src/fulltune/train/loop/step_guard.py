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

BASELINE_STEPS = 64
MIN_CLEAN_STEPS = 32
"""After fewer accepted steps, only non-finite values count as bad."""
NORM_SCORE, LOSS_SCORE = 3.0, 6.0
"""Norms and losses are outliers if they exceed the median by this many robust standard deviations."""
MIN_NORM_SPREAD = 0.15
"""Smallest assumed standard deviation of the norm's logarithm."""
MIN_LOSS_SPREAD = 0.05
"""Smallest assumed standard deviation of the loss, relative to the initial loss."""
RECENT_STEPS, STAY_SCORE = 20, 5.0
"""A run stops if the last `RECENT_STEPS` losses are all above the baseline and their median is `STAY_SCORE` standard
deviations above it."""
MIN_RISE = 0.1
"""Smallest rise that stops a run, relative to the initial loss."""
MAX_NON_FINITE_IN_A_ROW = 3
MAX_RECENTLY_SKIPPED = 5
MAD = 1.4826
"""Ratio of standard deviation to median absolute deviation in a normal distribution."""


@dataclass(frozen=True)
class StepHistory:
    """Losses and gradient norms of earlier steps, with which a new step is compared."""

    losses: tuple[float, ...] = ()
    log_norms: tuple[float, ...] = ()
    first: float | None = None
    """Median of the first `MIN_CLEAN_STEPS` losses. If the median is 0, later losses are not judged."""
    skipped: tuple[int, ...] = ()
    most_rows: float = 0.0

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> StepHistory:
        saved: dict[str, Any] = {field.name: values[field.name] for field in fields(cls)}
        return cls(**saved | {name: tuple(value) for name, value in saved.items() if isinstance(value, list)})


@dataclass(frozen=True)
class StepVerdict:
    """The guard's decision about a step, and the history including that step."""

    action: Literal["go on", "skip", "stop"]
    history: StepHistory
    reason: str = ""
    since: int | None = None
    """If the run stops, the first step whose update may have damaged the weights."""
    is_finite: bool = True


def judge_step(
    history: StepHistory,
    step: int,
    loss: float,
    norm: float | None,
    *,
    rows: float = 0.0,
    is_loss_scaled: bool = False,
    finite_only: bool = False,
) -> StepVerdict:
    """Decide whether to apply a step's update, skip it or stop the run, by comparing its loss and norm with earlier
    steps.

    `rows` is the number of rows per process; with fewer rows the limits are wider. If the fp16 loss is scaled, a
    non-finite norm is accepted, because the gradient scaler skips that step. With `finite_only` every finite step is
    accepted.
    """
    history = replace(history, most_rows=max(history.most_rows, rows))
    if is_loss_scaled and math.isfinite(loss) and norm is not None and not math.isfinite(norm):
        return StepVerdict("go on", history)
    if non_finite := _describe_non_finite(loss, norm):
        causes = "rows without a trained token, values out of range, or a dtype with too small a range"
        return replace(
            _skip_or_stop(history, step, f"the {non_finite}", causes, MAX_NON_FINITE_IN_A_ROW), is_finite=False
        )
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
        losses=losses[-BASELINE_STEPS - RECENT_STEPS :],
        log_norms=(*history.log_norms, *log_norm)[-BASELINE_STEPS:],
        first=first,
        skipped=recently,
    )
    if reason := _lasting_rise_reason(extended):
        return StepVerdict("stop", extended, reason, step - RECENT_STEPS - len(recently) + 1)
    return StepVerdict("go on", extended)


def _describe_non_finite(loss: float, norm: float | None) -> str | None:
    """Return, for example, "loss is nan", or None if both are finite."""
    if not math.isfinite(loss):
        return f"loss is {loss}"
    return f"gradient norm is {norm}" if norm is not None and not math.isfinite(norm) else None


def _skip_or_stop(
    history: StepHistory, step: int, reason: str, usual_causes: str, max_in_a_row: int = RECENT_STEPS
) -> StepVerdict:
    """Return a verdict that skips this step, or stops the run after `max_in_a_row` skips in a row or
    `MAX_RECENTLY_SKIPPED` among the last `RECENT_STEPS`."""
    skipped = (*(skip for skip in history.skipped if step - RECENT_STEPS < skip < step), step)
    extended = replace(history, skipped=skipped)
    in_a_row = sum(skip > step - max_in_a_row for skip in skipped)
    if len(skipped) < MAX_RECENTLY_SKIPPED and in_a_row < max_in_a_row:
        return StepVerdict("skip", extended, reason)
    if in_a_row == max_in_a_row:
        others = f"the previous {in_a_row - 1} steps were skipped too; the weights are still good"
    else:
        others = f"{len(skipped) - 1} of the previous {RECENT_STEPS} steps were skipped too"
    reason = f"{reason}, and {others}. Usual causes: a learning rate that is too high, {usual_causes}"
    return StepVerdict("stop", extended, reason, skipped[0])


def _outlier_reason(history: StepHistory, loss: float, norm: float | None, rows: float) -> str | None:
    """Return a message if both loss and norm are outliers, else None. With fewer `rows` the limits are wider."""
    if norm is None or norm <= 0 or not history.first or len(history.log_norms) < MIN_CLEAN_STEPS:
        return None
    median, spread = _median_and_spread(history.log_norms, MIN_NORM_SPREAD)
    losses = history.losses[-BASELINE_STEPS:]
    median_loss, loss_spread = _median_and_spread(losses, MIN_LOSS_SPREAD * abs(history.first))
    wider = math.sqrt(history.most_rows / rows) if rows else 1.0
    norm_score = (math.log(norm) - median - math.log(wider)) / spread / wider
    loss_score = (loss - median_loss) / loss_spread / wider
    if norm_score <= NORM_SCORE or loss_score <= LOSS_SCORE:
        return None
    ratio = math.exp(math.log(norm) - median)
    norm_text = f"the gradient norm is {ratio:.3g} times the median"
    return f"{norm_text}, and the loss is {loss:.3g} instead of about {median_loss:.3g}"


def _lasting_rise_reason(history: StepHistory) -> str | None:
    """Return a message if the last `RECENT_STEPS` losses stay clearly above the baseline, else None."""
    before, recent = history.losses[:-RECENT_STEPS], history.losses[-RECENT_STEPS:]
    if not history.first or len(before) < MIN_CLEAN_STEPS:
        return None
    baseline = before[-BASELINE_STEPS:]
    usual, now = statistics.median(baseline), statistics.median(recent)
    # Noise is measured from step to step: a fast-falling loss varies widely around its median even without noise.
    noise = MAD * statistics.median(abs(a - b) for a, b in pairwise(baseline)) / math.sqrt(2)
    if min(recent) <= usual or now - usual <= max(STAY_SCORE * noise, MIN_RISE * abs(history.first)):
        return None
    return f"the loss rose and stays high: its median was {usual:.3g} and is {now:.3g} in the last {RECENT_STEPS} steps"


def _median_and_spread(values: Sequence[float], min_spread: float) -> tuple[float, float]:
    median = statistics.median(values)
    return median, max(min_spread, MAD * statistics.median(abs(value - median) for value in values))


# ---- guards of a run ---------------------------------------------------------------------------------------------


def judge_parameter_changes(
    changes: ParameterChanges, has_gradients: bool, largest_grad_norm: float | None
) -> GuardDecision:
    """Decide to stop if no parameter value changed, else to continue. `has_gradients` (for any parameter) and the
    largest norm only affect the reason."""
    if changes.num_values_changed > 0:
        return GO_ON
    if not has_gradients:
        reason = "no parameter received a gradient; check that the loss depends on the model's outputs"
    elif changes.num_tensors_with_gradient == 0 or largest_grad_norm == 0:
        reason = (
            "every gradient was 0, so no parameter changed; the loss may be multiplied by 0, or may ignore all rows "
            "or tokens"
        )
    else:
        reason = "no parameter changed: the learning rate is too small for the weights' dtype, or the run is too short"
    return GuardDecision("stop", reason)


def short_notice_warning(notice: str | None, stop_seconds: float) -> str | None:
    """Return a warning if `stop_seconds`, the time for a step, an evaluation and a checkpoint, exceeds `train.notice`,
    else None."""
    if notice is None or stop_seconds <= parse_seconds(notice):
        return None
    return (
        f"train.notice: {notice} is too short for a step, an evaluation and a checkpoint (about "
        f"{format_seconds(stop_seconds)}), so a run that is asked to stop may lose the steps since its last "
        "checkpoint; set a smaller train.save_steps to lose fewer"
    )


ROLLBACK_RATE_FACTOR = 0.5


def learning_rate_factor(rollbacks: Sequence[int]) -> float:
    """Return the factor that multiplies the learning rate after rollbacks to these steps. The first rollback to a
    checkpoint does not lower the rate, because most causes do not recur."""
    is_first_free = bool(rollbacks) and rollbacks[0] > 0
    return float(ROLLBACK_RATE_FACTOR ** (len(rollbacks) - is_first_free))
