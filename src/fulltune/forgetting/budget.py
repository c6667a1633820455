"""Keeping forgetting within a budget: a weight by dual ascent while training, then weights scaled back (Wortsman et
al. 2022, arXiv 2109.01903), a certificate on sealed texts, and methods compared by the points that were tried; pure
functions of what was measured on generic text."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fulltune.records.forgetting import BudgetResult, Drift, InterpolationPoint

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
SURELY = 1.28
"""Standard errors of a difference of two halves that a chosen point stays away from the budget by: so that the sealed
half says the same in nine of ten cases."""


LANGUAGE, STATES = (0.1, 1.0), (0.005, 0.03)
"""Smallest weight of the generic-text loss, which is also the first, and largest weight, each to be divided by the
budget's limit: of a language model, whose loss is a divergence in nats a token, and of others, whose loss is 1 - cosine
of hidden states. Above the largest ones the task was learned less and hardly less was forgotten (2026-11-27)."""
PASSING = 1.0
"""Drift allowed above the limit at the peak learning rate, as a multiple of the limit; it falls to 0 with the rate."""
MOST_FACTOR = 1.5
"""Largest factor by which one measurement changes the weight."""


def next_weight(weight: float, measured: Drift, limit: float, rate: float, bounds: tuple[float, float]) -> float:
    """The weight of generic text after a measurement: higher where the drift's upper bound is above the limit."""
    allowed = limit * (1 + PASSING * rate)
    if not math.isfinite(measured.upper):
        return weight
    step = (measured.upper - allowed) / allowed
    factor = math.exp(min(max(step, -math.log(MOST_FACTOR)), math.log(MOST_FACTOR)))
    return min(max(weight * factor, bounds[0] / limit), bounds[1] / limit)


def least_limit(measured: Drift) -> float:
    """The smallest limit within which a point may be chosen: its sealed half will most likely say the same."""
    return measured.upper + SURELY * math.sqrt(2) * measured.error


def is_within(measured: Drift, limit: float) -> bool:
    """Whether a point may be chosen."""
    return least_limit(measured) <= limit


MOST_OF_IT = 0.9


def limit_for_most(found: BudgetResult) -> float | None:
    """The smallest limit that keeps `MOST_OF_IT` of the trained model's gain; None: it is kept, or there is no gain."""
    most = found.gain_of(found.end)
    if found.gain_of(found.choice) >= MOST_OF_IT * most:
        return None
    good = [one for one in found.points if found.gain_of(one) >= MOST_OF_IT * most]
    return min(least_limit(one.drift) for one in good)


def crossing(inside: InterpolationPoint, outside: InterpolationPoint, limit: float) -> float:
    """About the share between two points where a straight line between them crosses the limit (false position)."""
    low, high = (least_limit(point.drift) - limit for point in (inside, outside))
    part = low / (low - high) if math.isfinite(low - high) else 0.5
    return round(inside.share + part * (outside.share - inside.share), 3)


def best(points: Sequence[InterpolationPoint], limit: float, greater_is_better: bool) -> InterpolationPoint:
    """The point within the limit (the untouched model always is) with the best metric; among equals the least moved."""
    sign = 1 if greater_is_better else -1
    possible = [point for point in points if point.is_start or is_within(point.drift, limit)]

    def order(point: InterpolationPoint) -> tuple[float, float]:  # one whose metric is not finite is never better
        return sign * point.metric if math.isfinite(point.metric) else -math.inf, -point.drift.mean

    return max(possible, key=order)
