from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from fulltune.compare import rates
from fulltune.compare.context import CLOCK, FOLDER, Context
from fulltune.compare.sequential import TIME_UP_SHARE, alpha_spent
from fulltune.compare.trials import is_done, run_trial
from fulltune.errors import RecipeError
from fulltune.files import read_json_lines
from fulltune.recipe.methods import RIVALS, Method
from fulltune.records.comparison import Comparison, Expectation, Search, Trial
from fulltune.records.events import Designed
from fulltune.records.plan import BASELINES
from fulltune.stats.precision import planned_detectable_difference
from fulltune.text import is_share, typed_seconds

EXPECTATION = f"{FOLDER}/expectation.json"
FEW_TRAIN_ROWS = 10_000
"""With fewer train rows, five seeds are planned instead of three (Bouthillier et al. 2021; Mosbach et al. 2020)."""
LEAST_SEEDS = 2
GOOD_SEEDS = 3
"""A tight budget drops methods before it drops seeds below this number, because two seeds show little of the spread."""
RESERVE = 0.2
"""Share of the time left unplanned, because forecasts can err."""
FORECAST_AGAIN = 1.15
SEEDS_ALIKE, SEEDS_APART = 0.005, 0.02
"""Assumed standard deviations between seeds, low and high."""
START_SECONDS, SCORING_SECONDS, VERDICT_SECONDS = 5.0, 5.0, 10.0
"""First estimates, for small models on a slow CPU. Measurements of finished trials replace them."""
_FIRST_SECONDS = 13.0
_PASSES_PER_STEP = 3


@dataclass(frozen=True)
class MethodCost:
    """One method's forecast costs in seconds, and its finished runs."""

    run: float
    """Duration of a whole run's steps."""
    num_rates: int = 1
    decides: bool = True
    """False for a method that is only shown for reference and gets one run."""
    start: float = 0.0
    scoring: float = 0.0
    done: int = 0
    searched: bool = False

    def seconds_of(self, trial: Trial) -> float:
        return self.start + trial.share * self.run + (0.0 if trial.searches else self.scoring)


def num_seeds(wanted: int | None, train_rows: int) -> int:
    return wanted if wanted is not None else 5 if train_rows < FEW_TRAIN_ROWS else 3


def forecast_seconds(costs: Mapping[str, MethodCost], design: Expectation) -> float:
    """Forecast the seconds of unfinished trials. If sequential, only full and one rival get all seeds."""
    full, *rivals = (method for method in design.methods if costs[method].decides)
    leader = max(rivals, key=lambda method: costs[method].run, default=full)
    going_on = (full, leader) if design.sequential and design.num_seeds > 1 else design.methods
    total = 0.0
    for method in design.methods:
        cost = costs[method]
        searches = bool(design.search_share) and cost.num_rates > 1
        short = cost.num_rates if searches and not cost.searched else 0
        whole = design.num_seeds + searches if method in going_on else 1
        had = 0 if short else cost.done  # a search may choose another rate, which needs new runs
        total += short * (cost.start + design.search_share * cost.run)
        total += max(0, whole - had) * (cost.start + cost.run + cost.scoring)
    return total


def smaller_designs(costs: Mapping[str, MethodCost], largest: Expectation) -> Iterator[Expectation]:
    """Yield ever smaller designs: fewer seeds (down to three), then fewer rivals, two seeds, no rate search."""
    everyone, deciding = largest.methods, tuple(method for method in largest.methods if costs[method].decides)
    good, fewest = min(largest.num_seeds, GOOD_SEEDS), min(largest.num_seeds, LEAST_SEEDS)
    smaller = [everyone, *(deciding[:number] for number in range(len(deciding), 1, -1))]
    for methods, count in [
        *((everyone, count) for count in range(largest.num_seeds, good, -1)),
        *((methods, count) for count in range(good, fewest - 1, -1) for methods in smaller),
    ]:
        yield largest.model_copy(update={"methods": methods, "num_seeds": count})
    yield largest.model_copy(update={"methods": deciding[:2], "num_seeds": fewest, "search_share": 0.0})


