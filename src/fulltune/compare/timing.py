"""What trials are forecast to take, corrected by what they took, and for which of them there is still time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fulltune.compare import design, rate_search
from fulltune.compare.context import CLOCK, FOLDER, Line, lines_of
from fulltune.compare.trials import is_done
from fulltune.recipe.methods import RIVALS
from fulltune.records.comparison import Trial, TrialResult

START_SECONDS, CHECKS_SECONDS, SCORING_SECONDS, VERDICT_SECONDS = 5.0, 5.0, 5.0, 10.0
"""Beside steps and rows, of small models on a slow CPU: a trial's process, an arm's checks before step 1, loading a
model and its generic texts, resampling. What trials take corrects them from the first one on."""
_LIBRARIES_SECONDS = 8.0
"""Until the process that forks the trials' processes has read the libraries; part of the first trial."""
_PASSES_PER_STEP = 3
"""Forward passes that a step takes as long as."""


@dataclass(frozen=True)
class Pace:
    """How many times as long as planned things take, as finished trials tell."""

    steps: Mapping[str, float]
    """Of each arm; one without trials takes as many times as long as all others together."""
    rest: float
    """Starting, checking, loading."""

    def of(self, arm: str) -> float:
        return self.steps.get(arm, self.steps.get("", 1.0))


def costs_of(line: Line) -> dict[str, design.Cost]:
    """Of each trained arm, full first: as planned by arithmetic, corrected by what trials took."""
    known = pace(line)
    return {one.arm: _cost(line, one, known) for one in line.trained_arms}


def _cost(line: Line, method: Any, known: Pace) -> design.Cost:
    made, steps = line.room(method.arm).plan, known.of(method.arm)
    rows = sum(line.summary.splits[split].rows for split in ("eval", "test"))
    return design.Cost(
        run_seconds=steps * (made.time.total_seconds if made.time else 0.0),
        num_rates=len(grid(line, method)),
        decides=method.kind in ("full", *RIVALS),
        scoring_seconds=known.rest * SCORING_SECONDS + steps * rows * _row_seconds(line, method.arm),
    )


def _row_seconds(line: Line, arm: str) -> float:
    """To answer a row, as planned."""
    made = line.room(arm).plan
    if made.time is None or not made.total_steps:
        return 0.0
    return made.time.train_seconds / (made.total_steps * made.global_batch_size) / _PASSES_PER_STEP


def grid(line: Line, method: Any) -> tuple[float, ...]:
    """The rates that a method's search begins with."""
    usual = line.room(method.arm).plan.learning_rate
    return rate_search.grid(usual, method.learning_rates, method.learning_rate)


def usual(line: Line, method: Any) -> float:
    """The rate of that grid to keep where trials do not tell, and to take where there is no time for them."""
    return rate_search.usual_of(grid(line, method), line.room(method.arm).plan.learning_rate)


def fixed_of(line: Line) -> design.Fixed:
    """What comes on top of the steps; baselines embed the train rows, too."""
    known, arm = pace(line), line.full.arm
    baselines = sum(one.rows for one in line.summary.splits.values()) * _row_seconds(line, arm) * known.of(arm)
    return design.Fixed(
        known.rest * START_SECONDS, known.rest * CHECKS_SECONDS, known.rest * VERDICT_SECONDS + baselines
    )


def pace(line: Line) -> Pace:
    """What the finished trials tell; of trials side by side each counts with its share of the time."""
    took: defaultdict[str, float] = defaultdict(float)
    for entry in lines_of(line.folder / CLOCK):
        took[str(entry["what"]).removesuffix(": rows")] += entry["seconds"]
    kept = (TrialResult.load(path) for path in sorted((line.folder / FOLDER / "trials").glob("*.json")))
    known = [one for one in kept if one.trial.name in took and not one.problems and one.tokens_per_second > 0]
    if not known:
        return Pace({}, 1.0)
    steps: defaultdict[str, float] = defaultdict(float)
    planned: defaultdict[str, float] = defaultdict(float)
    rest = planned_rest = 0.0
    for one in known:
        arm, need, share = one.trial.arm, line.room(one.trial.arm).plan.time, one.trial.share
        if need is None:
            continue
        trained = share * need.tokens / one.tokens_per_second / one.side_by_side
        scored = 0.0 if one.trial.searches else SCORING_SECONDS
        for name in (arm, ""):
            steps[name] += trained
            planned[name] += share * need.total_seconds
        rest += max(0.0, took[one.trial.name] / one.side_by_side - trained)
        planned_rest += START_SECONDS + scored
    planned_rest += _LIBRARIES_SECONDS + CHECKS_SECONDS * len({one.trial.arm for one in known})
    return Pace({name: steps[name] / planned[name] for name in steps if planned[name] > 0}, rest / planned_rest)


def _seconds(line: Line, trials: Sequence[Trial]) -> float:
    """Of these trials, one after the other."""
    costs, start = costs_of(line), fixed_of(line).start
    return sum(
        start + one.share * costs[one.arm].run_seconds + (0.0 if one.searches else costs[one.arm].scoring_seconds)
        for one in trials
    )


def has_time(line: Line, trials: Sequence[Trial], keep: float = 0.0) -> bool:
    """Whether these trials, as far as they are not there, what must follow, and the verdict fit into the time left.

    Args:
        line: With its budget.
        trials: That would be trained now.
        keep: Seconds, as forecast, of what matters more.
    """
    if line.budget_seconds is None or all(is_done(line, one) for one in trials):
        return True
    asked = [one for one in trials if not is_done(line, one)]
    forecast = _alone(line, len(asked)) * _seconds(line, asked) + _alone(line, 2) * keep
    return forecast + fixed_of(line).verdict <= line.seconds_left


def _alone(line: Line, count: int) -> float:
    """How much longer so many trials take than if as many as can ran side by side."""
    return line.side_by_side / min(line.side_by_side, count)


def to_come(line: Line, counts: Mapping[str, int], seeds: int) -> float:
    """Seconds, as forecast, until full and one rival have so many seeds; the dearest rival is reckoned with.

    Args:
        line: Knows the costs.
        counts: Seeds that each arm has; arms without a run need not be named.
        seeds: Of both.
    """
    costs = {arm: cost for arm, cost in costs_of(line).items() if cost.decides and arm in counts}
    full, *rivals = costs
    start = fixed_of(line).start

    def rest(arm: str) -> float:
        runs = max(0, seeds - counts[arm])
        return runs * (start + costs[arm].run_seconds + costs[arm].scoring_seconds)

    leading = max((counts[arm] for arm in rivals), default=0)
    return rest(full) + max((rest(arm) for arm in rivals if counts[arm] == leading), default=0.0)
