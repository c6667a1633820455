"""What the lint looks at, of a comparison that was made, or of one that a recipe asks for."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from fulltune import pipeline, plan
from fulltune.compare import design, rate_search
from fulltune.compare.context import OPENINGS, Context, settings_of
from fulltune.compare.lint import lint
from fulltune.compare.rates import scale_of
from fulltune.compare.seeds import SeedRuns, most_seeds, waiting
from fulltune.compare.timing import expect
from fulltune.models.base import Base
from fulltune.models.files import is_quantised
from fulltune.models.shapes import shapes_of
from fulltune.recipe.fields import Recipe
from fulltune.recipe.methods import RIVALS
from fulltune.records.comparison import Expectation, Opening, Search
from fulltune.records.differences import ArmDesign, ComparisonDesign, Finding
from fulltune.run_context import Run
from fulltune.system import run_folder
from fulltune.text import parse_seconds
from fulltune.train.parent.fork_server import fork_server

USUAL_SHARE = 0.9
"""Of eval rows that are right, before anything was trained."""


def design_of(ran: SeedRuns, openings: Sequence[Opening], *, full_wins: bool) -> ComparisonDesign:
    """What the lint looks at in a comparison whose test rows were opened."""
    context, waited, arms = ran.context, waiting(ran.looks), []
    for arm, found in ran.results.items():
        setup, search = context.setup(arm), ran.searches[arm]
        arms.append(
            ArmDesign(
                name=arm,
                kind=context.recipe.compared_kind(setup.arm),
                settings=settings_of(setup.arm),
                rates_searched=_rates_searched(search),
                whole_runs=len(search.whole),
                learning_rate=search.chosen,
                on_edge=search.on_edge,
                seeds=tuple(one.trial.seed for one in found),
                weights_dtype=setup.plan.weights_dtype,
                bf16_rounding=setup.plan.bf16_rounding,
                train_tokens=found[0].tokens,
                waited=arm in waited,
                time_was_up=ran.time_was_up,
                no_time_to_search=search.time_was_up,
            )
        )
    return ComparisonDesign(
        arms=tuple(arms),
        full_wins=full_wins,
        weights_source=_weights_source(context.job.base),
        **_of_rows(context, [found[0].metric for found in ran.results.values()]),
        opened_by_others=tuple(opened_by_others(context)),
        left_out=ran.left_out,
        test_openings=len({(one.trials, one.alpha) for one in openings}),  # the same trials again show nothing new
    )


def _rates_searched(search: Search) -> tuple[float, ...]:
    """With those beyond the grid that a whole run led to."""
    tried = {one.learning_rate for one in (*search.tried, *search.whole)}
    return tuple(sorted(tried | {search.chosen})) if search.tried else ()


def _weights_source(base: Base) -> Literal["plain", "gguf"]:
    return "gguf" if is_quantised(base.files) else "plain"


def _of_rows(context: Context, metrics: Sequence[float] = (USUAL_SHARE,)) -> dict[str, Any]:
    """Fields of the design that the rows settle.

    Args:
        context: The comparison.
        metrics: Of each method's first whole run, on the eval rows; default: as often is.
    """
    scale, summary = scale_of(context), context.summary
    known = (one for one in summary.notes if " test rows have " in one and "stands in train" in one)
    return {
        "margin": context.recipe.compare.margin,
        "eval_rows": scale.eval_rows,
        "rates_told": max(map(scale.tolerance, metrics)) if scale.is_share else None,
        "test_in_eval": summary.test_in_eval,
        "test_in_train": next(known, ""),
    }


def opened_by_others(context: Context, own: Sequence[Path] = ()) -> list[str]:
    """Names of other comparisons beside this one that opened the same test rows.

    Args:
        context: The comparison.
        own: Folders that are no other one's.
    """
    found, mine = set(), {path.resolve() for path in (context.folder, *own)}
    for parent in {context.folder.resolve().parent, Path(context.recipe.output).resolve()}:
        for path in parent.glob(f"*/{OPENINGS}"):
            folder = path.parent.parent
            if folder not in mine and _data_fingerprint(folder) == context.summary.fingerprint:
                found.add(folder.name)
    return sorted(found)


def _data_fingerprint(folder: Path) -> str:
    """Of a run folder's rows; empty where it has none, or was written by a version that wrote them otherwise."""
    try:
        return str(json.loads((folder / "data" / "summary.json").read_text(encoding="utf-8"))["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


# ---- before anything is trained --------------------------------------------------------------------------------


def lint_recipe(recipe: Recipe, budget: str | None = None) -> tuple[Finding, ...]:
    """What would make the comparison that a recipe asks for unfair; no comparison is made.

    Args:
        recipe: As `recipe_for` gives it.
        budget: Most time to take; None: the recipe's. With one the rows are read and a few steps measured, because
            what is unfair depends on what fits.

    Raises:
        RecipeError: When the budget is too short for a verdict.
    """
    base = Base.of(recipe.model, recipe.task)
    shapes = shapes_of(base, {})
    text, expected = budget or recipe.compare.budget, None
    of_rows: dict[str, Any] = {}
    if text:
        expected, of_rows = _foreseen(recipe, parse_seconds(text))
    planned = recipe.compare.seeds or design.num_seeds(None, design.FEW_TRAIN_ROWS)
    left_out = expected.left_out if expected else ()
    rivals = [one.arm for one in recipe.methods if recipe.compared_kind(one) in RIVALS and one.arm not in left_out]
    arms = []
    for method in recipe.methods:
        if method.kind == "base" or method.arm in left_out:
            continue
        usual, _ = plan.learning_rate_of(method, shapes.num_parameters, shapes.is_decoder)
        rates = rate_search.grid(usual, method.learning_rates, method.fixed_learning_rate)
        seeds, waits, time_was_up, time_to_search = planned, False, False, True
        if expected:
            waits = expected.sequential and (method.kind == "head" or method.arm in rivals[1:])
            seeds = 1 if waits else expected.num_seeds
            time_was_up, time_to_search = expected.num_seeds < most_seeds(expected), bool(expected.search_share)
        arms.append(
            ArmDesign(
                name=method.arm,
                kind=recipe.compared_kind(method),
                settings=settings_of(method),
                rates_searched=rates if len(rates) > 1 and time_to_search else (),
                learning_rate=rates[0] if len(rates) == 1 else None,
                seeds=tuple(range(recipe.train.seed, recipe.train.seed + seeds)),
                waited=waits,
                time_was_up=time_was_up,
                no_time_to_search=len(rates) > 1 and not time_to_search,
                weights_dtype=recipe.model.weights_dtype,
                bf16_rounding=recipe.train.bf16_rounding or "stochastic",
            )
        )
    return lint(ComparisonDesign(arms=tuple(arms), left_out=left_out, weights_source=_weights_source(base), **of_rows))


def _foreseen(recipe: Recipe, budget_seconds: float) -> tuple[Expectation, dict[str, Any]]:
    """What fits into a budget, and what the lint looks at in the rows, which stay in the cache for the comparison."""
    began, output = time.monotonic(), Path(recipe.output)
    with run_folder.writing(output):
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".lint-", dir=output) as folder, fork_server() as start:
            job = Run(recipe, Path(folder))
            context = Context(job, pipeline.prepare(job), "", budget_seconds, start, began)
            goes_on = run_folder.unfinished(output, recipe.fingerprint())[-1:]
            expected = expect(context)
            return expected, _of_rows(context) | {"opened_by_others": opened_by_others(context, goes_on)}
