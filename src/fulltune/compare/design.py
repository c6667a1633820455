"""Which trials a comparison consists of: rates to try, seeds to run, and what fits into a budget. Pure functions.

The rate search of an arm is a successive halving (Jamieson and Talwalkar 2016) in two rounds: all rates of a
logarithmic grid for a small share of the steps, with a whole schedule of its own; then whole runs of the best two,
where the arm goes on to a second seed. When the best one lies at an edge of the grid, the next rate beyond is tried as
well.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fulltune.compare.precision import planned_detectable
from fulltune.trials import Expectation, Search, Trial, Tried

STEP = math.sqrt(10)
"""Between two rates of a grid."""
MOST_EXTENSIONS = 2
LEAST_STEPS = 10
"""Of a short trial: with fewer all rates look alike."""
FEW_TRAIN_ROWS = 10_000
"""Below it five seeds: with few rows the seeds differ more (Bouthillier et al. 2021; Mosbach et al. 2020)."""


def num_seeds(given: int | None, train_rows: int) -> tuple[int, str]:
    """How many seeds at most, and why; clear answers need fewer."""
    if given is not None:
        return given, "from the recipe"
    if train_rows < FEW_TRAIN_ROWS:
        return 5, f"fewer than {FEW_TRAIN_ROWS:,} train rows"
    return 3, f"{FEW_TRAIN_ROWS:,} train rows or more"


def grid(usual: float, given: Sequence[float] | None, fixed: float | None) -> tuple[float, ...]:
    """The rates that a search begins with.

    Args:
        usual: The method's default here.
        given: `learning_rates` of the method.
        fixed: `learning_rate` of the method: no search.
    """
    if fixed is not None:
        return (fixed,)
    if given is not None:
        return tuple(sorted(given))
    return tuple(rounded(usual * STEP**power) for power in (-1, 0, 1))


def rounded(rate: float) -> float:
    """To two digits, as people write rates."""
    return float(f"{rate:.1e}")


def share_of_steps(search_share: float, total_steps: int) -> float:
    """What a short trial takes of a run's steps: as asked for, but at least `LEAST_STEPS`."""
    return min(1.0, max(search_share, LEAST_STEPS / max(1, total_steps)))


def best_of(tried: Mapping[float, float], greater_is_better: bool) -> float:
    """The rate with the best metric; of equal ones the one nearest to the middle. NaN is worse than anything."""
    middle = statistics.mean(math.log(rate) for rate in tried)

    def key(rate: float) -> tuple[float, float]:
        return _oriented(tried[rate], greater_is_better), -abs(math.log(rate) - middle)

    return max(tried, key=key)


def _oriented(value: float, greater_is_better: bool) -> float:
    if math.isnan(value):
        return -math.inf
    return value if greater_is_better else -value


def beyond(
    tried: Mapping[float, float],
    greater_is_better: bool,
    may_extend: bool,
    eval_rows: int,
    is_share: bool,
) -> float | None:
    """The next rate to try because the best one lies at an edge; None when it does not.

    A rate at the edge that is only as good as its neighbour, by a standard error, says nothing of what lies beyond.

    Args:
        tried: Rate to metric.
        greater_is_better: Of the metric.
        may_extend: False for a grid that the user gave.
        eval_rows: How many there are.
        is_share: The metric is a share.
    """
    if not may_extend or len(tried) < 2:
        return None
    rates = sorted(tried)
    values = [_oriented(tried[rate], greater_is_better) for rate in rates]
    best = max(values)
    if best == -math.inf:  # nothing learned anything: it can only be too fast
        return rounded(rates[0] / STEP)
    near = tolerance(best if greater_is_better else -best, eval_rows, is_share)
    if values[-1] == best and values[-2] < best - near:
        return rounded(rates[-1] * STEP)
    if values[0] == best and values[1] < best - near:
        return rounded(rates[0] / STEP)
    return None


def search_trial(arm: str, rate: float, share: float, seed: int) -> Trial:
    name = f"{arm}-rate{rate:g}-{share:.1%}".replace("%", "pct")
    return Trial(name=name, arm=arm, learning_rate=rate, seed=seed, share=share, searches=True)


def final_trial(arm: str, rate: float, seed: int, share: float = 1.0, *, check: bool = False) -> Trial:
    """A whole run; shorter (`share` below 1) only where a budget asked for it, and then for every arm.

    With `check` it is one with another rate than the search chose.
    """
    name = f"{arm}-seed{seed}-rate{rate:g}" if check else f"{arm}-seed{seed}"
    return Trial(name=name, arm=arm, learning_rate=rate, seed=seed, share=share)


def tolerance(metric: float, eval_rows: int, is_share: bool) -> float:
    """What two rates may differ by without one being known to be better: a standard error of a share, else 1 %."""
    if math.isnan(metric):
        return 0.0
    return math.sqrt(max(0.0, metric * (1 - metric)) / max(1, eval_rows)) if is_share else 0.01 * abs(metric)


