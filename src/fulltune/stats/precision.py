from __future__ import annotations

import functools
import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import brentq
from scipy.special import chdtri, chndtrix, ndtr

from fulltune.stats.intervals import SeedSpread, UncertainValue, degrees_of_freedom, variance_of_mean

POWER = 0.8
MAX_ROWS_FACTOR = 100
MAX_SEEDS = 30
_DISCORDANCE = 0.1
"""Assumed share of rows on which two runs disagree."""


@dataclass(frozen=True)
class ComparisonPrecision:
    """The variances of a difference between methods, which can be rescaled to other numbers of rows or seeds."""

    shared: float
    """Variance due to the rows, which all seeds of a method share."""
    seeds: tuple[SeedSpread, ...]

    @classmethod
    def of(cls, uncertain: UncertainValue) -> ComparisonPrecision:
        return cls(max(0.0, uncertain.row_variance - variance_of_mean(uncertain.seeds, by_rows=True)), uncertain.seeds)

    def with_rows(self, factor: float) -> ComparisonPrecision:
        """Return the precision expected with `factor` times as many rows."""

        def changed(spread: SeedSpread) -> SeedSpread:
            by_rows = spread.by_rows / factor
            return replace(spread, variance=spread.beyond_rows + by_rows, by_rows=by_rows)

        return ComparisonPrecision(self.shared / factor, tuple(changed(one) for one in self.seeds))

    def with_seeds(self, counts: Sequence[int]) -> ComparisonPrecision:
        """Return the precision expected with these numbers of seeds. One seed borrows the other's variance."""
        most = max(counts)

        def changed(spread: SeedSpread, count: int) -> SeedSpread:
            """Return the spread expected with `count` seeds."""
            if spread.is_none:
                return spread
            degrees = max(1, (count if count > 1 else most) - 1)
            return replace(spread, num_seeds=count, degrees=degrees, borrowed=count == 1)

        return ComparisonPrecision(self.shared, tuple(map(changed, self.seeds, counts)))

    @property
    def degrees(self) -> float:
        return degrees_of_freedom(self.seeds)

    @property
    def row_variance(self) -> float:
        return self.shared + variance_of_mean(self.seeds, by_rows=True)

    @property
    def seed_variance(self) -> float:
        return max(0.0, variance_of_mean(self.seeds) - variance_of_mean(self.seeds, by_rows=True))

    def half_width(self, alpha: float, ratio: float = 1.0) -> float:
        """Return half the width of the two-sided interval at level 1 - `alpha`, if the variance between seeds is
        estimated at `ratio` times its true value."""
        shares, inverse = _inverse_chi_squared_quadrature(self.degrees)
        by_rows = variance_of_mean(self.seeds, by_rows=True)
        # The estimated variance scatters around the true one, which is at least the rows' part.
        estimated = ratio * max(variance_of_mean(self.seeds), by_rows)
        beyond = np.maximum(0.0, estimated * inverse - by_rows)
        return _mixture_quantile(np.sqrt(self.row_variance + beyond), shares, alpha)

    def variance_ratios(self, *, same_seeds: bool) -> list[float]:
        """Return equally likely values of the ratio of estimated to true variance between seeds, for a repeated
        comparison with other rows and, unless `same_seeds`, other seeds."""
        total, by_rows = variance_of_mean(self.seeds), variance_of_mean(self.seeds, by_rows=True)
        if math.isinf(self.degrees) or not total or (same_seeds and not by_rows):
            return [1.0]
        shares = [(step + 0.5) / _NUM_RATIOS for step in range(_NUM_RATIOS)]
        if not same_seeds:
            return [float(chdtri(self.degrees, 1 - share)) / self.degrees for share in shares]
        # The models stay the same and only the rows change, so the ratio is noncentral chi squared.
        scale, apart = by_rows / self.degrees, self.seed_variance * self.degrees / by_rows
        most = max(total, by_rows)
        return [float(chndtrix(share, self.degrees, apart)) * scale / most for share in shares]

    def detectable_difference(self, margin: float, alpha: float) -> float:
        """Return the smallest true difference above `margin` that is detected with 80 % power at level `alpha`."""
        ratios = self.variance_ratios(same_seeds=False)
        bounds = np.array([max(margin, self.half_width(alpha, ratio)) for ratio in ratios])
        error = math.sqrt(self.row_variance + self.seed_variance)
        if not error:
            return float(np.quantile(bounds, POWER))
        most = float(bounds.max()) + 5 * error
        return float(brentq(lambda size: float(ndtr((size - bounds) / error).mean()) - POWER, -most, most))


