"""Judge loss and metric curves for divergence, overfitting and underfitting (docs/concepts/guards.md)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fulltune.recipe.functions import is_own
from fulltune.text import format_metric, format_number, is_share

Point = tuple[int, float]
"""Optimizer step and value, which may be NaN or infinite."""


@dataclass(frozen=True)
class GuardDecision:
    """A guard's decision and the reason for it."""

    action: Literal["go on", "warn", "stop"]
    reason: str = ""
    readings: int = 0
    """Number of logged losses before the loss diverged."""


GO_ON = GuardDecision("go on")
CHANCE_STANDARD_ERRORS = 2.0
"""Number of standard errors above which a difference counts as real."""


def standard_error_of_share(share: float, count: int) -> float:
    """Return the standard error of a proportion measured on `count` rows, with Laplace smoothing."""
    smoothed = (share * count + 1) / (count + 2)
    return math.sqrt(max(0.0, smoothed * (1 - smoothed)) / (count + 2))


LOSS_WINDOW = 10
_FELL_WELL = 0.75
"""The loss has clearly fallen if the lowest window's mean is at most this fraction of the first window's."""
_SURE_STANDARD_ERRORS = 4.0
_FAR, _FAR_MORE, _NONE_NEAR = 3.0, 1.0, 1.5
_ABOVE, _ABOVE_UNEVALUATED, _ABOVE_MORE = 1.25, 2.0, 0.1
_MIN_AT_END = 4


def check_divergence(
    losses: Sequence[float], learning_rate: float, untrained_loss: float | None = None
) -> GuardDecision:
    """Decide to stop if the loss fell and rose again, or if the median of the last 20 losses is over 3 times the start
    loss (the first or, if larger, `untrained_loss` from before step 1), and each of them over 1.5 times."""
    decision = _check_fell_and_rose(losses, learning_rate, untrained_loss)
    begin, last = _start_loss(losses, untrained_loss), losses[-2 * LOSS_WINDOW :]
    if decision.action == "stop" or len(losses) <= 2 * LOSS_WINDOW or not _is_far_above(begin, last):
        return decision
    return GuardDecision("stop", _divergence_message(begin, last, learning_rate), len(losses) - 2 * LOSS_WINDOW)


def _check_fell_and_rose(losses: Sequence[float], learning_rate: float, untrained_loss: float | None) -> GuardDecision:
    """Decide to stop if the loss fell clearly, but rose again to its initial values and to `untrained_loss`."""
    first, now = statistics.fmean(losses[:LOSS_WINDOW] or [0.0]), statistics.median(losses[-2 * LOSS_WINDOW :] or [0.0])
    if len(losses) < 4 * LOSS_WINDOW or first <= 0 or now < max(first, untrained_loss or 0.0):
        return GO_ON
    windows = (losses[place : place + LOSS_WINDOW] for place in range(len(losses) - LOSS_WINDOW + 1))
    place, low = min(enumerate(windows), key=lambda window: statistics.fmean(window[1]))
    lowest = statistics.fmean(low)
    error = math.hypot(*map(statistics.stdev, (losses[:LOSS_WINDOW], low))) / LOSS_WINDOW**0.5
    if lowest > _FELL_WELL * first or first - lowest < _SURE_STANDARD_ERRORS * error:
        return GO_ON
    return GuardDecision(
        "stop",
        f"the loss diverged: it fell from {first:.3g} to {lowest:.3g}, but the median of the last {2 * LOSS_WINDOW} "
        f"values is {now:.3g}. {_cause(learning_rate, 'third')}",
        place + LOSS_WINDOW,
    )


