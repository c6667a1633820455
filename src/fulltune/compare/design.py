"""What a comparison consists of: seeds to run, and what fits into a budget. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

from fulltune.compare.sequential import TIME_UP_SHARE, spent
from fulltune.errors import RecipeError
from fulltune.records.comparison import Comparison, Expectation, Trial
from fulltune.stats.precision import planned_detectable
from fulltune.text import typed_seconds

FEW_TRAIN_ROWS = 10_000
"""Below it five seeds: with few rows the seeds differ more (Bouthillier et al. 2021; Mosbach et al. 2020)."""
LEAST_SEEDS = 2
"""With one nothing is known of the spread between seeds, and there is no interval."""
GOOD_SEEDS = 3
"""Two say little about their spread, so a budget gives up breadth before the third one."""
RESERVE = 0.2
"""Part of the time left that is not planned for: forecasts err."""
FORECAST_AGAIN = 1.15
"""A budget that is named leaves room for a next forecast that is longer: a machine is not always as quick."""
SEEDS_ALIKE, SEEDS_APART = 0.005, 0.02
"""Standard deviations between seeds for which it is said what can be found: which one it is, only seeds tell."""


def num_seeds(given: int | None, train_rows: int) -> int:
    """How many seeds at most; clear answers need fewer."""
    return given if given is not None else 5 if train_rows < FEW_TRAIN_ROWS else 3


def final_trial(arm: str, rate: float, seed: int, *, check: bool = False) -> Trial:
    """A whole run; with `check` one with another rate than the search chose."""
    name = f"{arm}-rate{rate:g}-seed{seed}" if check else f"{arm}-seed{seed}"
    return Trial(name=name, arm=arm, learning_rate=rate, seed=seed)


@dataclass(frozen=True)
class Cost:
    """Of one arm."""

    run_seconds: float
    """The steps of one whole run."""
    num_rates: int
    """In its grid; 1: no search."""
    decides: bool = True
    """False: it is shown for orientation, and gets one run."""
    scoring_seconds: float = 0.0
    """Eval, test and generic rows, after each whole run."""
    free_seconds: float | None = None
    """As many steps where a budget for forgetting does not hold them, as in short trials; None: it holds none."""

    def trial_seconds(self, trial: Trial) -> float:
        """A trial's steps, and of a whole run what is scored after it."""
        return trial.share * self.free if trial.searches else trial.share * self.run_seconds + self.scoring_seconds

    @property
    def free(self) -> float:
        """A whole run's steps as short trials do them."""
        return self.run_seconds if self.free_seconds is None else self.free_seconds


@dataclass(frozen=True)
class Fixed:
    """Seconds that do not depend on the steps."""

    start: float
    """Of each trial's process: loading and saving."""
    checks: float = 0.0
    """Before step 1 of an arm's first trial."""
    verdict: float = 0.0
    """Baselines, resampling, report."""


@dataclass(frozen=True)
class Done:
    """What is there already, when a comparison goes on."""

    runs: Mapping[str, int] = field(default_factory=dict)
    """Whole runs of each arm, at the rate that it has now."""
    searched: Collection[str] = ()
    """Arms whose rate is settled: others are searched, where there is time for it."""


@dataclass(frozen=True)
class Choice:
    """What is trained."""

    arms: tuple[str, ...]
    seeds: int
    """Of full and the leader."""
    search_share: float
    """Of a run's steps; 0: no search."""


def search_runs(num_rates: int) -> int:
    """Trials of one arm's search, without extensions."""
    return 0 if num_rates < 2 else num_rates


def runs_of(costs: Mapping[str, Cost], choice: Choice, sequential: bool) -> dict[str, int]:
    """Whole runs of each arm: all seeds, or where the rest waits those of full (listed first) and of one other arm."""
    full, *rivals = (arm for arm in choice.arms if costs[arm].decides)
    leader = max(rivals, key=lambda arm: costs[arm].run_seconds, default=full)  # which it will be is not known
    going_on = (full, leader) if sequential and choice.seeds > 1 else choice.arms

    def runs(arm: str) -> int:
        return choice.seeds + (choice.search_share > 0 and costs[arm].num_rates > 1) if arm in going_on else 1

    return {arm: runs(arm) for arm in choice.arms}


def seconds(
    costs: Mapping[str, Cost], choice: Choice, fixed: Fixed, sequential: bool = True, done: Done | None = None
) -> float:
    """What is still to be done of a design takes so long; with `sequential` most methods wait after their first one."""
    done, total = done or Done(), fixed.verdict
    for arm, runs in runs_of(costs, choice, sequential).items():
        cost = costs[arm]
        short = search_runs(cost.num_rates) if choice.search_share and arm not in done.searched else 0
        had = 0 if short else done.runs.get(arm, 0)  # a search may choose another rate, for which all are made again
        whole = max(0, runs - had)
        total += whole * (fixed.start + cost.run_seconds + cost.scoring_seconds)
        total += short * (fixed.start + choice.search_share * cost.free)
        total += fixed.checks if whole + short else 0.0
    return total


def choices(costs: Mapping[str, Cost], seeds: int, search_share: float) -> Iterator[Choice]:
    """Designs in the order of preference: seeds beyond three go first, then rivals, the third seed, the rate search."""
    everyone, deciding = tuple(costs), tuple(arm for arm, cost in costs.items() if cost.decides)
    good, fewest = min(seeds, GOOD_SEEDS), min(seeds, LEAST_SEEDS)
    for count in range(seeds, good - 1, -1):
        yield Choice(everyone, count, search_share)
    for count in range(good, fewest - 1, -1):
        for arms in (everyone, *(deciding[:number] for number in range(len(deciding), 1, -1))):
            yield Choice(arms, count, search_share)
    yield Choice(deciding[:2], fewest, 0.0)


