"""Compute intervals for the difference of two methods over rows and seeds (docs/concepts/statistics.md).

Each draw is the difference on resampled rows plus normal noise for the seeds, whose variance follows a scaled
chi-squared distribution (Welch-Satterthwaite degrees of freedom). With seed noise alone, this gives Student's t;
without it, the usual bootstrap.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import brentq
from scipy.special import ndtr

from fulltune.records.scores import Estimate
from fulltune.stats.bootstrap import Resampled, ResampledTrials

EXTRA_DISAGREEMENTS = 2.0
"""Number of disagreeing rows added to those observed, because 0 of 20 do not prove equality (rule of three)."""
_MIN_CLUSTERS = 2


# ---- spread between seeds --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SeedSpread:
    """The estimated variance of a method's metric between seeds."""

    num_seeds: int
    variance: float
    by_rows: float
    """Part of the variance that the rows alone would cause between equally good models."""
    degrees: float
    """Degrees of freedom, infinite if the variance is assumed or zero."""
    borrowed: bool = False
    """True if the variance is another method's, because this method has a single seed."""

    @property
    def is_none(self) -> bool:
        """True for an untrained method, whose metric does not depend on a seed."""
        return self.variance == 0 and math.isinf(self.degrees)

    @property
    def beyond_rows(self) -> float:
        return max(0.0, self.variance - self.by_rows)


NO_SPREAD = SeedSpread(1, 0.0, 0.0, math.inf)


def estimate_seed_spreads(drawn: ResampledTrials, are_untrained: Sequence[bool]) -> list[SeedSpread | None]:
    """Estimate each method's variance between seeds, 0 for untrained methods. A method with one seed gets the others'
    largest variance, or None if the others have none."""
    spreads = [
        NO_SPREAD if is_fixed else _estimate_spread(point, draws, drawn.num_clusters)
        for point, draws, is_fixed in zip(drawn.point, drawn.draws, are_untrained, strict=True)
    ]
    estimated = [spread for spread in spreads if spread is not None and not spread.is_none]
    if not estimated:
        return spreads
    widest = replace(max(estimated, key=lambda spread: spread.variance), num_seeds=1, borrowed=True)
    return [widest if spread is None else spread for spread in spreads]


def _estimate_spread(point: np.ndarray, draws: np.ndarray, num_clusters: int) -> SeedSpread | None:
    """Estimate the variance between seeds from the metric on all rows [seeds] and on resamples [draws, seeds], or
    return None for one seed."""
    seeds = len(point)
    if seeds == 1:
        return None
    # Rows affect each seed's metric and the mean over seeds; only what differs between seeds averages out.
    of_one, of_mean = float(draws.var(axis=0).mean()), float(draws.mean(axis=1).var())
    by_rows = max(0.0, of_one - of_mean) * seeds / (seeds - 1) * _unbiased_factor(num_clusters)
    return SeedSpread(seeds, float(point.var(ddof=1)), by_rows, seeds - 1)


def _unbiased_factor(num_clusters: int) -> float:
    return num_clusters / max(1, num_clusters - 1)


# ---- a difference and its distribution -------------------------------------------------------------------------


@dataclass(frozen=True)
class UncertainValue:
    """A number whose distribution is a mixture of one normal distribution per resample."""

    estimate: float
    centres: np.ndarray
    """Mean of each normal distribution: [draws]."""
    spreads: np.ndarray
    """Standard deviation of each normal distribution: [draws]."""
    row_variance: float
    seeds: tuple[SeedSpread, ...]
    seeds_known: bool = True

    def below(self, value: float) -> float:
        return float(ndtr((value - self.centres) / self.spreads).mean())

    def quantile(self, share: float) -> float:
        """Return the value below which the number lies with probability `share`."""
        low, high = float((self.centres - 40 * self.spreads).min()), float((self.centres + 40 * self.spreads).max())
        return float(brentq(lambda value: self.below(value) - share, low, high, xtol=1e-8, maxiter=500))

    def interval(self, alpha: float) -> tuple[float, float]:
        return self.quantile(alpha / 2), self.quantile(1 - alpha / 2)

    def p_value(self) -> float:
        """Return the two-sided p-value of the hypothesis that the true number is 0."""
        below = self.below(0.0)
        return min(1.0, 2 * min(below, 1 - below))

    def equivalence_p(self, margin: float) -> float:
        """Return the p-value for equivalence within ±`margin`, the larger of two one-sided tests (TOST)."""
        return max(self.below(-margin), 1 - self.below(margin))


def mean_of_method(
    drawn: ResampledTrials, method: int, spreads: Sequence[SeedSpread | None], span: float | None
) -> UncertainValue:
    """Return the mean metric over seeds of a method (given by index), with its uncertainty. `span` is the metric's
    range, or None if unbounded."""
    centres = drawn.draws[method].mean(axis=1)
    return _uncertain_value(float(drawn.point[method].mean()), centres, [spreads[method]], drawn.num_clusters, span)


