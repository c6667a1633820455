"""Whether a run over-fitted, under-fitted or got worse, by its curves (`bench/planted_fits.py` checks the rules)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fulltune.report.format import words
from fulltune.report.format.plots import Point
from fulltune.stats.shares import error_of_share
from fulltune.text import format_metric, format_number, is_share

Kind = Literal["over-fitted", "over-confident", "under-fitted", "got worse", "sound", "not known"]

LEAST_EVALUATIONS = 3
ROSE = 1.1
"""The last eval loss over the least one: smaller rises come and go with the order of the rows."""
FELL = 0.97
"""The last train loss over the one at the turn: it was still being learned."""
ERRORS = 2.0
"""Standard errors by which a share has to fall before it is said to have fallen."""
CEILING = 0.995
"""A share from which on next to nothing is left to gain."""
ASSUMED_ROWS = 1000
"""Of eval rows, where nobody says how many there are."""
CHANGED = 0.02
"""The same of other metrics, as a share of the best value."""
NO_GAP = 0.9
"""Train loss over eval loss above which the train rows are known no better than the eval rows."""
STILL_BETTER = 0.99
"""The last eval loss over the one of half the run, below which it was still falling."""


HARDLY = 0.97
"""The last train loss over the first one, above which hardly anything was learned."""


@dataclass(frozen=True)
class Curves:
    """What was measured while training, in order of steps."""

    train_loss: tuple[Point, ...] = ()
    eval_loss: tuple[Point, ...] = ()
    metric: tuple[Point, ...] = ()
    metric_name: str = "accuracy"
    greater_is_better: bool = True
    eval_rows: int = 0
    """0: not known."""
    epochs_per_step: float = 0.0
    kept_step: int | None = None
    """Whose weights the model has."""
    before: float | None = None
    """The metric before step 1."""
    is_mixed: bool = False
    """The train loss is also of rows that are mixed in, and so of another level than the eval loss."""

    @property
    def on_eval(self) -> str:
        """`accuracy on the eval rows`."""
        return f"{words.metric_name(self.metric_name)} on the eval rows"

    @property
    def best(self) -> Point:
        """The first of the best evaluations; NaN at step 0 where none is finite."""
        sign = 1 if self.greater_is_better else -1
        finite = [point for point in self.metric if math.isfinite(point[1])]
        return max(finite, key=lambda point: sign * point[1], default=(0, math.nan))


@dataclass(frozen=True)
class Fitting:
    """How well the run fits its rows."""

    kind: Kind
    turn: int | None = None
    """The step after which the eval rows were answered worse."""
    sentences: tuple[str, ...] = ()


def fitting(curves: Curves) -> Fitting:
    """What the curves say about over- and under-fitting, in words; over-confident: only the eval loss rises."""
    if worse := _worse_than_before(curves):
        return Fitting("got worse", 0, (worse, _LOWER))
    evaluations = [point for point in curves.eval_loss if math.isfinite(point[1])]
    trained = _train_loss(curves.train_loss, [step for step, _ in evaluations])
    if len(evaluations) < LEAST_EVALUATIONS or len(trained) < len(evaluations):
        few = f"Too few evaluations ({len(evaluations)}) to tell whether the run was over-fitted: it takes three."
        return Fitting("not known", None, (few,) if evaluations else ())
    turn, least = min(evaluations, key=lambda point: point[1])
    end, last = evaluations[-1]
    gap = (
        f"Towards the end the loss was {format_number(trained[end])} on train rows"
        f"{', mixed ones included' if curves.is_mixed else ''}, with dropout, and "
        f"{format_number(last)} on eval rows."
    )
    half = list(trained.values())[(len(trained) - 1) // 2]
    learned = trained[end] < FELL * trained[turn] or trained[end] < FELL * half
    fell = _metric_fell(curves)
    rose = turn < end and last >= ROSE * least > 0
    if not (rose or fell):
        if curves.is_mixed:
            return Fitting("not known", None, (_MIXED, gap))
        if not at_ceiling(curves.metric_name, curves.metric) and (why := _unfinished(evaluations, trained)):
            return Fitting("under-fitted", None, (f"Under-fitted: {why}.", gap, _MORE))
        return Fitting("sound", None, (f"No sign of over- or under-fitting: {_EVEN}.", gap))
    at, said = fell or (turn, f"the eval loss was least at {_place(curves, turn)}, {format_number(least)}, and rose")
    kept = _kept(curves, at)
    if not learned:
        worse = f"Got worse: {said}, and the train loss did not fall meanwhile, either."
        return Fitting("got worse", at, (worse, gap, kept, _LOWER))
    said = f"{said}, while the train loss still fell"
    if fell or _is_loss(curves) or not any(math.isfinite(value) for _, value in curves.metric):
        return Fitting("over-fitted", at, (f"Over-fitted: {said}.", gap, kept, _FEWER))
    return Fitting("over-confident", at, (f"Over-confident: {said}; {_not_known_worse(curves)}.", gap, kept))


_MIXED = (
    "No sign of over-fitting. Whether it was under-fitted is not known: the train loss is also of the rows that are "
    "mixed in."
)
_EVEN = (
    "from its first evaluation on the eval loss did not rise by a tenth, nor was it still falling while the train loss "
    "was not much lower"
)
_FEWER = "What helps: fewer epochs, so that the rate falls to 0 before that; more rows; a lower rate."
_MORE = "What helps: more epochs, or a search for the rate."
_LOWER = "What helps: a lower rate."


def _place(curves: Curves, step: int) -> str:
    """`step 300 (epoch 2)`."""
    return f"step {step:,} (epoch {format_number(step * curves.epochs_per_step)})"


def _kept(curves: Curves, turn: int) -> str:
    """Whether the weights that the model has are from before it got worse."""
    if curves.kept_step is None:
        return ""
    side = "from then" if curves.kept_step == turn else "from before" if curves.kept_step < turn else "from after that"
    return f"The weights kept are {side}, step {curves.kept_step:,}."


def at_ceiling(metric_name: str, metric: Sequence[Point]) -> bool:
    """All eval rows, or nearly all, were answered right at the end: more training can do no better on them."""
    return is_share(metric_name) and bool(metric) and metric[-1][1] >= CEILING


def _is_loss(curves: Curves) -> bool:
    return curves.metric_name in ("loss", "perplexity")


def _train_loss(train: Sequence[Point], steps: Sequence[int]) -> dict[int, float]:
    """The mean train loss of the steps up to each evaluation, since the one before."""
    found: dict[int, float] = {}
    before = 0
    for end in steps:
        values = [value for step, value in train if before < step <= end and math.isfinite(value)]
        if values:
            found[end] = sum(values) / len(values)
        before = end
    return found


def _worse_than_before(curves: Curves) -> str:
    """That every evaluation is worse than the one before step 1 by more than chance, in words; empty: one is not."""
    best, name, sign = curves.best[1], curves.metric_name, 1 if curves.greater_is_better else -1
    if curves.before is None or not math.isfinite(curves.before) or not math.isfinite(best):
        return ""
    if is_share(name):
        rows = curves.eval_rows or ASSUMED_ROWS
        chance = ERRORS * math.hypot(*(error_of_share(value, rows) for value in (curves.before, best)))
    else:
        chance = (ROSE - 1 if _is_loss(curves) else CHANGED) * abs(curves.before)
    if sign * (curves.before - best) <= chance:
        return ""
    was, became = (format_metric(name, value) for value in (curves.before, best))
    return f"Got worse: {curves.on_eval} was {was} before step 1, and never better than {became} afterwards."


def _metric_fell(curves: Curves) -> tuple[int, str] | None:
    """The best evaluation and what was lost since, where that is more than chance; None: nothing was."""
    if sum(math.isfinite(value) for _, value in curves.metric) < LEAST_EVALUATIONS or _is_loss(curves):
        return None
    step, said, lost, chance = _since_best(curves)
    return (step, said) if lost > chance else None


def _since_best(curves: Curves) -> tuple[int, str, float, float]:
    """The step of the metric's best evaluation, it and the last one in words, what was lost, what chance may take."""
    name, sign = curves.metric_name, 1 if curves.greater_is_better else -1
    step, best = curves.best
    last = [value for _, value in curves.metric if math.isfinite(value)][-1]
    rows = curves.eval_rows or ASSUMED_ROWS
    chance = ERRORS * error_of_share(best, rows) if is_share(name) else CHANGED * abs(best)
    before, after = (format_metric(name, value) for value in (best, last))
    said = f"{curves.on_eval} was best at {_place(curves, step)}, {before}, and {after}"
    return step, f"{said} at the end", sign * (best - last), chance


