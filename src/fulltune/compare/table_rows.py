"""The arms of a comparison as rows of its table."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import numpy as np

from fulltune.compare import rate_search
from fulltune.compare.context import BASE, Context, settings_of
from fulltune.compare.seeds import SeedRuns, waiting
from fulltune.evaluate import outputs
from fulltune.forgetting import drift
from fulltune.records.comparison import ArmRow, Search, TrialResult
from fulltune.records.differences import ArmScore, Decision
from fulltune.records.scores import Estimate, Scores
from fulltune.stats.bootstrap import resample

middle = statistics.median
"""Of what runs cost: the first one of a command finds files and libraries cold, and is no cost of the method."""
_SAMPLES = 2000
"""Resamples of generic texts."""


def rows_of(ran: SeedRuns, decision: Decision, baselines: Sequence[Scores]) -> tuple[ArmRow, ...]:
    """A row for each arm, the untouched model (or the first of the baselines) first."""
    context, scores, waited = ran.context, {one.arm: one for one in decision.scores}, waiting(ran.looks)
    num_parameters = context.setup(context.full.arm).plan.num_parameters
    base = _base(context, scores.get(BASE), baselines)
    rows = []
    if base is not None and any(one.kind == "base" for one in context.recipe.methods):
        rows.append(
            ArmRow(
                arm=BASE,
                kind="base",
                num_parameters=num_parameters,
                num_trainable=0,
                metric=base,
                values=(base.value,),
                gain_share=0.0,
            )
        )
    gain = 0.0 if base is None else scores[context.full.arm].mean - base.value
    for arm, found in ran.results.items():
        score, search, method = scores[arm], ran.searches[arm], context.setup(arm).arm
        share = None if base is None or context.measure.sign * gain <= 0 else (score.mean - base.value) / gain
        rows.append(
            ArmRow(
                arm=arm,
                kind=context.recipe.compared_kind(method),
                settings=settings_of(method),
                num_parameters=num_parameters,
                num_trainable=found[0].num_trainable,
                learning_rate=search.chosen,
                seeds=tuple(one.trial.seed for one in found),
                metric=Estimate(value=score.mean, low=score.low, high=score.high),
                values=score.values,
                gain_share=share,
                train_seconds=round(middle(one.train_seconds for one in found), 2),
                search_seconds=round(_search_seconds(context, search), 2),
                tokens_per_second=round(middle(one.tokens_per_second for one in found), 1),
                train_flops=middle(one.train_flops for one in found),
                peak_memory_bytes=max(one.peak_memory_bytes for one in found),
                memory_growth_bytes=max(one.memory_growth_bytes for one in found),
                saved_bytes=found[0].saved_bytes,
                drift=_drift(context, found),
                seconds_per_row=middle(one.seconds_per_row or 0.0 for one in found),
                waited=arm in waited,
            )
        )
    return tuple(rows)


def _base(context: Context, score: ArmScore | None, baselines: Sequence[Scores]) -> Estimate | None:
    """The metric without training."""
    if score is not None:
        return Estimate(value=score.mean, low=score.low, high=score.high)
    return baselines[0].metrics.get(context.measure.name) if baselines else None


def _search_seconds(context: Context, search: Search) -> float:
    spent = search.other_seconds
    for one in search.tried:
        trial = rate_search.search_trial(search.arm, one.learning_rate, one.share, context.recipe.train.seed)
        path = context.result_path(trial.name)
        spent += TrialResult.load(path).train_seconds if path.exists() else 0.0
    return spent


def _drift(context: Context, found: Sequence[TrialResult]) -> Estimate | None:
    """Mean drift on generic text, with a bootstrap interval over the texts."""
    folder = context.folder / "predictions" / "generic"
    if not (folder / f"{BASE}.npz").exists():
        return None
    before = outputs.load(folder / f"{BASE}.npz")["generic"]
    moved = [drift.drift(before, outputs.load(folder / f"{one.trial.name}.npz")["generic"]) for one in found]
    of_text = {"drift": np.mean(moved, axis=0)}
    mean = resample(of_text, lambda texts: {"drift": float(texts["drift"].mean())}, samples=_SAMPLES)["drift"]
    return mean.estimate(context.recipe.evaluate.confidence)
