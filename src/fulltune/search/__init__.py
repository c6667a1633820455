"""A run whose settings are searched on eval rows; the same command resumes it.

plan → search, in a folder of its own → the best run takes the place of the run's training → evaluate → report

A learning rate is found as a comparison finds it, for one method and one seed. Other settings are tried in whole runs:
all combinations where few, else some that are drawn at random.
"""

from __future__ import annotations

import math
import random
import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fulltune import pipeline
from fulltune.compare import budget
from fulltune.compare.context import SEALED, Context
from fulltune.compare.rates import Scale, choice, share_of_steps
from fulltune.compare.seeds import MOST_WHOLE_RUNS_ALONE, SeedRuns, search_all
from fulltune.compare.trial_folder import Clock, changed, make_folder, whole_run
from fulltune.compare.trials import clear
from fulltune.errors import DoesNotFitError, GuardStop, InterruptedRun, RecipeError, SetupError
from fulltune.evaluate import outputs
from fulltune.pipeline import Run, Until
from fulltune.recipe.several_runs import combinations, num_combinations, why_impossible, with_settings
from fulltune.records.comparison import Expectation, Searched, Trial, TriedSettings
from fulltune.records.data import DataSummary
from fulltune.records.events import Said
from fulltune.records.plan import Plan, Setting
from fulltune.records.scores import Estimate
from fulltune.records.training import Outcome
from fulltune.stats.bootstrap import Resampled, bounds_of
from fulltune.stats.intervals import paired
from fulltune.system import run_folder
from fulltune.system.run_folder import Reached
from fulltune.text import counted, format_metric, format_seconds, is_share, listed, parse_seconds, typed_seconds
from fulltune.train.parent.fork_server import fork_server

RECORD = "search.json"
FOLDER = "search"
"""Inside the run folder: the trials, until the best one is moved into the run."""
USUAL = "usual"
"""The folder of the run with the recipe's own settings."""
_DRAWS = 10
"""So many times as many draws as runs: some come twice, and some are impossible."""


def run(job: Run, until: Until = "report", measure: bool = False) -> Reached:
    """The line of a run up to stage `until`, with a search before its training where the recipe asks for one."""
    if not job.recipe.is_searched:
        return pipeline.run(job, until, measure)
    if measure or (job.folder / "plan" / "measured.json").exists():
        raise SetupError(
            "search: plans each of its runs itself, and does not take what 'plan --measure' found; write the measured "
            "settings into the recipe, which 'plan --measure' of a recipe without a search shows"
        )
    if until in ("data", "plan"):
        reached = pipeline.run(job, until)
        if reached.plan is not None:
            said = in_words(job, reached.plan)
            job.listener(Said(text=f"'fulltune run' begins with a search, which the plan leaves out: {said}"))
        return reached
    record = job.folder / RECORD
    if not record.exists():
        planned = pipeline.run(job, "plan")
        assert planned.plan is not None, "asked for"
        search = _search_settings if job.recipe.search.settings else _search_rate
        with run_folder.writing(job.folder), run_folder.locked(job.folder):
            try:
                found = search(job, planned.summary, planned.plan)
            except InterruptedRun:
                raise InterruptedRun(
                    "interrupted during the search; what is finished of it is kept, and the same command continues it"
                ) from None
            found.save(record)
        job.listener(Said(text=found.in_words))
    found = Searched.load(record)
    with run_folder.writing(job.folder), run_folder.locked(job.folder):
        move_into_run(job, found)
    return pipeline.run(replace(job, recipe=with_settings(job.recipe, found.settings)), until)


def in_words(job: Run, planned: Plan) -> str:
    """What a search consists of, and about how long it takes."""
    block, runs = job.recipe.search, MOST_WHOLE_RUNS_ALONE
    said = f"short trials and 2 to {runs} whole runs"
    if block.settings:
        runs = 1 + min(block.trials, num_combinations(block.settings))
        said = counted(runs, "whole run")
    return said if planned.time is None else f"{said}, about {format_seconds(round(runs * planned.time.whole_seconds))}"


def _refuse_too_short(given: float | None, least: float, what: str) -> None:
    if given is None or given >= least:
        return
    enough = typed_seconds(budget.round_up(budget.FORECAST_AGAIN * least))
    raise RecipeError(
        f"search.budget: {typed_seconds(given)} is too short for a search: {what} are the least, forecast to take "
        f"{typed_seconds(least)}; give --budget {enough} or more, or leave out the search"
    )


