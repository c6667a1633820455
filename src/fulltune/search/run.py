"""A run whose settings are searched on eval rows, on one screen; the same command resumes it.

plan → search, in a folder of its own → the best run takes the place of the run's training → evaluate → report
"""

from __future__ import annotations

from dataclasses import replace

from fulltune import pipeline
from fulltune.errors import InterruptedRun, SetupError
from fulltune.pipeline import Run, Until
from fulltune.recipe.several_runs import with_settings
from fulltune.records.comparison import Searched
from fulltune.records.events import Said
from fulltune.search import rate, settings
from fulltune.search.folder import RECORD, move_into_run
from fulltune.system import run_folder
from fulltune.system.run_folder import Reached


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
