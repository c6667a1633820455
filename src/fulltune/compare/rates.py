"""The search for a method's learning rate: successive halving on eval rows (docs/compare.md), as pure functions.

`tried` and `whole` map rates to metrics on the same eval rows, of short trials and of whole runs; `may_extend` is false
for a grid that the user gave.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from fulltune.records.comparison import Search, Trial
from fulltune.stats.curves import error_of_share

STEP = math.sqrt(10)
"""Between two rates of a grid."""
MOST_EXTENSIONS = 2
LEAST_STEPS = 10
"""Of a short trial: with fewer all rates look alike."""
CLEARLY = 2
"""Standard errors by which a whole run is clearly better than another, of one seed each."""


@dataclass(frozen=True)
class Scale:
    """How the eval rows measure."""

    greater_is_better: bool
    eval_rows: int
    is_share: bool
    """The metric is a share."""

    def oriented(self, metric: float) -> float:
        """So that more is better; NaN, for a trial that diverged, is worse than anything."""
        return -math.inf if math.isnan(metric) else metric if self.greater_is_better else -metric

    def tolerance(self, metric: float) -> float:
        """What trials may differ by without one being known to be better: a standard error of a share, else 1 %."""
        if math.isnan(metric):
            return 0.0
        if not self.is_share:
            return 0.01 * abs(metric)
        return error_of_share(metric, self.eval_rows)

    def ahead(self, rate: float, tried: Mapping[float, float]) -> float:
        """By how many of these the trial with a rate is ahead of all others; inf: the others diverged."""
        others = max((self.oriented(metric) for other, metric in tried.items() if other != rate), default=math.inf)
        apart, least = self.oriented(tried[rate]) - others, self.tolerance(tried[rate])
        return apart / least if least else math.inf if apart > 0 else 0.0


def grid(usual: float, given: Sequence[float] | None, fixed: float | None) -> tuple[float, ...]:
    """The rates that a search begins with: those that the recipe gives, else three around the usual one."""
    if fixed is not None:
        return (fixed,)
    return tuple(sorted(given)) if given is not None else tuple(rounded(usual * STEP**power) for power in (-1, 0, 1))


def rounded(rate: float) -> float:
    """To two digits, as people write rates."""
    return float(f"{rate:.1e}")


def nearest(rates: Iterable[float], near: float) -> float:
    """Of these rates the one nearest to another; of equally near ones, as rates are rounded, the lower."""
    return min(sorted(rates), key=lambda rate: round(abs(math.log(rate / near)) / math.log(STEP), 1))


def share_of_steps(search_share: float, total_steps: int) -> float:
    """What a short trial takes of a run's steps: as asked for, but at least `LEAST_STEPS`."""
    return min(1.0, max(search_share, LEAST_STEPS / max(1, total_steps)))


def search_trial(method: str, rate: float, share: float, seed: int) -> Trial:
    """A short trial of a search."""
    name = f"{method}-rate{rate:g}-{share:.1%}".replace("%", "pct")
    return Trial(name=name, method=method, learning_rate=rate, seed=seed, share=share, searches=True)


def final_trial(method: str, rate: float, seed: int, *, check: bool = False) -> Trial:
    """A whole run; with `check` one with another rate than the search chose."""
    name = f"{method}-rate{rate:g}-seed{seed}" if check else f"{method}-seed{seed}"
    return Trial(name=name, method=method, learning_rate=rate, seed=seed)


def best_of(tried: Mapping[float, float], scale: Scale) -> list[float]:
    """The rates with the best metric, the lowest first."""
    best = max(scale.oriented(metric) for metric in tried.values())
    return sorted(rate for rate in tried if scale.oriented(tried[rate]) == best)


def choice(tried: Mapping[float, float], scale: Scale, usual: float | None) -> float:
    """The usual rate, unless the best one is ahead by more than a standard error; where it was not tried the best."""
    best, *_ = best_of(tried, scale)
    if usual is None or usual not in tried:
        return best
    ahead = scale.oriented(tried[best]) - scale.oriented(tried[usual])
    return best if ahead > scale.tolerance(tried[best]) else usual


def _why(tried: Mapping[float, float], chosen: float, scale: Scale, what: str) -> str:
    """In words; `what` are the trials: `whole runs`."""
    if chosen in best_of(tried, scale)[:1]:
        return f"the best of {len(tried)} {what}"
    least = "the eval rows can tell" if scale.is_share else "1 %"
    return f"the usual rate: no other was ahead by more than {least}, in {what}"


def beyond(tried: Mapping[float, float], scale: Scale) -> float | None:
    """The next rate beyond the grid, because the best one is at its edge and clearly better than its neighbour."""
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
    """The result of the short trials: the best rate, where it is clearly better than the usual one."""
    chosen = choice(tried, scale, usual)
    on_edge = chosen in (min(tried), max(tried)) and scale.ahead(chosen, tried) > 1
    how = _why(tried, chosen, scale, f"short runs of {share:.0%} of the steps")
    how += ", at the edge of those tried" * on_edge
    return Search(
        method=method, tried=dict(tried), share=share, chosen=chosen, reason=how, on_edge=on_edge, usual=usual
    )


def next_whole(search: Search, whole: Mapping[float, float], scale: Scale, may_extend: bool, most: int) -> float | None:
    """The rate of the next whole run: the usual, the best, then outwards while clearly better; None: no more."""
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
    if best not in (min(whole), max(whole)) or not _is_clear(best, whole, scale):
        return None
    upwards = best == max(whole)
    if further := [rate for rate in left if (rate > best) == upwards]:
        return nearest(further, best)
    rate = rounded(best * STEP if upwards else best / STEP)
    return rate if may_extend and rate < too_high else None


def _is_clear(best: float, whole: Mapping[float, float], scale: Scale) -> bool:
    """Whether the whole run with the best rate is clearly better than all others, as far as they did not diverge."""
    return CLEARLY < scale.ahead(best, whole) < math.inf


def after_whole(search: Search, whole: Mapping[float, float], scale: Scale) -> Search:
    """The search's result after whole runs: the usual rate, or the lowest of the best where that is clearly better."""
    chosen = choice(whole, scale, search.usual)
    rates = {*search.tried, *whole}
    on_edge = chosen in (min(rates), max(rates)) and _is_clear(chosen, whole, scale)
    reason = _why(whole, chosen, scale, "whole runs")
    changes = {"chosen": chosen, "whole": dict(whole), "reason": reason, "on_edge": on_edge}
    return search.model_copy(update=changes)


def after_divergence(search: Search) -> float | None:
    """The lower rate to take after a whole run diverged, tried or not; None: it was the last one, or the user's."""
    if not search.tried:
        return None
    lower, lowest = rounded(search.chosen / STEP), min(search.tried)
    known = max((rate for rate in search.tried if rate < search.chosen), default=None)
    return known or (lower if lower > 0.9 * lowest / STEP**MOST_EXTENSIONS else None)


def replaced(search: Search, chosen: float, reason: str) -> Search:
    """The search with a lower rate than it found, because that one diverged: its short trial counts no more."""
    tried = {rate: math.nan if rate == search.chosen else metric for rate, metric in search.tried.items()}
    changes = {"tried": tried, "chosen": chosen, "reason": reason, "on_edge": chosen <= min(tried)}
    return search.model_copy(update=changes)
