"""The search for an arm's learning rate: successive halving on eval rows (docs/compare.md), as pure functions.

`tried` and `whole` map rates to metrics on the same eval rows, of short trials and of whole runs; `may_extend` is false
for a grid that the user gave.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fulltune.records.comparison import Search, Trial, Tried
from fulltune.stats.shares import error_of_share

STEP = math.sqrt(10)
"""Between two rates of a grid."""
MOST_EXTENSIONS = 2
MOST_WHOLE_RUNS = 2 + MOST_EXTENSIONS
LEAST_STEPS = 10
"""Of a short trial: with fewer all rates look alike."""
_USUAL = {True: "the usual rate", False: "of the given rates the nearest to the usual one"}
"""In words, by whether rates may be tried that the recipe does not name."""
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


def grid(usual: float, given: Sequence[float] | None, fixed: float | None) -> tuple[float, ...]:
    """The rates that a search begins with: those that the recipe gives, else three around the usual one."""
    if fixed is not None:
        return (fixed,)
    return tuple(sorted(given)) if given is not None else tuple(rounded(usual * STEP**power) for power in (-1, 0, 1))


def rounded(rate: float) -> float:
    """To two digits, as people write rates."""
    return float(f"{rate:.1e}")


def nearest(rates: Sequence[float], near: float) -> float:
    """Of these rates the one nearest to another; of equally near ones, as rates are rounded, the lower."""
    return min(sorted(rates), key=lambda rate: round(abs(math.log(rate / near)) / math.log(STEP), 1))


def share_of_steps(search_share: float, total_steps: int) -> float:
    """What a short trial takes of a run's steps: as asked for, but at least `LEAST_STEPS`."""
    return min(1.0, max(search_share, LEAST_STEPS / max(1, total_steps)))


def search_trial(arm: str, rate: float, share: float, seed: int) -> Trial:
    name = f"{arm}-rate{rate:g}-{share:.1%}".replace("%", "pct")
    return Trial(name=name, arm=arm, learning_rate=rate, seed=seed, share=share, searches=True)


def best_of(tried: Mapping[float, float], scale: Scale, near: float | None = None) -> float:
    """The rate with the best metric; of equal ones the nearest to `near`, by default the lowest."""
    best = max(scale.oriented(metric) for metric in tried.values())
    equal = [rate for rate in tried if scale.oriented(tried[rate]) == best]
    return min(equal) if near is None else nearest(equal, near)


def choice(tried: Mapping[float, float], scale: Scale, usual: float | None) -> float:
    """The usual rate, unless the best one is ahead by more than a standard error; where it was not tried the best."""
    best = best_of(tried, scale)
    if usual is None or usual not in tried:
        return best
    ahead = scale.oriented(tried[best]) - scale.oriented(tried[usual])
    return best if ahead > scale.tolerance(tried[best]) else usual


def _why(tried: Mapping[float, float], chosen: float, scale: Scale, may_extend: bool, what: str) -> str:
    """In words; `what` are the trials: `whole runs`."""
    best = best_of(tried, scale)
    if chosen != best:
        others = "the other was not" if len(tried) == 2 else f"none of the {len(tried) - 1} others was"
        least = "the eval rows can tell" if scale.is_share else "1 %"
        return f"{_USUAL[may_extend]}: {others} ahead by more than {least}, in {what}"
    equal = sum(scale.oriented(metric) == scale.oriented(tried[best]) for metric in tried.values())
    return f"the lower of {equal} rates that were equal in {what}" if equal > 1 else f"the best of {len(tried)} {what}"


def beyond(tried: Mapping[float, float], scale: Scale, may_extend: bool) -> float | None:
    """The next rate to try because the best one is at an edge, and clearly better than its neighbour; else None."""
    if not may_extend or len(tried) < 2:
        return None
    rates = sorted(tried)
    values = [scale.oriented(tried[rate]) for rate in rates]
    best = max(values)
    if best == -math.inf:  # nothing learned anything: it can only be too fast
        return rounded(rates[0] / STEP)
    near = scale.tolerance(best if scale.greater_is_better else -best)
    if values[-1] == best and values[-2] < best - near:
        return rounded(rates[-1] * STEP)
    if values[0] == best and values[1] < best - near:
        return rounded(rates[0] / STEP)
    return None


def above(tried: Mapping[float, float], scale: Scale, may_extend: bool) -> float | None:
    """The next higher rate to try in order to see where rates are too high; None: one was, or the grid was given."""
    if not may_extend or ceiling(tried, scale) is not None:
        return None
    return rounded(max(tried) * STEP)


def ceiling(tried: Mapping[float, float], scale: Scale) -> float | None:
    """The lowest rate above the best one whose trial diverged or was clearly worse; None: none was."""
    if not tried:
        return None
    best = best_of(tried, scale)
    least = scale.oriented(tried[best]) - CLEARLY * scale.tolerance(tried[best])
    return min((rate for rate in tried if rate > best and scale.oriented(tried[rate]) < least), default=None)


