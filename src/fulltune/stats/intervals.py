"""Intervals of the difference of two methods, over rows and seeds, by pure functions (docs/concepts/statistics.md).

A draw is the difference on resampled rows plus a normal number whose spread is drawn from what k seeds tell about the
spread between seeds (chi squared, with the degrees of freedom of Welch and Satterthwaite): Student's t where seeds are
all that matters, the usual bootstrap where they do not. Seeds of two methods count as independent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import brentq
from scipy.special import ndtr

from fulltune.records.scores import Estimate
from fulltune.stats.bootstrap import Drawn, Resampled

SURPRISES = 2.0
"""Rows that disagree beyond those seen: 0 of 20 rows that differ do not prove that two models are equal. With none
seen, the interval is about 3 / rows, the rule of three."""
_LEAST_CLUSTERS = 2
"""One tells nothing of others: all its resamples are the same."""


# ---- spread between seeds --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SeedSpread:
    """What is known of one method's spread between seeds."""

    num_seeds: int
    variance: float
    """Of the metric between seeds, on these rows."""
    by_rows: float
    """Part of it that the rows alone make of equal models."""
    degrees: float
    """Of freedom; inf: the variance is assumed, or there is none."""
    borrowed: bool = False
    """Taken from another method, because this one has a single seed."""

    @property
    def is_none(self) -> bool:
        """The method is not trained: no number of seeds changes anything."""
        return self.variance == 0 and math.isinf(self.degrees)

    @property
    def beyond_rows(self) -> float:
        return max(0.0, self.variance - self.by_rows)


NO_SPREAD = SeedSpread(1, 0.0, 0.0, math.inf)
"""Of a method that is not trained."""


def seed_spreads(drawn: Drawn, fixed: Sequence[bool]) -> list[SeedSpread | None]:
    """The spread of each method, none of a fixed one (not trained); a method with one seed borrows the largest of the
    others, and without any it is None."""
    found = [
        NO_SPREAD if is_fixed else _spread(point, draws, drawn.num_clusters)
        for point, draws, is_fixed in zip(drawn.point, drawn.draws, fixed, strict=True)
    ]
    known = [spread for spread in found if spread is not None and not spread.is_none]
    if not known:
        return found
    widest = replace(max(known, key=lambda spread: spread.variance), num_seeds=1, borrowed=True)
    return [widest if spread is None else spread for spread in found]


def _spread(point: np.ndarray, draws: np.ndarray, num_clusters: int) -> SeedSpread | None:
    """Of a method with `point[seeds]` and `draws[draws, seeds]`; None: one seed tells nothing."""
    seeds = len(point)
    if seeds == 1:
        return None
    # Rows move each seed's metric and the seeds' mean; the part that differs from seed to seed is what averages out.
    of_one, of_mean = float(draws.var(axis=0).mean()), float(draws.mean(axis=1).var())
    by_rows = max(0.0, of_one - of_mean) * seeds / (seeds - 1) * _unbiased(num_clusters)
    return SeedSpread(seeds, float(point.var(ddof=1)), by_rows, seeds - 1)


def _unbiased(num_clusters: int) -> float:
    return num_clusters / max(1, num_clusters - 1)


# ---- a difference and its distribution -------------------------------------------------------------------------


@dataclass(frozen=True)
class Uncertain:
    """A number with its distribution: a mixture of normal ones, a draw of rows each."""

    estimate: float
    centres: np.ndarray
    """[draws]"""
    spreads: np.ndarray
    """Standard deviation around each, [draws]."""
    row_variance: float
    """Its part that comes from the rows, noise of single seeds included."""
    seeds: tuple[SeedSpread, ...]
    """Of each method."""
    seeds_known: bool = True

    def below(self, value: float) -> float:
        """Chance that the true number is below `value`."""
        return float(ndtr((value - self.centres) / self.spreads).mean())

    def quantile(self, share: float) -> float:
        """The number that the true one is below with this chance."""
        low, high = float((self.centres - 40 * self.spreads).min()), float((self.centres + 40 * self.spreads).max())
        return float(brentq(lambda value: self.below(value) - share, low, high, xtol=1e-8, maxiter=500))

    def interval(self, alpha: float) -> tuple[float, float]:
        """Two-sided, wrong in `alpha` of cases."""
        return self.quantile(alpha / 2), self.quantile(1 - alpha / 2)

    def p_value(self, value: float = 0.0) -> float:
        """Two-sided, of the true number being `value`."""
        below = self.below(value)
        return min(1.0, 2 * min(below, 1 - below))

    def equivalence_p(self, margin: float) -> float:
        """The larger of the two one-sided tests (TOST)."""
        return max(self.below(-margin), 1 - self.below(margin))


