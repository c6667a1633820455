"""A run whose learning rate is searched, as a comparison searches it, for one method and one seed.

plan → search (on eval rows, in a folder of its own) → the best run is moved into the run → evaluate → report
"""

from __future__ import annotations

import shutil
from dataclasses import replace

from fulltune import pipeline
from fulltune.compare import budget
from fulltune.compare.context import Context
from fulltune.compare.rates import share_of_steps
from fulltune.compare.seeds import MOST_WHOLE_RUNS_ALONE, SeedRuns, search_all
from fulltune.compare.trials import clear
from fulltune.data.prepare import link
from fulltune.errors import InterruptedRun, RecipeError, SetupError
from fulltune.pipeline import Run, Until
from fulltune.plan.settings import with_settings
from fulltune.recipe.fields import Recipe
from fulltune.records.comparison import Expectation, Searched
from fulltune.records.data import DataSummary
from fulltune.records.events import Message
from fulltune.records.plan import Plan, Setting
from fulltune.records.training import Outcome
from fulltune.system import run_folder
from fulltune.system.run_folder import Reached
from fulltune.text import counted, format_seconds, parse_seconds, typed_seconds
from fulltune.train.parent.fork_server import fork_server

RECORD = "search.json"
FOLDER = "search"
"""Inside the run folder: the trials, until the best one is moved into the run."""
_RUNS = f"2 to {MOST_WHOLE_RUNS_ALONE} whole runs"


def run_recipe(job: Run, until: Until = "report", measure: bool = False) -> Reached:
    """Do a run's stages up to `until`, with a search for its learning rate before the training where the recipe asks
    for one; the same call resumes it."""
    if not job.recipe.is_searched:
        return pipeline.run(job, until, measure)
    if measure or (job.folder / "plan" / "measured.json").exists():
        raise SetupError(
            "search: plans each of its runs itself, and does not take what 'plan --measure' found; write the measured "
            "settings into the recipe, which 'plan --measure' of a recipe without a search shows"
        )
    if until in ("data", "plan"):
        reached = pipeline.run(job, until)
        if (made := reached.plan) is not None:
            time = (
                f", about {format_seconds(round(MOST_WHOLE_RUNS_ALONE * made.time.whole_seconds))}" if made.time else ""
            )
            said = f"'fulltune run' begins with a search, which the plan leaves out: short trials and {_RUNS}{time}"
            job.listener(Message(text=said))
        return reached
    record = job.folder / RECORD
    if not record.exists():
        summary = pipeline.run(job, "plan").summary
        with run_folder.writing(job.folder), run_folder.locked(job.folder):
            try:
                found = _search(job, summary)
            except InterruptedRun:
                raise InterruptedRun(
                    "interrupted during the search; what is finished of it is kept, and the same command continues it"
                ) from None
            found.save(record)
        job.listener(Message(text=f"search: taking the learning rate {found.rate.chosen:g}: {found.rate.reason}"))
    found = Searched.load(record)
    with run_folder.writing(job.folder), run_folder.locked(job.folder):
        move_into_run(job, found)
    return pipeline.run(replace(job, recipe=_at_its_rate(job.recipe, found)), until)


def _search(job: Run, summary: DataSummary) -> Searched:
    """Find the learning rate of a run on its eval rows, within the recipe's budget."""
    if job.hooks.compute_loss is not None:
        raise RecipeError(
            "method.learning_rate: search trains in processes of its own, which a loss from Python cannot reach; name "
            "the rate"
        )
    folder, given = job.folder / FOLDER, job.recipe.compare.budget
    run_folder.find_or_make(job.recipe, "", folder.name, folder, fresh=False)
    if not (folder / "data").exists():
        link(job.folder / "data", folder / "data")
    with fork_server() as start:
        seconds = None if given is None else parse_seconds(given)
        context = Context(replace(job, folder=folder), summary, "", seconds, start)
        expectation = _expected(context)
        ran = SeedRuns(context, search_all(context, expectation), expectation)
        kept = ran.best_rate(context.full.label)
    found = ran.searches[kept.trial.method]
    if not found.whole:  # there was time for one
        found = found.model_copy(update={"whole": {found.chosen: kept.metric}})
    for one in context.kept_results():
        if one.trial.name != kept.trial.name:
            clear(context, one.trial)
    return Searched(
        trial=kept.trial.name,
        rate=found,
        metric_name=context.measure.name,
        eval_rows=context.scale.eval_rows,
        seconds=round(context.seconds_spent, 1),
        run_seconds=round(kept.train_seconds, 1),
    )


