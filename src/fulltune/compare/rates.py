"""Search a method's learning rate by successive halving on eval rows, as pure functions (docs/guides/compare.md)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from fulltune.records.comparison import Search, Trial
from fulltune.stats.curves import error_of_share

STEP = math.sqrt(10)
MOST_EXTENSIONS = 2
LEAST_STEPS = 10
"""Minimum number of steps in a short trial, because in fewer steps all rates look alike."""
CLEARLY = 2
"""Standard errors by which a whole run leads clearly."""


@dataclass(frozen=True)
class Scale:
    """Direction, number of rows and kind of the eval metric."""

    greater_is_better: bool
    eval_rows: int
    is_share: bool

    def oriented(self, metric: float) -> float:
        """Return the metric with its sign changed so that higher is better, and NaN is worst."""
        return -math.inf if math.isnan(metric) else metric if self.greater_is_better else -metric

    def tolerance(self, metric: float) -> float:
        """Return the difference below which two trials count as equal: a standard error for shares, else 1 %."""
        if math.isnan(metric):
            return 0.0
        if not self.is_share:
            return 0.01 * abs(metric)
        return error_of_share(metric, self.eval_rows)

    def ahead(self, rate: float, tried: Mapping[float, float]) -> float:
        """Return a rate's lead over the others in tolerances, or infinity if all others diverged."""
        others = max((self.oriented(metric) for other, metric in tried.items() if other != rate), default=math.inf)
        apart, least = self.oriented(tried[rate]) - others, self.tolerance(tried[rate])
        return apart / least if least else math.inf if apart > 0 else 0.0


def grid(usual: float, rates: Sequence[float] | None, fixed: float | None) -> tuple[float, ...]:
    """Return the recipe's rates, or three around the default."""
    if fixed is not None:
        return (fixed,)
    return tuple(sorted(rates)) if rates is not None else tuple(rounded(usual * STEP**power) for power in (-1, 0, 1))


def rounded(rate: float) -> float:
    return float(f"{rate:.1e}")


def nearest(rates: Iterable[float], near: float) -> float:
    """Return the rate closest to `near` on a log scale, of equally close ones the lower."""
    return min(sorted(rates), key=lambda rate: round(abs(math.log(rate / near)) / math.log(STEP), 1))


def share_of_steps(search_share: float, total_steps: int) -> float:
    """Return the share of a run's steps for a short trial."""
    return min(1.0, max(search_share, LEAST_STEPS / max(1, total_steps)))


def search_trial(method: str, rate: float, share: float, seed: int) -> Trial:
    name = f"{method}-rate{rate:g}-{share:.1%}".replace("%", "pct")
    return Trial(name=name, method=method, learning_rate=rate, seed=seed, share=share, searches=True)


def final_trial(method: str, rate: float, seed: int, *, check: bool = False) -> Trial:
    """Return the trial of a whole run; `check` marks a rate that is only tried out."""
    name = f"{method}-rate{rate:g}-seed{seed}" if check else f"{method}-seed{seed}"
    return Trial(name=name, method=method, learning_rate=rate, seed=seed)


def best_of(tried: Mapping[float, float], scale: Scale) -> list[float]:
    """Return the rates with the best metric, in ascending order."""
    best = max(scale.oriented(metric) for metric in tried.values())
    return sorted(rate for rate in tried if scale.oriented(tried[rate]) == best)


def choice(tried: Mapping[float, float], scale: Scale, usual: float | None) -> float:
    """Return the default rate, or the best one if it leads by more than the tolerance."""
    best, *_ = best_of(tried, scale)
    if usual is None or usual not in tried:
        return best
    ahead = scale.oriented(tried[best]) - scale.oriented(tried[usual])
    return best if ahead > scale.tolerance(tried[best]) else usual


def _choice_reason(tried: Mapping[float, float], rate: float, scale: Scale, what: str) -> str:
    if rate in best_of(tried, scale)[:1]:
        return f"the best of {len(tried)} {what}"
    least = "the error of the eval rows" if scale.is_share else "1 %"
    return f"the default rate: no other led by more than {least} in {what}"