def mean_of_method(drawn: Drawn, method: int, spreads: Sequence[SeedSpread | None], span: float | None) -> Uncertain:
    """A method's metric, the mean of its seeds."""
    centres = drawn.draws[method].mean(axis=1)
    return _uncertain(float(drawn.point[method].mean()), centres, [spreads[method]], drawn.num_clusters, span)


def difference(
    drawn: Drawn, one: int, other: int, spreads: Sequence[SeedSpread | None], sign: float, span: float | None
) -> Uncertain:
    """One method minus another, each the mean of its seeds; `sign` is -1 where smaller is better, and `span` the most
    that the metric can differ by."""
    centres = sign * (drawn.draws[one].mean(axis=1) - drawn.draws[other].mean(axis=1))
    estimate = sign * float(drawn.point[one].mean() - drawn.point[other].mean())
    return _uncertain(estimate, centres, [spreads[one], spreads[other]], drawn.num_clusters, span)


def _uncertain(
    estimate: float, centres: np.ndarray, spreads: Sequence[SeedSpread | None], num_clusters: int, span: float | None
) -> Uncertain:
    known = tuple(spread for spread in spreads if spread is not None)
    chance = np.random.default_rng(1)
    # Few clusters tell little about the spread of clusters, too.
    stretch = np.sqrt(_unbiased(num_clusters) / _chi_squared(chance, max(1, num_clusters - 1), len(centres)))
    centres = estimate + (centres - estimate) * stretch
    surprise = SURPRISES * (0.0 if span is None else span / num_clusters) ** 2
    found = variance_of_mean(known) / _chi_squared(chance, degrees_of_mean(known), len(centres))
    beyond = np.maximum(0.0, found - variance_of_mean(known, by_rows=True))
    return Uncertain(
        estimate=estimate,
        centres=centres,
        # Never exactly 0: a step of a distribution function has no quantile.
        spreads=np.sqrt(beyond + surprise) + 1e-12 * (1 + abs(estimate)),
        row_variance=float(centres.var()) + surprise,
        seeds=known,
        seeds_known=len(known) == len(spreads),
    )


def paired(one: Resampled, other: Resampled, span: float | None, confidence: float) -> Estimate | None:
    """A metric of one model minus another's on the same resamples, with the interval over the rows; None when they are
    not of the same rows, of fewer than two clusters, or have no finite value in common."""
    sizes = [(model.num_rows, model.num_clusters, model.draws.shape) for model in (one, other)]
    if sizes[0] != sizes[1] or one.num_clusters < _LEAST_CLUSTERS:
        return None
    finite = np.isfinite(one.draws) & np.isfinite(other.draws)
    if not finite.any() or not np.isfinite([one.value, other.value]).all():
        return None
    centres = one.draws[finite] - other.draws[finite]
    found = _uncertain(one.value - other.value, centres, [NO_SPREAD, NO_SPREAD], one.num_clusters, span)
    low, high = found.interval(1 - confidence)
    most = math.inf if span is None else span
    return Estimate(value=found.estimate, low=max(low, -most), high=min(high, most))


def variance_of_mean(spreads: Sequence[SeedSpread], *, by_rows: bool = False) -> float:
    """Variance between seeds of the methods' means, or the part of it that comes from the rows."""
    return sum((spread.by_rows if by_rows else spread.variance) / spread.num_seeds for spread in spreads)


def degrees_of_mean(spreads: Sequence[SeedSpread]) -> float:
    """Degrees of freedom of that variance (Welch and Satterthwaite); a borrowed one is not better known by being used
    twice."""
    if any(spread.borrowed for spread in spreads):
        return min(spread.degrees for spread in spreads)
    # Below what the rows alone make, a variance that was found says nothing but that the seeds' part is small.
    parts = [(max(one.variance, one.by_rows) / one.num_seeds, one.degrees) for one in spreads]
    whole = sum(variance for variance, _ in parts)
    scatter = sum(variance**2 / degrees for variance, degrees in parts)
    return whole**2 / scatter if scatter > 0 else math.inf


def _chi_squared(chance: np.random.Generator, degrees: float, count: int) -> np.ndarray:
    """Over its degrees of freedom."""
    if math.isinf(degrees):
        return np.ones(count)
    return np.maximum(chance.chisquare(degrees, count) / degrees, 1e-12)


# ---- several tests ---------------------------------------------------------------------------------------------


def holm(p_values: Sequence[float], alpha: float) -> list[tuple[float, float]]:
    """Several tests that together are wrong in no more than `alpha` of cases (Holm 1979): of each, in the order given,
    the adjusted p-value and the level at which it is made, so that its interval says the same."""
    found, highest = {}, 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda place: p_values[place])):
        left = len(p_values) - rank
        highest = max(highest, min(1.0, left * p_values[place]))
        found[place] = (highest, alpha / left)
    return [found[place] for place in range(len(p_values))]
