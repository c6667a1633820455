"""The line of a comparison: data once, a rate search for each arm, seeds until the answer is clear, one look at the
test rows, the verdict. Layer 3, like `pipeline`, whose stages it uses.

    data → rates (halving, on eval rows) → seeds (looks at eval rows) → test rows, once → verdict → proof card

Everything is kept in files as it comes, so that the same command goes on where it was stopped.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fulltune import pipeline, plan, report
from fulltune.compare import design, more_time, parallel, rate_search, timing
from fulltune.compare.conclude import judge, opened_by_others
from fulltune.compare.context import OPENINGS, RECORD, Line, lines_of, settings_of
from fulltune.compare.lint import lint
from fulltune.compare.many_tasks import many_tasks
from fulltune.compare.rates import EXPECTATION, expect, grid_trials, search, usual
from fulltune.compare.seeds import most_seeds, run_seeds
from fulltune.compare.table_rows import design_of_rows
from fulltune.context import Run
from fulltune.errors import RecipeError
from fulltune.evaluate.generic_text import generic_texts
from fulltune.models.base import Base
from fulltune.models.files import is_quantised
from fulltune.models.shapes import shapes_of
from fulltune.recipe.fields import Recipe
from fulltune.recipe.methods import RIVALS
from fulltune.recipe.tasks import FACTS
from fulltune.records.comparison import Comparison, Expectation, ManyTasks, Search
from fulltune.records.differences import ArmDesign, ComparisonDesign, Finding
from fulltune.records.events import Said
from fulltune.system import run_folder
from fulltune.text import is_share, parse_seconds
from fulltune.train.parent.fork_server import fork_server


def recipe_for(recipe: Recipe) -> Recipe:
    """The recipe as a comparison uses it: with near-duplicates on one side of the split.

    Raises:
        RecipeError: When there is nothing to compare.
    """
    if not recipe.methods:
        raise RecipeError(
            "methods: names nothing to compare; add for example 'methods: [base, full, lora, adapter, prompt]'"
        )
    if "near_duplicates" in recipe.data.model_fields_set or FACTS[recipe.task].reads == "image":
        return recipe
    block = recipe.data.model_copy(update={"near_duplicates": recipe.compare.near_duplicates})
    return recipe.model_copy(update={"data": block})


def lint_recipe(recipe: Recipe, budget: str | None = None) -> tuple[Finding, ...]:
    """What would make the comparison that a recipe asks for unfair; no comparison is made.

    Args:
        recipe: As `recipe_for` gives it.
        budget: Most time to take; None: the recipe's. With one the rows are read and a few steps measured, because
            what is unfair depends on what fits.

    Raises:
        RecipeError: When the budget is too short for a verdict.
    """
    base = Base.of(recipe.model, recipe.task, has_weights=False)
    shapes = shapes_of(base, {})
    text = budget or recipe.compare.budget
    fits: Expectation | None = None
    of_rows: dict[str, Any] = {}
    if text:
        fits, of_rows = _foreseen(recipe, parse_seconds(text))
    planned = recipe.compare.seeds or design.num_seeds(None, design.FEW_TRAIN_ROWS)
    left_out = fits.left_out if fits else ()
    rivals = [one.arm for one in recipe.methods if one.kind in RIVALS and one.arm not in left_out]
    arms = []
    for method in recipe.methods:
        if method.kind == "base" or method.arm in left_out:
            continue
        waits = fits is not None and fits.sequential and (method.kind == "head" or method.arm in rivals[1:])
        seeds = planned if fits is None else 1 if waits else fits.num_seeds
        usual, _ = plan.learning_rate_of(method, shapes.num_parameters, shapes.is_decoder)
        rates = rate_search.grid(usual, method.learning_rates, method.learning_rate)
        arms.append(
            ArmDesign(
                name=method.arm,
                kind=method.kind,
                settings=settings_of(method),
                rates_searched=rates if len(rates) > 1 and (fits is None or fits.search_share) else (),
                learning_rate=rates[0] if len(rates) == 1 else None,
                seeds=tuple(range(recipe.train.seed, recipe.train.seed + seeds)),
                waited=waits,
                time_was_up=fits is not None and fits.num_seeds < most_seeds(fits),
                no_time_to_search=len(rates) > 1 and fits is not None and not fits.search_share,
                weights_dtype=recipe.model.weights_dtype,
                bf16_rounding=recipe.train.bf16_rounding or "stochastic",
            )
        )
    return lint(
        ComparisonDesign(
            arms=tuple(arms),
            left_out=left_out,
            weights_source="gguf" if is_quantised(base.files) else "plain",
            **of_rows,
        )
    )


def _foreseen(recipe: Recipe, budget_seconds: float) -> tuple[Expectation, dict[str, Any]]:
    """What fits into a budget, and what the lint looks at in the rows, which stay in the cache for the comparison."""
    began, output = time.monotonic(), Path(recipe.output)
    with run_folder.writing(output):
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".lint-", dir=output) as folder:
            job = Run(recipe, Path(folder))
            with fork_server() as start:
                line = Line(job, pipeline.prepare(job), "", budget_seconds, start, began)
                goes_on = run_folder.unfinished(output, recipe.fingerprint())[-1:]
                return expect(line), design_of_rows(line) | {"opened_by_others": opened_by_others(line, goes_on)}


@dataclass(frozen=True)
class Compared:
    """What a comparison gave."""

    comparison: Comparison
    folder: Path
    cards: tuple[Path, ...]


def together(found: Mapping[str, Compared]) -> ManyTasks:
    """Comparisons on one base, by the name of their task, as one record.

    Raises:
        RecipeError: When a budget left no method that all of them trained.
    """
    trained = [{row.arm for row in one.comparison.rows if row.kind not in ("base", "full")} for one in found.values()]
    if not set.intersection(*trained):
        raise RecipeError("--budget: too short to train one method beside full for every task; give more time")
    shares = all(is_share(one.comparison.metric) for one in found.values())
    folders = {name: one.folder.name for name, one in found.items()}
    return many_tasks({name: one.comparison for name, one in found.items()}, folders, shares)


def run(job: Run, command: str, budget: str | None = None) -> Compared:
    """Compare the recipe's methods, or go on with it.

    Args:
        job: The recipe, as `recipe_for` gives it, in its run folder.
        command: What was typed, for the record.
        budget: Most time to take in all, over all commands, such as `30m`; None: what it had, or the
            recipe's, else without limit. A comparison that ended undecided because its time was up goes on with more.

    Raises:
        FulltuneError: One of its kinds; the same command goes on.
    """
    began = time.monotonic()
    with run_folder.writing(job.folder), run_folder.locked(job.folder):
        seconds = _budget_seconds(job, budget)
        known = Comparison.load(job.folder / RECORD) if (job.folder / RECORD).exists() else None
        if known is not None and (why := more_time.refused(known, seconds)):
            # Its models and its table belong together: nothing is touched.
            job.listener(Said(text=why))
            return Compared(known, job.folder, report.write_comparison(job.folder))
        comparison = _compare(job, command, seconds, began, known)
        return Compared(comparison, job.folder, report.write_comparison(job.folder))


def _budget_seconds(job: Run, budget: str | None) -> float | None:
    """What was typed, else the most of what the recipe says and of what the comparison was given before."""
    text, path = budget or job.recipe.compare.budget, job.folder / EXPECTATION
    seconds = parse_seconds(text) if text else None
    before = Expectation.load(path).budget_seconds if path.exists() and budget is None else None
    return max((one for one in (seconds, before) if one is not None), default=None)


def _compare(
    job: Run, command: str, budget_seconds: float | None, began: float, known: Comparison | None
) -> Comparison:
    with fork_server() as start:
        with run_folder.not_left_when_refused(job.folder):
            if job.recipe.compare.generic_text is not None:
                generic_texts(job.recipe.compare.generic_text)  # refused before hours of training, not after
            summary = pipeline.prepare(job)
        before = known.openings if known else ()
        line = Line(job, summary, command, budget_seconds, start, began, alpha_left=before[-1].left if before else None)
        expectation = expect(line)
        if len(lines_of(job.folder / OPENINGS)) > len(before):
            line.say("the test rows were opened: nothing more is trained")
            line.budget_seconds = 0.0
        with parallel.helpers(line) as together:
            searches = _searches(line, expectation, together)
            ran = run_seeds(line, searches, expectation, together)
        return judge(line, expectation, searches, ran)


def _searches(line: Line, expectation: Expectation, together: parallel.Together) -> dict[str, Search]:
    """The rate of each arm: full and the first rival at the usual one where there is no time to search, others only
    with a search."""
    methods = [one for one in line.trained_arms if one.arm in expectation.arms]
    pair = [one.arm for one in methods if one.kind in ("full", *RIVALS)][:2]
    seeds = min(design.LEAST_SEEDS, expectation.num_seeds)
    keep = timing.to_come(line, dict.fromkeys((one.arm for one in methods), 0), seeds)
    grids = [trial for one in methods for trial in grid_trials(line, one, expectation)]
    if timing.has_time(line, grids, keep):
        together(grids)
    found: dict[str, Search] = {}
    for one in methods:
        searched = search(line, one, expectation, keep)
        if searched is None and one.arm in pair:
            line.say(f"{one.arm}: no time to search its rate; taking the usual one")
            searched = usual(line, one)
        if searched is None:
            line.say(f"{one.arm}: there is no time for it")
        else:
            found[one.arm] = searched
    return found