def move_into_run(job: Run, found: Searched) -> None:
    """Move the run that a search chose into the run folder, the plan last, so that a killed move goes on."""
    run, trial, arm = job.folder, job.folder / found.place, job.recipe.method.arm
    planned = Plan.load(job.plan_path)
    (run / "attempts").mkdir(exist_ok=True)
    for attempt in sorted((trial / "attempts").glob(f"{found.trial}-*")):
        if re.fullmatch(re.escape(found.trial) + r"-\d+", attempt.name):
            attempt.rename(run / "attempts" / attempt.name)
    for path in (run / "attempts").glob(f"{found.trial}-*/outcome.json"):
        outcome = Outcome.load(path)
        if outcome.model_folder not in (None, f"models/{arm}"):
            outcome.model_copy(update={"model_folder": f"models/{arm}"}).save(path)
    for source, target in ((trial / "models" / arm, run / "models" / arm), (trial / "probe", run / "probe")):
        if source.exists():
            shutil.rmtree(target, ignore_errors=True)
            target.parent.mkdir(exist_ok=True)
            source.rename(target)
    names = (f"{found.trial}.json", f"{arm}.json")
    made = next(Plan.load(path) for name in names if (path := trial / "plan" / name).exists())
    changes = {"model_name": "", "method": arm, "settings": tuple(_settings(made, planned, found))}
    if (adopted := made.model_copy(update=changes)) != planned:
        run_folder.save_plan(run, with_settings(job.recipe, found.settings), adopted)


def _settings(made: Plan, planned: Plan, found: Searched) -> list[Setting]:
    """The trial's settings; what it was given only in order to be a trial is as it was planned for the run."""
    before = {one.name: one for one in planned.settings}
    settings = []
    for one in made.settings:
        known = before.get(one.name)
        if one.name in found.settings:
            settings.append(Setting(name=one.name, value=one.value, reason=found.reason, chosen=True))
        elif known is not None and (known.value == one.value or not one.chosen):
            settings.append(known)
        elif one.chosen:
            settings.append(one)
    return settings


# ---- the learning rate -----------------------------------------------------------------------------------------


def _search_rate(job: Run, summary: DataSummary, planned: Plan) -> Searched:
    """Find the learning rate of a run on its eval rows, within the recipe's budget."""
    if job.hooks.compute_loss is not None:
        raise RecipeError(
            "method.learning_rate: search trains in processes of its own, which a loss from Python cannot reach; name "
            "the rate, or try rates with search: {method.learning_rate: [...]}"
        )
    folder, given = job.folder / FOLDER, job.recipe.search.budget
    make_folder(folder, job.recipe, job.folder / "data")
    seconds = None if given is None else parse_seconds(given)
    with fork_server() as start:
        context = Context(replace(job, folder=folder), summary, "", seconds, start)
        context.texts = ([], "")  # how far models moved generic text is asked in comparisons
        expectation = _expected(context)
        ran = SeedRuns(context, search_all(context, expectation), expectation)
        kept = ran.best_rate(context.full.arm)
    found = ran.searches[kept.trial.arm]
    if not found.whole:  # there was time for one
        found = found.model_copy(update={"whole": {found.chosen: kept.metric}})
    for one in context.kept_results():
        if one.trial.name != kept.trial.name:
            clear(context, one.trial)
    return Searched(
        trial=kept.trial.name,
        place=FOLDER,
        settings={"method.learning_rate": found.chosen},
        reason=f"searched: {found.reason}",
        metric_name=context.measure.name,
        greater_is_better=context.measure.greater_is_better,
        eval_rows=context.scale.eval_rows,
        rate=found,
        bought=_bought_by_rate(context, found.usual, kept.trial),
        confidence=job.recipe.evaluate.confidence,
        seconds=round(context.clock.spent_seconds, 1),
        run_seconds=round(kept.train_seconds, 1),
        budget_seconds=seconds,
        time_was_up=found.time_was_up,
    )


