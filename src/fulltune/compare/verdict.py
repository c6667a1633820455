"""FULL, PEFT, EQUIVALENT or UNDECIDED: a pure function of what the arms' trials kept of the same rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fulltune.recipe.methods import RIVALS
from fulltune.records.differences import ArmKind, ArmScore, Decision, Difference, VerdictKind
from fulltune.stats.bootstrap import SAMPLES, Drawn, draw
from fulltune.stats.intervals import (
    SeedSpread,
    Uncertain,
    difference,
    discordance,
    holm,
    holm_levels,
    mcnemar,
    mean_of_arm,
    seed_spreads,
)
from fulltune.stats.precision import MOST_ROWS_FACTOR, MOST_SEEDS, Needed, Precision, needed
from fulltune.stats.row_scores import Measure
from fulltune.tasks import Predictions
from fulltune.text import is_share

_FEW_SEEDS = 3
"""From fewer the spread between seeds is hardly known."""


@dataclass(frozen=True)
class ArmItems:
    """What the trials of one arm kept of the rows that all arms are scored on."""

    name: str
    kind: ArmKind
    trials: Sequence[Predictions]
    """What `reduce` kept, seed by seed in the order of the seeds; arms may have unequal numbers of them."""
    cost: float
    """To tell cheaper arms from dearer ones, of all arms the same: here the parameters that are trained."""
    right: np.ndarray | None = None
    """Whether each seed has each row right: bool [seeds, rows]; None: rows are not simply right or wrong."""
    alpha_share: float = 1.0
    """Part of alpha at which this arm is tested; below 1 where it waited and has another chance."""

    @property
    def decides(self) -> bool:
        return self.kind in RIVALS


def decide(
    arms: Sequence[ArmItems],
    measure: Measure,
    *,
    margin: float,
    clusters: np.ndarray | None = None,
    confidence: float = 0.95,
    alpha: float | None = None,
    samples: int = SAMPLES,
    seed: int = 0,
) -> Decision:
    """Compare full fine-tuning with every other arm.

    Args:
        arms: Exactly one of the kind `full`, and at least one other.
        measure: The metric.
        margin: Differences below it do not matter, in units of the metric.
        clusters: Number of each row's cluster; rows of one are resampled together.
        confidence: Of the intervals that stand alone.
        alpha: Chance of a wrong verdict; left out, 1 - confidence. After a sequential rule, what its last look spends.
        samples: Draws of the rows.
        seed: Of these draws.
    """
    alpha = 1 - confidence if alpha is None else alpha
    (full,) = (place for place, arm in enumerate(arms) if arm.kind == "full")
    drawn = draw(measure, [arm.trials for arm in arms], clusters, samples, seed)
    spreads = seed_spreads(drawn, [arm.kind == "base" for arm in arms])
    others = [place for place in range(len(arms)) if place != full]
    found = {place: difference(drawn, full, place, spreads, measure.sign, measure.span) for place in others}
    deciding = [place for place in others if arms[place].decides]
    differences = []
    for group in (deciding, [place for place in others if place not in deciding]):
        differences += _differences(arms, full, group, found, drawn, margin, confidence, alpha, measure)
    verdict, recommended = _verdict(differences, arms[full].name, arms)
    return Decision(
        verdict=verdict,
        recommended=recommended,
        metric=measure.name,
        greater_is_better=measure.greater_is_better,
        margin=margin,
        confidence=confidence,
        alpha=alpha,
        num_rows=drawn.num_rows,
        num_clusters=drawn.num_clusters,
        num_draws=drawn.num_draws,
        scores=tuple(_score(arm, place, drawn, spreads, measure, confidence) for place, arm in enumerate(arms)),
        differences=tuple(differences),
        headline=_headline(verdict, recommended, arms[full].name),
        because=tuple(_because(one, measure) for one in differences if one.decides),
        would_decide=tuple(_would_decide(differences)) if verdict == "UNDECIDED" else (),
        notes=tuple(_notes(differences, verdict, recommended)),
    )


def _differences(
    arms: Sequence[ArmItems],
    full: int,
    group: Sequence[int],
    found: dict[int, Uncertain],
    drawn: Drawn,
    margin: float,
    confidence: float,
    alpha: float,
    measure: Measure,
) -> list[Difference]:
    """Of arms that share the chance of a wrong answer."""
    p_values = [found[place].p_value() for place in group]
    equivalence = [found[place].equivalence_p(margin) for place in group]
    adjusted, equivalent = holm(p_values), holm(equivalence)
    made, bounds = [], None if measure.span is None else (-measure.span, measure.span)
    levels, equal_levels = holm_levels(p_values, alpha), holm_levels(equivalence, alpha)
    for number, place in enumerate(group):
        arm, uncertain = arms[place], found[place]
        level, equal_level = levels[number] * arm.alpha_share, equal_levels[number] * arm.alpha_share
        low, high = _within(uncertain.interval(1 - confidence), bounds)
        adjusted_low, adjusted_high = _within(uncertain.interval(level), bounds)
        known = uncertain.seeds_known
        certain = known and adjusted[number] <= alpha * arm.alpha_share
        is_equivalent = known and equivalent[number] <= alpha * arm.alpha_share
        decided = needed(uncertain, drawn.num_rows, margin, level, equal_level) if known else Needed(None, None)
        rights = (arms[full].right, arm.right)
        made.append(
            Difference(
                arm=arm.name,
                kind=arm.kind,
                decides=arm.decides,
                cheaper=arm.cost < arms[full].cost,
                num_seeds=len(arm.trials),
                estimate=uncertain.estimate,
                low=low,
                high=high,
                adjusted_low=adjusted_low,
                adjusted_high=adjusted_high,
                p_value=p_values[number],
                adjusted_p=adjusted[number],
                equivalence_p=equivalence[number],
                adjusted_equivalence_p=equivalent[number],
                equivalent=is_equivalent,
                not_worse=known and 1 - uncertain.below(margin) <= level / 2,
                full_better=certain and uncertain.estimate >= margin and adjusted_low > 0,
                arm_better=certain and uncertain.estimate <= -margin and adjusted_high < 0,
                standard_error=float(np.sqrt(uncertain.variance)),
                row_variance=uncertain.row_variance,
                seed_variance=uncertain.seed_variance,
                seeds_known=known,
                discordance=None if rights[0] is None or rights[1] is None else discordance(rights[0], rights[1]),
                detectable=Precision.of(uncertain).detectable(margin, level),
                mcnemar=None if rights[0] is None or rights[1] is None else mcnemar(rights[0], rights[1]),
                rows_needed=decided.rows,
                seeds_needed=decided.seeds,
            )
        )
    return made


def _score(
    arm: ArmItems,
    place: int,
    drawn: Drawn,
    spreads: Sequence[SeedSpread | None],
    measure: Measure,
    confidence: float,
) -> ArmScore:
    mean, spread = mean_of_arm(drawn, place, spreads, measure.span), spreads[place]
    low, high = _within(mean.interval(1 - confidence), measure.bounds)
    several = spread is not None and len(arm.trials) > 1
    return ArmScore(
        arm=arm.name,
        kind=arm.kind,
        values=tuple(drawn.point[place].tolist()),
        mean=mean.estimate,
        low=low,
        high=high,
        seed_sd=float(np.sqrt(spread.beyond_rows)) if spread is not None and several else None,
    )


def _within(interval: tuple[float, float], bounds: tuple[float, float] | None) -> tuple[float, float]:
    """No share of rows is below 0 or above 1, no difference of shares beyond 1, whatever few seeds allow."""
    return interval if bounds is None else (max(bounds[0], interval[0]), min(bounds[1], interval[1]))


# ---- the rule --------------------------------------------------------------------------------------------------


def _verdict(differences: Sequence[Difference], full: str, arms: Sequence[ArmItems]) -> tuple[VerdictKind, str]:
    """The verdict and the arm to take."""
    cost = {arm.name: arm.cost for arm in arms}
    rivals = [one for one in differences if one.decides]
    if better := [one for one in rivals if one.arm_better]:
        return "PEFT", min(better, key=lambda one: one.estimate).arm
    if rivals and all(one.full_better and not one.equivalent for one in rivals):
        return "FULL", full
    if equal := [one for one in rivals if one.equivalent and one.cheaper]:
        return "EQUIVALENT", min(equal, key=lambda one: cost[one.arm]).arm
    good = [one.arm for one in rivals if one.not_worse and one.cheaper]
    return "UNDECIDED", min(good, key=cost.__getitem__) if good else ""


def _headline(verdict: VerdictKind, recommended: str, full: str) -> str:
    match verdict:
        case "FULL":
            return f"Updating every parameter is worth it here: {full} is better than every other method by the margin."
        case "PEFT":
            return f"Take {recommended}: it is better than {full} by the margin."
        case "EQUIVALENT":
            return f"Take {recommended}: as good as {full} within the margin, and it trains fewer weights."
    if recommended:
        less = "does not lose the margin to"
        return f"Whether they are equal is open, but {recommended} {less} {full} and trains fewer weights."
    return "These rows and seeds do not tell the methods apart."


# ---- in words --------------------------------------------------------------------------------------------------


def shown(value: float, metric: str) -> str:
    """A difference with its sign: in points where the metric is a share, else as it is."""
    return f"{100 * value:+.2f} points" if is_share(metric) else f"{value:+.4g}"


def _because(one: Difference, measure: Measure) -> str:
    gap, low, high = (shown(value, measure.name) for value in (one.estimate, one.adjusted_low, one.adjusted_high))
    found = f"full minus {one.arm}: {gap} of {measure.name} ({low} to {high})"
    if not one.seeds_known:
        return f"{found}: one seed, so the spread between seeds is not known"
    if one.full_better:
        return f"{found}: full is better"
    if one.arm_better:
        return f"{found}: {one.arm} is better"
    if one.equivalent:
        return f"{found}: equal within the margin"
    if one.not_worse:
        return f"{found}: {one.arm} is equal or better"
    return f"{found}: not decided"


def _would_decide(differences: Sequence[Difference]) -> list[str]:
    said = []
    for one in differences:
        if not one.decides or one.full_better or one.arm_better or one.equivalent:
            continue
        if not one.seeds_known:
            said.append(
                f"{one.arm}: train at least two, better three seeds of full and of {one.arm}; one seed of each does "
                "not tell how much seeds differ"
            )
            continue
        ways = []
        if one.rows_needed is not None:
            ways.append(f"{one.rows_needed:,} test rows")
        if one.seeds_needed is not None:
            ways.append(f"{one.seeds_needed} seeds of each method")
        if ways:
            said.append(
                f"{one.arm}: take {' or '.join(ways)}; that is enough if the difference is as large as it looks now"
            )
        elif one.num_seeds < _FEW_SEEDS:
            said.append(
                f"{one.arm}: train three or more seeds of full and of {one.arm}; from fewer it cannot be told how many "
                "rows or seeds would be enough"
            )
        else:
            said.append(
                f"{one.arm}: neither {MOST_ROWS_FACTOR} times the test rows nor {MOST_SEEDS} seeds of each method "
                "would be enough alone, if the difference is what it looks like now; it takes more of both, or a "
                "larger compare.margin: the smallest difference that matters to you"
            )
    return said


def _notes(differences: Sequence[Difference], verdict: VerdictKind, recommended: str) -> list[str]:
    said = []
    for one in differences:
        if one.decides:
            continue
        if one.arm_better or one.equivalent or one.estimate <= 0:
            how = "is not worse than full" if one.not_worse else "scores no less than full"
            said.append(f"{one.arm}, which decides nothing, {how}: is there anything to learn here?")
    fewer = [one.arm for one in differences if one.decides and one.num_seeds == 1 and one.seeds_known]
    if fewer:
        said.append(f"{', '.join(fewer)}: one seed; the spread between seeds is taken from the other methods")
    for one in differences:
        if one.decides and one.mcnemar is not None and one.full_better and one.mcnemar.p_value > 0.05:
            said.append(f"{one.arm}: McNemar's test on majority votes does not see the difference")
    if verdict == "PEFT" and (
        cheaper := [one.arm for one in differences if one.decides and one.arm_better and one.arm != recommended]
    ):
        said.append(f"also better than full: {', '.join(cheaper)}")
    return said
