"""How much of a task costs how much of what a model could do before: pure functions of the points that were tried."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fulltune.records.forgetting import Point, Preserved

BUDGETS = (0.005, 0.01, 0.02, 0.05)
"""Shares at which the frontier is said in numbers."""
NORMAL = 1.96
STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)
"""Standard errors in which a difference lies with 95 %, by degrees of freedom from 1 on; of more as of 10."""


def envelope(found: Preserved) -> list[Point]:
    """The points that no other one beats: by rising drift, and each better than all before it."""
    sign = 1 if found.greater_is_better else -1
    best: list[Point] = []
    known = (point for point in found.points if math.isfinite(point.metric) and math.isfinite(point.measured.drift))
    for point in sorted(known, key=lambda point: (point.measured.drift, -sign * point.metric)):
        if not best or sign * point.metric > sign * best[-1].metric:
            best.append(point)
    return best


def best_at(found: Preserved, limit: float) -> Point:
    """The point with the best metric among those whose drift is not above a limit, as far as they tell."""
    return next((point for point in reversed(envelope(found)) if point.measured.drift <= limit), found.start)


def drift_at(found: Preserved, metric: float) -> tuple[float, float]:
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


def at_equal_metric(first: Sequence[Preserved], second: Sequence[Preserved]) -> Apart | None:
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