def fit_design_to_budget(
    costs: Mapping[str, MethodCost], largest: Expectation, end_seconds: float = 0.0, seconds_spent: float = 0.0
) -> Expectation:
    """Return the largest of `smaller_designs` that fits into the budget minus `RESERVE`, or raise a `RecipeError`.

    `seconds_spent` is the time used so far, `end_seconds` the time needed after the last trial.
    """
    ordered = list(smaller_designs(costs, largest))
    most = math.inf if largest.budget_seconds is None else (1 - RESERVE) * (largest.budget_seconds - seconds_spent)
    design = next((each for each in ordered if end_seconds + forecast_seconds(costs, each) <= most), None)
    if design is None:
        raise RecipeError(
            _budget_too_short(ordered[-1], end_seconds + forecast_seconds(costs, ordered[-1]), seconds_spent)
        )
    num_rates = [costs[name].num_rates for name in design.methods if design.search_share and costs[name].num_rates > 1]
    return design.model_copy(
        update={
            "num_search_trials": sum(num_rates),
            "seconds": round(seconds_spent + end_seconds + forecast_seconds(costs, design), 1),
            "notes": tuple(_design_notes(costs, design)),
        }
    )


def refuse_hopeless_budget(
    costs: Mapping[str, MethodCost], largest: Expectation, end_seconds: float, seconds_spent: float
) -> None:
    """Raise `RecipeError` if the budget is below half of the smallest design's training time, before anything is
    measured."""
    *_, least = smaller_designs(costs, largest)
    # Arithmetic can be off by half, and what starts and scoring take is known only for small models.
    if least.num_seeds * sum(costs[name].run for name in least.methods) / 2 > (largest.budget_seconds or math.inf):
        needed = end_seconds + forecast_seconds(costs, least)
        raise RecipeError(_budget_too_short(least, needed, seconds_spent))


def with_detectable_differences(
    expected: Expectation, costs: Mapping[str, MethodCost], margin: float, alpha: float, test_rows: int
) -> Expectation:
    """Return the design with the differences it can detect if seeds vary little or much, from three seeds on."""
    if expected.num_seeds < GOOD_SEEDS:
        return expected
    limited = expected.num_seeds < expected.most_seeds
    level = (
        alpha if limited or not expected.sequential else alpha_spent(expected.most_seeds, expected.most_seeds, alpha)
    )
    level *= TIME_UP_SHARE if limited or len(expected.methods) < len(costs) else 1
    level /= max(1, sum(costs[method].decides for method in expected.methods) - 1)
    alike, apart = (
        planned_detectable_difference(test_rows, expected.num_seeds, seed_sd, margin, level)
        for seed_sd in (SEEDS_ALIKE, SEEDS_APART)
    )
    return expected.model_copy(update={"detectable": (alike, apart)})


def _design_notes(costs: Mapping[str, MethodCost], design: Expectation) -> Iterator[str]:
    """Yield a note for each cut: fewer seeds, no rate search, or fewer methods."""
    if design.num_seeds < design.most_seeds:
        yield f"{design.num_seeds} seeds are planned instead of {design.most_seeds}; more seeds run if time remains"
    if not design.search_share and any(costs[method].num_rates > 1 for method in design.methods):
        yield "no rate search: each method trains at its default learning rate, which the report marks as unfair"
    if left_out := [method for method in costs if method not in design.methods]:
        yield f"not trained: {', '.join(left_out)}"


def _budget_too_short(least: Expectation, needed: float, seconds_spent: float) -> str:
    """Return the error message for a budget below the smallest design's forecast."""
    enough = typed_seconds(round_up_seconds(seconds_spent + FORECAST_AGAIN * needed / (1 - RESERVE)))
    each = "one run" if least.num_seeds == 1 else f"{least.num_seeds} runs"
    before = f" ({typed_seconds(seconds_spent)} already spent)" if seconds_spent > 1 else ""
    return (
        f"--budget {typed_seconds(least.budget_seconds or 0.0)}{before} is too short for a verdict: {each} each of "
        f"{' and '.join(least.methods)}, without a rate search, are forecast to take {typed_seconds(needed)}; set "
        f"--budget {enough} or more, or make runs shorter (train.num_train_epochs, fewer rows)"
    )


