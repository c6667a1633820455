"""How many seeds and which rates fit into a time: what trials are forecast to take, corrected by what they took."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fulltune.compare import rates
from fulltune.compare.context import CLOCK, FOLDER, Context
from fulltune.compare.sequential import TIME_UP_SHARE, spent
from fulltune.compare.trials import is_done, run_trial
from fulltune.errors import RecipeError
from fulltune.files import lines_of
from fulltune.recipe.methods import RIVALS
from fulltune.records.comparison import Comparison, Expectation, Search, Trial
from fulltune.records.events import Designed
from fulltune.records.plan import BASELINES
from fulltune.stats.precision import planned_detectable
from fulltune.text import is_share, typed_seconds

EXPECTATION = f"{FOLDER}/expectation.json"
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
START_SECONDS, SCORING_SECONDS, VERDICT_SECONDS = 5.0, 5.0, 10.0
"""Beside steps and rows, of small models on a slow CPU: a trial's process, loading a model and its generic texts,
resampling. What trials take corrects them from the first one on."""
_FIRST_SECONDS = 13.0
"""Of the first trial: libraries are read, and its steps are checked."""
_PASSES_PER_STEP = 3
"""Forward passes that a step takes as long as."""


@dataclass(frozen=True)
class Cost:
    """What trials of a method take, in seconds, and which of them are there."""

    run: float
    """The steps of one whole run."""
    num_rates: int = 1
    """In its grid; 1: no search."""
    decides: bool = True
    """False: it is shown for orientation, and gets one run."""
    start: float = 0.0
    """Of each trial's process: loading and saving."""
    scoring: float = 0.0
    """Eval, test and generic rows, after each whole run of a comparison."""
    done: int = 0
    """Whole runs at the rate that it has now."""
    searched: bool = False
    """Its rate is settled: others are searched, where there is time for it."""

    def of(self, trial: Trial) -> float:
        return self.start + trial.share * self.run + (0.0 if trial.searches else self.scoring)


def num_seeds(given: int | None, train_rows: int) -> int:
    """How many seeds at most; clear answers need fewer."""
    return given if given is not None else 5 if train_rows < FEW_TRAIN_ROWS else 3


def seconds(costs: Mapping[str, Cost], design: Expectation) -> float:
    """What is still to be done of a design takes so long: all seeds, or where the rest waits those of full (listed
    first) and of the dearest other method, because it is not known which one will lead."""
    full, *rivals = (method for method in design.methods if costs[method].decides)
    leader = max(rivals, key=lambda method: costs[method].run, default=full)
    going_on = (full, leader) if design.sequential and design.num_seeds > 1 else design.methods
    total = 0.0
    for method in design.methods:
        cost = costs[method]
        searches = bool(design.search_share) and cost.num_rates > 1
        short = cost.num_rates if searches and not cost.searched else 0
        whole = design.num_seeds + searches if method in going_on else 1
        had = 0 if short else cost.done  # a search may choose another rate, for which all are made again
        total += short * (cost.start + design.search_share * cost.run)
        total += max(0, whole - had) * (cost.start + cost.run + cost.scoring)
    return total


def designs(costs: Mapping[str, Cost], whole: Expectation) -> Iterator[Expectation]:
    """In the order of preference, the whole one first: seeds beyond three go first, then rivals, the third seed, the
    rate search."""
    everyone, deciding = whole.methods, tuple(method for method in whole.methods if costs[method].decides)
    good, fewest = min(whole.num_seeds, GOOD_SEEDS), min(whole.num_seeds, LEAST_SEEDS)
    smaller = [everyone, *(deciding[:number] for number in range(len(deciding), 1, -1))]
    for methods, count in [
        *((everyone, count) for count in range(whole.num_seeds, good, -1)),
        *((methods, count) for count in range(good, fewest - 1, -1) for methods in smaller),
    ]:
        yield whole.model_copy(update={"methods": methods, "num_seeds": count})
    yield whole.model_copy(update={"methods": deciding[:2], "num_seeds": fewest, "search_share": 0.0})


def fitting(costs: Mapping[str, Cost], whole: Expectation, end: float = 0.0, spent: float = 0.0) -> Expectation:
    """The first design, full first, that fits into the budget of the whole one, less a reserve, with `end` seconds of
    baselines, resampling and report, and what was `spent` by commands before."""
    ordered = list(designs(costs, whole))
    most = math.inf if whole.budget_seconds is None else (1 - RESERVE) * (whole.budget_seconds - spent)
    chosen = next((one for one in ordered if end + seconds(costs, one) <= most), None)
    if chosen is None:
        raise RecipeError(_too_short(ordered[-1], end + seconds(costs, ordered[-1]), spent))
    num_rates = [
        costs[method].num_rates for method in chosen.methods if chosen.search_share and costs[method].num_rates > 1
    ]
    return chosen.model_copy(
        update={
            "num_search_trials": sum(num_rates),
            "seconds": round(spent + end + seconds(costs, chosen), 1),
            "notes": tuple(_notes(costs, chosen)),
        }
    )


