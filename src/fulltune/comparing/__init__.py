"""The line of a comparison: data once, a rate search for each arm, seeds until the answer is clear, one look at the
test rows, the verdict. Layer 3, like `pipeline`, whose stages it uses.

    data → rates (halving, on eval rows) → seeds (looks at eval rows) → test rows, once → verdict → proof card

Everything is kept in files as it comes, so that the same command goes on where it was stopped.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fulltune import model, pipeline, plan, report, run_folder, train
from fulltune.compare import design, rate_search
from fulltune.compare.lint import lint
from fulltune.compare.many_tasks import many_tasks
from fulltune.compare_records import ArmDesign, ComparisonDesign, Finding
from fulltune.comparing import beside
from fulltune.comparing.line import OPENINGS, RECORD, Line, settings_of
from fulltune.comparing.rates import expect, grid_trials, search
from fulltune.comparing.seeds import run_seeds
from fulltune.comparing.verdict import judge
from fulltune.errors import RecipeError
from fulltune.generic_text import generic_texts
from fulltune.recipe import Recipe
from fulltune.tasks import task_named
from fulltune.trials import Comparison, ManyTasks
from fulltune.units import is_share, parse_seconds


def recipe_for(recipe: Recipe) -> Recipe:
    """The recipe as a comparison uses it: with near-duplicates on one side of the split.

    Raises:
        RecipeError: When there is nothing to compare.
    """
    if not recipe.methods:
        raise RecipeError(
            "methods: names nothing to compare; add for example 'methods: [base, full, lora, adapter, prompt]'"
        )
    if "near_duplicates" in recipe.data.model_fields_set or recipe.task == "image-classification":
        return recipe
    block = recipe.data.model_copy(update={"near_duplicates": recipe.compare.near_duplicates})
    return recipe.model_copy(update={"data": block})


def lint_recipe(recipe: Recipe) -> tuple[Finding, ...]:
    """What would make the comparison that a recipe asks for unfair; nothing is trained, no rows are read."""
    block, source = recipe.model, model.locate(recipe.model, weights=False)
    shapes = model.shapes(block, task_named(recipe.task).AUTO_CLASS, {}, weights=False)
    planned = recipe.compare.seeds or design.num_seeds(None, design.FEW_TRAIN_ROWS)
    arms = []
    for method in recipe.methods:
        if method.kind == "base":
            continue
        usual, _ = plan.learning_rate_of(method, shapes.num_parameters, shapes.is_decoder)
        rates = rate_search.grid(usual, method.learning_rates, method.learning_rate)
        arms.append(
            ArmDesign(
                name=method.arm,
                kind=method.kind,
                settings=settings_of(method),
                rates_searched=rates if len(rates) > 1 else (),
                learning_rate=rates[0] if len(rates) == 1 else None,
                seeds=tuple(range(recipe.train.seed, recipe.train.seed + planned)),
                weights_dtype=recipe.model.weights_dtype,
                bf16_rounding=recipe.train.bf16_rounding or "stochastic",
            )
        )
    return lint(ComparisonDesign(arms=tuple(arms), weights_source="gguf" if model.is_quantised(source) else "plain"))


@dataclass(frozen=True)
class Compared:
    """What a comparison gave."""

    comparison: Comparison
    folder: Path
    cards: tuple[Path, ...]


def together(found: Mapping[str, Compared]) -> ManyTasks:
    """Comparisons on one base, by the name of their task, as one record."""
    shares = all(is_share(one.comparison.metric) for one in found.values())
    folders = {name: one.folder.name for name, one in found.items()}
    return many_tasks({name: one.comparison for name, one in found.items()}, folders, shares)


def run(job: pipeline.Run, command: str, budget: str | None = None) -> Compared:
    """Compare the recipe's methods, or go on with it.

    Args:
        job: The recipe, as `recipe_for` gives it, in its run folder.
        command: What was typed, for the record.
        budget: Most time to take, such as `30m`; None: the recipe's, else without limit.

    Raises:
        FulltuneError: One of its kinds; the same command goes on.
    """
    began = time.monotonic()
    with run_folder.writing(job.folder), run_folder.locked(job.folder):
        known = job.folder / RECORD
        if known.exists():  # whatever budget or version it was finished with: its models and its table belong together
            return Compared(Comparison.load(known), job.folder, report.write_proof(job.folder))
        comparison = _compare(job, command, budget, began)
        return Compared(comparison, job.folder, report.write_proof(job.folder))


def _compare(job: pipeline.Run, command: str, budget: str | None, began: float) -> Comparison:
    with train.nursery() as start:
        if job.recipe.compare.generic_text is not None:
            generic_texts(job.recipe.compare.generic_text)  # refused before hours of training, not after
        summary = pipeline.prepare(job)
        text = budget or job.recipe.compare.budget
        line = Line(job, summary, command, parse_seconds(text) if text else None, start, began)
        expectation = expect(line)
        if (job.folder / OPENINGS).exists():
            line.say("the test rows were opened: nothing more is trained")
            line.budget_seconds = 0.0
        with beside.helpers(line) as together:
            grids = [trial for one in line.trained_arms for trial in grid_trials(line, one, expectation)]
            together(grids)
            searches = {one.arm: search(line, one, expectation) for one in line.trained_arms}
            results, looks = run_seeds(line, searches, expectation, together)
        return judge(line, expectation, searches, results, looks)