_NUM_RATIOS = 20


@functools.lru_cache(256)
def _inverse_chi_squared_quadrature(degrees: float) -> tuple[np.ndarray, np.ndarray]:
    """Return weights and nodes that integrate numerically over the distribution of degrees / chi-squared."""
    if math.isinf(degrees):
        return np.ones(1), np.ones(1)
    edges = np.concatenate([[0.0], np.geomspace(1e-7, 1.0, 160)])
    middles = np.concatenate([[edges[1] / 2], np.sqrt(edges[1:-1] * edges[2:])])
    return np.diff(edges), degrees / chdtri(degrees, 1 - middles)


def _mixture_quantile(deviations: np.ndarray, shares: np.ndarray, alpha: float) -> float:
    """Return the value that a mixture of centred normals exceeds with probability `alpha`/2."""
    if not deviations.any():
        return 0.0

    def outside(value: float) -> float:
        return float((shares * ndtr(-value / np.maximum(deviations, 1e-300))).sum())

    most = float(deviations.max())
    return float(brentq(lambda value: outside(value) - alpha / 2, 0.0, 40 * most, xtol=1e-5 * most, rtol=1e-5))


def planned_detectable_difference(num_rows: int, num_seeds: int, seed_sd: float, margin: float, alpha: float) -> float:
    """Return the smallest true difference above `margin` that a planned comparison detects with 80 % power, if two runs
    disagree on 10 % of the rows. `seed_sd` is the standard deviation between seeds."""
    # Disagreement between runs is assumed to be noise of single runs, which averages out over seeds.
    by_rows = _DISCORDANCE / num_rows / 2
    spread = SeedSpread(num_seeds, by_rows + seed_sd**2, by_rows, max(1, num_seeds - 1))
    return ComparisonPrecision(0.0, (spread, spread)).detectable_difference(margin, alpha)


def rows_and_seeds_needed(
    uncertain: UncertainValue, num_rows: int, margin: float, alpha: float, equivalence_alpha: float
) -> tuple[int | None, int | None]:
    """Return how many test rows, or how many seeds per method, would show a difference (at level `alpha`) or
    equivalence (at `equivalence_alpha`) if the estimate were exact. Each is None if no number would be enough."""
    now, size = ComparisonPrecision.of(uncertain), abs(uncertain.estimate)

    def decided(precision: ComparisonPrecision) -> bool:
        differs = size >= margin and size > precision.half_width(alpha)
        return differs or size + precision.half_width(2 * equivalence_alpha) < margin

    # More rows or seeds only narrow the interval, so bisection finds the first number that decides.
    factors: list[float] = np.geomspace(1, MAX_ROWS_FACTOR, 100).tolist()[1:]
    index = bisect_left(factors, True, key=lambda factor: decided(now.with_rows(factor)))
    rows = math.ceil(num_rows * factors[index]) if index < len(factors) else None
    fewest = min((one.num_seeds for one in now.seeds if not one.is_none), default=1)
    counts = range(fewest + 1, MAX_SEEDS + 1)
    index = bisect_left(counts, True, key=lambda count: decided(now.with_seeds([count] * len(now.seeds))))
    return rows, counts[index] if index < len(counts) else None
