"""Compute the replay weight by dual ascent on a budget for forgetting, and choose among interpolated weights (Wortsman
et al. 2022, arXiv 2109.01903)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fulltune.records.forgetting import BudgetResult, Drift, InterpolationPoint

MIN_TEXTS, MAX_TEXTS, MAX_REPLAYED = 40, 600, 1100
"""Minimum and maximum number of selection texts (and of held-out texts), and maximum number of replayed texts."""
SELECTION_TOKENS = 12_800
SHARES = (1.0, 0.75, 0.5, 0.25)
"""Interpolation points that are tried first; 0 is the pretrained model."""
REFINEMENTS = 2
NUM_POINTS = 1 + len(SHARES) + REFINEMENTS
MIN_SHARE_STEP = 0.01
MAX_ROWS = 300
SAFETY_ERRORS = 1.28
"""Distance from the limit, in standard errors, at which the held-out texts confirm the choice in nine of ten cases."""


LANGUAGE_WEIGHTS, STATE_WEIGHTS = (0.1, 1.0), (0.005, 0.03)
"""Smallest (also initial) and largest product of replay weight and drift limit, for language models (nats per token)
and other models (1 - cosine). Larger weights slowed learning in our tests."""
MAX_EXCESS = 1.0
"""Drift allowed above the limit at the peak learning rate, as a multiple of the limit."""
MAX_FACTOR = 1.5


def next_replay_weight(
    weight: float, measured: Drift, limit: float, rate_share: float, bounds: tuple[float, float]
) -> float:
    """Return the next replay weight: higher if the measured drift exceeds its limit, else lower. `rate_share` is the
    learning rate divided by its peak; `bounds` are `LANGUAGE_WEIGHTS` or `STATE_WEIGHTS`."""
    allowed = limit * (1 + MAX_EXCESS * rate_share)
    if not math.isfinite(measured.upper):
        return weight
    step = (measured.upper - allowed) / allowed
    factor = math.exp(min(max(step, -math.log(MAX_FACTOR)), math.log(MAX_FACTOR)))
    return min(max(weight * factor, bounds[0] / limit), bounds[1] / limit)


def smallest_limit(measured: Drift) -> float:
    """Return the smallest limit at which an interpolation with this drift may be chosen."""
    return measured.upper + SAFETY_ERRORS * math.sqrt(2) * measured.error


def is_within(measured: Drift, limit: float) -> bool:
    return smallest_limit(measured) <= limit


MOST_GAIN = 0.9


def limit_for_most_gain(result: BudgetResult) -> float | None:
    """Return the smallest drift limit that allows the share `MOST_GAIN` of the trained model's gain, or None if the
    chosen point already has it."""
    most = result.metric_gain(result.end)
    if result.metric_gain(result.choice) >= MOST_GAIN * most:
        return None
    return min(smallest_limit(point.drift) for point in result.points if result.metric_gain(point) >= MOST_GAIN * most)


def share_at_limit(inside: InterpolationPoint, outside: InterpolationPoint, limit: float) -> float:
    """Estimate by linear interpolation the share at which drift reaches `limit`, from a point within the limit and one
    beyond it."""
    low, high = (smallest_limit(point.drift) - limit for point in (inside, outside))
    fraction = low / (low - high) if math.isfinite(low - high) else 0.5
    return round(inside.share + fraction * (outside.share - inside.share), 3)


def best_point_within(
    points: Sequence[InterpolationPoint], limit: float, greater_is_better: bool
) -> InterpolationPoint:
    """Return the point with the best metric among the start and the points within the limit; among equals, the one with
    the least drift."""
    sign = 1 if greater_is_better else -1
    possible = [point for point in points if point.is_start or is_within(point.drift, limit)]

    def order(point: InterpolationPoint) -> tuple[float, float]:  # a non-finite metric is never better
        return sign * point.metric if math.isfinite(point.metric) else -math.inf, -point.drift.mean

    return max(possible, key=order)
