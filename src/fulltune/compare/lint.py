"""What makes a comparison of methods unfair, from its design alone: one rule a function, all rules in `lint`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from fulltune.records.differences import ArmDesign, ComparisonDesign, Finding

FEWEST_SEEDS = 3
FEWEST_RATES = 3
MOST_TEST_IN_EVAL = 0.1
"""Share of test rows that may stand in eval as well."""
_MORE_TIME = "give a larger --budget, with which an undecided comparison goes on"
_MOST_TOKENS_APART = 0.02
"""Arms may differ by so much of their tokens: a prompt's virtual tokens are taken off the rows' length."""
_ATTENTION = frozenset(
    (
        *("q", "k", "v", "o", "q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "qkv", "qkv_proj", "in_proj"),
        *("query", "key", "value", "query_key_value", "c_attn", "wq", "wk", "wv", "wo", "to_q", "to_k", "to_v"),
        *("q_lin", "k_lin", "v_lin", "out_lin"),
    )
)
"""Names of attention's matrices, as transformers' models have them."""


def lint(design: ComparisonDesign) -> tuple[Finding, ...]:
    """All that is wrong, what makes the comparison unfair first."""
    found = [finding for rule in _RULES for finding in rule(design)]
    return tuple(sorted(found, key=lambda finding: finding.level != "unfair"))


def _trained(design: ComparisonDesign) -> list[ArmDesign]:
    return [arm for arm in design.arms if arm.kind != "base"]


def _full(design: ComparisonDesign) -> list[ArmDesign]:
    return [arm for arm in design.arms if arm.kind == "full"]


def _peft(design: ComparisonDesign) -> list[ArmDesign]:
    return [arm for arm in design.arms if arm.kind not in ("base", "head", "full")]


def _named(arms: Iterable[ArmDesign]) -> str:
    return ", ".join(arm.name for arm in arms)


# ---- learning rates --------------------------------------------------------------------------------------------


def _one_rate_for_all(design: ComparisonDesign) -> Iterator[Finding]:
    given = [arm for arm in _trained(design) if arm.learning_rate is not None]
    unsearched = all(len(set(arm.rates_searched)) < 2 for arm in given)
    if len(given) > 1 and unsearched and len({arm.learning_rate for arm in given}) == 1:
        yield Finding(
            rule="one-rate-for-all",
            level="unfair",
            where=_named(given),
            what=f"all methods are trained at {given[0].learning_rate:g}; the best rate of LoRA is about ten times "
            "that of full fine-tuning",
            to_do="search the rate of each method: leave `learning_rate` out",
        )


def _rate_not_searched(design: ComparisonDesign) -> Iterator[Finding]:
    for arm in _trained(design):
        tried = len(set(arm.rates_searched))
        # Fewer are tried where trials failed or the recipe says so; a sole rate was never compared with another.
        if tried < 2 and arm.no_time_to_search:
            yield Finding(
                rule="rate-not-searched",
                level="unfair",
                where=arm.name,
                what="the budget leaves no time to search its learning rate, so it is trained at the usual one: what "
                "looks like a weak method may be a wrong rate",
                to_do=_MORE_TIME,
            )
        elif tried < 2:
            yield Finding(
                rule="rate-not-searched",
                level="unfair",
                where=arm.name,
                what="its learning rate was not searched: what looks like a weak method may be a wrong rate",
                to_do="leave `learning_rate` out, or give `learning_rates` with three or more",
            )
        elif tried < FEWEST_RATES:
            yield Finding(
                rule="rate-not-searched",
                level="worth knowing",
                where=arm.name,
                what=f"only {tried} learning rates were tried",
                to_do="give `learning_rates` with three or more",
            )


def _edge_of_grid(design: ComparisonDesign) -> Iterator[Finding]:
    for arm in _trained(design):
        tried = sorted(set(arm.rates_searched))
        if len(tried) < 2 or arm.learning_rate is None or arm.on_edge is False:
            continue
        edge = "lowest" if _same(arm.learning_rate, tried[0]) else "highest"
        if edge == "lowest" or _same(arm.learning_rate, tried[-1]):
            yield Finding(
                rule="edge-of-grid",
                level="unfair",
                where=arm.name,
                what=f"the best rate, {arm.learning_rate:g}, is the {edge} that was tried: a better one may lie beyond",
                to_do=_MORE_TIME
                if arm.no_time_to_search
                else f"add {'lower' if edge == 'lowest' else 'higher'} rates to its `learning_rates`",
            )


def _unequal_search(design: ComparisonDesign) -> Iterator[Finding]:
    if not design.full_wins or not any(arm.whole_runs for arm in _full(design)):
        return
    for arm in _peft(design):
        if arm.rates_searched and not arm.whole_runs:
            yield Finding(
                rule="unequal-search",
                level="unfair",
                where=arm.name,
                what=f"short trials alone chose its rate, {arm.learning_rate:g}, while whole runs chose that of full "
                "fine-tuning: it may lose because of its rate",
                to_do="give more time, or give both the rates to try as `learning_rates` with `search_share: 1`",
            )


def _low_peft_rates(design: ComparisonDesign) -> Iterator[Finding]:
    highest = max((max(arm.rates_searched, default=0.0) for arm in _full(design)), default=0.0)
    for arm in _peft(design):
        inside = arm.on_edge is False  # whether higher ones are better is known
        if highest and arm.rates_searched and not inside and max(arm.rates_searched) <= highest * (1 + 1e-6):
            yield Finding(
                rule="low-peft-rates",
                level="unfair",
                where=arm.name,
                what=f"its rates end at {max(arm.rates_searched):g}, not above those of full fine-tuning; such methods "
                "need about ten times higher ones",
                to_do="add rates up to ten times those of full fine-tuning",
            )


def _few_eval_rows(design: ComparisonDesign) -> Iterator[Finding]:
    searched = any(len(set(arm.rates_searched)) > 1 for arm in _trained(design))
    if searched and design.rates_told is not None and design.rates_told > design.margin:
        yield Finding(
            rule="few-eval-rows",
            level="worth knowing",
            where="eval rows",
            what=f"{design.eval_rows:,} rows choose the learning rates, too few to tell rates apart that differ by "
            f"less than about {100 * design.rates_told:.2g} points; only a rate ahead by more replaces the usual one, "
            "so there may be a better rate for any method",
            to_do="give more rows for choosing: `data.eval`, or a larger `data.eval_fraction`",
        )


def _same(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=1e-6)


# ---- seeds, rows, tokens ---------------------------------------------------------------------------------------


def _few_seeds(design: ComparisonDesign) -> Iterator[Finding]:
    for arm in _trained(design):
        count = len(set(arm.seeds))
        if count >= FEWEST_SEEDS or arm.waited:
            continue
        if arm.time_was_up:
            yield Finding(
                rule="few-seeds",
                level="worth knowing",
                where=arm.name,
                what="one seed: the budget ends before its second"
                if count <= 1
                else f"{count} seeds: the budget ends "
                "before the next one, and so few tell little about how much seeds differ",
                to_do=_MORE_TIME,
            )
            continue
        alone = count <= 1
        yield Finding(
            rule="few-seeds",
            level="unfair" if alone else "worth knowing",
            where=arm.name,
            what="one seed: the next one may turn the result round" if alone else f"only {count} seeds",
            to_do=f"train at least {FEWEST_SEEDS} seeds",
        )


def _eval_is_test(design: ComparisonDesign) -> Iterator[Finding]:
    if design.test_in_eval > MOST_TEST_IN_EVAL:
        yield Finding(
            rule="eval-is-test",
            level="unfair",
            where="rows",
            what=f"{design.test_in_eval:.0%} of the rows that are reported also chose learning rates and checkpoints: "
            "the method that was tried most often looks best",
            to_do="give rows for `data.eval` that `data.test` does not have",
        )


def _test_in_train(design: ComparisonDesign) -> Iterator[Finding]:
    if design.test_in_train:
        yield Finding(
            rule="test-in-train",
            level="worth knowing",
            where="test rows",
            what=f"{design.test_in_train}, most of all that of a method that learns rows by heart",
            to_do="take these rows out of train or out of test",
        )


def _test_opened_again(design: ComparisonDesign) -> Iterator[Finding]:
    if design.test_openings > 1 and design.for_more_time:
        yield Finding(
            rule="test-opened-again",
            level="worth knowing",
            where="test rows",
            what=f"opened {design.test_openings} times, because the time was up before and more was given; each "
            "verdict may be wrong in a part of the cases only, so that together they keep the certainty",
            to_do="nothing, as long as the recipe was not changed because of the earlier card",
        )
    elif design.test_openings > 1:
        yield Finding(
            rule="test-opened-again",
            level="unfair",
            where="test rows",
            what=f"scored {design.test_openings} times: what was seen before may have shaped the comparison",
            to_do="take fresh test rows for the next verdict",
        )


def _test_opened_by_others(design: ComparisonDesign) -> Iterator[Finding]:
    if design.opened_by_others:
        yield Finding(
            rule="test-opened-again",
            level="worth knowing",
            where="test rows",
            what=f"other comparisons opened them before ({', '.join(design.opened_by_others)}): what those showed may "
            "have shaped this one",
            to_do="take fresh test rows where the recipe was changed because of what was seen",
        )


def _left_out(design: ComparisonDesign) -> Iterator[Finding]:
    if design.left_out:
        yield Finding(
            rule="left-out",
            level="worth knowing",
            where=", ".join(design.left_out),
            what="not trained: the budget leaves no time for it",
            to_do=_MORE_TIME,
        )


def _unequal_tokens(design: ComparisonDesign) -> Iterator[Finding]:
    known = {arm.name: arm.train_tokens for arm in _trained(design) if arm.train_tokens}
    ordered = sorted(known, key=lambda name: (known[name], name in [arm.name for arm in _full(design)]))
    least, most = (ordered[0], ordered[-1]) if known else ("", "")
    if known and known[least] < (1 - _MOST_TOKENS_APART) * known[most]:
        yield Finding(
            rule="unequal-tokens",
            level="unfair",
            where=f"{most}, {least}",
            what=f"{most} sees {known[most]:,} tokens in training, {least} {known[least]:,}",
            to_do="train all methods for the same epochs, on rows of the same length",
        )


# ---- methods ---------------------------------------------------------------------------------------------------


def _attention_only(design: ComparisonDesign) -> Iterator[Finding]:
    for arm in design.arms:
        names = _targets(arm.settings) if arm.kind in ("lora", "peft") else []
        if names and all(_is_attention(name) for name in names):
            yield Finding(
                rule="attention-only-lora",
                level="unfair",
                where=arm.name,
                what=f"it changes attention alone ({', '.join(names)}), which is known to lose to all linear layers",
                to_do="set `target_modules: all-linear`",
            )


def _targets(settings: dict[str, Any]) -> list[str]:
    """Of our own block, or of a PEFT config."""
    config = settings.get("config")
    given = settings.get("target_modules") or (config.get("target_modules") if isinstance(config, dict) else None) or []
    return [] if isinstance(given, str) else [str(name) for name in given]


def _is_attention(name: str) -> bool:
    """`q_proj`, `self_attn.q_proj`, `attention.self.query` or `attention.output.dense`."""
    return name.split(".")[-1] in _ATTENTION or any("attn" in part or "attention" in part for part in name.split("."))


def _bf16_full(design: ComparisonDesign) -> Iterator[Finding]:
    for arm in _full(design):
        if arm.weights_dtype != "fp32" and arm.bf16_rounding in (None, "nearest"):
            yield Finding(
                rule="bf16-full",
                level="unfair",
                where=arm.name,
                what=f"its weights are kept in {arm.weights_dtype} and rounded to the nearest: at usual rates most "
                "updates are lost",
                to_do="keep weights in fp32, or set `train.bf16_rounding: stochastic`",
            )


def _quantised_source(design: ComparisonDesign) -> Iterator[Finding]:
    if design.weights_source != "plain":
        yield Finding(
            rule="quantised-source",
            level="unfair",
            where="model",
            what=f"the pretrained weights come from a quantised file ({design.weights_source}): all methods start from "
            "rounded weights, and full fine-tuning trains these",
            to_do="take the model's original weights",
        )


_RULES: tuple[Callable[[ComparisonDesign], Iterator[Finding]], ...] = (
    _one_rate_for_all,
    _rate_not_searched,
    _edge_of_grid,
    _unequal_search,
    _low_peft_rates,
    _few_eval_rows,
    _few_seeds,
    _eval_is_test,
    _test_in_train,
    _test_opened_again,
    _test_opened_by_others,
    _left_out,
    _unequal_tokens,
    _attention_only,
    _bf16_full,
    _quantised_source,
)
