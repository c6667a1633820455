"""The arms as rows of the table, and as the design that the lint looks at."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fulltune.compare import rate_search
from fulltune.compare.context import BASE, FOLDER, Line, settings_of
from fulltune.compare.rates import scale_of
from fulltune.compare.seeds import Ran, Results, waiting
from fulltune.evaluate import drift, outputs
from fulltune.models.files import is_quantised
from fulltune.records.comparison import ArmRow, Opening, Search, TrialResult
from fulltune.records.differences import ArmDesign, ComparisonDesign, Decision, Look
from fulltune.records.scores import Estimate, Scores


def rows_of(
    line: Line,
    searches: Mapping[str, Search],
    results: Results,
    looks: Sequence[Look],
    decision: Decision,
    base: Scores | None,
) -> tuple[ArmRow, ...]:
    scores = {one.arm: one for one in decision.scores}
    waited = waiting(looks)
    base_value = _base_value(line, scores.get(BASE), base)
    full_value = scores[line.full.arm].mean
    made = line.room(line.full.arm).plan
    rows = []
    if any(one.kind == "base" for one in line.recipe.methods) and base_value is not None:
        if (of_base := scores.get(BASE)) is not None:
            estimate = Estimate(value=of_base.mean, low=of_base.low, high=of_base.high)
        else:
            assert base is not None, "`base_value` came from it"
            estimate = base.metrics[line.measure.name]
        rows.append(
            ArmRow(
                arm=BASE,
                kind="base",
                num_parameters=made.num_parameters,
                num_trainable=0,
                metric=estimate,
                values=(estimate.value,),
                gain_share=0.0,
            )
        )
    for arm, found in results.items():
        score, method = scores[arm], line.room(arm).arm
        gain = None
        if base_value is not None and line.measure.sign * (full_value - base_value) > 0:
            gain = (score.mean - base_value) / (full_value - base_value)
        rows.append(
            ArmRow(
                arm=arm,
                kind=method.kind,
                settings=settings_of(method),
                num_parameters=made.num_parameters,
                num_trainable=found[0].num_trainable,
                learning_rate=searches[arm].chosen,
                seeds=tuple(one.trial.seed for one in found),
                metric=Estimate(value=score.mean, low=score.low, high=score.high),
                values=score.values,
                gain_share=gain,
                train_seconds=round(middle(one.train_seconds for one in found), 2),
                search_seconds=round(_search_seconds(line, searches[arm]), 2),
                tokens_per_second=round(middle(one.tokens_per_second for one in found), 1),
                train_flops=middle(one.train_flops for one in found),
                peak_memory_bytes=max(one.peak_memory_bytes for one in found),
                memory_growth_bytes=max(one.memory_growth_bytes for one in found),
                saved_bytes=found[0].saved_bytes,
                drift=_drift(line, found),
                seconds_per_row=middle(one.seconds_per_row or 0.0 for one in found),
                waited=arm in waited,
            )
        )
    return tuple(rows)


USUAL_SHARE = 0.9
"""Of eval rows that are right, before anything was trained."""
middle = statistics.median
"""Of what runs cost: the first one of a command finds files and libraries cold, and is no cost of the method."""


def _base_value(line: Line, of_rows: Any, base: Scores | None) -> float | None:
    """The metric without training."""
    if of_rows is not None:
        return float(of_rows.mean)
    return base.metrics[line.measure.name].value if base and line.measure.name in base.metrics else None


def _search_seconds(line: Line, search: Search) -> float:
    spent = search.other_seconds
    for one in search.tried:
        trial = rate_search.search_trial(search.arm, one.learning_rate, one.share, line.recipe.train.seed)
        path = line.folder / FOLDER / "trials" / f"{trial.name}.json"
        spent += TrialResult.load(path).train_seconds if path.exists() else 0.0
    return spent


def _drift(line: Line, found: Sequence[TrialResult]) -> Estimate | None:
    """Mean drift on generic text, with a bootstrap interval over the texts."""
    folder = line.folder / "predictions" / "generic"
    if not (folder / f"{BASE}.npz").exists():
        return None
    before = outputs.load(folder / f"{BASE}.npz")["generic"]
    moved = [drift.drift(before, outputs.load(folder / f"{one.trial.name}.npz")["generic"]) for one in found]
    of_text = np.mean(moved, axis=0)
    drawn = np.random.default_rng(0).integers(0, len(of_text), (2000, len(of_text)))
    means = of_text[drawn].mean(axis=1)
    tail = (1 - line.recipe.evaluate.confidence) / 2
    low, high = np.quantile(means, (tail, 1 - tail))
    return Estimate(value=float(of_text.mean()), low=float(low), high=float(high))


def design_of_rows(line: Line, metrics: Sequence[float] = (USUAL_SHARE,)) -> dict[str, Any]:
    """Fields of the design that the rows settle, before or after something was trained.

    Args:
        line: The comparison.
        metrics: Of each method's first whole run, on the eval rows; left out, as often is.
    """
    scale = scale_of(line)
    known = (one for one in line.summary.notes if " test rows have " in one and "stands in train" in one)
    return {
        "margin": line.recipe.compare.margin,
        "eval_rows": scale.eval_rows,
        "rates_told": max(map(scale.tolerance, metrics)) if scale.is_share else None,
        "test_in_eval": line.summary.test_in_eval,
        "test_in_train": next(known, ""),
    }


def _rates_searched(search: Search) -> tuple[float, ...]:
    """With those beyond the grid that a whole run led to."""
    tried = {one.learning_rate for one in (*search.tried, *search.whole)}
    return tuple(sorted(tried | {search.chosen})) if search.tried else ()


def design_of(
    line: Line,
    searches: Mapping[str, Search],
    ran: Ran,
    openings: Sequence[Opening],
    others: Sequence[str],
    *,
    full_wins: bool,
) -> ComparisonDesign:
    """What the lint looks at."""
    waited = waiting(ran.looks)
    arms = []
    for arm, found in ran.results.items():
        method, made = line.room(arm).arm, line.room(arm).plan
        arms.append(
            ArmDesign(
                name=arm,
                kind=method.kind,
                settings=settings_of(method),
                rates_searched=_rates_searched(searches[arm]),
                whole_runs=len(searches[arm].whole),
                learning_rate=searches[arm].chosen,
                on_edge=searches[arm].on_edge,
                seeds=tuple(one.trial.seed for one in found),
                weights_dtype=made.weights_dtype,
                bf16_rounding=made.bf16_rounding,
                train_tokens=found[0].tokens,
                waited=arm in waited,
                time_was_up=ran.time_was_up,
                no_time_to_search=searches[arm].time_was_up,
            )
        )
    return ComparisonDesign(
        arms=tuple(arms),
        full_wins=full_wins,
        weights_source="gguf" if is_quantised(line.job.base.files) else "plain",
        **design_of_rows(line, [found[0].metric for found in ran.results.values()]),
        opened_by_others=tuple(others),
        left_out=tuple(one.arm for one in line.trained_arms if one.arm not in ran.results),
        test_openings=len({(one.trials, one.alpha) for one in openings}),  # the same trials again show nothing new
        for_more_time=all(one.alpha is not None for one in openings),
    )