def finished(
    arm: str, tried: Sequence[Tried], greater_is_better: bool, may_extend: bool, eval_rows: int, is_share: bool
) -> Search:
    """The search's result: the best rate."""
    if not tried:
        raise ValueError(f"{arm}: no rate was tried")
    found = {one.learning_rate: one.metric for one in tried}
    chosen = best_of(found, greater_is_better)
    on_edge = _is_on_edge(found, chosen, greater_is_better, eval_rows, is_share)
    how = f"best of {len(found)} rates on the eval rows after {tried[0].share:.0%} of the steps"
    if on_edge:
        how += ", at the edge of those tried" + ("" if may_extend else " (the recipe's)")
    return Search(arm=arm, tried=tuple(tried), chosen=chosen, reason=how, on_edge=on_edge)


def _is_on_edge(
    tried: Mapping[float, float], chosen: float, greater_is_better: bool, eval_rows: int, is_share: bool
) -> bool:
    """Whether a better rate may lie beyond: the chosen one is at an edge, and ahead by a standard error."""
    if len(tried) < 2 or chosen not in (min(tried), max(tried)):
        return False
    others = [_oriented(metric, greater_is_better) for rate, metric in tried.items() if rate != chosen]
    ahead = _oriented(tried[chosen], greater_is_better) - max(others)
    return ahead > tolerance(tried[chosen], eval_rows, is_share)


def slower(search: Search, metric: float, greater_is_better: bool, eval_rows: int, is_share: bool) -> float | None:
    """The next lower rate that was tried, when a whole run ends below its own rate's short trial: it came apart.

    None when it did not, or no lower rate was tried.

    Args:
        search: How the rate was found.
        metric: Of the whole run, on the eval rows.
        greater_is_better: Of the metric.
        eval_rows: How many there are.
        is_share: The metric is a share.
    """
    tried, lower = {one.learning_rate: one.metric for one in search.tried}, next_lower(search)
    reached = tried.get(search.chosen)
    if reached is None or lower is None:
        return None
    behind = _oriented(reached, greater_is_better) - _oriented(metric, greater_is_better)
    return lower if behind > tolerance(reached, eval_rows, is_share) else None


def next_lower(search: Search) -> float | None:
    """The highest rate below the chosen one that was tried."""
    return max((one.learning_rate for one in search.tried if one.learning_rate < search.chosen), default=None)


def after_divergence(search: Search) -> float | None:
    """The rate to take after a whole run diverged: a lower one, tried or not; None: enough, or it was given.

    The search itself went no further down than `MOST_EXTENSIONS` steps, and this does not either.
    """
    if not search.tried:
        return None
    lower = rounded(search.chosen / STEP)
    lowest = min(one.learning_rate for one in search.tried)
    return next_lower(search) or (lower if lower > 0.9 * lowest / STEP**MOST_EXTENSIONS else None)


def replaced(search: Search, chosen: float, reason: str) -> Search:
    """The search with a lower rate than it found, because that one came apart."""
    rates = {one.learning_rate for one in search.tried}
    return search.model_copy(update={"chosen": chosen, "reason": reason, "on_edge": chosen <= min(rates)})


def to_check(search: Search, greater_is_better: bool) -> float | None:
    """The second best rate of the search, which gets a whole run too; None: there is none, or no need.

    Short trials flatter high rates: MiniLM-L6 on Banking77 reached 76.6 % with the higher and 61.3 % with the lower
    rate after 15 % of the steps, and after all of them the lower one was better. And where steps are few they hardly
    tell rates apart: 19.4 and 18.5 % after 19 of 160 steps (docs/log.md). No need is there where the best one was
    replaced already, and where the trials were whole runs.
    """
    all_tried = {one.learning_rate: one.metric for one in search.tried}
    tried = {rate: metric for rate, metric in all_tried.items() if not math.isnan(metric)}
    if len(tried) < 2 or search.tried[0].share >= 1 or search.chosen != best_of(all_tried, greater_is_better):
        return None
    del tried[search.chosen]
    return best_of(tried, greater_is_better)


def checked(
    search: Search, other: float, metrics: tuple[float, float], greater_is_better: bool, eval_rows: int, is_share: bool
) -> Search:
    """The search's result after whole runs with both rates: the better one; if they are equal, the one chosen before.

    Args:
        search: Which chose one of them.
        other: The other one.
        metrics: Of whole runs with the chosen and with the other rate, on the eval rows.
        greater_is_better: Of the metric.
        eval_rows: How many there are.
        is_share: The metric is a share.
    """
    found = dict(zip((search.chosen, other), metrics, strict=True))
    mine, its = (_oriented(one, greater_is_better) for one in metrics)
    chosen = other if its > mine else search.chosen
    rates = {one.learning_rate for one in search.tried}
    return search.model_copy(
        update={
            "chosen": chosen,
            "whole": tuple(Tried(learning_rate=rate, share=1.0, metric=metric) for rate, metric in found.items()),
            "reason": "the better of two whole runs" if mine != its else f"{search.reason}; two whole runs were equal",
            "on_edge": chosen in (min(rates), max(rates))
            and _is_on_edge(found, chosen, greater_is_better, eval_rows, is_share),
        }
    )