def round_up_seconds(time: float) -> float:
    """Round seconds up to a multiple that grows from 10 s (short times) to 5 min (over an hour)."""
    step = 10 if time <= 120 else 30 if time <= 600 else 60 if time <= 3600 else 300
    return float(math.ceil(time / step) * step)


def why_not_resumable(comparison: Comparison, budget_seconds: float | None) -> str | None:
    """Explain why a finished comparison cannot resume with this budget, or return None if it can."""
    before = comparison.expectation.budget_seconds or 0.0
    if not comparison.time_was_up or comparison.decision.verdict != "UNDECIDED":
        why = f"finished with the verdict {comparison.decision.verdict}, which more time would not change"
    elif not comparison.can_resume:
        why = "finished, because the permitted error rate is used up and these test rows allow no further verdict"
    elif budget_seconds is not None and budget_seconds <= before:
        more = typed_seconds(round_up_seconds(2 * before))
        why = f"the budget of {typed_seconds(before)} is used up; to continue, raise the total, such as --budget {more}"
    else:
        return None
    return f"{why}; --fresh starts a new comparison"


# ---- a running comparison --------------------------------------------------------------------------------------


def load_or_plan_design(context: Context) -> Expectation:
    """Load the design for this budget, or plan and save one."""
    path = context.folder / EXPECTATION
    design = Expectation.load(path) if path.exists() else None
    if design is None or design.budget_seconds != context.budget_seconds:
        design = _plan_design(context)
        design.save(path)
    margin = context.recipe.compare.margin
    context.job.listener(Designed(expectation=design, metric=context.resamplable_metric.name, margin=margin))
    return design


def _plan_design(context: Context) -> Expectation:
    """Choose the design that fits into the budget, after measuring the speed in a short trial."""
    block, splits = context.recipe.compare, context.summary.splits
    steps = context.method_setup(context.full.label).plan.total_steps
    context.log_elapsed_time("preparation")
    costs, end = forecast_costs(context)
    most = num_seeds(block.seeds, splits["train"].rows)
    whole = Expectation(
        methods=tuple(costs),
        num_seeds=most,
        most_seeds=most,
        search_share=rates.share_of_steps(block.search_share, steps),
        budget_seconds=context.budget_seconds,
        sequential=block.sequential,
    )
    if context.budget_seconds is not None and not context.saved_results():
        refuse_hopeless_budget(costs, whole, end, context.seconds_spent)
        # Arithmetic alone errs too much; the search usually begins with this trial anyway.
        full, share = context.full, rates.share_of_steps(0.0, steps)
        trial = rates.short_trial(full.label, default_rate(context, full), share, context.recipe.train.seed)
        context.say(f"measuring the speed before planning the budget, with {share:.0%} of a run of {full.label}")
        run_trial(context, trial)
        costs, end = forecast_costs(context)
    context.log_elapsed_time("design")  # noted even if the budget is refused below
    design = fit_design_to_budget(costs, whole, end, context.seconds_spent)
    if not is_share(context.resamplable_metric.name):
        return design
    return with_detectable_differences(design, costs, block.margin, context.alpha, splits["test"].rows)


def method_rates(context: Context, method: Method) -> tuple[float, ...]:
    planned = context.method_setup(method.label).plan.learning_rate
    return rates.rates_to_try(planned, method.learning_rates, method.fixed_learning_rate)


def default_rate(context: Context, method: Method) -> float:
    """Return the rate in the method's search grid that is closest to the plan's rate."""
    planned = context.method_setup(method.label).plan.learning_rate
    return rates.nearest_rate(method_rates(context, method), rates.rounded(planned))


