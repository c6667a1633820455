"""Keeping forgetting within a budget: a weight by dual ascent while training, then weights scaled back (Wortsman et
al. 2022, arXiv 2109.01903), a certificate on sealed texts, and methods compared by the points that were tried; pure
functions of what was measured on generic text."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fulltune.records.held import Certificate, Drift, HeldRun, Point

LEAST_READ, MOST_READ, MOST_REPLAYED = 40, 600, 1100
"""Texts of a run with a budget: for selection, and as many sealed ones; for replay."""
TOKENS_READ = 12_800
"""About as many for selection, and as many sealed ones: of short texts there are more."""
SHARES = (1.0, 0.75, 0.5, 0.25)
"""Points between the untouched and the trained model that are tried, besides the untouched one."""
REFINEMENTS = 2
"""Further points, between the largest share that is within the budget and the next one."""
NUM_POINTS = 1 + len(SHARES) + REFINEMENTS
LEAST_FURTHER = 0.01
"""Nearer to a share within the budget no further one is tried."""
MOST_ROWS = 300
"""Eval rows that choose among the points."""
ONE_SIDED = 1.645
"""Standard errors above the mean below which the true one lies with 95 %."""
SURELY = 1.28
"""Standard errors of a difference of two halves that a chosen point stays away from the budget by: so that the sealed
half says the same in nine of ten cases."""


@dataclass(frozen=True)
class Weighing:
    """How generic text is weighed while training: a language model by a divergence in nats a token, others by 1 -
    cosine. The larger the budget, the less weight: what it is worth stays the same. Measured: docs/log.md."""

    first: float
    """Weight at the start, and the least, times the budget's limit."""
    most: float
    """At more hardly less was lost, and less learned; times the limit."""


LANGUAGE, STATES = Weighing(0.1, 1.0), Weighing(0.005, 0.03)
PASSING = 1.0
"""So many times the limit more of drift are let pass at the highest learning rate: they are gone when it has fallen."""
MOST_FACTOR = 1.5
"""By which the weight changes at once."""


def upper(measured: Drift) -> float:
    """Above the true drift with 95 %."""
    return measured.drift + ONE_SIDED * measured.error


def next_weight(weight: float, measured: Drift, limit: float, rate: float, weighing: Weighing) -> float:
    """The weight of generic text after a measurement: higher where the drift's upper bound is above the limit."""
    allowed = limit * (1 + PASSING * rate)
    if not math.isfinite(upper(measured)):
        return weight
    step = (upper(measured) - allowed) / allowed
    factor = math.exp(min(max(step, -math.log(MOST_FACTOR)), math.log(MOST_FACTOR)))
    return min(max(weight * factor, weighing.first / limit), weighing.most / limit)


def least_limit(measured: Drift) -> float:
    """The smallest limit within which a point may be chosen: its sealed half will most likely say the same."""
    return upper(measured) + SURELY * math.sqrt(2) * measured.error


def is_within(measured: Drift, limit: float) -> bool:
    """Whether a point may be chosen."""
    return least_limit(measured) <= limit


MOST_OF_IT = 0.9


def limit_for_most(found: HeldRun) -> float | None:
    """The smallest limit that keeps `MOST_OF_IT` of the trained model's gain; None: it is kept, or there is no gain."""
    most = found.gain_of(found.end)
    if found.gain_of(found.chosen) >= MOST_OF_IT * most:
        return None
    good = [one for one in found.points if found.gain_of(one) >= MOST_OF_IT * most]
    return min(least_limit(one.measured) for one in good)


def crossing(inside: Point, outside: Point, limit: float) -> float:
    """About the share between two points where a straight line between them crosses the limit (false position)."""
    low, high = (least_limit(point.measured) - limit for point in (inside, outside))
    part = low / (low - high) if math.isfinite(low - high) else 0.5
    return round(inside.share + part * (outside.share - inside.share), 3)


def best(points: Sequence[Point], limit: float, greater_is_better: bool) -> Point:
    """The point within the limit (the untouched model always is) with the best metric; among equals the least moved."""
    sign = 1 if greater_is_better else -1
    possible = [point for point in points if point.is_start or is_within(point.measured, limit)]

    def order(point: Point) -> tuple[float, float]:  # one whose metric is not finite is never better
        return sign * point.metric if math.isfinite(point.metric) else -math.inf, -point.measured.drift

    return max(possible, key=order)


