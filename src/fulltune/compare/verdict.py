from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fulltune.recipe.methods import RIVALS, VARIANT, MethodKind
from fulltune.records.comparison import Decision, Difference, VerdictKind
from fulltune.records.scores import Estimate
from fulltune.report.format.words import MetricFormatter
from fulltune.stats.bootstrap import ResamplableMetric, ResampledTrials
from fulltune.stats.intervals import (
    UncertainValue,
    correct_p_values,
    difference_of_methods,
    estimate_seed_spreads,
    mean_of_method,
)
from fulltune.stats.precision import MAX_ROWS_FACTOR, MAX_SEEDS, ComparisonPrecision, rows_and_seeds_needed
from fulltune.tasks import Predictions
from fulltune.text import listed

_FEW_SEEDS = 3


@dataclass(frozen=True)
class MethodOutputs:
    """One method's outputs on the rows that all methods share."""

    name: str
    kind: MethodKind
    trials: Sequence[Predictions]
    cost: float
    alpha_share: float = 1.0

    @property
    def decides(self) -> bool:
        return self.kind in RIVALS


@dataclass(frozen=True)
class Terms:
    """A comparison's metric, margin, confidence and accepted error probability."""

    measure: ResamplableMetric
    margin: float
    confidence: float = 0.95
    alpha: float = 0.05


def decide_verdict(methods: Sequence[MethodOutputs], drawn: ResampledTrials, terms: Terms) -> Decision:
    """Compare full fine-tuning with every other method on bootstrap resamples (`drawn`), and return the verdict."""
    measure = terms.measure
    (full,) = (index for index, method in enumerate(methods) if method.kind == "full")
    spreads = estimate_seed_spreads(drawn, [method.kind == "base" for method in methods])
    differences = []
    for decides in (True, False):  # methods that share the chance of a wrong answer
        group = [index for index, method in enumerate(methods) if index != full and method.decides == decides]
        gaps = [difference_of_methods(drawn, full, index, spreads, measure.sign, measure.span) for index in group]
        tests = correct_p_values([gap.p_value() for gap in gaps], terms.alpha)
        equivalence = correct_p_values([gap.equivalence_p(terms.margin) for gap in gaps], terms.alpha)
        for index, gap, *tested in zip(group, gaps, tests, equivalence, strict=True):
            differences.append(_test_difference(methods[full], methods[index], gap, tested, drawn.num_rows, terms))
    verdict, recommended = _choose_verdict(differences, methods[full].name, methods)
    scores = {}
    for index, method in enumerate(methods):
        mean = mean_of_method(drawn, index, spreads, measure.span)
        low, high = _clip(mean.interval(1 - terms.confidence), measure.bounds)
        scores[method.name] = Estimate(value=mean.estimate, low=low, high=high)
    return Decision(
        verdict=verdict,
        recommended=recommended,
        metric=measure.name,
        greater_is_better=measure.greater_is_better,
        margin=terms.margin,
        confidence=terms.confidence,
        alpha=terms.alpha,
        num_rows=drawn.num_rows,
        scores=scores,
        values={method.name: tuple(point.tolist()) for method, point in zip(methods, drawn.point, strict=True)},
        seed_sds={
            method.name: float(np.sqrt(spread.beyond_rows))
            for method, spread in zip(methods, spreads, strict=True)
            if spread is not None and len(method.trials) > 1
        },
        differences=tuple(differences),
        headline=_state_verdict(verdict, recommended, methods[full].name, differences),
        because=tuple(
            _explain_difference(difference, MetricFormatter(measure.name, terms.margin))
            for difference in differences
            if difference.decides
        ),
        would_decide=tuple(_what_would_decide(differences)) if verdict == "UNDECIDED" else (),
        notes=tuple(_verdict_notes(differences)),
    )


def _test_difference(
    full: MethodOutputs,
    method: MethodOutputs,
    difference: UncertainValue,
    p_values: Sequence[tuple[float, float]],
    num_rows: int,
    terms: Terms,
) -> Difference:
    """Return a method's difference from full. `p_values`: (p, level) of the difference and equivalence tests."""
    margin, alpha, span = terms.margin, terms.alpha * method.alpha_share, terms.measure.span
    bounds = None if span is None else (-span, span)
    (adjusted_p, level), (equivalence_p, equal_level) = ((p, of_test * method.alpha_share) for p, of_test in p_values)
    adjusted_low, adjusted_high = _clip(difference.interval(level), bounds)
    is_tested = difference.seeds_known
    certain = is_tested and adjusted_p <= alpha
    rows, seeds = rows_and_seeds_needed(difference, num_rows, margin, level, equal_level) if is_tested else (None, None)
    return Difference(
        method=method.name,
        kind=method.kind,
        decides=method.decides,
        cheaper=method.cost < full.cost,
        num_seeds=len(method.trials),
        estimate=difference.estimate,
        adjusted_low=adjusted_low,
        adjusted_high=adjusted_high,
        equivalent=is_tested and equivalence_p <= alpha,
        not_worse=is_tested and 1 - difference.below(margin) <= level / 2,
        full_better=certain and difference.estimate >= margin and adjusted_low > 0,
        other_better=certain and difference.estimate <= -margin and adjusted_high < 0,
        seeds_known=is_tested,
        detectable=ComparisonPrecision.of(difference).detectable_difference(margin, level),
        rows_needed=rows,
        seeds_needed=seeds,
    )