def forecast_costs(context: Context) -> tuple[dict[str, MethodCost], float]:
    """Forecast each method's costs by label (full fine-tuning first), and the seconds after the last trial."""
    steps, rest = actual_to_planned_time(context)
    results, costs, splits = context.saved_results(), dict[str, MethodCost](), context.summary.splits
    scored, rows = sum(splits[split].rows for split in ("eval", "test")), sum(one.rows for one in splits.values())
    end = 0.0
    for method in context.trained_methods:
        label, planned = method.label, context.method_setup(method.label).plan
        slower = steps.get(label, steps.get("", 1.0))
        path = context.search_path(label)
        search = Search.load(path) if path.exists() else None
        row_seconds = scoring = 0.0
        if planned.time is not None and planned.total_steps:
            rows_seen = planned.total_steps * planned.global_batch_size
            row_seconds = planned.time.train_seconds / rows_seen / _PASSES_PER_STEP
        if context.scores_runs:
            scoring = rest * SCORING_SECONDS + slower * scored * row_seconds
        if context.scores_runs and method is context.full:  # baselines embed the train rows as well, some repeatedly
            baselines = planned.time.overhead_seconds.get(BASELINES, 0.0) if planned.time else 0.0
            end = rest * VERDICT_SECONDS + slower * max(baselines, rows * row_seconds)
        whole_runs = [one.trial for one in results if one.trial.method == label and not one.trial.searches]
        current_rates = () if search is None else (search.chosen, *search.whole)
        costs[label] = MethodCost(
            run=slower * planned.time.total_seconds if planned.time else 0.0,
            num_rates=len(method_rates(context, method)),
            decides=method is context.full or context.recipe.compared_kind(method) in RIVALS,
            start=rest * START_SECONDS,
            scoring=scoring,
            done=sum(trial.learning_rate in current_rates for trial in whole_runs),
            searched=search is not None and not search.time_was_up,
        )
    return costs, end


def actual_to_planned_time(context: Context) -> tuple[dict[str, float], float]:
    """Return the ratios of actual to planned training time by method ("" for all), and of all other work."""
    took: defaultdict[str, float] = defaultdict(float)
    for entry in read_json_lines(context.folder / CLOCK):
        took[str(entry["what"]).removesuffix(": rows")] += entry["seconds"]
    steps, planned = defaultdict[str, float](float), defaultdict[str, float](float)
    rest, planned_rest = 0.0, _FIRST_SECONDS
    for result in context.saved_results():
        method, share = result.trial.method, result.trial.share
        need = context.method_setup(method).plan.time
        if result.trial.name not in took or not result.tokens_per_second or need is None or not need.train_seconds:
            continue
        slower = need.tokens / result.tokens_per_second / need.train_seconds
        for name in (method, ""):
            steps[name] += share * slower * need.total_seconds
            planned[name] += share * need.total_seconds
        rest += max(0.0, took[result.trial.name] - share * slower * need.total_seconds)
        planned_rest += START_SECONDS + (SCORING_SECONDS if context.scores_runs and not result.trial.searches else 0.0)
    if not steps:
        return {}, 1.0
    return {name: steps[name] / planned[name] for name in steps if planned[name] > 0}, rest / planned_rest


def has_time(context: Context, trials: Sequence[Trial], reserved_seconds: float = 0.0) -> bool:
    """Return whether unfinished trials, `reserved_seconds` and the verdict fit into the remaining budget."""
    unfinished = [] if context.budget_seconds is None else [one for one in trials if not is_done(context, one)]
    if not unfinished:
        return True
    costs, end = forecast_costs(context)
    return (
        sum(costs[one.method].seconds_of(one) for one in unfinished) + reserved_seconds + end
        <= (1 - RESERVE) * context.seconds_left
    )


def forecast_remaining_seconds(context: Context, counts: Mapping[str, int], seeds: int) -> float:
    """Forecast the seconds until full fine-tuning and the costliest leading rival have `seeds` runs each."""
    costs = {method: cost for method, cost in forecast_costs(context)[0].items() if cost.decides and method in counts}

    def rest(method: str) -> float:
        return max(0, seeds - counts[method]) * (costs[method].start + costs[method].run + costs[method].scoring)

    full, *rivals = costs
    leading = max((counts[method] for method in rivals), default=0)
    return rest(full) + max((rest(method) for method in rivals if counts[method] == leading), default=0.0)
