"""What a comparison is forecast to take, corrected by what its trials took, and for what there is still time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fulltune.compare import design, rate_search
from fulltune.compare.context import CLOCK, FOLDER, Context
from fulltune.compare.trials import is_done, run_trial
from fulltune.files import lines_of
from fulltune.recipe.methods import RIVALS
from fulltune.records.comparison import Expectation, Search, Trial
from fulltune.records.events import Designed
from fulltune.records.plan import BASELINES, Plan
from fulltune.text import is_share

EXPECTATION = f"{FOLDER}/expectation.json"
START_SECONDS, CHECKS_SECONDS, SCORING_SECONDS, VERDICT_SECONDS = 5.0, 5.0, 5.0, 10.0
"""Beside steps and rows, of small models on a slow CPU: a trial's process, an arm's checks before step 1, loading a
model and its generic texts, resampling. What trials take corrects them from the first one on."""
_LIBRARIES_SECONDS = 8.0
"""Until the process that forks the trials' processes has read the libraries; part of the first trial."""
_PASSES_PER_STEP = 3
"""Forward passes that a step takes as long as."""


def expect(context: Context) -> Expectation:
    """The design and what it costs; settled once for a budget, so that going on later changes nothing."""
    path = context.folder / EXPECTATION
    found = Expectation.load(path) if path.exists() else None
    if found is None or found.budget_seconds != context.budget_seconds:
        found = _settled(context)
        found.save(path)
    margin = context.recipe.compare.margin
    context.job.listener(Designed(expectation=found, metric=context.measure.name, margin=margin))
    return found


def _settled(context: Context) -> Expectation:
    """The design for this budget, less what is there."""
    block = context.recipe.compare
    steps = context.setup(context.full.arm).plan.total_steps
    context.clock.write("preparation")
    if context.budget_seconds is not None and not context.kept_results():
        # Arithmetic alone errs too much; most often the search begins with the same trial.
        full, share = context.full, rate_search.share_of_steps(0.0, steps)
        trial = rate_search.search_trial(full.arm, usual(context, full), share, context.recipe.train.seed)
        context.say(f"measuring the speed here before the budget is planned: {share:.0%} of a run of {full.arm}")
        run_trial(context, trial)
    costs = costs_of(context)
    context.clock.write("design")  # also of a command whose budget is refused
    return design.expected(
        costs,
        design.num_seeds(block.seeds, context.summary.splits["train"].rows),
        rate_search.share_of_steps(block.search_share, steps),
        fixed_of(context),
        context.summary.splits["test"].rows,
        block.margin if is_share(context.measure.name) else None,
        context.budget_seconds,
        sequential=block.sequential,
        alpha=context.alpha,
        spent_seconds=context.clock.spent_seconds,
        done=_done(context, costs),
    )


def _done(context: Context, costs: Mapping[str, design.Cost]) -> design.Done:
    """What an earlier command left: its short trials, and the whole runs that are not made again."""
    searches = {arm: Search.load(context.search_path(arm)) for arm in costs if context.search_path(arm).exists()}
    runs = dict.fromkeys(searches, 0)
    kept = [one.trial for one in context.kept_results() if one.trial.arm in searches and not one.trial.searches]
    for arm, search in searches.items():
        mine = [one for one in kept if one.arm == arm]
        checked = (one for one in mine if one == design.final_trial(arm, one.learning_rate, one.seed, check=True))
        rates = {search.chosen, *(one.learning_rate for one in checked)}
        runs[arm] = sum(one.learning_rate in rates for one in mine)
    return design.Done(runs=runs, searched=[arm for arm, found in searches.items() if not found.time_was_up])


@dataclass(frozen=True)
class Pace:
    """How many times as long as planned things take, as finished trials tell."""

    steps: Mapping[str, float]
    """Of each arm; one without trials takes as many times as long as all others together."""
    rest: float
    """Starting, checking, loading."""

    def of(self, arm: str) -> float:
        return self.steps.get(arm, self.steps.get("", 1.0))


def costs_of(context: Context) -> dict[str, design.Cost]:
    """Of each trained arm, full first: as planned by arithmetic, corrected by what trials took."""
    known, costs = pace(context), {}
    rows = sum(context.summary.splits[split].rows for split in ("eval", "test"))
    for method in context.trained_arms:
        setup, steps = context.setup(method.arm), known.of(method.arm)
        costs[method.arm] = design.Cost(
            run_seconds=steps * _planned(setup.plan),
            free_seconds=steps * _planned(setup.free_plan),
            num_rates=len(grid(context, method)),
            decides=method is context.full or context.recipe.compared_kind(method) in RIVALS,
            scoring_seconds=known.rest * SCORING_SECONDS + steps * rows * _row_seconds(context, method.arm),
        )
    return costs


