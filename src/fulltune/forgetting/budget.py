"""Keeping forgetting within a budget: pure functions of what was measured on generic text.

Three means, in the order in which a run uses them. While it trains, generic text counts with a weight that rises as
the budget is spent (dual ascent on the constraint). Afterwards the change of the weights is scaled back as far as it
must be (Wortsman et al. 2022, arXiv 2109.01903; by layers as Wang et al. 2025, arXiv 2410.17146), by what texts say
that were read all along. Last, the point that was chosen is measured once on texts that nothing has read before.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from fulltune.records.forgetting import Certificate, Drift, Point

ONE_SIDED = 1.645
"""Standard errors above the mean below which the true one lies with 95 %."""
SURELY = 1.28
"""Standard errors of a difference of two halves that a chosen point stays away from the budget by: so that the sealed
half says the same in nine of ten cases."""
FIRST_WEIGHT, LEAST_WEIGHT, MOST_WEIGHT = 0.3, 0.01, 30.0
MOST_FACTOR = 4.0
"""By which the weight changes at once."""


def limit_of(budget: float, writes: bool) -> float:
    """The budget in the units of the drift: nats a token for language models, else 1 - cosine."""
    return -math.log1p(-budget) if writes else budget


def upper(measured: Drift) -> float:
    """Above the true drift with 95 %."""
    return measured.drift + ONE_SIDED * measured.error


def next_weight(weight: float, measured: Drift, limit: float) -> float:
    """The weight of generic text after a measurement: higher where the drift's upper bound is above the limit."""
    step = (upper(measured) - limit) / limit
    factor = math.exp(min(max(step, -math.log(MOST_FACTOR)), math.log(MOST_FACTOR)))
    return min(max(weight * factor, LEAST_WEIGHT), MOST_WEIGHT)


def is_within(measured: Drift, limit: float) -> bool:
    """Whether a point may be chosen: its sealed half will most likely say the same."""
    return upper(measured) + SURELY * math.sqrt(2) * measured.error <= limit


def best(points: Sequence[Point], limit: float, greater_is_better: bool) -> Point:
    """The point within the limit with the best metric; among equals the one that moved less. The untouched model, whose
    share is 0, is within any limit."""
    sign = 1 if greater_is_better else -1
    possible = [point for point in points if point.share == 0 or is_within(point.measured, limit)]
    return max(possible, key=lambda point: (sign * point.metric, -point.measured.drift))


def certified(measured: Drift, limit: float) -> Certificate:
    """What the sealed half says: passed where the drift is below the limit with 95 %."""
    return Certificate(measured=measured, limit=limit, upper=upper(measured), passed=upper(measured) <= limit)
