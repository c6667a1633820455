"""After each seed: which arms are hopeless, and is the answer clear? A pure function of the development rows.

Looking several times gives several chances to be wrong, also because the sealed rows are scored with the same trained
models as the development rows. So each look may spend a part of alpha, and the parts sum up to alpha: whatever makes
one stop, the chance of a wrong verdict on the sealed rows stays below their sum (Bonferroni over looks), if the last
test is made at the part of the look after which it was stopped. Late looks get most (a power family of Hwang, Shih and
DeCani's kind), because an answer after few seeds is rarely needed unless it is very clear.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Literal

import numpy as np

from fulltune.compare.draws import draw
from fulltune.compare.items import Measure
from fulltune.compare.precision import Precision, clear
from fulltune.compare.statistics import Uncertain, difference, seed_spreads
from fulltune.compare.verdict import ArmItems
from fulltune.compare_records import ArmStep, Look

SAMPLES = 2_000
_LATE = 3.0
"""Power of the spending function: how much is kept for the last look."""
_SURE = 0.95
"""Chance of a clear answer on the sealed rows at which it is stopped."""
_HOPELESS = 0.2
"""Chance of a clear answer with all seeds below which more seeds are a waste. (Of equal arms it is about a tenth, that
of the development rows and of the test rows both being unlucky.)"""
_UNKNOWN_SEED_SD_IN_MARGINS = 3.0
"""Before a second seed nothing is known of the spread between seeds; measured ones reach 2.6 points, so that three
margins of a point are a wide guess. Only an arm that is far behind all the same is given up after one seed."""


def spent(num_seeds: int, max_seeds: int, alpha: float) -> float:
    """Part of alpha that the look after so many seeds may spend; over 1 to `max_seeds` they sum up to alpha."""
    if not 1 <= num_seeds <= max_seeds:
        raise ValueError(f"look {num_seeds} of {max_seeds}")
    share = (num_seeds / max_seeds) ** _LATE - ((num_seeds - 1) / max_seeds) ** _LATE
    return alpha * share


def look(
    arms: Sequence[ArmItems],
    measure: Measure,
    *,
    margin: float,
    max_seeds: int,
    alpha: float = 0.05,
    clusters: np.ndarray | None = None,
    test_rows: int | None = None,
    samples: int = SAMPLES,
) -> Look:
    """Decide about each arm after another seed.

    Args:
        arms: What each arm's trials kept of the development rows. Exactly one is `full`, whose number of trials is
            that of the look; arms with fewer were given up before.
        measure: The metric.
        margin: See the recipe.
        max_seeds: Planned for each arm.
        alpha: Chance of a wrong verdict over all looks.
        clusters: Of the development rows.
        test_rows: Sealed rows; left out, as many as there are development rows.
        samples: Draws of the rows.
    """
    (full,) = (place for place, arm in enumerate(arms) if arm.kind == "full")
    counts = [len(arm.trials) for arm in arms]
    now = counts[full]
    level = spent(now, max_seeds, alpha)
    drawn = draw(measure, [arm.trials for arm in arms], clusters, samples)
    spreads = seed_spreads(drawn, [arm.kind == "base" for arm in arms], _UNKNOWN_SEED_SD_IN_MARGINS * margin)
    rows_factor = (test_rows or drawn.num_rows) / drawn.num_rows

    def minus(one: int, other: int) -> Uncertain:
        return difference(drawn, one, other, spreads, measure.sign, measure.span)

    rivals = [place for place, arm in enumerate(arms) if arm.decides]
    given_up = {place for place in rivals if counts[place] < now}
    share, last = (part / max(1, len(rivals)) for part in (level, spent(max_seeds, max_seeds, alpha)))
    best = max(range(len(arms)), key=lambda place: measure.sign * float(drawn.point[place].mean()))
    dropped: dict[int, float] = {}
    chances, possible = {}, {}
    for place in rivals:
        gap = minus(full, place)
        kept = counts[place] if place in given_up else max_seeds
        chances[place] = 0.0 if now == 1 else _chance(gap, margin, share, rows_factor, (now, counts[place]))
        possible[place] = _chance(gap, margin, last, rows_factor, (max_seeds, kept))
        alone = _chance(gap, margin, last, rows_factor, (max_seeds, counts[place]))
        # It would have to be better than it looks by more than its share of alpha allows, and the seeds that it has
        # must do for the last test.
        behind = minus(best, place) if place != best else None
        if behind is not None and behind.below(margin) <= share and alone >= _SURE:
            dropped[place] = behind.estimate
    enough, reason = _enough(arms, rivals, chances, possible, now, max_seeds)
    steps = []
    for place, arm in enumerate(arms):
        decision: Literal["drop", "enough", "more"] = "enough" if enough else "more"
        why = reason
        if not enough and place in given_up:
            decision, why = "drop", "given up before"
        elif not enough and place in dropped:
            decision = "drop"
            why = f"{dropped[place]:.4g} behind {arms[best].name} on the development rows: no seed makes up for it"
        steps.append(ArmStep(arm=arm.name, decision=decision, reason=why, chance=chances.get(place)))
    return Look(num_seeds=now, max_seeds=max_seeds, spent=level, enough=enough, reason=reason, arms=tuple(steps))


def _enough(
    arms: Sequence[ArmItems],
    rivals: Sequence[int],
    chances: dict[int, float],
    possible: dict[int, float],
    num_seeds: int,
    max_seeds: int,
) -> tuple[bool, str]:
    if num_seeds >= max_seeds:
        return True, "all seeds that were planned"
    if num_seeds == 1:
        return False, "one seed tells nothing about the spread between seeds"
    # FULL takes all arms, PEFT and EQUIVALENT take one; to be sure, each must have a clear answer.
    if all(chances[place] >= _SURE for place in rivals):
        return True, "clear: the test rows would very likely say the same"
    # Two seeds say too little about their spread to give up because of it.
    if num_seeds > 2 and all(max(possible[place], chances[place]) < _HOPELESS for place in rivals):
        return True, "more seeds would hardly decide: the rows are too few for these differences"
    open_ones = [arms[place].name for place in rivals if chances[place] < _SURE]
    return False, f"not clear yet: {', '.join(open_ones)}"


def _chance(gap: Uncertain, margin: float, level: float, rows_factor: float, seeds: tuple[int, int]) -> float:
    """Chance that the sealed rows give a clear answer with so many seeds of full and the arm, from what is seen now.

    The trained models are the same, so what differs on the sealed rows is the rows' part; with further seeds the
    seeds' part as well.
    """
    now = Precision.of(gap)
    then = now.with_seeds(seeds).with_rows(rows_factor)
    same_seeds = all(one.num_seeds == count for one, count in zip(now.seeds, seeds, strict=True))
    scatter = math.sqrt(now.row_variance + then.row_variance + max(0.0, now.seed_variance - then.seed_variance))
    chances = [
        _chance_at(gap.estimate, scatter, then.half_width(level, seen), then.half_width(2 * level, seen), margin)
        for seen in then.luck(same_seeds=same_seeds)
    ]
    return sum(chances) / len(chances)


def _chance_at(estimate: float, scatter: float, half: float, half_one_sided: float, margin: float) -> float:
    """The same with the interval's half width known."""
    if scatter == 0:
        return float(clear(estimate, half, half_one_sided, margin))
    normal = NormalDist(estimate, scatter)
    needed, room = max(margin, half), margin - half_one_sided
    differs = (1 - normal.cdf(needed)) + normal.cdf(-needed)
    equal = normal.cdf(room) - normal.cdf(-room) if room > 0 else 0.0
    return min(1.0, differs + equal)
