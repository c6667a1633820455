"""The search for a run's learning rate: that of a comparison, for one method and one seed."""

from __future__ import annotations

from dataclasses import replace

from fulltune.compare import design, rate_search, timing
from fulltune.compare.context import SEALED, Context
from fulltune.compare.rates import scale_of, search_all
from fulltune.compare.seeds import SeedRuns
from fulltune.compare.trial_folder import make_folder
from fulltune.compare.trials import clear
from fulltune.errors import RecipeError
from fulltune.evaluate import outputs
from fulltune.inference.store import clusters_of
from fulltune.pipeline import Run
from fulltune.records.comparison import Expectation, Searched, Trial, Tried
from fulltune.records.data import DataSummary
from fulltune.records.plan import Plan
from fulltune.records.scores import Estimate
from fulltune.search import FOLDER
from fulltune.stats.bootstrap import resample
from fulltune.stats.intervals import paired
from fulltune.text import counted, format_seconds, parse_seconds, typed_seconds
from fulltune.train.parent.fork_server import fork_server

MOST_WHOLE_RUNS = 3
"""With short trials of 6 % of the steps that is at most three and a half runs."""
_NO_TEXTS: tuple[list[str], str] = ([], "")
"""How far a model moved away from where it began is asked in comparisons."""


def search(job: Run, summary: DataSummary, planned: Plan) -> Searched:
    """Find the learning rate of a run on its eval rows, within the recipe's budget."""
    if job.hooks.compute_loss is not None:
        raise RecipeError(
            "method.learning_rate: search trains in processes of its own, which a loss from Python cannot reach; name "
            "the rate, or try rates with search: {method.learning_rate: [...]}"
        )
    folder = job.folder / FOLDER
    make_folder(folder, job.recipe, job.folder / "data")
    budget = job.recipe.search.budget
    with fork_server() as start:
        context = Context(
            replace(job, folder=folder),
            summary,
            "",
            None if budget is None else parse_seconds(budget),
            start,
            most_whole_runs=MOST_WHOLE_RUNS,
            finds_ceiling=True,
        )
        context.texts = _NO_TEXTS
        expectation = expected(context)
        ran = SeedRuns(context, search_all(context, expectation), expectation)
        kept = ran.best_rate(context.full.arm)
    found, scale = ran.searches[kept.trial.arm], scale_of(context)
    if not found.whole:  # there was time for one
        found = found.model_copy(update={"whole": (Tried(learning_rate=found.chosen, share=1.0, metric=kept.metric),)})
    for one in context.kept_results():
        if one.trial.name != kept.trial.name:
            clear(context, one.trial)
    ceiling = rate_search.ceiling({one.learning_rate: one.metric for one in found.tried}, scale)
    return Searched(
        trial=kept.trial.name,
        place=FOLDER,
        settings={"method.learning_rate": found.chosen},
        reason=f"searched: {found.reason}",
        metric_name=context.measure.name,
        greater_is_better=context.measure.greater_is_better,
        eval_rows=scale.eval_rows,
        rate=found,
        ceiling=ceiling if ceiling is not None and ceiling > found.chosen else None,
        bought=bought(context, ran, kept.trial),
        confidence=job.recipe.evaluate.confidence,
        seconds=round(context.clock.spent_seconds, 1),
        run_seconds=round(kept.train_seconds, 1),
        budget_seconds=context.budget_seconds,
        time_was_up=found.time_was_up,
    )


def in_words(job: Run, planned: Plan) -> str:
    """What it consists of, and about how long it takes."""
    rates = job.recipe.method.learning_rates
    number = len(rates) if rates else 3
    said = f"{number} short trials and 2 to {MOST_WHOLE_RUNS} whole runs"
    if planned.time is None:
        return said
    run = timing.START_SECONDS + planned.time.total_seconds
    share = rate_search.share_of_steps(job.recipe.compare.search_share, planned.total_steps)
    short = timing.START_SECONDS + share * planned.time.total_seconds
    return f"{said}, about {format_seconds(round((number + 1) * short + 2 * run))}"


def expected(context: Context) -> Expectation:
    """What the search will cost, said before it starts; refuses a budget below two short trials and a whole run."""
    arm, block = context.full.arm, context.recipe.compare
    steps = context.setup(arm).plan.total_steps
    share = rate_search.share_of_steps(block.search_share, steps)
    costs, fixed = timing.costs_of(context), timing.fixed_of(context)
    cost = costs[arm]
    short = fixed.start + share * cost.run_seconds
    whole = fixed.start + cost.run_seconds + cost.scoring_seconds
    # One beyond the grid shows where rates are too high.
    seconds = fixed.checks + (cost.num_rates + 1) * short + 2 * whole
    most = fixed.checks + (cost.num_rates + rate_search.MOST_EXTENSIONS) * short + context.most_whole_runs * whole
    if context.budget_seconds is not None and not context.kept_results():
        least = fixed.checks + 2 * short + whole
        if context.budget_seconds < least:
            raise RecipeError(_too_short(context.budget_seconds - fixed.checks, short, whole, seconds))
    context.say(
        f"rate search: {counted(cost.num_rates, 'short trial')} of {share:.0%} of the steps, then 2 to "
        f"{context.most_whole_runs} whole runs; about {format_seconds(round(seconds))}, at most about "
        f"{format_seconds(round(most))}"
        + (f" (budget: {typed_seconds(context.budget_seconds)})" if context.budget_seconds else "")
    )
    return Expectation(
        arms=(arm,),
        num_seeds=1,
        num_search_trials=design.search_runs(cost.num_rates),
        seconds=seconds,
        most_seconds=most,
        detectable=None,
        search_share=share,
        budget_seconds=context.budget_seconds,
        recipe_seeds=1,
    )


def _too_short(budget: float, short: float, whole: float, seconds: float) -> str:
    """What a budget buys, when that is no search."""
    number = max(0, int(budget / short))
    buys = counted(number, "short trial") if budget < whole else "a whole run at one rate"
    enough = typed_seconds(design.round_up(design.FORECAST_AGAIN * seconds))
    return (
        f"search.budget: is too short for a search: it buys {buys} (a short trial is forecast to take "
        f"{typed_seconds(short)}, a whole run {typed_seconds(whole)}), and two short trials and a whole run are the "
        f"least; give --budget {enough}, for all trials and two whole runs, or leave out the search"
    )


def bought(context: Context, ran: SeedRuns, kept: Trial) -> Estimate | None:
    """The kept run's metric on the test rows less that of the whole run at the usual rate, which decides nothing."""
    search = ran.searches[kept.arm]
    usual = next(
        (
            one.trial
            for one in context.kept_results()
            if not one.trial.searches and one.trial.learning_rate == search.usual and not one.problems
        ),
        None,
    )
    if usual is None or usual.learning_rate == kept.learning_rate:
        return None
    measure, clusters = context.measure, clusters_of(context.folder / "data" / "test")
    block = context.recipe.evaluate
    mine, other = (
        resample(
            outputs.load(context.folder / SEALED / f"{one.name}.npz"),
            lambda rows: {measure.name: measure.whole(rows)},
            samples=block.bootstrap_samples,
            clusters=clusters,
        )[measure.name]
        for one in (kept, usual)
    )
    return paired(mine, other, measure.span, block.confidence)
