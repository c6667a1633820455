"""Search a method's learning rate by successive halving on eval rows, as pure functions (docs/guides/compare.md)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from fulltune.records.comparison import Search, Trial
from fulltune.stats.curves import standard_error_of_share

STEP = math.sqrt(10)
MOST_EXTENSIONS = 2
LEAST_STEPS = 10
"""Minimum length of a short trial, because after fewer steps all rates look alike."""
CLEARLY = 2
"""Number of standard errors by which a whole run must lead to be clearly better."""


@dataclass(frozen=True)
class MetricScale:
    """The eval metric's direction, whether it is a share, and the number of eval rows."""

    greater_is_better: bool
    eval_rows: int
    is_share: bool

    def oriented(self, metric: float) -> float:
        """Return the metric, negated if lower is better, or -inf for NaN."""
        return -math.inf if math.isnan(metric) else metric if self.greater_is_better else -metric

    def tolerance(self, metric: float) -> float:
        """Return the largest difference that counts as noise: a standard error for a share, else 1 % of it."""
        if math.isnan(metric):
            return 0.0
        if not self.is_share:
            return 0.01 * abs(metric)
        return standard_error_of_share(metric, self.eval_rows)

    def lead_in_tolerances(self, rate: float, metrics_by_rate: Mapping[float, float]) -> float:
        """Return a rate's lead over the best other rate in `tolerance`s, or infinity if all others diverged."""
        others = [self.oriented(metric) for other, metric in metrics_by_rate.items() if other != rate]
        metric = metrics_by_rate[rate]
        apart, least = self.oriented(metric) - max(others, default=math.inf), self.tolerance(metric)
        return apart / least if least else math.inf if apart > 0 else 0.0


def rates_to_try(default: float, listed: Sequence[float] | None, fixed: float | None) -> tuple[float, ...]:
    """Return the fixed rate if set, else the listed rates, else three rates around the default rate."""
    if fixed is not None:
        return (fixed,)
    return (
        tuple(sorted(listed)) if listed is not None else tuple(rounded(default * STEP**power) for power in (-1, 0, 1))
    )


def rounded(rate: float) -> float:
    return float(f"{rate:.1e}")


def nearest_rate(rates: Iterable[float], near: float) -> float:
    return min(sorted(rates), key=lambda rate: round(abs(math.log(rate / near)) / math.log(STEP), 1))


def share_of_steps(search_share: float, total_steps: int) -> float:
    return min(1.0, max(search_share, LEAST_STEPS / max(1, total_steps)))


def short_trial(method: str, rate: float, share: float, seed: int) -> Trial:
    name = f"{method}-rate{rate:g}-{share:.1%}".replace("%", "pct")
    return Trial(name=name, method=method, learning_rate=rate, seed=seed, share=share, searches=True)


def whole_run_trial(method: str, rate: float, seed: int, *, is_rate_test: bool = False) -> Trial:
    """Return a trial that trains for a whole run. `is_rate_test` adds the rate to its name."""
    name = f"{method}-rate{rate:g}-seed{seed}" if is_rate_test else f"{method}-seed{seed}"
    return Trial(name=name, method=method, learning_rate=rate, seed=seed)


def best_rates(metrics_by_rate: Mapping[float, float], scale: MetricScale) -> list[float]:
    """Return the rates with the best metric, in ascending order."""
    best = max(scale.oriented(metric) for metric in metrics_by_rate.values())
    return sorted(rate for rate in metrics_by_rate if scale.oriented(metrics_by_rate[rate]) == best)


def choose_rate(metrics_by_rate: Mapping[float, float], scale: MetricScale, default_rate: float | None) -> float:
    """Return the best rate, or the default rate if it was tried and the best leads it by no more than the tolerance."""
    best, *_ = best_rates(metrics_by_rate, scale)
    if default_rate is None or default_rate not in metrics_by_rate:
        return best
    ahead = scale.oriented(metrics_by_rate[best]) - scale.oriented(metrics_by_rate[default_rate])
    return best if ahead > scale.tolerance(metrics_by_rate[best]) else default_rate


def _choice_reason(metrics_by_rate: Mapping[float, float], rate: float, scale: MetricScale, run_kind: str) -> str:
    """Return the reason for choosing `rate`. `run_kind` names what was compared, such as short trials."""
    if rate in best_rates(metrics_by_rate, scale)[:1]:
        return f"the best of {len(metrics_by_rate)} {run_kind}"
    least = "the error of the eval rows" if scale.is_share else "1 %"
    return f"the default rate, because no other rate was better by more than {least} in {run_kind}"