def _not_known_worse(curves: Curves) -> str:
    """What the eval rows say of the answers while their loss rose: not resolved is not equal."""
    _, said, lost, chance = _since_best(curves)
    if not lost:
        return f"{said}: the probabilities have become too extreme, and the answers no worse by that metric"
    most = f"{100 * chance:.1f} points" if is_share(curves.metric_name) else format_number(chance)
    rows = f"these {curves.eval_rows:,}" if curves.eval_rows else f"{ASSUMED_ROWS:,}, as is assumed,"
    return f"{said}. Of {rows} rows a difference of up to {most} may be chance: whether answers got worse is open"


def _unfinished(evaluations: Sequence[Point], trained: dict[int, float]) -> str:
    """That an under-fitted run was still getting better, or had hardly begun, in words; empty where it was not so."""
    (end, last), half = evaluations[-1], evaluations[(len(evaluations) - 1) // 2][1]
    if last > min(value for _, value in evaluations) or half <= 0 or trained[end] <= NO_GAP * last:
        return ""
    if trained[end] > HARDLY * next(iter(trained.values())):
        return "the train loss hardly fell, and the eval loss was least at the end"
    if last < STILL_BETTER * half:
        return "the eval loss was least at the last evaluation and still falling, and the train loss was not much lower"
    return ""