def _clip(interval: tuple[float, float], bounds: tuple[float, float] | None) -> tuple[float, float]:
    return interval if bounds is None else (max(bounds[0], interval[0]), min(bounds[1], interval[1]))


def _choose_verdict(
    differences: Sequence[Difference], full: str, methods: Sequence[MethodOutputs]
) -> tuple[VerdictKind, str]:
    """Return the verdict and the recommended method's name (empty if none is recommended)."""
    cost = {method.name: method.cost for method in methods}
    rivals = [one for one in differences if one.decides]
    if better := [one for one in rivals if one.other_better]:
        best = min(better, key=lambda difference: difference.estimate)
        return "VARIANT" if best.kind == VARIANT else "PEFT", best.method
    if rivals and all(one.full_better and not one.equivalent for one in rivals):
        return "FULL", full
    if equal := [one for one in rivals if one.equivalent and one.cheaper]:
        return "EQUIVALENT", min(equal, key=lambda difference: cost[difference.method]).method
    if rivals and all(one.full_better or one.equivalent for one in rivals):
        return "EQUIVALENT", full  # only variants are equal, which cost as much: the plain one is simpler
    good = [one.method for one in rivals if one.not_worse and one.cheaper]
    return "UNDECIDED", min(good, key=cost.__getitem__) if good else ""


def _state_verdict(verdict: VerdictKind, recommended: str, full: str, differences: Sequence[Difference]) -> str:
    match verdict:
        case "FULL" if all(one.kind == VARIANT for one in differences if one.decides):
            return f"Keep {full} unchanged: it beats every variant with other settings by at least the margin."
        case "FULL":
            return f"Updating every parameter is worth it here: {full} beats every other method by at least the margin."
        case "PEFT" | "VARIANT":
            return f"Use {recommended}: it beats {full} by at least the margin."
        case "EQUIVALENT" if recommended == full:
            equal = listed([one.method for one in differences if one.equivalent])
            return f"Use {full}: {equal} {'are' if ' and ' in equal else 'is'} equally good within the margin."
        case "EQUIVALENT":
            return f"Use {recommended}: it is as good as {full} within the margin and trains fewer weights."
    if recommended:
        loss = f"is worse than {full} by less than the margin, if at all,"
        return f"It is unclear whether the methods are equal, but {recommended} {loss} and trains fewer weights."
    return "These rows and seeds cannot distinguish the methods."


def _explain_difference(rival: Difference, write: MetricFormatter) -> str:
    """State a rival's difference from full fine-tuning in one sentence."""
    if not rival.seeds_known:
        answer = "only one seed, so the spread between seeds is unknown"
    elif rival.full_better:
        answer = "full is better"
    elif rival.other_better:
        answer = f"{rival.method} is better"
    elif rival.equivalent:
        answer = "equal within the margin"
    elif rival.not_worse:
        answer = f"{rival.method} is worse by less than the margin, if at all"
    else:
        answer = "not decided"
    points = " points" if write.in_points else ""
    return f"full minus {rival.method}: {write.adjusted(rival)}{points} of {write.name}: {answer}"


def _what_would_decide(differences: Sequence[Difference]) -> Iterator[str]:
    """Yield a sentence on how many rows or seeds would decide, for each undecided rival."""
    for rival in differences:
        if not rival.is_open:
            continue
        rows = [] if rival.rows_needed is None else [f"{rival.rows_needed:,} test rows"]
        seeds = [] if rival.seeds_needed is None else [f"{rival.seeds_needed} seeds per method"]
        if rows or seeds:
            what = f"{' or '.join(rows + seeds)} would decide, if the true difference equals the estimate"
        elif rival.num_seeds < _FEW_SEEDS:
            what = f"train three or more seeds of full and of {rival.method}; fewer do not show how much seeds differ"
        else:
            what = (
                f"even if the true difference equals the estimate, neither {MAX_ROWS_FACTOR} times the test rows nor "
                f"{MAX_SEEDS} seeds per method would decide alone; use more of both, or a larger compare.margin (the "
                "smallest difference that matters to you)"
            )
        yield f"{rival.method}: {what}"


def _verdict_notes(differences: Sequence[Difference]) -> Iterator[str]:
    """Yield notes on reference methods and single seeds."""
    for shown in differences:
        if not shown.decides and (shown.other_better or shown.equivalent or shown.estimate <= 0):
            how = "is not worse than full" if shown.not_worse else "scores at least as well as full"
            yield f"{shown.method}, shown for reference, {how}: check whether the task can be learned from these rows"
    if fewer := [one.method for one in differences if one.decides and one.num_seeds == 1 and one.seeds_known]:
        yield f"{', '.join(fewer)}: only one seed, so the spread between seeds is taken from the other methods"