def _expected(context: Context) -> Expectation:
    """What the search will cost, said before it starts; refuses a budget below two short trials and a whole run."""
    method, given = context.full.label, context.budget_seconds
    share = share_of_steps(context.recipe.compare.search_share, context.setup(method).plan.total_steps)
    cost = budget.costs_of(context)[0][method]
    short, whole = cost.start + share * cost.run, cost.start + cost.run
    least, seconds = 2 * short + whole, cost.num_rates * short + 2 * whole
    if given is not None and given < least and not context.kept_results():
        raise RecipeError(
            f"compare.budget: {typed_seconds(given)} is too short for a search: two short trials and a whole run are "
            f"the least, forecast to take {typed_seconds(least)}; give --budget "
            f"{typed_seconds(budget.round_up(budget.FORECAST_AGAIN * least))} or more, or leave out the search"
        )
    context.say(
        f"rate search: {counted(cost.num_rates, 'short trial')} of {share:.0%} of the steps, then {_RUNS}; about "
        f"{format_seconds(round(seconds))}" + (f" (budget: {typed_seconds(given)})" if given else "")
    )
    return Expectation(
        methods=(method,),
        num_seeds=1,
        most_seeds=1,
        num_search_trials=cost.num_rates,
        seconds=seconds,
        search_share=share,
        budget_seconds=given,
    )


def _at_its_rate(recipe: Recipe, found: Searched) -> Recipe:
    """The recipe of the run that a search chose."""
    method = {
        "method.learning_rate": found.rate.chosen,
        "method.learning_rates": None,
        "method.name": recipe.method.label,
    }
    return with_settings(recipe, {**method, "compare.budget": None})


def move_into_run(job: Run, found: Searched) -> None:
    """Move the run that a search chose into the run folder, the plan last, so that a killed move goes on."""
    run, trial, method = job.folder, job.folder / FOLDER, job.recipe.method.label
    (run / "attempts").mkdir(exist_ok=True)
    for attempt in sorted((trial / "attempts").glob(f"{found.trial}-*")):
        attempt.rename(run / "attempts" / attempt.name)
    for path in (run / "attempts").glob(f"{found.trial}-*/outcome.json"):
        outcome = Outcome.load(path)
        if outcome.model_folder not in (None, f"models/{method}"):
            outcome.model_copy(update={"model_folder": f"models/{method}"}).save(path)
    for source, target in ((trial / "models" / method, run / "models" / method), (trial / "probe", run / "probe")):
        if source.exists():
            shutil.rmtree(target, ignore_errors=True)
            target.parent.mkdir(exist_ok=True)
            source.rename(target)
    planned, made = Plan.load(job.plan_path), Plan.load(trial / "plan" / f"{found.trial}.json")
    changes = {"model_name": "", "method": method, "settings": tuple(_settings(made, planned, found))}
    if (adopted := made.model_copy(update=changes)) != planned:
        run_folder.save_plan(run, _at_its_rate(job.recipe, found), adopted)


def _settings(made: Plan, planned: Plan, found: Searched) -> list[Setting]:
    """The trial's settings; what it was given only in order to be a trial is as it was planned for the run."""
    before = {one.name: one for one in planned.settings}
    settings = []
    for one in made.settings:
        known = before.get(one.name)
        if one.name == "method.learning_rate":
            reason = f"searched: {found.rate.reason}"
            settings.append(Setting(name=one.name, value=one.value, reason=reason, is_automatic=True))
        elif known is not None and (known.value == one.value or not one.is_automatic):
            settings.append(known)
        elif one.is_automatic:
            settings.append(one)
    return settings