def judge_final_loss(
    losses: Sequence[float], eval_losses: Sequence[float], learning_rate: float, untrained_loss: float | None = None
) -> GuardDecision:
    """Decide to stop if a finished run's last losses are far above the start loss, or to warn if they are slightly
    above. The decision is milder if an eval loss was below the start loss."""
    if len(losses) < _MIN_AT_END:
        return GO_ON
    begin, last = _start_loss(losses, untrained_loss), losses[-min(2 * LOSS_WINDOW, len(losses) // 2) :]
    was_better = any(loss < begin for loss in eval_losses)
    if _is_far_above(begin, last):
        is_sure = len(losses) >= 2 * LOSS_WINDOW or (bool(eval_losses) and min(eval_losses) > _NONE_NEAR * begin)
        return GuardDecision(
            "stop" if is_sure and not was_better else "warn", _divergence_message(begin, last, learning_rate)
        )
    now = statistics.median(last)
    times = _ABOVE if eval_losses else _ABOVE_UNEVALUATED
    if was_better or begin <= 0 or now <= max(times * begin, begin + _ABOVE_MORE):
        return GO_ON
    return GuardDecision(
        "warn",
        f"the loss ended higher than it began: it was {begin:.3g} before the first update, and the median of the last "
        f"{len(last)} values is {now:.3g}. {_cause(learning_rate)}",
    )


MAX_BEHIND = 2


def check_got_worse(
    num_worse: int, worse_by: str, losses: Sequence[float], learning_rate: float, untrained_loss: float | None = None
) -> GuardDecision:
    """Decide to stop if at least two evaluations in a row (`num_worse`) were worse than before step 1 and the train
    loss has not fallen, else to go on. `worse_by` is the difference as text."""
    begin, now = _start_loss(losses, untrained_loss), statistics.median(losses[-2 * LOSS_WINDOW :] or [0.0])
    if num_worse < MAX_BEHIND or len(losses) < 2 * LOSS_WINDOW or now < begin:
        return GO_ON
    return GuardDecision(
        "stop",
        f"training makes the model worse: {worse_by} than before step 1 in {num_worse} evaluations in a row, and the "
        f"train loss has not fallen ({begin:.3g} at the beginning, {now:.3g} now). {_cause(learning_rate)}",
    )


def judge_got_worse(
    worse_by: str, losses: Sequence[float], learning_rate: float, untrained_loss: float | None = None
) -> GuardDecision:
    """Decide about a finished run that got worse (`worse_by`): stop if the train loss did not fall, else warn."""
    begin, last = _start_loss(losses, untrained_loss), losses[-min(2 * LOSS_WINDOW, max(1, len(losses) // 2)) :]
    now, worse = statistics.median(last or [0.0]), f"training made the model worse: {worse_by} than before step 1"
    if len(losses) < _MIN_AT_END or now < begin:
        return GuardDecision("warn", f"{worse}. Try a lower learning rate (here {learning_rate:g}) or fewer epochs")
    fallen = f"the train loss has not fallen ({begin:.3g} at the beginning, {now:.3g} at the end)"
    return GuardDecision("stop", f"{worse}, and {fallen}. {_cause(learning_rate)}")


def _start_loss(losses: Sequence[float], untrained_loss: float | None) -> float:
    return max([*losses[:1], *([] if untrained_loss is None else [untrained_loss])], default=0.0)


def _is_far_above(begin: float, last: Sequence[float]) -> bool:
    is_above = begin > 0 and statistics.median(last) > max(_FAR * begin, begin + _FAR_MORE)
    return is_above and min(last) > _NONE_NEAR * begin


def _divergence_message(start_loss: float, last_losses: Sequence[float], learning_rate: float) -> str:
    return (
        f"the loss diverged: before any update it was at most {start_loss:.3g}, and the last {len(last_losses)} values "
        f"are between {min(last_losses):.3g} and {max(last_losses):.3g}. {_cause(learning_rate)}"
    )


def without_cause(reason: str) -> str:
    """Return a guard's reason without the usual cause and advice."""
    return reason.partition(". Usual cause")[0]


def _cause(learning_rate: float, share: str = "tenth") -> str:
    return f"Usual cause: a learning rate that is too high (here {learning_rate:g}); try a {share} of it"


def should_stop_early(values: Sequence[float], greater_is_better: bool, patience: int, threshold: float) -> bool:
    """Return True if none of the last `patience` evaluations improved on the best one by more than `threshold`."""
    best, since = None, 0
    for value in values:
        gain = 0.0 if best is None else (value - best if greater_is_better else best - value)
        if best is None or gain > threshold:
            best, since = value, 0
        else:
            since += 1
    return since >= patience


# ---- a run that has ended --------------------------------------------------------------------------------------

Kind = Literal["over-fitted", "over-confident", "under-fitted", "got worse", "sound", "not known"]

MIN_EVALUATIONS = 3
RISE_RATIO = 1.1
"""Ratio of the last to the lowest eval loss that counts as a rise."""
HARDLY_FELL = 0.97
"""Ratio of the last to an earlier train loss above which the loss has hardly fallen."""
CEILING = 0.995
ASSUMED_ROWS = 1000
MIN_RELATIVE_CHANGE = 0.02
"""Smallest relative change that counts, for metrics that are not shares."""
NO_GAP = 0.9
"""Ratio of train to eval loss above which the model fits train rows no better than eval rows."""
STILL_BETTER = 0.99
"""The eval loss was still falling if its last value divided by its value halfway is below this."""
_STILL_FALLING = 0.05
"""The train loss counts as still falling if it fell by more than this fraction in the last quarter."""
_LEARNED = 0.05
_FLAT = 0.03
MIN_CHANGED_SHARE = 0.5
"""Minimum share of values with a gradient that must change; below it, rounding has lost the updates."""
MIN_FOR_SHAPE = 8


@dataclass(frozen=True)
class Curves:
    """A training run's losses and metric by step."""

    train_loss: tuple[Point, ...] = ()
    eval_loss: tuple[Point, ...] = ()
    metric: tuple[Point, ...] = ()
    metric_name: str = "accuracy"
    greater_is_better: bool = True
    eval_rows: int = 0
    epochs_per_step: float = 0.0
    kept_step: int | None = None
    before: float | None = None
    """The metric before step 1, or None if not measured."""
    is_mixed: bool = False
    """True if the train loss includes mixed-in rows, unlike the eval loss."""

    @property
    def on_eval(self) -> str:
        name = self.metric_name
        return f"{name if is_own(name) else name.replace('_', ' ')} on the eval rows"

    @property
    def best(self) -> Point:
        """Step and value of the best evaluation (the first of equals), or 0 and NaN if no value is finite."""
        sign = 1 if self.greater_is_better else -1
        finite = [point for point in self.metric if math.isfinite(point[1])]
        return max(finite, key=lambda point: sign * point[1], default=(0, math.nan))

    @property
    def losses(self) -> list[float]:
        return [value for _, value in self.train_loss if math.isfinite(value)]

    @property
    def is_at_ceiling(self) -> bool:
        return is_share(self.metric_name) and bool(self.metric) and self.metric[-1][1] >= CEILING

    @property
    def is_loss(self) -> bool:
        return self.metric_name in ("loss", "perplexity")

    def largest_chance_difference(self, *values: float) -> float:
        """Return the largest difference that chance alone may cause: two standard errors for proportions."""
        if not is_share(self.metric_name):
            return (RISE_RATIO - 1 if self.is_loss else MIN_RELATIVE_CHANGE) * abs(values[0])
        rows = self.eval_rows or ASSUMED_ROWS
        return CHANCE_STANDARD_ERRORS * math.hypot(*(standard_error_of_share(value, rows) for value in values))


@dataclass(frozen=True)
class Fit:
    """Judgement of whether a run overfitted or underfitted."""

    kind: Kind
    evidence: str = ""
    turn: int | None = None
    details: str = ""
    helps: str = ""

    @property
    def sentence(self) -> str:
        """The kind and evidence, or an empty string without evidence."""
        return self.evidence and f"{self.kind.capitalize()}: {self.evidence}."


_FEWER = "fewer epochs (the learning rate then reaches 0 earlier), more rows, or a lower learning rate"
_MORE = "more epochs, or a search for the learning rate"
_LOWER = "a lower learning rate"


def judge_curves(curves: Curves) -> Fit:
    """Judge whether a run overfitted, underfitted, got worse, or became over-confident (only the eval loss rose)."""
    if worse := _worse_than_untrained(curves):
        return Fit("got worse", worse, 0, helps=_LOWER)
    evaluations = [point for point in curves.eval_loss if math.isfinite(point[1])]
    steps = [step for step, _ in evaluations]
    trained: dict[int, float] = {}  # mean train loss since the previous evaluation, by the evaluation's step
    for before, step in zip([0, *steps], steps, strict=False):
        if values := [value for at, value in curves.train_loss if before < at <= step and math.isfinite(value)]:
            trained[step] = statistics.fmean(values)
    if len(evaluations) < MIN_EVALUATIONS or len(trained) < len(evaluations):
        reason = f"too few evaluations ({len(evaluations)}) to judge overfitting (at least three are needed)"
        return Fit("not known", reason if evaluations else "")
    turn, least = min(evaluations, key=lambda point: point[1])
    end, last = evaluations[-1]
    mixed = ", including mixed-in rows" if curves.is_mixed else ""
    gap = (
        f"Towards the end, the loss was {format_number(trained[end])} on train rows (with dropout{mixed}) and "
        f"{format_number(last)} on eval rows."
    )
    since_best, fell = _decline_since_best(curves)
    rose = turn < end and last >= RISE_RATIO * least > 0
    if not (rose or fell):
        return _judge_no_decline(curves, evaluations, trained, gap)
    turn_step = curves.best[0] if fell else turn
    evidence = (
        since_best
        if fell
        else f"the eval loss rose after its minimum of {format_number(least)} at {_step_and_epoch(curves, turn)}"
    )
    details = f"{gap}{_model_step_sentence(curves, turn_step)}"
    half = list(trained.values())[(len(trained) - 1) // 2]
    if trained[end] >= HARDLY_FELL * max(trained[turn], half):
        return Fit("got worse", f"{evidence}, and the train loss did not fall either", turn_step, details, _LOWER)
    evidence = f"{evidence}, while the train loss kept falling"
    if fell or not since_best:
        return Fit("over-fitted", evidence, turn_step, details, _FEWER)
    chance = curves.largest_chance_difference(curves.best[1])
    chance_in_words = f"{100 * chance:.1f} points" if is_share(curves.metric_name) else format_number(chance)
    rows = f"{curves.eval_rows:,}" if curves.eval_rows else f"{ASSUMED_ROWS:,} (assumed)"
    evidence = (
        f"{evidence}. However, {since_best}. With {rows} rows, differences of up to {chance_in_words} may be chance"
    )
    return Fit("over-confident", evidence, turn_step, details)


def _judge_no_decline(curves: Curves, evaluations: Sequence[Point], trained: dict[int, float], details: str) -> Fit:
    """Judge whether a run that never got worse underfitted. `trained`: train loss by step of evaluation."""
    if curves.is_mixed:
        reason = "no sign of overfitting, but the train loss is not comparable because it includes mixed-in rows"
        return Fit("not known", reason, None, details)
    (end, last), half = evaluations[-1], evaluations[(len(evaluations) - 1) // 2][1]
    is_least = last <= min(value for _, value in evaluations) and half > 0
    if is_least and trained[end] > NO_GAP * last and not curves.is_at_ceiling:
        if trained[end] > HARDLY_FELL * next(iter(trained.values())):
            why = "the train loss hardly fell, and the eval loss was lowest at the end"
            return Fit("under-fitted", why, None, details, _MORE)
        if last < STILL_BETTER * half:
            why = "the eval loss was still falling at the end, and the train loss was not much lower"
            return Fit("under-fitted", why, None, details, _MORE)
    return Fit("sound", "no sign of overfitting or underfitting", None, details)


def _step_and_epoch(curves: Curves, step: int) -> str:
    return f"step {step:,} (epoch {format_number(step * curves.epochs_per_step)})"


def _model_step_sentence(curves: Curves, best: int) -> str:
    """Return a sentence on whether the saved weights are from before or after step `best`, or "" if unknown."""
    if curves.kept_step is None:
        return ""
    side = "this step" if curves.kept_step == best else "an earlier step" if curves.kept_step < best else "a later step"
    return f" The saved weights are from {side} ({curves.kept_step:,})."


def _worse_than_untrained(curves: Curves) -> str | None:
    """Return a sentence if every evaluation is worse than before step 1 by more than chance explains, else None."""
    before, best, sign = curves.before, curves.best[1], 1 if curves.greater_is_better else -1
    if (
        before is None
        or not math.isfinite(before + best)
        or sign * (before - best) <= curves.largest_chance_difference(before, best)
    ):
        return None
    metric_before, metric_best = (format_metric(curves.metric_name, value) for value in (before, best))
    return f"{curves.on_eval} was {metric_before} before step 1 and never better than {metric_best} afterwards"


def _decline_since_best(curves: Curves) -> tuple[str, bool]:
    """Return a sentence comparing the best and the last evaluation, and whether the decline exceeds chance; ("", False)
    if the metric is a loss."""
    finite = [value for _, value in curves.metric if math.isfinite(value)]
    if curves.is_loss or not finite:
        return "", False
    step, best = curves.best
    lost = abs(best - finite[-1])
    before, after = (format_metric(curves.metric_name, value) for value in (best, finite[-1]))
    words = f"{curves.on_eval} was best at {_step_and_epoch(curves, step)} with {before} and ended at {after}"
    return words, len(finite) >= MIN_EVALUATIONS and lost > curves.largest_chance_difference(best)


def is_flat(losses: Sequence[float]) -> bool:
    """Return True if the losses' first and last quarters have nearly equal medians."""
    size = len(losses) // 4
    if len(losses) < MIN_FOR_SHAPE:
        return False
    began, ended = statistics.median(losses[:size]), statistics.median(losses[-size:])
    return 0 < (1 - _FLAT) * began < ended < (1 + _FLAT) * began


def final_loss_if_falling(losses: Sequence[float]) -> float | None:
    """Return the mean of the last quarter of the losses if they are still falling, else None."""
    size = len(losses) // 4
    if not size:
        return None
    before, last = statistics.fmean(losses[-2 * size : -size]), statistics.fmean(losses[-size:])
    falls = before > 0 and _LEARNED * losses[0] < last < min(losses[0], (1 - _STILL_FALLING) * before)
    return last if falls else None