def _planned(made: Plan) -> float:
    """Seconds of a run's steps, with its evaluations and checkpoints."""
    return made.time.total_seconds if made.time else 0.0


def _row_seconds(context: Context, arm: str) -> float:
    """To answer a row, as planned."""
    made = context.setup(arm).plan
    if made.time is None or not made.total_steps:
        return 0.0
    return made.time.train_seconds / (made.total_steps * made.global_batch_size) / _PASSES_PER_STEP


def grid(context: Context, method: Any) -> tuple[float, ...]:
    """The rates that a method's search begins with."""
    usual = context.setup(method.arm).plan.learning_rate
    return rate_search.grid(usual, method.learning_rates, method.fixed_learning_rate)


def usual(context: Context, method: Any) -> float:
    """The rate of that grid to keep where trials do not tell, and to take where there is no time for them."""
    planned = context.setup(method.arm).plan.learning_rate
    return rate_search.nearest(grid(context, method), rate_search.rounded(planned))


def fixed_of(context: Context) -> design.Fixed:
    """What comes on top of the steps; baselines embed the train rows, too, some more than once."""
    known, arm = pace(context), context.full.arm
    rows, need = sum(one.rows for one in context.summary.splits.values()), context.setup(arm).plan.time
    planned = sum(part.seconds for part in need.around if part.name == BASELINES) if need else 0.0
    reading = max(planned, rows * _row_seconds(context, arm))
    verdict = known.rest * VERDICT_SECONDS + reading * known.of(arm)
    return design.Fixed(known.rest * START_SECONDS, known.rest * CHECKS_SECONDS, verdict)


def pace(context: Context) -> Pace:
    """What the finished trials tell."""
    took: defaultdict[str, float] = defaultdict(float)
    for entry in lines_of(context.folder / CLOCK):
        took[str(entry["what"]).removesuffix(": rows")] += entry["seconds"]
    known = [
        one
        for one in context.kept_results()
        if one.trial.name in took and not one.problems and one.tokens_per_second > 0
    ]
    if not known:
        return Pace({}, 1.0)
    steps: defaultdict[str, float] = defaultdict(float)
    planned: defaultdict[str, float] = defaultdict(float)
    rest = planned_rest = 0.0
    for one in known:
        made, arm, share = context.setup(one.trial.arm).plan, one.trial.arm, one.trial.share
        if context.recipe.preserve.budget is not None:
            # A short trial is not held to the budget, and trains no generic text along: its own plan knows.
            made, share = Plan.load(context.folder / "plan" / f"{one.trial.name}.json"), 1.0
        need = made.time
        if need is None:
            continue
        trained = share * need.tokens / one.tokens_per_second
        if made.preserving is not None:
            trained *= need.total_seconds / need.train_seconds  # what chooses among points comes after the last step
        for name in (arm, ""):
            steps[name] += trained
            planned[name] += share * need.total_seconds
        rest += max(0.0, took[one.trial.name] - trained)
        planned_rest += START_SECONDS + (0.0 if one.trial.searches else SCORING_SECONDS)
    planned_rest += _LIBRARIES_SECONDS + CHECKS_SECONDS * len({one.trial.arm for one in known})
    return Pace({name: steps[name] / planned[name] for name in steps if planned[name] > 0}, rest / planned_rest)


def has_time(context: Context, trials: Sequence[Trial], keep: float = 0.0) -> bool:
    """Whether trials that are not there yet, `keep` seconds, and the verdict fit into the time left less a reserve."""
    asked = [] if context.budget_seconds is None else [one for one in trials if not is_done(context, one)]
    if not asked:
        return True
    costs, fixed = costs_of(context), fixed_of(context)
    trained = sum(fixed.start + costs[one.arm].trial_seconds(one) for one in asked)
    return trained + keep + fixed.verdict <= (1 - design.RESERVE) * context.seconds_left


def to_come(context: Context, counts: Mapping[str, int], seeds: int) -> float:
    """Seconds, as forecast, until full and the dearest rival have so many seeds, of which `counts` are there."""
    costs = {arm: cost for arm, cost in costs_of(context).items() if cost.decides and arm in counts}
    full, *rivals = costs
    start = fixed_of(context).start

    def rest(arm: str) -> float:
        runs = max(0, seeds - counts[arm])
        return runs * (start + costs[arm].run_seconds + costs[arm].scoring_seconds)

    leading = max((counts[arm] for arm in rivals), default=0)
    return rest(full) + max((rest(arm) for arm in rivals if counts[arm] == leading), default=0.0)