def next_rate_beyond_grid(metrics_by_rate: Mapping[float, float], scale: MetricScale) -> float | None:
    """Return the next rate beyond the grid if a rate at the grid's edge leads clearly, else None."""
    rates, best = sorted(metrics_by_rate), best_rates(metrics_by_rate, scale)[0]
    if math.isnan(metrics_by_rate[best]):  # nothing learned anything: it can only be too fast
        return rounded(rates[0] / STEP)
    for edge, neighbour, step in ((rates[-1], rates[-2], STEP), (rates[0], rates[1], 1 / STEP)):
        if scale.oriented(metrics_by_rate[edge]) == scale.oriented(metrics_by_rate[best]):
            return (
                rounded(edge * step)
                if scale.lead_in_tolerances(edge, {rate: metrics_by_rate[rate] for rate in (edge, neighbour)}) > 1
                else None
            )
    return None


def search_from_short_trials(
    method: str, metrics_by_rate: Mapping[float, float], share: float, scale: MetricScale, default_rate: float
) -> Search:
    """Choose a rate from the metrics of short trials (`share` of a whole run's steps). Return the search's record."""
    rate = choose_rate(metrics_by_rate, scale, default_rate)
    tried = dict(metrics_by_rate)
    on_edge = rate in (min(tried), max(tried)) and scale.lead_in_tolerances(rate, tried) > 1
    how = _choice_reason(metrics_by_rate, rate, scale, f"short runs of {share:.0%} of the steps")
    how += ", at the edge of the rates tried" * on_edge
    return Search(method=method, tried=tried, share=share, chosen=rate, reason=how, on_edge=on_edge, usual=default_rate)


def next_rate_for_whole_run(
    search: Search, whole_run_metrics: Mapping[float, float], scale: MetricScale, may_extend: bool, max_runs: int
) -> float | None:
    """Return the rate of the next whole run, or None if no run is needed.

    The default rate comes first, then the best of the short trials, then, as long as the outermost rate leads clearly,
    rates beyond it. `may_extend` allows rates without a short trial.
    """
    short = search.tried
    if len(short) < 2 or search.whole or len(whole_run_metrics) >= max_runs:
        return None
    too_high = min((rate for rate, metric in short.items() if math.isnan(metric)), default=math.inf)
    left = {rate: metric for rate, metric in short.items() if rate not in whole_run_metrics and rate < too_high}
    if search.usual is not None and search.usual in left:
        return search.usual
    if len(whole_run_metrics) < 2:
        return nearest_rate(best_rates(left, scale), search.chosen) if left else None
    best, *_ = best_rates(whole_run_metrics, scale)
    edges = (min(whole_run_metrics), max(whole_run_metrics))
    if best not in edges or not _leads_clearly(best, whole_run_metrics, scale):
        return None
    upwards = best == edges[1]
    if further := [rate for rate in left if (rate > best) == upwards]:
        return nearest_rate(further, best)
    rate = rounded(best * STEP if upwards else best / STEP)
    return rate if may_extend and rate < too_high else None


def _leads_clearly(best: float, whole_run_metrics: Mapping[float, float], scale: MetricScale) -> bool:
    return CLEARLY < scale.lead_in_tolerances(best, whole_run_metrics) < math.inf


def search_after_whole_runs(search: Search, whole_run_metrics: Mapping[float, float], scale: MetricScale) -> Search:
    """Return `search` with the rate that `choose_rate` selects by the whole runs' metrics."""
    rate = choose_rate(whole_run_metrics, scale, search.usual)
    rates = {*search.tried, *whole_run_metrics}
    on_edge = rate in (min(rates), max(rates)) and _leads_clearly(rate, whole_run_metrics, scale)
    reason = _choice_reason(whole_run_metrics, rate, scale, "whole runs")
    changes = {"chosen": rate, "whole": dict(whole_run_metrics), "reason": reason, "on_edge": on_edge}
    return search.model_copy(update=changes)


def lower_rate_after_divergence(search: Search) -> float | None:
    """Return the next lower rate, or None if no lower rate is left."""
    if not search.tried:
        return None
    lower, lowest = rounded(search.chosen / STEP), min(search.tried)
    lower_tried = max((rate for rate in search.tried if rate < search.chosen), default=None)
    return lower_tried or (lower if lower > 0.9 * lowest / STEP**MOST_EXTENSIONS else None)


def with_lower_rate(search: Search, lower: float, reason: str) -> Search:
    """Return the search with `lower` as the chosen rate, and the old rate marked as diverged."""
    tried = {rate: math.nan if rate == search.chosen else metric for rate, metric in search.tried.items()}
    changes = {"tried": tried, "chosen": lower, "reason": reason, "on_edge": lower <= min(tried)}
    return search.model_copy(update=changes)