def finished(arm: str, tried: Sequence[Tried], scale: Scale, may_extend: bool, usual: float) -> Search:
    """The result of the short trials: the best rate, where it is clearly better than the usual one."""
    found = {one.learning_rate: one.metric for one in tried}
    chosen = choice(found, scale, usual)
    ahead = scale.oriented(found[chosen]) - max(scale.oriented(found[rate]) for rate in found if rate != chosen)
    on_edge = chosen in (min(found), max(found)) and ahead > scale.tolerance(found[chosen])
    how = _why(found, chosen, scale, may_extend, f"short runs of {tried[0].share:.0%} of the steps")
    if on_edge:
        how += ", at the edge of those tried" + ("" if may_extend else " (the recipe's)")
    return Search(arm=arm, tried=tuple(tried), chosen=chosen, reason=how, on_edge=on_edge, usual=usual)


def without_search(arm: str, rate: float) -> Search:
    """Of a rate that the recipe gives."""
    return Search(arm=arm, tried=(), chosen=rate, reason="from the recipe: the only rate, not searched")


def without_time(arm: str, rate: float, may_extend: bool) -> Search:
    """Of the usual rate, where there is no time for others."""
    reason = f"{_USUAL[may_extend]}: no time for a search"
    return Search(arm=arm, tried=(), chosen=rate, reason=reason, time_was_up=True)


def next_whole(
    search: Search, whole: Mapping[float, float], scale: Scale, may_extend: bool, most: int = MOST_WHOLE_RUNS
) -> float | None:
    """The rate of the next whole run: the usual, the best, then outwards while clearly better; None: no more."""
    short = {one.learning_rate: one.metric for one in search.tried}
    if len(short) < 2 or search.whole or len(whole) >= most:
        return None
    too_high = min((rate for rate, metric in short.items() if math.isnan(metric)), default=math.inf)
    left = {rate: metric for rate, metric in short.items() if rate not in whole and rate < too_high}
    if search.usual is not None and search.usual in left:
        return search.usual
    if len(whole) < 2:
        return best_of(left, scale, near=search.chosen) if left else None
    best = best_of(whole, scale)
    if best not in (min(whole), max(whole)) or not _is_clear(best, whole, scale):
        return None
    if best == min(whole):
        further = max((rate for rate in left if rate < best), default=rounded(best / STEP))
    else:
        further = min((rate for rate in left if rate > best), default=rounded(best * STEP))
        reached = short.get(best, math.nan)
        if further in left and scale.oriented(left[further]) < scale.oriented(reached) - scale.tolerance(reached):
            return None
    return further if further in left or (may_extend and further < too_high) else None


def _is_clear(best: float, whole: Mapping[float, float], scale: Scale) -> bool:
    """Whether the whole run with the best rate is clearly better than all others, as far as they did not diverge."""
    others = max(scale.oriented(metric) for rate, metric in whole.items() if rate != best)
    ahead = scale.oriented(whole[best]) - others
    return math.isfinite(ahead) and ahead > CLEARLY * scale.tolerance(whole[best])


def after_whole(search: Search, whole: Mapping[float, float], scale: Scale, may_extend: bool, share: float) -> Search:
    """The search's result after whole runs: the usual rate, or the lowest of the best where that is clearly better."""
    chosen = choice(whole, scale, search.usual)
    rates = {one.learning_rate for one in search.tried} | set(whole)
    on_edge = chosen in (min(rates), max(rates)) and _is_clear(chosen, whole, scale)
    runs = tuple(Tried(learning_rate=rate, share=share, metric=metric) for rate, metric in whole.items())
    reason = _why(whole, chosen, scale, may_extend, "whole runs")
    return search.model_copy(update={"chosen": chosen, "whole": runs, "reason": reason, "on_edge": on_edge})


def slower(search: Search, metric: float, scale: Scale) -> float | None:
    """The next lower rate that was tried, when a whole run ends below its own short trial (diverged); else None."""
    tried, lower = {one.learning_rate: one.metric for one in search.tried}, next_lower(search)
    reached = tried.get(search.chosen)
    if reached is None or lower is None:
        return None
    behind = scale.oriented(reached) - scale.oriented(metric)
    return lower if behind > CLEARLY * scale.tolerance(reached) else None


def next_lower(search: Search) -> float | None:
    """The highest rate below the chosen one that was tried."""
    return max((one.learning_rate for one in search.tried if one.learning_rate < search.chosen), default=None)


def after_divergence(search: Search) -> float | None:
    """The lower rate to take after a whole run diverged, tried or not; None: it was the last one, or the user's."""
    if not search.tried:
        return None
    lower = rounded(search.chosen / STEP)
    lowest = min(one.learning_rate for one in search.tried)
    return next_lower(search) or (lower if lower > 0.9 * lowest / STEP**MOST_EXTENSIONS else None)


def replaced(search: Search, chosen: float, reason: str, dropped_seconds: Sequence[float] = ()) -> Search:
    """The search with a lower rate than it found, because that one diverged: its short trial counts no more."""
    tried = tuple(
        one.model_copy(update={"metric": math.nan}) if one.learning_rate == search.chosen else one
        for one in search.tried
    )
    on_edge = chosen <= min(one.learning_rate for one in tried)
    changes = {"tried": tried, "chosen": chosen, "reason": reason, "on_edge": on_edge}
    return with_dropped(search.model_copy(update=changes), dropped_seconds)


def with_dropped(search: Search, seconds: Sequence[float]) -> Search:
    """The same with whole runs counted that came to nothing else."""
    counts = {"other_runs": search.other_runs + len(seconds), "other_seconds": search.other_seconds + sum(seconds)}
    return search.model_copy(update=counts)