def _expected(context: Context) -> Expectation:
    """What the search will cost, said before it starts; refuses a budget below two short trials and a whole run."""
    arm, given = context.full.arm, context.budget_seconds
    share = share_of_steps(context.recipe.compare.search_share, context.setup(arm).plan.total_steps)
    cost = budget.costs_of(context)[0][arm]
    short, whole = cost.start + share * cost.run, cost.start + cost.run + cost.scoring
    if not context.kept_results():
        _refuse_too_short(given, 2 * short + whole, "two short trials and a whole run")
    seconds = cost.num_rates * short + 2 * whole
    context.say(
        f"rate search: {counted(cost.num_rates, 'short trial')} of {share:.0%} of the steps, then 2 to "
        f"{MOST_WHOLE_RUNS_ALONE} whole runs; about {format_seconds(round(seconds))}"
        + (f" (budget: {typed_seconds(given)})" if given else "")
    )
    return Expectation(
        arms=(arm,),
        num_seeds=1,
        most_seeds=1,
        num_search_trials=cost.num_rates,
        seconds=seconds,
        search_share=share,
        budget_seconds=given,
    )


def _bought_by_rate(context: Context, usual: float | None, kept: Trial) -> Estimate | None:
    """The kept run's metric on the test rows less that of the whole run at the usual rate, which decides nothing."""
    known = [one.trial for one in context.kept_results() if not one.trial.searches and not one.problems]
    before = next((one for one in known if one.learning_rate == usual), None)
    if before is None or usual == kept.learning_rate:
        return None
    measure, folder = context.measure, context.folder / SEALED
    mine, other = (
        context.scoring.estimates(outputs.load(folder / f"{one.name}.npz"), metrics=measure.alone)[measure.name]
        for one in (kept, before)
    )
    return paired(mine, other, measure.span, context.recipe.evaluate.confidence)


# ---- other settings --------------------------------------------------------------------------------------------


def _search_settings(job: Run, summary: DataSummary, planned: Plan) -> Searched:
    """Find the best settings in whole runs; the recipe's own are kept unless clearly beaten on eval rows."""
    block, folder = job.recipe.search, job.folder / FOLDER
    given = None if block.budget is None else parse_seconds(block.budget)
    possible = num_combinations(block.settings)
    most = min(block.trials, possible)
    run_seconds = planned.time.whole_seconds if planned.time else 0.0
    if not _record(folder, USUAL).exists():
        _refuse_too_short(given, 2 * run_seconds, "two runs")

    def say(text: str) -> None:
        job.listener(Said(text=text))

    say(
        f"search: {in_words(job, planned)}, with the recipe's own settings and {most} of "
        f"{counted(possible, 'combination')} of {listed(list(block.settings))}"
        + (f" (budget: {typed_seconds(given)})" if given is not None else "")
    )

    def tried(number: int, settings: dict[str, Any]) -> TriedSettings:
        said = [f"{key.split('.')[-1]} {value}" for key, value in settings.items()] or ["the recipe's own settings"]
        say(f"run {number} of {1 + most}: {listed(said)}")
        one = _try(job, settings)
        say(f"  {one.problem or f'{planned.metric} {format_metric(planned.metric, one.metric)} on the eval rows'}")
        return one

    scale = Scale(planned.greater_is_better, summary.splits["eval"].rows, is_share(planned.metric))
    found, time_was_up = {USUAL: tried(1, {})}, False
    for settings in _drawn(job):
        if any(_is_the_same(job, one.settings, settings) for one in found.values()):
            continue
        took = [one.seconds for one in found.values()]
        begins = not _record(folder, _name(job, settings)).exists()
        if time_was_up := begins and given is not None and sum(took) + max(took) > given:
            say("the budget is used up: the best of the runs so far is taken")
            break
        one = tried(1 + len(found), settings)
        found[one.name] = one
        kept = choice({name: one.metric for name, one in found.items()}, scale, USUAL)
        for name in found.keys() - {kept}:
            for part in ("models", "checkpoints"):
                shutil.rmtree(folder / name / part, ignore_errors=True)
    return _found(job, found, planned, scale).model_copy(update={"budget_seconds": given, "time_was_up": time_was_up})


def _name(job: Run, settings: Mapping[str, Any]) -> str:
    """Of a combination: the places of its values in their lists."""
    block = job.recipe.search.settings
    return "-".join(str(values.index(settings[key]) + 1) for key, values in block.items()) if settings else USUAL


def _record(folder: Path, name: str) -> Path:
    return folder / "trials" / f"{name}.json"