def difference_of_methods(
    drawn: ResampledTrials,
    first: int,
    second: int,
    spreads: Sequence[SeedSpread | None],
    sign: float,
    span: float | None,
) -> UncertainValue:
    """Return how much better method `first` is than `second` in the mean metric over seeds, with the uncertainty.

    `spreads` has one entry per method. `sign` is -1 if smaller is better. `span` is the metric's range, or None if
    unbounded.
    """
    centres = sign * (drawn.draws[first].mean(axis=1) - drawn.draws[second].mean(axis=1))
    estimate = sign * float(drawn.point[first].mean() - drawn.point[second].mean())
    return _uncertain_value(estimate, centres, [spreads[first], spreads[second]], drawn.num_clusters, span)


def _uncertain_value(
    estimate: float, draws: np.ndarray, spreads: Sequence[SeedSpread | None], num_clusters: int, span: float | None
) -> UncertainValue:
    """Return an estimate's distribution from bootstrap draws [draws] and seed spreads, widened for few clusters or
    seeds. `span` is the metric's range."""
    estimated = tuple(spread for spread in spreads if spread is not None)
    chance = np.random.default_rng(1)
    # With few clusters, the spread between clusters is uncertain as well.
    stretch = np.sqrt(
        _unbiased_factor(num_clusters) / _scaled_chi_squared(chance, max(1, num_clusters - 1), len(draws))
    )
    draws = estimate + (draws - estimate) * stretch
    surprise = EXTRA_DISAGREEMENTS * (0.0 if span is None else span / num_clusters) ** 2
    between_seeds = variance_of_mean(estimated) / _scaled_chi_squared(chance, degrees_of_freedom(estimated), len(draws))
    beyond = np.maximum(0.0, between_seeds - variance_of_mean(estimated, by_rows=True))
    return UncertainValue(
        estimate=estimate,
        centres=draws,
        # Never exactly 0, because a step function has no inverse.
        spreads=np.sqrt(beyond + surprise) + 1e-12 * (1 + abs(estimate)),
        row_variance=float(draws.var()) + surprise,
        seeds=estimated,
        seeds_known=len(estimated) == len(spreads),
    )


def paired_difference(first: Resampled, second: Resampled, span: float | None, confidence: float) -> Estimate | None:
    """Return `first`'s metric minus `second`'s with its bootstrap interval, or None if there are too few rows or no
    finite values. `span` is the metric's range, or None if unbounded."""
    sizes = [(model.num_rows, model.num_clusters, model.draws.shape) for model in (first, second)]
    if sizes[0] != sizes[1] or first.num_clusters < _MIN_CLUSTERS:
        return None
    finite = np.isfinite(first.draws) & np.isfinite(second.draws)
    if not finite.any() or not np.isfinite([first.value, second.value]).all():
        return None
    centres = first.draws[finite] - second.draws[finite]
    gap = _uncertain_value(first.value - second.value, centres, [NO_SPREAD, NO_SPREAD], first.num_clusters, span)
    low, high = gap.interval(1 - confidence)
    limit = math.inf if span is None else span
    return Estimate(value=gap.estimate, low=max(low, -limit), high=min(high, limit))


def variance_of_mean(spreads: Sequence[SeedSpread], *, by_rows: bool = False) -> float:
    """Return how much the seeds add to the variance of a mean or of a difference of means. With `by_rows`, only the
    part due to rows counts."""
    return sum((spread.by_rows if by_rows else spread.variance) / spread.num_seeds for spread in spreads)


def degrees_of_freedom(spreads: Sequence[SeedSpread]) -> float:
    """Return the Welch-Satterthwaite degrees of freedom of `variance_of_mean`."""
    if any(spread.borrowed for spread in spreads):
        return min(spread.degrees for spread in spreads)
    # A variance below the rows' part only shows that the seeds' part is small.
    parts = [(max(one.variance, one.by_rows) / one.num_seeds, one.degrees) for one in spreads]
    total = sum(variance for variance, _ in parts)
    scatter = sum(variance**2 / degrees for variance, degrees in parts)
    return total**2 / scatter if scatter > 0 else math.inf


def _scaled_chi_squared(chance: np.random.Generator, degrees: float, count: int) -> np.ndarray:
    """Draw `count` values of chi-squared / `degrees`, which are 1 if `degrees` is infinite."""
    if math.isinf(degrees):
        return np.ones(count)
    return np.maximum(chance.chisquare(degrees, count) / degrees, 1e-12)


# ---- several tests ---------------------------------------------------------------------------------------------


def correct_p_values(p_values: Sequence[float], alpha: float) -> list[tuple[float, float]]:
    """Correct p-values for several tests at the joint level `alpha` (Holm 1979); return each test's adjusted p-value
    and significance level."""
    adjusted, highest = {}, 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        left = len(p_values) - rank
        highest = max(highest, min(1.0, left * p_values[index]))
        adjusted[index] = (highest, alpha / left)
    return [adjusted[index] for index in range(len(p_values))]
