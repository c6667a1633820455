"""FULL, PEFT, VARIANT, EQUIVALENT or UNDECIDED: a pure function of what the arms' trials kept of the same rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fulltune.recipe.methods import RIVALS, VARIANT, ArmKind
from fulltune.records.differences import ArmScore, Decision, Difference, VerdictKind
from fulltune.report.comparison.numbers import Writer
from fulltune.stats.bootstrap import SAMPLES, Drawn, draw
from fulltune.stats.intervals import HolmTest, SeedSpread, Uncertain, difference, holm, mean_of_arm, seed_spreads
from fulltune.stats.precision import MOST_ROWS_FACTOR, MOST_SEEDS, Precision, needed
from fulltune.stats.row_scores import Measure
from fulltune.tasks import Predictions
from fulltune.text import listed

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
) -> Decision:
    """Compare full fine-tuning with every other arm; rows of one cluster are resampled together."""
    alpha = 1 - confidence if alpha is None else alpha
    (full,) = (place for place, arm in enumerate(arms) if arm.kind == "full")
    drawn = draw(measure, [arm.trials for arm in arms], clusters, samples)
    spreads = seed_spreads(drawn, [arm.kind == "base" for arm in arms])
    differences, bounds = [], None if measure.span is None else (-measure.span, measure.span)
    for decides in (True, False):  # arms that share the chance of a wrong answer
        group = [place for place, arm in enumerate(arms) if place != full and arm.decides == decides]
        found = [difference(drawn, full, place, spreads, measure.sign, measure.span) for place in group]
        tests = holm([one.p_value() for one in found], alpha)
        equivalence = holm([one.equivalence_p(margin) for one in found], alpha)
        for place, one, test, equal in zip(group, found, tests, equivalence, strict=True):
            terms = (drawn.num_rows, margin, confidence, alpha, bounds)
            differences.append(_difference(arms[full], arms[place], one, test, equal, *terms))
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
        headline=_headline(verdict, recommended, arms[full].name, differences),
        because=tuple(_because(one, Writer(measure.name, margin)) for one in differences if one.decides),
        would_decide=tuple(_would_decide(differences)) if verdict == "UNDECIDED" else (),
        notes=tuple(_notes(differences, verdict, recommended)),
    )


def of_learned(decision: Decision, untouched: Mapping[str, Sequence[int]]) -> Decision:
    """The verdict where a budget for forgetting left some methods (their seeds) nothing but the untouched model."""
    if not untouched:
        return decision
    notes = tuple(
        f"{arm} (seed{'s' if len(seeds) > 1 else ''} {listed([str(seed) for seed in seeds])}): nothing within the "
        "budget for forgetting was better than the untouched model, which stands in its place"
        for arm, seeds in untouched.items()
    )
    changes: dict[str, object] = {"notes": (*decision.notes, *notes)}
    taken = decision.recommended
    if any(one.arm == taken and len(one.values) == len(untouched.get(taken, ())) for one in decision.scores):
        changes |= {
            "verdict": "UNDECIDED",
            "recommended": "",
            "headline": f"Within the budget for forgetting {taken} is the untouched model: nothing is learned to take.",
            "would_decide": (
                "give a larger preserve.budget, more texts (preserve.probe, preserve.replay) or more train rows",
            ),
        }
    return decision.model_copy(update=changes)


def _difference(
    full: ArmItems,
    arm: ArmItems,
    found: Uncertain,
    test: HolmTest,
    equivalence: HolmTest,
    num_rows: int,
    margin: float,
    confidence: float,
    alpha: float,
    bounds: tuple[float, float] | None,
) -> Difference:
    level, equal_level = test.level * arm.alpha_share, equivalence.level * arm.alpha_share
    low, high = _within(found.interval(1 - confidence), bounds)
    adjusted_low, adjusted_high = _within(found.interval(level), bounds)
    known = found.seeds_known
    certain = known and test.adjusted_p <= alpha * arm.alpha_share
    rows, seeds = needed(found, num_rows, margin, level, equal_level) if known else (None, None)
    return Difference(
        arm=arm.name,
        kind=arm.kind,
        decides=arm.decides,
        cheaper=arm.cost < full.cost,
        num_seeds=len(arm.trials),
        estimate=found.estimate,
        low=low,
        high=high,
        adjusted_low=adjusted_low,
        adjusted_high=adjusted_high,
        p_value=test.p_value,
        adjusted_p=test.adjusted_p,
        equivalence_p=equivalence.p_value,
        adjusted_equivalence_p=equivalence.adjusted_p,
        equivalent=known and equivalence.adjusted_p <= alpha * arm.alpha_share,
        not_worse=known and 1 - found.below(margin) <= level / 2,
        full_better=certain and found.estimate >= margin and adjusted_low > 0,
        arm_better=certain and found.estimate <= -margin and adjusted_high < 0,
        standard_error=float(np.sqrt(found.variance)),
        row_variance=found.row_variance,
        seed_variance=found.seed_variance,
        seeds_known=known,
        detectable=Precision.of(found).detectable(margin, level),
        rows_needed=rows,
        seeds_needed=seeds,
    )


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
    return ArmScore(
        arm=arm.name,
        kind=arm.kind,
        values=tuple(drawn.point[place].tolist()),
        mean=mean.estimate,
        low=low,
        high=high,
        seed_sd=float(np.sqrt(spread.beyond_rows)) if spread is not None and len(arm.trials) > 1 else None,
    )


def _within(interval: tuple[float, float], bounds: tuple[float, float] | None) -> tuple[float, float]:
    """No share of rows is below 0 or above 1, no difference of shares beyond 1, whatever few seeds allow."""
    return interval if bounds is None else (max(bounds[0], interval[0]), min(bounds[1], interval[1]))


def _verdict(differences: Sequence[Difference], full: str, arms: Sequence[ArmItems]) -> tuple[VerdictKind, str]:
    """The verdict and the arm to take."""
    cost = {arm.name: arm.cost for arm in arms}
    rivals = [one for one in differences if one.decides]
    if better := [one for one in rivals if one.arm_better]:
        best = min(better, key=lambda one: one.estimate)
        return "VARIANT" if best.kind == VARIANT else "PEFT", best.arm
    if rivals and all(one.full_better and not one.equivalent for one in rivals):
        return "FULL", full
    if equal := [one for one in rivals if one.equivalent and one.cheaper]:
        return "EQUIVALENT", min(equal, key=lambda one: cost[one.arm]).arm
    if rivals and all(one.full_better or one.equivalent for one in rivals):
        return "EQUIVALENT", full  # only variants are equal, which cost as much: the plain one is simpler
    good = [one.arm for one in rivals if one.not_worse and one.cheaper]
    return "UNDECIDED", min(good, key=cost.__getitem__) if good else ""


def _headline(verdict: VerdictKind, recommended: str, full: str, differences: Sequence[Difference]) -> str:
    match verdict:
        case "FULL" if all(one.kind == VARIANT for one in differences if one.decides):
            return f"Keep {full} as it is: it is better than with any of the other settings by the margin."
        case "FULL":
            return f"Updating every parameter is worth it here: {full} is better than every other method by the margin."
        case "PEFT" | "VARIANT":
            return f"Take {recommended}: it is better than {full} by the margin."
        case "EQUIVALENT" if recommended == full:
            equal = listed([one.arm for one in differences if one.equivalent])
            return f"Take {full}: {equal} {'are' if ' and ' in equal else 'is'} as good within the margin, and no more."
        case "EQUIVALENT":
            return f"Take {recommended}: as good as {full} within the margin, and it trains fewer weights."
    if recommended:
        less = "does not lose the margin to"
        return f"Whether they are equal is open, but {recommended} {less} {full} and trains fewer weights."
    return "These rows and seeds do not tell the methods apart."


def in_words(one: Difference, write: Writer) -> str:
    """`full minus lora: +0.62 [-0.35, +1.58] points of accuracy`: with the interval that holds for all together."""
    return f"full minus {one.arm}: {write.adjusted(one)}{' points' if write.in_points else ''} of {write.name}"


def _because(one: Difference, write: Writer) -> str:
    if not one.seeds_known:
        answer = "one seed, so the spread between seeds is not known"
    elif one.full_better:
        answer = "full is better"
    elif one.arm_better:
        answer = f"{one.arm} is better"
    elif one.equivalent:
        answer = "equal within the margin"
    elif one.not_worse:
        answer = f"{one.arm} is not worse by the margin"
    else:
        answer = "not decided"
    return f"{in_words(one, write)}: {answer}"


def _would_decide(differences: Sequence[Difference]) -> Iterator[str]:
    for one in differences:
        if not one.decides or one.full_better or one.arm_better or one.equivalent:
            continue
        rows = [] if one.rows_needed is None else [f"{one.rows_needed:,} test rows"]
        seeds = [] if one.seeds_needed is None else [f"{one.seeds_needed} seeds per method"]
        if not one.seeds_known:
            what = (
                f"train at least two, better three seeds of full and of {one.arm}; one seed of each does not tell how "
                "much seeds differ"
            )
        elif rows or seeds:
            what = f"would be decided by {' or '.join(rows + seeds)}, if the true difference equals the estimate"
        elif one.num_seeds < _FEW_SEEDS:
            what = (
                f"train three or more seeds of full and of {one.arm}; fewer are too few to estimate how many rows or "
                "seeds would be enough"
            )
        else:
            what = (
                f"if the true difference equals the estimate, neither {MOST_ROWS_FACTOR} times the test rows nor "
                f"{MOST_SEEDS} seeds per method would decide alone; it takes more of both, or a larger compare.margin: "
                "the smallest difference that matters to you"
            )
        yield f"{one.arm}: {what}"


def _notes(differences: Sequence[Difference], verdict: VerdictKind, recommended: str) -> Iterator[str]:
    deciding = [one for one in differences if one.decides]
    for one in differences:
        if not one.decides and (one.arm_better or one.equivalent or one.estimate <= 0):
            how = "is not worse than full" if one.not_worse else "scores no less than full"
            yield f"{one.arm}, which decides nothing, {how}: is there anything to learn here?"
    if fewer := [one.arm for one in deciding if one.num_seeds == 1 and one.seeds_known]:
        yield f"{', '.join(fewer)}: one seed; the spread between seeds is taken from the other methods"
    better = [one.arm for one in deciding if one.arm_better and one.arm != recommended]
    if verdict in ("PEFT", "VARIANT") and better:
        yield f"also better than full: {', '.join(better)}"