def _run(job: Run, settings: dict[str, Any], until: Until) -> Reached:
    # Going on at half the rate, it would not tell whether these settings are any good.
    only: dict[str, dict[str, Any]] = {"evaluate": {"baselines": False}, "train": {"max_rollbacks": 0}}
    recipe = changed(with_settings(job.recipe, settings), only)
    return whole_run(job, recipe, job.folder / FOLDER / _name(job, settings), until, job.folder / "data")


def _try(job: Run, settings: dict[str, Any]) -> TriedSettings:
    """Train with these settings; done before, it is known. That it diverged or does not fit is a result, too."""
    name = _name(job, settings)
    if (path := _record(job.folder / FOLDER, name)).exists():
        return TriedSettings.load(path)
    clock, metric, problem = Clock(path.with_suffix(".jsonl")), None, ""
    try:
        # What the best settings bought is asked of the usual run's weights, which do not stay on the disk.
        with clock.during(name):
            reached = _run(job, settings, "train" if settings else "evaluate")
        assert reached.outcome is not None, "asked for"
        metric = reached.outcome.best_metric
        problem = "" if metric is not None else "its eval rows were never scored"
    except (GuardStop, DoesNotFitError) as stop:
        problem = "; ".join(stop.problems)
    value, seconds = math.nan if metric is None else metric, round(clock.spent_seconds, 1)
    found = TriedSettings(name=name, settings=settings, metric=value, seconds=seconds, problem=problem)
    found.save(path)
    return found


def _found(job: Run, found: Mapping[str, TriedSettings], planned: Plan, scale: Scale) -> Searched:
    """The record of these runs, the first with the recipe's own settings; GuardStop when every run failed."""
    block, folder, arm = job.recipe.search, job.folder / FOLDER, job.recipe.method.arm
    best = found[choice({name: one.metric for name, one in found.items()}, scale, USUAL)]
    if math.isnan(best.metric):
        raise GuardStop([f"search: {one.name}: {one.problem}" for one in found.values()])
    trial = Plan.load(folder / best.name / "plan" / f"{arm}.json").trial
    reason, bought = f"none of {counted(len(found) - 1, 'other')} was clearly better", None
    if best.settings:
        reason = f"the best of {counted(len(found), 'whole run')}"
        _run(job, best.settings, "evaluate")
        files = [folder / name / "scores" / f"{trial}.npz" for name in (best.name, USUAL)]
        if all(file.exists() for file in files):  # else the usual settings failed
            mine, other = map(Resampled.load, files)
            bounds = bounds_of(planned.metric)
            bought = paired(mine, other, bounds and bounds[1] - bounds[0], job.recipe.evaluate.confidence)
    values = {one.name: one.value for one in planned.settings}
    return Searched(
        trial=trial,
        place=f"{FOLDER}/{best.name}",
        settings=best.settings,
        own={name: values.get(name) for name in block.settings},
        reason=f"searched: {reason}",
        metric_name=planned.metric,
        greater_is_better=planned.greater_is_better,
        eval_rows=scale.eval_rows,
        tried=tuple(sorted(found.values(), key=lambda one: scale.oriented(one.metric), reverse=True)),
        num_combinations=num_combinations(block.settings),
        bought=bought,
        confidence=job.recipe.evaluate.confidence,
        seconds=round(sum(one.seconds for one in found.values()), 1),
        run_seconds=best.seconds,
    )


def _is_the_same(job: Run, one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two combinations make the same run, such as the recipe's own settings written out."""
    first, second = (with_settings(job.recipe, settings).fingerprint() for settings in (one, other))
    return first == second


def _drawn(job: Run) -> list[dict[str, Any]]:
    """All combinations, or of more than `search.trials` so many possible ones, drawn at random by the recipe's seed."""
    values, most = job.recipe.search.settings, job.recipe.search.trials
    if num_combinations(values) <= most:
        return list(combinations(values))
    chance, drawn = random.Random(job.recipe.train.seed), dict[str, dict[str, Any]]()
    for _ in range(_DRAWS * most):
        settings = {name: chance.choice(given) for name, given in values.items()}
        if len(drawn) < most and not why_impossible(job.recipe, settings):
            drawn.setdefault(_name(job, settings), settings)
    return list(drawn.values())
