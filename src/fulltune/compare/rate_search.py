"""Run a recipe that searches its learning rate: plan → search (on eval rows, in a subfolder) → move the best run into
the run folder → evaluate → report."""

from __future__ import annotations

import shutil
from dataclasses import replace

from fulltune import pipeline
from fulltune.compare import budget
from fulltune.compare.context import Context
from fulltune.compare.folds import run_folds
from fulltune.compare.pairs import announce_choice, choose_pairs
from fulltune.compare.rates import share_of_steps
from fulltune.compare.seeds import MOST_WHOLE_RUNS_ALONE, SeedRuns, search_all_rates
from fulltune.compare.trials import delete_trial_files
from fulltune.data.prepare import link_cached_rows
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
from fulltune.system.run_folder import RunResult
from fulltune.text import counted, format_seconds, parse_seconds, typed_seconds
from fulltune.train.parent.fork_server import fork_server

RECORD = "search.json"
FOLDER = "search"
_RUNS = f"2 to {MOST_WHOLE_RUNS_ALONE} whole runs"


def run_recipe(job: Run, until: Until = "report", measure: bool = False) -> RunResult:
    """Run or resume all stages up to `until`, after searching the learning rate if the recipe asks for it. `measure`
    tries out settings in the plan stage."""
    choose = {"data": None, "plan": announce_choice}.get(until, choose_pairs)
    if job.recipe.is_cross_validated:
        return run_folds(job, until, measure, choose)
    if not job.recipe.is_searched:
        return pipeline.run(job, until, measure, choose)
    if measure or (job.folder / "plan" / "measured.json").exists():
        raise SetupError(
            "search: each run of a search is planned without 'plan --measure'; run 'plan --measure' on a recipe "
            "without a search, and copy the settings that it shows into this recipe"
        )
    if until in ("data", "plan"):
        reached = pipeline.run(job, until, choose=choose)
        if (plan := reached.plan) is not None:
            time = (
                f", about {format_seconds(round(MOST_WHOLE_RUNS_ALONE * plan.time.whole_seconds))}" if plan.time else ""
            )
            message = f"this plan does not include the search: 'fulltune run' first runs short trials and {_RUNS}{time}"
            job.listener(Message(text=message))
        return reached
    record = job.folder / RECORD
    if not record.exists():
        summary = pipeline.run(job, "plan", choose=choose).summary
        job = replace(job)  # reads what was chosen
        with run_folder.explain_os_errors(job.folder), run_folder.lock_folder(job.folder):
            try:
                searched = _search_rate(job, summary)
            except InterruptedRun:
                raise InterruptedRun(
                    "interrupted during the search; run the same command to resume after the finished trials"
                ) from None
            searched.save(record)
        job.listener(Message(text=f"search: using the learning rate {searched.rate.chosen:g}: {searched.rate.reason}"))
    searched = Searched.load(record)
    with run_folder.explain_os_errors(job.folder), run_folder.lock_folder(job.folder):
        move_best_run(job, searched)
    return pipeline.run(replace(job, recipe=_with_searched_rate(job.recipe, searched)), until)


def _search_rate(job: Run, summary: DataSummary) -> Searched:
    """Search the learning rate in a subfolder, delete all models but the best, and return the result."""
    if job.hooks.compute_loss is not None:
        raise RecipeError(
            "method.learning_rate: a search trains in separate processes, where a loss from Python is not available; "
            "set a learning rate"
        )
    folder, limit = job.folder / FOLDER, job.recipe.compare.budget
    run_folder.find_or_make_folder(job.recipe, "", folder.name, folder, fresh=False)
    if not (folder / "data").exists():
        link_cached_rows(job.folder / "data", folder / "data")
    with fork_server() as start:
        seconds = None if limit is None else parse_seconds(limit)
        context = Context(replace(job, folder=folder), summary, "", seconds, start)
        expectation = _forecast_search(context)
        ran = SeedRuns(context, search_all_rates(context, expectation), expectation)
        best = ran.train_best_rate(context.full.label)
    rate_search = ran.searches[best.trial.method]
    if not rate_search.whole:  # there was time for one run only
        rate_search = rate_search.model_copy(update={"whole": {rate_search.chosen: best.metric}})
    for result in context.saved_results():
        if result.trial.name != best.trial.name:
            delete_trial_files(context, result.trial)
    return Searched(
        trial=best.trial.name,
        rate=rate_search,
        metric_name=context.resamplable_metric.name,
        eval_rows=context.metric_scale.eval_rows,
        seconds=round(context.seconds_spent, 1),
        run_seconds=round(best.train_seconds, 1),
    )