def expected(
    costs: Mapping[str, Cost],
    seeds: int,
    search_share: float,
    fixed: Fixed,
    test_rows: int,
    margin: float | None,
    budget_seconds: float | None = None,
    *,
    sequential: bool = True,
    alpha: float = 0.05,
    spent_seconds: float = 0.0,
    done: Done | None = None,
) -> Expectation:
    """The design of a comparison whose arms have these costs, full first, made to fit a budget less a reserve."""

    def takes(choice: Choice, waits: bool = sequential) -> float:
        return seconds(costs, choice, fixed, waits, done)

    ordered = list(choices(costs, seeds, search_share))
    chosen = ordered[0]
    if budget_seconds is not None:
        planned = (1 - RESERVE) * (budget_seconds - spent_seconds)
        fitting = next((one for one in ordered if takes(one) <= planned), None)
        if fitting is None:
            raise RecipeError(_too_short(ordered[-1], budget_seconds, spent_seconds, takes(ordered[-1])))
        chosen = fitting
    limited = chosen.seeds < seeds

    def detectable(seed_sd: float) -> float | None:
        if margin is None or chosen.seeds < GOOD_SEEDS:
            return None
        level = alpha if limited or not sequential else spent(seeds, seeds, alpha)
        level *= TIME_UP_SHARE if limited or len(chosen.arms) < len(costs) else 1
        rivals = sum(costs[arm].decides for arm in chosen.arms) - 1
        return planned_detectable(
            test_rows, chosen.seeds, seed_sd=seed_sd, margin=margin, alpha=level, num_arms=max(1, rivals)
        )

    return Expectation(
        arms=chosen.arms,
        num_seeds=chosen.seeds,
        num_search_trials=sum(search_runs(costs[arm].num_rates) for arm in chosen.arms if chosen.search_share),
        seconds=round(spent_seconds + takes(chosen), 1),
        most_seconds=round(spent_seconds + takes(chosen, sequential and budget_seconds is not None), 1),
        detectable=detectable(SEEDS_ALIKE),
        detectable_apart=detectable(SEEDS_APART),
        notes=tuple(_notes(costs, chosen, ordered[0])),
        search_share=chosen.search_share,
        budget_seconds=budget_seconds,
        sequential=sequential,
        recipe_seeds=seeds,
        left_out=tuple(arm for arm in costs if arm not in chosen.arms),
    )


def _notes(costs: Mapping[str, Cost], chosen: Choice, wanted: Choice) -> Iterator[str]:
    """What the budget took, and what few seeds mean."""
    if chosen.seeds < wanted.seeds:
        yield f"{chosen.seeds} seeds are planned instead of up to {wanted.seeds}; where time is left, more are run"
    searched = any(costs[arm].num_rates > 1 for arm in chosen.arms)
    if searched and not chosen.search_share:
        yield "no rate search: each method is trained at its usual rate, which the report will mark as unfair"
    if left_out := [arm for arm in wanted.arms if arm not in chosen.arms]:
        yield f"not trained: {', '.join(left_out)}"
    if chosen.seeds == 1:
        yield "one seed tells nothing about the spread between seeds: it ends UNDECIDED; give two, better three"
    elif chosen.seeds == LEAST_SEEDS:
        yield "two seeds say little about how much seeds differ: only large differences are found; three are better"


def _too_short(least: Choice, budget: float, spent_seconds: float, need: float) -> str:
    enough = typed_seconds(round_up(spent_seconds + FORECAST_AGAIN * need / (1 - RESERVE)))
    each = "one run" if least.seeds == 1 else f"{least.seeds} runs"
    before = f", {typed_seconds(spent_seconds)} of which are spent," if spent_seconds > 1 else ""
    return (
        f"--budget {typed_seconds(budget)}{before} is too short for a verdict: {each} each of "
        f"{' and '.join(least.arms)}, without a rate search, are forecast to take {typed_seconds(need)}; give --budget "
        f"{enough} or more, or make runs shorter (train.num_train_epochs, fewer rows)"
    )


def round_up(time: float) -> float:
    """To a time that one would type: 10 s, half minutes from two minutes on, 5 minutes from an hour on."""
    step = 10 if time <= 120 else 30 if time <= 600 else 60 if time <= 3600 else 300
    return float(math.ceil(time / step) * step)


def why_finished(known: Comparison, budget_seconds: float | None) -> str | None:
    """Why a comparison that has a verdict does not go on with this budget (None: no limit); None: it does."""
    verdict, had = known.decision.verdict, known.expectation.budget_seconds or 0.0
    if verdict != "UNDECIDED":
        why = f"finished: the verdict is {verdict}; more time does not change it"
    elif not known.time_was_up:
        why = "finished: it ended undecided, but not because its time was up, so more time adds nothing"
    elif not known.can_go_on:
        why = (
            "finished: its time was up after the last seeds, whose verdict took all that was left of the chance of a "
            "wrong answer, so no other one can follow on the same test rows"
        )
    elif budget_seconds is not None and budget_seconds <= had:
        more = typed_seconds(round_up(2 * had))
        why = f"its {typed_seconds(had)} are used up; to go on, give more time in all, such as --budget {more}"
    else:
        return None
    return f"{why}; --fresh begins another comparison"
