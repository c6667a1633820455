from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from fulltune.compare import budget, rates
from fulltune.compare.context import settings_of
from fulltune.compare.seeds import SeedRuns
from fulltune.models.base import Base
from fulltune.models.shapes import measure_shapes
from fulltune.plan.defaults import default_learning_rate
from fulltune.recipe.fields import Recipe
from fulltune.recipe.methods import VARIANT
from fulltune.recipe.tasks import ALSO_OCCURS
from fulltune.records.comparison import Comparison, Finding, MethodRow, Search
from fulltune.records.data import DataSummary
from fulltune.records.run import COMPARISON, Access
from fulltune.text import counted

FEWEST_SEEDS = 3
FEWEST_RATES = 3
MOST_TEST_IN_EVAL = 0.1
"""Largest share of test rows that may also be in eval."""
_MOST_TOKENS_APART = 0.02
"""Tolerated relative difference in train tokens, because a prompt's virtual tokens shorten the rows."""
_ATTENTION = {
    *("q", "k", "v", "o", "q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "qkv", "qkv_proj", "in_proj"),
    *("query", "key", "value", "query_key_value", "c_attn", "wq", "wk", "wv", "wo", "to_q", "to_k", "to_v"),
    *("q_lin", "k_lin", "v_lin", "out_lin"),
}
_MORE_TIME = "set a larger --budget, so that an undecided comparison can continue"
_UNFAIR = {
    "rate-not-searched": "leave `learning_rate` unset or list `learning_rates`, with a larger --budget if time was up",
    "edge-of-grid": "add rates beyond this one to the method's `learning_rates`, or set a larger --budget",
    "unequal-search": "set a larger --budget, or list both methods' rates as `learning_rates` with `search_share: 1`",
    "low-peft-rates": "add learning rates up to ten times those of full fine-tuning",
    "one-seed": f"train at least {FEWEST_SEEDS} seeds",
    "attention-only-lora": "set `target_modules: all-linear`",
    "bf16-full": "store weights in fp32, or set `train.bf16_rounding: stochastic`",
    "unequal-tokens": "train all methods for the same epochs, on rows of the same length",
    "unequal-heads": "give all methods the same `head_init`",
    "eval-is-test": "choose rows for `data.eval` that are not in `data.test`",
}
_WORTH_KNOWING = {
    "few-rates": "list three or more rates as `learning_rates`",
    "few-seeds": f"train at least {FEWEST_SEEDS} seeds",
    "no-time-for-seeds": _MORE_TIME,
    "left-out": _MORE_TIME,
    "few-eval-rows": "use more eval rows, with `data.eval` or a larger `data.eval_fraction`",
    "test-in-train": "remove these rows from train or from test",
    "test-opened-by-others": "use fresh test rows if the recipe was changed because of earlier results",
}
RuleHits = Iterator[tuple[str, str, str]]


def lint_comparison(seed_runs: SeedRuns, comparison: Comparison) -> tuple[Finding, ...]:
    """Check a comparison for unfair settings and weak evidence. Unfair findings come first."""
    context, trained = seed_runs.context, [row for row in comparison.rows if row.kind != "base"]
    findings = [
        *_check_rates(trained, full_wins=comparison.decision.verdict == "FULL"),
        *_check_methods(trained, time_was_up=seed_runs.time_was_up),
        *_check_equal_terms(trained),
        *_check_eval_rows(seed_runs, trained),
        *_check_test_rows(context.folder, rows_in_train(context.summary)),
    ]
    if dropped := ", ".join(seed_runs.dropped_methods):
        findings.append(("left-out", dropped, "not trained, because the budget is too short"))
    return _to_findings(findings)


def lint_recipe(recipe: Recipe) -> tuple[Finding, ...]:
    """Check a recipe for unfair settings before the comparison starts."""
    shapes = measure_shapes(Base.from_block(recipe.model, recipe.task), {})
    seeds = recipe.compare.seeds or budget.num_seeds(None, budget.FEW_TRAIN_ROWS)
    trained = []
    for method in recipe.methods:
        if method.kind == "base":
            continue
        usual, _ = default_learning_rate(method, shapes, recipe.task)
        grid = rates.rates_to_try(usual, method.learning_rates, method.fixed_learning_rate)
        tried, rate = (dict.fromkeys(grid, math.nan), math.nan) if len(grid) > 1 else ({}, grid[0])
        trained.append(
            MethodRow(
                method=method.label,
                kind=recipe.compared_kind(method),
                settings=settings_of(method),
                search=Search(method=method.label, tried=tried, chosen=rate),
                seeds=tuple(range(recipe.train.seed, recipe.train.seed + seeds)),
                weights_dtype=recipe.model.weights_dtype,
                bf16_rounding=recipe.train.bf16_rounding or "stochastic",
            )
        )
    return _to_findings([*_check_rates(trained), *_check_methods(trained), *_check_equal_terms(trained)])


def _to_findings(findings: Iterable[tuple[str, str, str]]) -> tuple[Finding, ...]:
    """Convert (rule, location, description) tuples to findings, unfair ones first."""
    return tuple(
        Finding(
            rule=rule,
            level="unfair" if rule in _UNFAIR else "worth knowing",
            where=where,
            what=what,
            to_do=(_UNFAIR | _WORTH_KNOWING)[rule],
        )
        for rule, where, what in sorted(findings, key=lambda hit: hit[0] not in _UNFAIR)
    )


def _method_names(rows: Iterable[MethodRow]) -> str:
    return ", ".join(row.method for row in rows)


def _tried_rates(row: MethodRow) -> list[float]:
    search = row.search
    return sorted({*search.tried, *search.whole}) if search is not None and search.tried else []


def _check_rates(trained: Sequence[MethodRow], *, full_wins: bool = False) -> RuleHits:
    """Yield findings on rates that were searched too little or, if `full_wins`, less than full fine-tuning's."""
    weak = "so the method may look weak because of a wrong rate"
    full = [row for row in trained if row.kind == "full"]
    highest = max((max(_tried_rates(row), default=0.0) for row in full), default=0.0)
    for row in trained:
        tried, search = _tried_rates(row), row.search
        assert search is not None, "it is trained"
        if len(tried) < 2:
            yield "rate-not-searched", row.method, f"its learning rate was not searched, {weak}"
        elif len(tried) < FEWEST_RATES:
            yield "few-rates", row.method, f"only {len(tried)} learning rates were tried"
        if search.on_edge and len(tried) > 1:
            edge = "highest" if search.chosen > tried[0] else "lowest"
            best = f"the best rate, {search.chosen:g}, is the {edge} one tried"
            yield "edge-of-grid", row.method, f"{best}; a rate beyond it may be better"
        if row.kind in ("full", "head", VARIANT) or not tried:
            continue
        if full_wins and not search.whole and any(one.search and one.search.whole for one in full):
            what = (
                f"its rate, {search.chosen:g}, was chosen by short trials, but full fine-tuning's rate by whole runs, "
                "so the method may lose because of its rate"
            )
            yield "unequal-search", row.method, what
        # A rate chosen inside the grid shows that higher ones are no better.
        if max(tried) <= highest * (1 + 1e-6) and (search.on_edge or math.isnan(search.chosen)):
            what = (
                f"its highest rate, {max(tried):g}, is no higher than full fine-tuning's, although such methods need "
                "rates about ten times higher"
            )
            yield "low-peft-rates", row.method, what


def _check_methods(trained: Sequence[MethodRow], *, time_was_up: bool = False) -> RuleHits:
    """Yield findings on too few seeds (because of the budget if `time_was_up`) and on unfair settings."""
    for row in trained:
        count = len(set(row.seeds))
        seeds = counted(count, "seed")
        if count < FEWEST_SEEDS and not row.waited and time_was_up:
            yield "no-time-for-seeds", row.method, f"only {seeds}, because the budget is too short for another"
        elif count == 1 and not row.waited:
            yield "one-seed", row.method, "there is only one seed, and another seed may reverse the result"
        elif count < FEWEST_SEEDS and not row.waited:
            yield "few-seeds", row.method, f"only {seeds}"
        # From the recipe's own block, or from a PEFT config.
        config = row.settings.get("config")
        of_peft = config.get("target_modules") if isinstance(config, dict) else None
        targets = (row.settings.get("target_modules") or of_peft or []) if row.kind in ("lora", "peft") else []
        names = [] if isinstance(targets, str) else [str(name) for name in targets]
        # Such as `q_proj`, `self_attn.q_proj` or `attention.output.dense`.
        if names and all(name.split(".")[-1] in _ATTENTION or "attn" in name or "attention" in name for name in names):
            attention = f"only attention is updated ({', '.join(names)})"
            what = f"{attention}, which is known to work worse than updating all linear layers"
            yield "attention-only-lora", row.method, what
        if row.kind == "full" and row.weights_dtype != "fp32" and row.bf16_rounding in (None, "nearest"):
            rounded = "rounded to nearest, so that most updates are lost at usual learning rates"
            yield "bf16-full", row.method, f"its weights are stored in {row.weights_dtype} and {rounded}"


def _check_equal_terms(trained: Sequence[MethodRow]) -> RuleHits:
    """Yield findings on unequal tokens or heads. Variants differ on purpose."""
    alike = [row for row in trained if row.kind != VARIANT]
    sized = sorted((row for row in alike if row.train_tokens), key=lambda row: (row.train_tokens, row.kind == "full"))
    if sized and sized[0].train_tokens < (1 - _MOST_TOKENS_APART) * sized[-1].train_tokens:
        least, most = sized[0], sized[-1]
        what = f"{most.method} is trained on {most.train_tokens:,} tokens, {least.method} on {least.train_tokens:,}"
        yield "unequal-tokens", _method_names((most, least)), what
    random = [row for row in alike if row.settings.get("head_init") == "random"]
    if random and len(random) < len(alike):
        what = f"the head of {_method_names(random)} is initialised at random, all other heads from a linear probe"
        yield "unequal-heads", "methods", what


def _check_eval_rows(seed_runs: SeedRuns, trained: Sequence[MethodRow]) -> RuleHits:
    """Yield findings on too few eval rows and on their use as test rows."""
    scale, summary = seed_runs.context.metric_scale, seed_runs.context.summary
    resolution = max(scale.tolerance(row.metric.value) for row in trained) if scale.is_share else 0.0
    if resolution > seed_runs.context.recipe.compare.margin and any(len(_tried_rates(row)) > 1 for row in trained):
        yield (
            "few-eval-rows",
            "eval rows",
            f"the learning rates are chosen on {scale.eval_rows:,} rows, which cannot distinguish rates that differ by "
            f"less than about {100 * resolution:.2g} points. A rate replaces the default only if it is better by more, "
            "so a slightly better rate may have been missed",
        )
    if summary.test_share_in_eval > MOST_TEST_IN_EVAL:
        yield (
            "eval-is-test",
            "rows",
            f"{summary.test_share_in_eval:.0%} of the test rows were also used to choose rates and checkpoints, which "
            "favours the method with the most trials",
        )


def _check_test_rows(folder: Path, in_train: str | None) -> RuleHits:
    """Yield findings on test rows that occur in train (described in `in_train`) or were used for other verdicts."""
    if in_train:
        yield "test-in-train", "test rows", f"{in_train}, especially for methods that memorise rows"
    if names := ", ".join(comparisons_on_same_test_rows(folder)):
        what = f"earlier comparisons ({names}) used these rows for a verdict, which may have influenced this comparison"
        yield "test-opened-by-others", "test rows", what


def rows_in_train(summary: DataSummary) -> str | None:
    return next((one for one in summary.notes if " test rows have " in one and f"{ALSO_OCCURS} train" in one), None)


def comparisons_on_same_test_rows(folder: Path) -> tuple[str, ...]:
    """Return the names of other comparisons that used the same test rows for a verdict."""
    noted = Access.load_for_same_rows(folder)
    return tuple(sorted({one.run for one in noted if one.trial == COMPARISON} - {folder.resolve().name}))