def detectable(
    expected: Expectation, costs: Mapping[str, Cost], margin: float, alpha: float, test_rows: int
) -> Expectation:
    """The same with the differences that it can find."""
    if expected.num_seeds < GOOD_SEEDS:
        return expected
    limited = expected.num_seeds < expected.most_seeds
    level = alpha if limited or not expected.sequential else spent(expected.most_seeds, expected.most_seeds, alpha)
    level *= TIME_UP_SHARE if limited or len(expected.methods) < len(costs) else 1
    level /= max(1, sum(costs[method].decides for method in expected.methods) - 1)
    alike, apart = (
        planned_detectable(test_rows, expected.num_seeds, seed_sd, margin, level)
        for seed_sd in (SEEDS_ALIKE, SEEDS_APART)
    )
    return expected.model_copy(update={"detectable": (alike, apart)})


def _notes(costs: Mapping[str, Cost], chosen: Expectation) -> Iterator[str]:
    """What the budget took."""
    if chosen.num_seeds < chosen.most_seeds:
        yield (
            f"{chosen.num_seeds} seeds are planned instead of up to {chosen.most_seeds}; where time is left, more are "
            "run"
        )
    if not chosen.search_share and any(costs[method].num_rates > 1 for method in chosen.methods):
        yield "no rate search: each method is trained at its usual rate, which the report will mark as unfair"
    if left_out := [method for method in costs if method not in chosen.methods]:
        yield f"not trained: {', '.join(left_out)}"


def _too_short(least: Expectation, need: float, spent: float) -> str:
    enough = typed_seconds(round_up(spent + FORECAST_AGAIN * need / (1 - RESERVE)))
    each = "one run" if least.num_seeds == 1 else f"{least.num_seeds} runs"
    before = f", {typed_seconds(spent)} of which are spent," if spent > 1 else ""
    return (
        f"--budget {typed_seconds(least.budget_seconds or 0.0)}{before} is too short for a verdict: {each} each of "
        f"{' and '.join(least.methods)}, without a rate search, are forecast to take {typed_seconds(need)}; give "
        f"--budget {enough} or more, or make runs shorter (train.num_train_epochs, fewer rows)"
    )


def round_up(time: float) -> float:
    """To a time that one would type: 10 s, half minutes from two minutes on, 5 minutes from an hour on."""
    step = 10 if time <= 120 else 30 if time <= 600 else 60 if time <= 3600 else 300
    return float(math.ceil(time / step) * step)


def why_finished(known: Comparison, budget_seconds: float | None) -> str | None:
    """Why a comparison that has a verdict does not go on with this budget (None: no limit); None: it does."""
    had = known.expectation.budget_seconds or 0.0
    if not known.time_was_up or known.decision.verdict != "UNDECIDED":
        why = f"finished: the verdict is {known.decision.verdict}; more time adds nothing"
    elif not known.can_go_on:
        why = "finished: no part of the chance of a wrong answer is left for another verdict on the same test rows"
    elif budget_seconds is not None and budget_seconds <= had:
        more = typed_seconds(round_up(2 * had))
        why = f"its {typed_seconds(had)} are used up; to go on, give more time in all, such as --budget {more}"
    else:
        return None
    return f"{why}; --fresh begins another comparison"


# ---- of a comparison on its way --------------------------------------------------------------------------------


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
    block, splits = context.recipe.compare, context.summary.splits
    steps = context.setup(context.full.label).plan.total_steps
    context.note_time("preparation")
    if context.budget_seconds is not None and not context.kept_results():
        # Arithmetic alone errs too much; most often the search begins with the same trial.
        full, share = context.full, rates.share_of_steps(0.0, steps)
        trial = rates.search_trial(full.label, usual(context, full), share, context.recipe.train.seed)
        context.say(f"measuring the speed here before the budget is planned: {share:.0%} of a run of {full.label}")
        run_trial(context, trial)
    costs, end = costs_of(context)
    context.note_time("design")  # also of a command whose budget is refused
    most = num_seeds(block.seeds, splits["train"].rows)
    whole = Expectation(
        methods=tuple(costs),
        num_seeds=most,
        most_seeds=most,
        search_share=rates.share_of_steps(block.search_share, steps),
        budget_seconds=context.budget_seconds,
        sequential=block.sequential,
    )
    found = fitting(costs, whole, end, context.seconds_spent)
    if not is_share(context.measure.name):
        return found
    return detectable(found, costs, block.margin, context.alpha, splits["test"].rows)


