"""A run whose settings are searched on eval rows, on one screen; the same command resumes it.

plan → search, in a folder of its own → the best run takes the place of the run's training → evaluate → report
"""

from __future__ import annotations

import re
import shutil
from dataclasses import replace

from fulltune import pipeline
from fulltune.errors import InterruptedRun, SetupError
from fulltune.pipeline import Run, Until
from fulltune.recipe.several_runs import with_settings
from fulltune.records.comparison import Searched
from fulltune.records.events import Said
from fulltune.records.plan import Plan, Setting
from fulltune.records.training import Outcome
from fulltune.search import rate, settings
from fulltune.system import run_folder
from fulltune.system.run_folder import Reached

RECORD = "search.json"


def run(job: Run, until: Until = "report", measure: bool = False) -> Reached:
    """The line of a run up to stage `until`, with a search before its training where the recipe asks for one."""
    if not job.recipe.is_searched:
        return pipeline.run(job, until, measure)
    if measure or (job.folder / "plan" / "measured.json").exists():
        raise SetupError(
            "search: plans each of its runs itself, and does not take what 'plan --measure' found; write the measured "
            "settings into the recipe, which 'plan --measure' of a recipe without a search shows"
        )
    by = settings if job.recipe.search.settings else rate
    if until in ("data", "plan"):
        reached = pipeline.run(job, until)
        if reached.plan is not None:
            said = by.in_words(job, reached.plan)
            job.listener(Said(text=f"'fulltune run' begins with a search, which the plan leaves out: {said}"))
        return reached
    record = job.folder / RECORD
    if not record.exists():
        planned = pipeline.run(job, "plan")
        assert planned.plan is not None, "asked for"
        with run_folder.writing(job.folder), run_folder.locked(job.folder):
            try:
                found = by.search(job, planned.summary, planned.plan)
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