def beyond(tried: Mapping[float, float], scale: Scale) -> float | None:
    """Return the next rate beyond the grid if the best rate is at the grid's edge and leads clearly, else None."""
    rates, best = sorted(tried), best_of(tried, scale)[0]
    if math.isnan(tried[best]):  # nothing learned anything: it can only be too fast
        return rounded(rates[0] / STEP)
    for edge, neighbour, step in ((rates[-1], rates[-2], STEP), (rates[0], rates[1], 1 / STEP)):
        if scale.oriented(tried[edge]) == scale.oriented(tried[best]):
            return (
                rounded(edge * step)
                if scale.ahead(edge, {rate: tried[rate] for rate in (edge, neighbour)}) > 1
                else None
            )
    return None


def finished(method: str, tried: Mapping[float, float], share: float, scale: Scale, usual: float) -> Search:
    """Return the search's result from the short trials."""
    rate = choice(tried, scale, usual)
    on_edge = rate in (min(tried), max(tried)) and scale.ahead(rate, tried) > 1
    how = _choice_reason(tried, rate, scale, f"short runs of {share:.0%} of the steps")
    how += ", at the edge of those tried" * on_edge
    return Search(method=method, tried=dict(tried), share=share, chosen=rate, reason=how, on_edge=on_edge, usual=usual)


def next_whole(search: Search, whole: Mapping[float, float], scale: Scale, may_extend: bool, most: int) -> float | None:
    """Return the rate of the next whole run, or None if no further run is needed.

    The default rate comes first, then the best of the short trials, then rates further out while the edge leads
    clearly.
    """
    short = search.tried
    if len(short) < 2 or search.whole or len(whole) >= most:
        return None
    too_high = min((rate for rate, metric in short.items() if math.isnan(metric)), default=math.inf)
    left = {rate: metric for rate, metric in short.items() if rate not in whole and rate < too_high}
    if search.usual is not None and search.usual in left:
        return search.usual
    if len(whole) < 2:
        return nearest(best_of(left, scale), search.chosen) if left else None
    best, *_ = best_of(whole, scale)
    if best not in (min(whole), max(whole)) or not _leads_clearly(best, whole, scale):
        return None
    upwards = best == max(whole)
    if further := [rate for rate in left if (rate > best) == upwards]:
        return nearest(further, best)
    rate = rounded(best * STEP if upwards else best / STEP)
    return rate if may_extend and rate < too_high else None


def _leads_clearly(best: float, whole: Mapping[float, float], scale: Scale) -> bool:
    return CLEARLY < scale.ahead(best, whole) < math.inf


def after_whole(search: Search, whole: Mapping[float, float], scale: Scale) -> Search:
    """Return the search with the best whole run's rate if it leads, else with the default rate."""
    rate = choice(whole, scale, search.usual)
    rates = {*search.tried, *whole}
    on_edge = rate in (min(rates), max(rates)) and _leads_clearly(rate, whole, scale)
    reason = _choice_reason(whole, rate, scale, "whole runs")
    changes = {"chosen": rate, "whole": dict(whole), "reason": reason, "on_edge": on_edge}
    return search.model_copy(update=changes)


def after_divergence(search: Search) -> float | None:
    """Return the next lower rate after a divergence, or None if it is the lowest."""
    if not search.tried:
        return None
    lower, lowest = rounded(search.chosen / STEP), min(search.tried)
    lower_tried = max((rate for rate in search.tried if rate < search.chosen), default=None)
    return lower_tried or (lower if lower > 0.9 * lowest / STEP**MOST_EXTENSIONS else None)


def replaced(search: Search, lower: float, reason: str) -> Search:
    """Return the search with a lower rate; this invalidates the short trials, and the diverged rate's metric becomes
    NaN."""
    tried = {rate: math.nan if rate == search.chosen else metric for rate, metric in search.tried.items()}
    changes = {"tried": tried, "chosen": lower, "reason": reason, "on_edge": lower <= min(tried)}
    return search.model_copy(update=changes)
