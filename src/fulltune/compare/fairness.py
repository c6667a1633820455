"""What the lint looks at, in a comparison that was made, or in one that a recipe asks for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from fulltune import plan
from fulltune.compare import design, rate_search
from fulltune.compare.context import OPENINGS, Context, settings_of
from fulltune.compare.lint import lint
from fulltune.compare.rates import scale_of
from fulltune.compare.seeds import SeedRuns, waiting
from fulltune.models.base import Base
from fulltune.models.files import is_quantised
from fulltune.models.shapes import shapes_of
from fulltune.recipe.fields import Recipe
from fulltune.records.comparison import Opening
from fulltune.records.differences import ArmDesign, ComparisonDesign, Finding


def design_of(ran: SeedRuns, openings: Sequence[Opening], *, full_wins: bool) -> ComparisonDesign:
    """What the lint looks at in a comparison whose test rows were opened."""
    context, waited, arms = ran.context, waiting(ran.looks), []
    scale, summary = scale_of(context), context.summary
    metrics = [found[0].metric for found in ran.results.values()]
    known = (one for one in summary.notes if " test rows have " in one and "stands in train" in one)
    for arm, found in ran.results.items():
        setup, search = context.setup(arm), ran.searches[arm]
        # With those beyond the grid that a whole run led to.
        tried = {one.learning_rate for one in (*search.tried, *search.whole)}
        arms.append(
            ArmDesign(
                name=arm,
                kind=context.recipe.compared_kind(setup.arm),
                settings=settings_of(setup.arm),
                rates_searched=tuple(sorted(tried | {search.chosen})) if search.tried else (),
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
        margin=context.recipe.compare.margin,
        eval_rows=scale.eval_rows,
        rates_told=max(map(scale.tolerance, metrics)) if scale.is_share else None,
        test_in_eval=summary.test_in_eval,
        test_in_train=next(known, ""),
        opened_by_others=tuple(opened_by_others(context)),
        left_out=ran.left_out,
        test_openings=len({(one.trials, one.alpha) for one in openings}),  # the same trials again show nothing new
    )


def _weights_source(base: Base) -> Literal["plain", "gguf"]:
    return "gguf" if is_quantised(base.files) else "plain"


def opened_by_others(context: Context) -> list[str]:
    """Names of other comparisons beside this one that opened the same test rows."""
    found, mine = set(), context.folder.resolve()
    for parent in {context.folder.resolve().parent, Path(context.recipe.output).resolve()}:
        for path in parent.glob(f"*/{OPENINGS}"):
            folder = path.parent.parent
            if folder != mine and _data_fingerprint(folder) == context.summary.fingerprint:
                found.add(folder.name)
    return sorted(found)


def _data_fingerprint(folder: Path) -> str:
    """Of a run folder's rows; empty where it has none, or was written by a version that wrote them otherwise."""
    try:
        return str(json.loads((folder / "data" / "summary.json").read_text(encoding="utf-8"))["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def lint_recipe(recipe: Recipe) -> tuple[Finding, ...]:
    """What would make a recipe's comparison unfair, as far as its rows and a budget play no part."""
    base = Base.of(recipe.model, recipe.task)
    shapes = shapes_of(base, {})
    seeds = recipe.compare.seeds or design.num_seeds(None, design.FEW_TRAIN_ROWS)
    arms = []
    for method in recipe.methods:
        if method.kind == "base":
            continue
        usual, _ = plan.learning_rate_of(method, shapes.num_parameters, shapes.is_decoder)
        rates = rate_search.grid(usual, method.learning_rates, method.fixed_learning_rate)
        arms.append(
            ArmDesign(
                name=method.arm,
                kind=recipe.compared_kind(method),
                settings=settings_of(method),
                rates_searched=rates if len(rates) > 1 else (),
                learning_rate=rates[0] if len(rates) == 1 else None,
                seeds=tuple(range(recipe.train.seed, recipe.train.seed + seeds)),
                weights_dtype=recipe.model.weights_dtype,
                bf16_rounding=recipe.train.bf16_rounding or "stochastic",
            )
        )
    return lint(ComparisonDesign(arms=tuple(arms), weights_source=_weights_source(base)))