def grid(context: Context, method: Any) -> tuple[float, ...]:
    """The rates that a method's search begins with."""
    planned = context.setup(method.label).plan.learning_rate
    return rates.grid(planned, method.learning_rates, method.fixed_learning_rate)


def usual(context: Context, method: Any) -> float:
    """The rate of that grid to keep where trials do not tell, and to take where there is no time for them."""
    planned = context.setup(method.label).plan.learning_rate
    return rates.nearest(grid(context, method), rates.rounded(planned))


def costs_of(context: Context) -> tuple[dict[str, Cost], float]:
    """Return the costs of the trained methods, full first, and the seconds after the last trial (0 without scores).
    Planned times are corrected by those of finished trials."""
    steps, rest = pace(context)
    results, costs, splits = context.kept_results(), dict[str, Cost](), context.summary.splits
    scored, rows = sum(splits[split].rows for split in ("eval", "test")), sum(one.rows for one in splits.values())
    end = 0.0
    for method in context.trained_methods:
        label, made, slower = (
            method.label,
            context.setup(method.label).plan,
            steps.get(method.label, steps.get("", 1.0)),
        )
        path = context.search_path(label)
        search = Search.load(path) if path.exists() else None
        row_seconds = scoring = 0.0
        if made.time is not None and made.total_steps:
            row_seconds = made.time.train_seconds / (made.total_steps * made.global_batch_size) / _PASSES_PER_STEP
        if context.scores_runs:
            scoring = rest * SCORING_SECONDS + slower * scored * row_seconds
        if context.scores_runs and method is context.full:  # baselines embed the train rows, too, some more than once
            baselines = made.time.around.get(BASELINES, 0.0) if made.time else 0.0
            end = rest * VERDICT_SECONDS + slower * max(baselines, rows * row_seconds)
        costs[label] = Cost(
            run=slower * made.time.total_seconds if made.time else 0.0,
            num_rates=len(grid(context, method)),
            decides=method is context.full or context.recipe.compared_kind(method) in RIVALS,
            start=rest * START_SECONDS,
            scoring=scoring,
            done=0 if search is None else _runs_at_its_rates(search, [one.trial for one in results]),
            searched=search is not None and not search.time_was_up,
        )
    return costs, end


def _runs_at_its_rates(search: Search, trials: Sequence[Trial]) -> int:
    """Whole runs that are not made again."""
    whole_runs = [one for one in trials if one.method == search.method and not one.searches]
    return sum(one.learning_rate in (search.chosen, *search.whole) for one in whole_runs)


def pace(context: Context) -> tuple[dict[str, float], float]:
    """How many times as long as planned the steps of each method take (of one without trials as those of all others, by
    the empty name), and what comes with them, such as starting and loading, as finished trials tell."""
    took: defaultdict[str, float] = defaultdict(float)
    for entry in lines_of(context.folder / CLOCK):
        took[str(entry["what"]).removesuffix(": rows")] += entry["seconds"]
    steps, planned = defaultdict[str, float](float), defaultdict[str, float](float)
    rest, planned_rest = 0.0, _FIRST_SECONDS
    for one in context.kept_results():
        method, share, need = one.trial.method, one.trial.share, context.setup(one.trial.method).plan.time
        if one.trial.name not in took or not one.tokens_per_second or need is None or not need.train_seconds:
            continue
        slower = need.tokens / one.tokens_per_second / need.train_seconds
        for name in (method, ""):
            steps[name] += share * slower * need.total_seconds
            planned[name] += share * need.total_seconds
        rest += max(0.0, took[one.trial.name] - share * slower * need.total_seconds)
        planned_rest += START_SECONDS + (SCORING_SECONDS if context.scores_runs and not one.trial.searches else 0.0)
    if not steps:
        return {}, 1.0
    return {name: steps[name] / planned[name] for name in steps if planned[name] > 0}, rest / planned_rest


def has_time(context: Context, trials: Sequence[Trial], keep: float = 0.0) -> bool:
    """Whether trials that are not there yet, `keep` seconds, and the verdict fit into the time left less a reserve."""
    asked = [] if context.budget_seconds is None else [one for one in trials if not is_done(context, one)]
    if not asked:
        return True
    costs, end = costs_of(context)
    return sum(costs[one.method].of(one) for one in asked) + keep + end <= (1 - RESERVE) * context.seconds_left


def to_come(context: Context, counts: Mapping[str, int], seeds: int) -> float:
    """Seconds, as forecast, until full and the dearest rival have so many seeds, of which `counts` are there."""
    costs = {method: cost for method, cost in costs_of(context)[0].items() if cost.decides and method in counts}

    def rest(method: str) -> float:
        return max(0, seeds - counts[method]) * (costs[method].start + costs[method].run + costs[method].scoring)

    full, *rivals = costs
    leading = max((counts[method] for method in rivals), default=0)
    return rest(full) + max((rest(method) for method in rivals if counts[method] == leading), default=0.0)