def _forecast_search(context: Context) -> Expectation:
    """Forecast and announce the search's time. Raise a `RecipeError` if the budget is too short."""
    method, limit = context.full.label, context.budget_seconds
    share = share_of_steps(context.recipe.compare.search_share, context.method_setup(method).plan.total_steps)
    cost = budget.forecast_costs(context)[0][method]
    short, whole = cost.start + share * cost.run, cost.start + cost.run
    least, seconds = 2 * short + whole, cost.num_rates * short + 2 * whole
    if limit is not None and limit < least and not context.saved_results():
        raise RecipeError(
            f"compare.budget: {typed_seconds(limit)} is too short for a search, which needs at least two short trials "
            f"and a whole run, forecast to take {typed_seconds(least)}; set --budget "
            f"{typed_seconds(budget.round_up_seconds(budget.FORECAST_AGAIN * least))} or more, or remove the search"
        )
    context.say(
        f"rate search: {counted(cost.num_rates, 'short trial')} of {share:.0%} of the steps, then {_RUNS}; about "
        f"{format_seconds(round(seconds))}" + (f" (budget: {typed_seconds(limit)})" if limit else "")
    )
    return Expectation(methods=(method,), num_seeds=1, most_seeds=1, search_share=share)


def _with_searched_rate(recipe: Recipe, searched: Searched) -> Recipe:
    """Return the recipe with the chosen rate and without a search or budget."""
    method = {
        "method.learning_rate": searched.rate.chosen,
        "method.learning_rates": None,
        "method.name": recipe.method.label,
    }
    return with_settings(recipe, {**method, "compare.budget": None})


def move_best_run(job: Run, searched: Searched) -> None:
    """Move the best run into the run folder. The plan file is moved last, so that an interrupted move can resume."""
    run, trial, method = job.folder, job.folder / FOLDER, job.recipe.method.label
    (run / "attempts").mkdir(exist_ok=True)
    for attempt in sorted((trial / "attempts").glob(f"{searched.trial}-*")):
        attempt.rename(run / "attempts" / attempt.name)
    for path in (run / "attempts").glob(f"{searched.trial}-*/outcome.json"):
        outcome = Outcome.load(path)
        if outcome.model_folder not in (None, f"models/{method}"):
            outcome.model_copy(update={"model_folder": f"models/{method}"}).save(path)
    for source, target in ((trial / "models" / method, run / "models" / method), (trial / "probe", run / "probe")):
        if source.exists():
            shutil.rmtree(target, ignore_errors=True)
            target.parent.mkdir(exist_ok=True)
            source.rename(target)
    planned, trial_plan = Plan.load(job.plan_path), Plan.load(trial / "plan" / f"{searched.trial}.json")
    before, settings = {setting.name: setting for setting in planned.settings}, list[Setting]()
    for setting in trial_plan.settings:
        before_trial = before.get(setting.name)
        if setting.name == "method.learning_rate":
            reason = f"searched: {searched.rate.reason}"
            settings.append(Setting(name=setting.name, value=setting.value, reason=reason, is_automatic=True))
        elif before_trial is not None and (before_trial.value == setting.value or not setting.is_automatic):
            settings.append(before_trial)  # only the search changed it
        elif setting.is_automatic:
            settings.append(setting)
    changes = {"model_name": "", "method": method, "settings": tuple(settings)}
    if (adopted := trial_plan.model_copy(update=changes)) != planned:
        run_folder.save_plan(run, _with_searched_rate(job.recipe, searched), adopted)