def certified(measured: Drift, limit: float) -> Certificate:
    """What the sealed half says: passed where the drift is below the limit with 95 %."""
    highest = upper(measured)
    return Certificate(measured=measured, limit=limit, upper=highest, passed=highest <= limit)


# ---- how much of a task costs how much of what a model could do before --------------------------------------------

NORMAL = 1.96
STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)
"""Standard errors in which a difference lies with 95 %, by degrees of freedom from 1 on; of more as of 10."""


def envelope(found: HeldRun) -> list[Point]:
    """The points that no other one beats: by rising drift, and each better than all before it."""
    sign = 1 if found.greater_is_better else -1
    best: list[Point] = []
    known = (point for point in found.points if math.isfinite(point.metric) and math.isfinite(point.measured.drift))
    for point in sorted(known, key=lambda point: (point.measured.drift, -sign * point.metric)):
        if not best or sign * point.metric > sign * best[-1].metric:
            best.append(point)
    return best


def drift_at(found: HeldRun, metric: float) -> tuple[float, float]:
    """The drift and its standard error at which a metric is reached, by straight lines between the best points."""
    sign, before = 1 if found.greater_is_better else -1, None
    for point in envelope(found):
        if sign * point.metric >= sign * metric:
            here = point.measured
            if before is None:
                return here.drift, here.error
            part = (metric - before.metric) / (point.metric - before.metric)
            drift, error = (
                begin + part * (end - begin)
                for begin, end in ((before.measured.drift, here.drift), (before.measured.error, here.error))
            )
            return drift, error
        before = point
    raise ValueError(f"no point reaches {metric}")


@dataclass(frozen=True)
class Apart:
    """How far two methods moved generic text where both have the same metric."""

    metric: float
    """The best that all their runs reach."""
    first: float
    second: float
    """Mean drift over the runs of each."""
    error: float
    """Standard error of the difference."""
    reach: float
    """Standard errors in which the difference lies with 95 %."""
    over: Literal["seeds and texts", "texts"]
    """What the error is about."""

    @property
    def difference(self) -> float:
        """By how much more the first one moved."""
        return self.first - self.second

    @property
    def less(self) -> Literal["first", "second"] | None:
        """Which one moved generic text less; None: that cannot be told, never by one seed of each."""
        if self.over == "texts" or abs(self.difference) <= self.reach * self.error:
            return None
        return "second" if self.difference > 0 else "first"


def at_equal_metric(first: Sequence[HeldRun], second: Sequence[HeldRun]) -> Apart | None:
    """Two methods' drift at the same metric, over their seeds; None: a run is no better than the untouched model."""
    runs = (*first, *second)
    sign = 1 if runs[0].greater_is_better else -1
    metric = sign * min(max((sign * point.metric for point in envelope(run)), default=-math.inf) for run in runs)
    if not all(sign * metric > sign * run.start.metric for run in runs):
        return None
    here = [[drift_at(run, metric) for run in side] for side in (first, second)]
    one, other = (statistics.mean(drift for drift, _ in side) for side in here)
    # The seeds of one method read the same texts: their errors are not averaged away. Those of the two methods count as
    # independent, which is cautious: they read the same texts, too.
    of_texts = sum(statistics.mean(error for _, error in side) ** 2 for side in here)
    if min(len(first), len(second)) > 1:
        parts = [statistics.variance([drift for drift, _ in side]) / len(side) for side in here]
        if (of_seeds := sum(parts)) > 0:
            # Seeds of two methods count as independent; degrees of freedom after Welch and Satterthwaite.
            freedom = of_seeds**2 / sum(part**2 / (len(side) - 1) for part, side in zip(parts, here, strict=True))
            student = STUDENT[min(int(freedom + 1e-9), len(STUDENT)) - 1]
            error = math.sqrt(of_seeds + of_texts)
            reach = math.sqrt(student**2 * of_seeds + NORMAL**2 * of_texts) / error
            return Apart(metric, one, other, error, reach, "seeds and texts")
    return Apart(metric, one, other, math.sqrt(of_texts), NORMAL, "texts")
