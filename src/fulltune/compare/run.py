"""Run a comparison: data → rates (on eval rows) → seeds (looks at eval rows) → test rows, once → verdict → report."""

from __future__ import annotations

import time
from pathlib import Path

from fulltune import pipeline, report
from fulltune.compare.budget import EXPECTATION, load_or_plan_design, why_not_resumable
from fulltune.compare.conclude import judge_on_test_rows
from fulltune.compare.context import RECORD, TEST_LOG, Context
from fulltune.compare.pairs import choose_pairs
from fulltune.compare.seeds import SeedRuns, search_all_rates
from fulltune.errors import RecipeError
from fulltune.files import read_json_lines
from fulltune.pipeline import Run
from fulltune.plan.settings import with_settings
from fulltune.recipe.fields import Recipe
from fulltune.recipe.methods import usual_methods
from fulltune.recipe.rules import problems_of
from fulltune.recipe.tasks import FACTS
from fulltune.records.comparison import Comparison, Expectation
from fulltune.records.events import Message
from fulltune.system import run_folder
from fulltune.text import parse_seconds
from fulltune.train.parent.fork_server import fork_server

NEAR_DUPLICATES = 0.8
"""Minimum Jaccard similarity of 5-grams for rows to count as near duplicates."""
Compared = tuple[Comparison, tuple[Path, ...]]


def run_comparison(job: Run, command: str, budget: str | None = None) -> Compared:
    """Run or resume a comparison of the recipe's methods, and return its record and report files. `command` is shown in
    the report, and `budget`, such as `30m`, limits all commands together."""
    before = 0.0 if job.began is None else time.time() - job.began
    began, record = time.monotonic() - before, job.folder / RECORD
    with run_folder.explain_os_errors(job.folder), run_folder.lock_folder(job.folder):
        text, path = budget or job.recipe.compare.budget, job.folder / EXPECTATION
        seconds = parse_seconds(text) if text else None
        if path.exists() and budget is None:  # an earlier command may have had a larger budget
            earlier = Expectation.load(path).budget_seconds
            seconds = max((one for one in (seconds, earlier) if one is not None), default=None)
        finished = Comparison.load(record) if record.exists() else None
        if finished is not None and (why := why_not_resumable(finished, seconds)):
            # Its models and its table belong together, so nothing is changed.
            job.listener(Message(text=why))
            return finished, report.write_comparison_report(job.folder)
        openings = finished.openings if finished else ()
        with fork_server() as start:
            with run_folder.remove_new_run_on_error(job.folder):
                job, summary = pipeline.prepare_as_chosen(job, choose_pairs)
            alpha_left = openings[-1].left if openings else None
            context = Context(job, summary, command, seconds, start, began, alpha_left=alpha_left)
            if busy := context.method_setup(context.full.label).plan.busy:
                context.say(busy)
            expectation = load_or_plan_design(context)
            if len(read_json_lines(job.folder / TEST_LOG)) > len(openings):
                context.say("the test rows were already scored, so no more runs are trained")
                context.budget_seconds = 0.0
            comparison = judge_on_test_rows(
                SeedRuns(context, search_all_rates(context, expectation), expectation).train_until_clear()
            )
            with context.log_duration("report"):
                return comparison, report.write_comparison_report(job.folder)


def comparison_recipe(recipe: Recipe) -> Recipe:
    """Add the usual methods to a recipe without any, and keep near duplicates in one split unless the recipe sets them.
    Raise `RecipeError` if its other settings exclude these methods."""
    if not recipe.methods:
        methods = usual_methods(recipe.method, FACTS[recipe.task].head_is_new)
        recipe = recipe.model_copy(update={"methods": methods})
        if problems := [*problems_of(recipe)]:
            raise RecipeError(problems)
    if "near_duplicates" in recipe.data.model_fields_set or FACTS[recipe.task].reads == "image":
        return recipe
    return with_settings(recipe, {"data.near_duplicates": NEAR_DUPLICATES})
