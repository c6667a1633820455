"""What a comparison consists of: seeds to run, and what fits into a budget. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fulltune.compare.precision import planned_detectable
from fulltune.trials import Expectation, Trial

FEW_TRAIN_ROWS = 10_000
"""Below it five seeds: with few rows the seeds differ more (Bouthillier et al. 2021; Mosbach et al. 2020)."""
LEAST_SEEDS = 2
SHORTEST = 0.1
"""Of a run: shorter ones say little about the whole."""


def num_seeds(given: int | None, train_rows: int) -> int:
    """How many seeds at most; clear answers need fewer."""
    if given is not None:
        return given
    return 5 if train_rows < FEW_TRAIN_ROWS else 3


def final_trial(arm: str, rate: float, seed: int, share: float = 1.0, *, check: bool = False) -> Trial:
    """A whole run; shorter (`share` below 1) only where a budget asked for it, and then for every arm.

    With `check` it is one with another rate than the search chose.
    """
    name = f"{arm}-rate{rate:g}-seed{seed}" if check else f"{arm}-seed{seed}"
    return Trial(name=name, arm=arm, learning_rate=rate, seed=seed, share=share)


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

    Where those had rates to choose from the second best gets a whole run as well; that a third one does is rare.
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
    least_search_share: float = 0.0,
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
        least_search_share: With shorter trials all rates look alike.
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
        if takes(length) > budget_seconds and search_share > least_search_share:
            search_share = max(search_share / 2, least_search_share)
            notes.append(f"a shorter rate search ({search_share:.0%} of the steps), to stay within the budget")
        if takes(length) > budget_seconds:
            starts = takes(0.0)
            length = max(SHORTEST, (budget_seconds - starts) / max(1e-9, takes(1.0) - starts))
            notes.append(f"runs of {length:.0%} of the recipe's steps: the verdict is about such runs")
        if takes(length) > budget_seconds:
            notes.append("even that takes longer: each method gets one run, then it says what is known by then")
    if seeds == LEAST_SEEDS:
        notes.insert(0, "two seeds say little about their spread: only large differences are found; better give three")
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
        budget_seconds=budget_seconds,
        sequential=sequential,
    )
