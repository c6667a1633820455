"""What makes a comparison of methods unfair: one rule a function, all in `_RULES`; and the designs they look at."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from fulltune import plan
from fulltune.compare import design, rate_search
from fulltune.compare.context import OPENINGS, Context, settings_of
from fulltune.compare.rates import scale_of
from fulltune.compare.seeds import SeedRuns, waiting
from fulltune.models.base import Base
from fulltune.models.files import is_quantised
from fulltune.models.shapes import shapes_of
from fulltune.recipe.fields import Recipe
from fulltune.recipe.methods import VARIANT
from fulltune.records.comparison import Opening
from fulltune.records.differences import ArmDesign, ComparisonDesign, Finding

FEWEST_SEEDS = 3
FEWEST_RATES = 3
MOST_TEST_IN_EVAL = 0.1
"""Share of test rows that may stand in eval as well."""
_MORE_TIME = "give a larger --budget, with which an undecided comparison goes on"
_MORE_RATES = "give `learning_rates` with three or more"
_MOST_TOKENS_APART = 0.02
"""Arms may differ by so much of their tokens: a prompt's virtual tokens are taken off the rows' length."""
_ATTENTION = {
    *("q", "k", "v", "o", "q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "qkv", "qkv_proj", "in_proj"),
    *("query", "key", "value", "query_key_value", "c_attn", "wq", "wk", "wv", "wo", "to_q", "to_k", "to_v"),
    *("q_lin", "k_lin", "v_lin", "out_lin"),
}
"""Names of attention's matrices, as transformers' models have them."""

Found = Iterator[tuple[Literal["unfair", "worth knowing"], str, str, str]]
"""Of each finding its level, where it is, what it is and what to do."""


def lint(design: ComparisonDesign) -> tuple[Finding, ...]:
    """All that is wrong, what makes the comparison unfair first."""
    found = [
        Finding(rule=name, level=level, where=where, what=what, to_do=to_do)
        for name, rule in _RULES.items()
        for level, where, what, to_do in rule(design)
    ]
    return tuple(sorted(found, key=lambda finding: finding.level != "unfair"))


def _trained(design: ComparisonDesign) -> list[ArmDesign]:
    return [arm for arm in design.arms if arm.kind != "base"]


def _full(design: ComparisonDesign) -> list[ArmDesign]:
    return [arm for arm in design.arms if arm.kind == "full"]


def _peft(design: ComparisonDesign) -> list[ArmDesign]:
    return [arm for arm in design.arms if arm.kind not in ("base", "head", "full", VARIANT)]


def _named(arms: Iterable[ArmDesign]) -> str:
    return ", ".join(arm.name for arm in arms)


def _one_rate_for_all(design: ComparisonDesign) -> Found:
    given = [arm for arm in _trained(design) if arm.learning_rate is not None]
    unsearched = all(len(set(arm.rates_searched)) < 2 for arm in given)
    if len(given) > 1 and unsearched and len({arm.learning_rate for arm in given}) == 1:
        what = (
            f"all methods are trained at {given[0].learning_rate:g}; the best rate of LoRA is about ten times that of "
            "full fine-tuning"
        )
        yield "unfair", _named(given), what, "search the rate of each method: leave `learning_rate` unset"


def _rate_not_searched(design: ComparisonDesign) -> Found:
    for arm in _trained(design):
        tried, weak = len(set(arm.rates_searched)), "what looks like a weak method may be a wrong rate"
        # Fewer are tried where trials failed or the recipe says so; a sole rate was never compared with another.
        if tried < 2 and arm.no_time_to_search:
            late = "the budget leaves no time to search its learning rate, so it is trained at the usual one"
            yield "unfair", arm.name, f"{late}: {weak}", _MORE_TIME
        elif tried < 2:
            to_do = f"leave `learning_rate` unset, or {_MORE_RATES}"
            yield "unfair", arm.name, f"its learning rate was not searched: {weak}", to_do
        elif tried < FEWEST_RATES:
            yield "worth knowing", arm.name, f"only {tried} learning rates were tried", _MORE_RATES


def _edge_of_grid(design: ComparisonDesign) -> Found:
    for arm in _trained(design):
        tried = sorted(set(arm.rates_searched))
        if len(tried) < 2 or arm.learning_rate is None or arm.on_edge is False:
            continue
        edges = {tried[0]: ("lowest", "lower"), tried[-1]: ("highest", "higher")}
        for rate, (edge, further) in edges.items():
            if math.isclose(arm.learning_rate, rate, rel_tol=1e-6):
                what = f"the best rate, {rate:g}, is the {edge} that was tried: a better one may lie beyond"
                to_do = _MORE_TIME if arm.no_time_to_search else f"add {further} rates to its `learning_rates`"
                yield "unfair", arm.name, what, to_do


def _unequal_search(design: ComparisonDesign) -> Found:
    if not design.full_wins or not any(arm.whole_runs for arm in _full(design)):
        return
    for arm in _peft(design):
        if arm.rates_searched and not arm.whole_runs:
            what = (
                f"its rate, {arm.learning_rate:g}, was chosen by short trials alone, that of full fine-tuning by whole "
                "runs: it may lose because of its rate"
            )
            to_do = "give more time, or give both the rates to try as `learning_rates` with `search_share: 1`"
            yield "unfair", arm.name, what, to_do


def _low_peft_rates(design: ComparisonDesign) -> Found:
    highest = max((max(arm.rates_searched, default=0.0) for arm in _full(design)), default=0.0)
    for arm in _peft(design):
        inside = arm.on_edge is False  # whether higher ones are better is known
        if highest and arm.rates_searched and not inside and max(arm.rates_searched) <= highest * (1 + 1e-6):
            what = (
                f"its rates end at {max(arm.rates_searched):g}, not above those of full fine-tuning; such methods need "
                "about ten times higher ones"
            )
            yield "unfair", arm.name, what, "add rates up to ten times those of full fine-tuning"


def _few_eval_rows(design: ComparisonDesign) -> Found:
    searched = any(len(set(arm.rates_searched)) > 1 for arm in _trained(design))
    if searched and design.rates_told is not None and design.rates_told > design.margin:
        what = (
            f"{design.eval_rows:,} rows choose the learning rates, too few to tell rates apart that differ by less "
            f"than about {100 * design.rates_told:.2g} points; only a rate ahead by more replaces the usual one, so "
            "there may be a better rate for any method"
        )
        to_do = "give more rows for choosing: `data.eval`, or a larger `data.eval_fraction`"
        yield "worth knowing", "eval rows", what, to_do


def _few_seeds(design: ComparisonDesign) -> Found:
    for arm in _trained(design):
        count = len(set(arm.seeds))
        if count >= FEWEST_SEEDS or arm.waited:
            continue
        if arm.time_was_up:
            late = "one seed: the budget ends before its second"
            if count > 1:
                late = f"{count} seeds: the budget ends before the next one; too few to estimate the spread of seeds"
            yield "worth knowing", arm.name, late, _MORE_TIME
        elif count > 1:
            yield "worth knowing", arm.name, f"only {count} seeds", f"train at least {FEWEST_SEEDS} seeds"
        else:
            what = "one seed: another one may reverse the result"
            yield "unfair", arm.name, what, f"train at least {FEWEST_SEEDS} seeds"


def _eval_is_test(design: ComparisonDesign) -> Found:
    if design.test_in_eval > MOST_TEST_IN_EVAL:
        what = (
            f"{design.test_in_eval:.0%} of the rows that are reported also chose learning rates and checkpoints: the "
            "method that was tried most often looks best"
        )
        yield "unfair", "rows", what, "give rows for `data.eval` that `data.test` does not have"


def _test_in_train(design: ComparisonDesign) -> Found:
    if design.test_in_train:
        what = f"{design.test_in_train}, most of all that of a method that learns rows by heart"
        yield "worth knowing", "test rows", what, "take these rows out of train or out of test"


def _test_opened_again(design: ComparisonDesign) -> Found:
    if design.test_openings > 1:
        what = (
            f"used for a verdict {design.test_openings} times, because the time was up before and more was given; each "
            "verdict has a part of the permitted error only, so that together they keep the certainty"
        )
        to_do = "nothing, as long as the recipe was not changed because of the earlier report"
        yield "worth knowing", "test rows", what, to_do
    if others := design.opened_by_others:
        names = ", ".join(others)
        what = f"other comparisons used them for a verdict before ({names}): what that showed may have shaped this one"
        to_do = "take fresh test rows where the recipe was changed because of what was seen"
        yield "worth knowing", "test rows", what, to_do


def _left_out(design: ComparisonDesign) -> Found:
    if design.left_out:
        what = "not trained: the budget leaves no time for it"
        yield "worth knowing", ", ".join(design.left_out), what, _MORE_TIME


def _unequal_tokens(design: ComparisonDesign) -> Found:
    # What a variant has otherwise is what is asked about.
    known = [arm for arm in _trained(design) if arm.train_tokens and arm.kind != VARIANT]
    known.sort(key=lambda arm: (arm.train_tokens, arm.kind == "full"))
    if not known:
        return
    (least, few), (most, many) = ((arm.name, arm.train_tokens or 0) for arm in (known[0], known[-1]))
    if few < (1 - _MOST_TOKENS_APART) * many:
        what = f"{most} sees {many:,} tokens in training, {least} {few:,}"
        to_do = "train all methods for the same epochs, on rows of the same length"
        yield "unfair", f"{most}, {least}", what, to_do


def _unequal_heads(design: ComparisonDesign) -> Found:
    arms = [arm for arm in _trained(design) if arm.kind != VARIANT]
    random = [arm for arm in arms if arm.settings.get("head_init") == "random"]
    if random and len(random) < len(arms):
        what = f"the head of {_named(random)} starts at random, that of the others from a linear probe"
        yield "unfair", "methods", what, "give all methods the same `head_init`"


def _attention_only(design: ComparisonDesign) -> Found:
    for arm in design.arms:
        # Of our own block, or of a PEFT config.
        config = arm.settings.get("config")
        of_peft = config.get("target_modules") if isinstance(config, dict) else None
        targets = (arm.settings.get("target_modules") or of_peft or []) if arm.kind in ("lora", "peft") else []
        names = [] if isinstance(targets, str) else [str(name) for name in targets]
        if names and all(map(_is_attention, names)):
            what = f"it changes attention alone ({', '.join(names)}), which is known to lose to all linear layers"
            yield "unfair", arm.name, what, "set `target_modules: all-linear`"


def _is_attention(name: str) -> bool:
    """`q_proj`, `self_attn.q_proj`, `attention.self.query` or `attention.output.dense`."""
    return name.split(".")[-1] in _ATTENTION or any("attn" in part or "attention" in part for part in name.split("."))


def _bf16_full(design: ComparisonDesign) -> Found:
    for arm in _full(design):
        if arm.weights_dtype != "fp32" and arm.bf16_rounding in (None, "nearest"):
            what = (
                f"its weights are kept in {arm.weights_dtype} and rounded to the nearest: at usual rates most updates "
                "are lost"
            )
            yield "unfair", arm.name, what, "keep weights in fp32, or set `train.bf16_rounding: stochastic`"


def _quantised_source(design: ComparisonDesign) -> Found:
    if design.weights_source != "plain":
        what = (
            f"the pretrained weights come from a quantised file ({design.weights_source}): all methods start from "
            "rounded weights, and full fine-tuning trains these"
        )
        yield "unfair", "model", what, "take the model's original weights"


_RULES: dict[str, Callable[[ComparisonDesign], Found]] = {
    "one-rate-for-all": _one_rate_for_all,
    "rate-not-searched": _rate_not_searched,
    "edge-of-grid": _edge_of_grid,
    "unequal-search": _unequal_search,
    "low-peft-rates": _low_peft_rates,
    "few-eval-rows": _few_eval_rows,
    "few-seeds": _few_seeds,
    "eval-is-test": _eval_is_test,
    "test-in-train": _test_in_train,
    "test-opened-again": _test_opened_again,
    "left-out": _left_out,
    "unequal-tokens": _unequal_tokens,
    "unequal-heads": _unequal_heads,
    "attention-only-lora": _attention_only,
    "bf16-full": _bf16_full,
    "quantised-source": _quantised_source,
}


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