def without_search(arm: str, rate: float) -> Search:
    return Search(arm=arm, tried=(), chosen=rate, reason="from the recipe: the only rate, not searched")


# ---- what it costs ---------------------------------------------------------------------------------------------

LEAST_SEEDS = 2
SHORTEST = 0.1
"""Of a run: shorter ones say little about the whole."""


@dataclass(frozen=True)
class Cost:
    """Of one arm."""

    run_seconds: float
    """One whole run."""
    num_rates: int
    """In its grid; 1: no search."""


def search_runs(num_rates: int) -> int:
    """Trials of one arm's search, without extensions."""
    return 0 if num_rates < 2 else num_rates


def seconds(costs: Mapping[str, Cost], runs: Mapping[str, int], share: float, start: float, length: float) -> float:
    """Of so many whole runs of each arm, after the rate searches.

    Args:
        costs: Of each arm.
        runs: Number of whole runs.
        share: Of a run's steps, in a search.
        start: Seconds of each process beside its steps.
        length: Share of the recipe's steps that a whole run takes.
    """
    return sum(
        length * one.run_seconds * (runs[arm] + share * search_runs(one.num_rates))
        + start * (runs[arm] + search_runs(one.num_rates))
        for arm, one in costs.items()
    )


def runs_of(costs: Mapping[str, Cost], seeds: int, sequential: bool) -> dict[str, int]:
    """Whole runs of each arm: all seeds, or where the rest waits those of full, which is first, and one other arm.

    Where those had rates to choose from, most often the second best gets a whole run as well: see `to_check`.
    """
    full, *rivals = costs
    leader = max(rivals, key=lambda arm: costs[arm].run_seconds, default=full)  # which it will be is not known
    going_on = (full, leader) if sequential and seeds > 1 else tuple(costs)
    return {arm: seeds + (one.num_rates > 1) if arm in going_on else 1 for arm, one in costs.items()}


def expected(
    costs: Mapping[str, Cost],
    seeds: int,
    search_share: float,
    start_seconds: float,
    test_rows: int,
    margin: float | None,
    budget_seconds: float | None = None,
    sequential: bool = True,
) -> Expectation:
    """The design, made to fit a budget: first fewer seeds, then a shorter search, then shorter runs.

    Args:
        costs: Of each trained arm, full first.
        seeds: Runs of each arm at most.
        search_share: Share of a run's steps in a search.
        start_seconds: Of each process, beside its steps.
        test_rows: Rows that the verdict is made on.
        margin: Differences of the metric that do not matter; None: it is no share, so that nothing usual is known.
        budget_seconds: Most time that it may take.
        sequential: Methods wait as long as the verdict does not hinge on them.
    """
    length, notes = 1.0, []

    def takes(length: float, waiting: bool = sequential) -> float:
        return seconds(costs, runs_of(costs, seeds, waiting), search_share, start_seconds, length)

    wanted = seeds
    if seeds < LEAST_SEEDS:
        notes.append("one seed tells nothing about the spread between seeds: it ends UNDECIDED; give two, better three")
    if budget_seconds is not None:
        while seeds > LEAST_SEEDS and takes(length) > budget_seconds:
            seeds -= 1
        if seeds < wanted:
            notes.append(f"{seeds} instead of {wanted} seeds at most, to stay within the budget")
        if takes(length) > budget_seconds:
            search_share /= 2
            notes.append(f"half the rate search ({search_share:.0%} of the steps), to stay within the budget")
        if takes(length) > budget_seconds:
            starts = takes(0.0)
            length = max(SHORTEST, (budget_seconds - starts) / max(1e-9, takes(1.0) - starts))
            notes.append(f"runs of {length:.0%} of the recipe's steps: the verdict is about such runs")
        if takes(length) > budget_seconds:
            notes.append("even that takes longer: it stops when the time is up and says what is known by then")
    return Expectation(
        arms=tuple(costs),
        num_seeds=seeds,
        num_search_trials=sum(search_runs(one.num_rates) for one in costs.values()),
        seconds=round(takes(length), 1),
        most_seconds=round(takes(length, waiting=False), 1),
        detectable=None
        if margin is None or seeds < LEAST_SEEDS
        else planned_detectable(test_rows, seeds, margin=margin, num_arms=max(1, len(costs) - 1)),
        notes=tuple(notes),
        length_share=length,
        search_share=search_share,
        from_budget=budget_seconds is not None,
    )
