"""After each seed: which methods need another one, and is the answer clear? By the development rows.

Formulas and sources: docs/statistics.md. Full and the best of the others, the *leader*, go on; the rest waits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np

from fulltune.compare.verdict import ArmItems
from fulltune.records.differences import ArmStep, Look
from fulltune.stats.bootstrap import draw
from fulltune.stats.intervals import Uncertain, difference, seed_spreads
from fulltune.stats.precision import Precision
from fulltune.stats.row_scores import Measure

SAMPLES = 2_000
_LATE = 4.0
"""Power of the spending function: how much is kept for the last look."""
_SURE = 0.95
"""Chance of a clear answer on the sealed rows at which it is stopped."""
_LIKELY = 0.5
"""Chance that full is clearly better than the leader at which, after the last seeds, the others catch up."""
_CLEAR = "clear: the test rows would very likely say the same"
_HOPELESS = 0.2
"""Chance of a clear answer with all seeds below which more seeds are a waste. (Of equal arms it is about a tenth, that
of the development rows and of the test rows both being unlucky.)"""
WAITING_SHARE = 0.25
"""Part of a look's alpha at which methods that have fewer seeds are tested. The rest is kept for a second look, after
they have caught up; full fine-tuning and the leader have the same seeds in both, and so the same test."""


TIME_UP_SHARE = 0.5
"""Part of the unspent alpha at which the sealed rows are tested when the time is up. The rest is kept for the looks and
the verdict after more time: the sealed rows may be opened again and again, and all together keep alpha (Bonferroni)."""


def spent(num_seeds: int, max_seeds: int, alpha: float, *, again: bool = False) -> float:
    """The part of alpha that the look after so many seeds may spend; up to `max_seeds` the parts sum to alpha."""
    if not 1 <= num_seeds <= max_seeds:
        raise ValueError(f"look {num_seeds} of {max_seeds}")
    looks = max(1, max_seeds - 1)  # after one seed nothing is decided
    this = num_seeds - (max_seeds > 1)
    share = (this / looks) ** _LATE - (max(0, this - 1) / looks) ** _LATE
    return alpha * share * (1 - WAITING_SHARE if again else 1)


@dataclass(frozen=True)
class Left:
    """What is left of alpha at the end."""

    now: float
    """At which the sealed rows are tested."""
    later: float
    """For all verdicts after this one, looks included; 0: there can be none."""


def left(looks: Sequence[Look], alpha: float, *, time_was_up: bool = False) -> Left:
    """What of alpha the test on the sealed rows may spend after these looks, and what remains after it."""
    of_seeds: dict[int, float] = {}
    for one in looks:
        of_seeds.setdefault(one.num_seeds, one.spent)  # a second look after the same seeds takes no more than the first
    unspent = alpha - sum(of_seeds.values())
    unspent = unspent if unspent > 1e-9 * alpha else 0.0  # the parts of all looks are alpha, but for rounding
    if looks and looks[-1].enough:
        level = looks[-1].spent
        again = len(looks) > 1 and looks[-2].num_seeds == looks[-1].num_seeds
        if again or not time_was_up:
            return Left(level, unspent)
        now = min(level, TIME_UP_SHARE * (unspent + level))
        return Left(now, unspent + level - now)
    if not unspent:  # the time was up while others caught up after the last seeds
        return Left((1 - WAITING_SHARE) * looks[-1].spent, 0.0)
    now = TIME_UP_SHARE * unspent if time_was_up else unspent
    return Left(now, unspent - now)


@dataclass(frozen=True)
class Chances:
    """Of each clear answer about full fine-tuning and one rival on the sealed rows."""

    full: float
    equal: float
    rival: float

    @property
    def clear(self) -> float:
        return self.full + self.equal + self.rival

    @property
    def full_wins(self) -> bool:
        """The answer is clear, and it is most likely that full is better."""
        return self.clear >= _SURE and self.full >= max(self.equal, self.rival)


@dataclass(frozen=True)
class Outlook:
    """What is expected of one rival."""

    name: str
    score: float
    """On the development rows; higher is better."""
    cost: float
    abreast: bool
    """It has as many seeds as full: the leader, and whoever caught up."""
    now: Chances
    """Were it stopped now."""
    with_all: float
    """Chance of a clear answer with all seeds that were planned."""


def look(
    arms: Sequence[ArmItems],
    measure: Measure,
    *,
    margin: float,
    max_seeds: int,
    again: bool = False,
    alpha: float = 0.05,
    clusters: np.ndarray | None = None,
    test_rows: int | None = None,
    samples: int = SAMPLES,
) -> Look:
    """Decide about each arm after another seed; `again`: a second look with as many seeds of full."""
    (full,) = (place for place, arm in enumerate(arms) if arm.kind == "full")
    counts = [len(arm.trials) for arm in arms]
    now = counts[full]
    drawn = draw(measure, [arm.trials for arm in arms], clusters, samples)
    spreads = seed_spreads(drawn, [arm.kind == "base" for arm in arms])
    rivals = [place for place, arm in enumerate(arms) if arm.decides]
    level, last = spent(now, max_seeds, alpha, again=again), spent(max_seeds, max_seeds, alpha)
    rows_factor = (test_rows or drawn.num_rows) / drawn.num_rows
    outlooks = {}
    for place in rivals:
        gap = difference(drawn, full, place, spreads, measure.sign, measure.span)
        abreast = counts[place] == now
        share = 1.0 if abreast else WAITING_SHARE
        stopped = planned = Chances(0.0, 0.0, 0.0)  # one seed each tells nothing about the spread between seeds
        if now > 1:
            with_all = (max_seeds, max_seeds if abreast else counts[place])
            stopped = _chances(gap, margin, share * (level / len(rivals)), rows_factor, (now, counts[place]))
            planned = _chances(gap, margin, share * (last / len(rivals)), rows_factor, with_all)
        score = measure.sign * float(drawn.point[place].mean())
        outlooks[place] = Outlook(arms[place].name, score, arms[place].cost, abreast, stopped, planned.clear)
    asked, reason = _asked(arms[full].name, list(outlooks.values()), now, max_seeds, again=again)
    steps = []
    for place, arm in enumerate(arms):
        wanted = asked.get(arm.name, counts[place])
        others: Literal["wait", "enough"] = "wait" if asked else "enough"
        decision: Literal["more", "wait", "enough"] = "more" if wanted > counts[place] else others
        chance = outlooks[place].now.clear if place in outlooks and now > 1 else None
        steps.append(ArmStep(arm=arm.name, decision=decision, seeds=wanted, chance=chance))
    return Look(num_seeds=now, max_seeds=max_seeds, spent=level, enough=not asked, reason=reason, arms=tuple(steps))


def _asked(
    full: str, rivals: Sequence[Outlook], now: int, max_seeds: int, *, again: bool
) -> tuple[dict[str, int], str]:
    """How many seeds which methods are to have before the next look, none when it is enough; and why."""
    if now == max_seeds == 1:
        return {}, "all seeds that were planned"
    if now == 1:
        leader = max(rivals, key=lambda one: (one.score, -one.cost)).name
        best = f"of the methods beside {full} the best is {leader}; " if len(rivals) > 1 else ""
        return {full: 2, leader: 2}, f"{best}one seed tells nothing about the spread between seeds"
    abreast = [one for one in rivals if one.abreast]
    if any(one.now.clear >= _SURE and not one.now.full_wins for one in abreast):
        return {}, _CLEAR
    late = [one.name for one in rivals if not one.abreast and not one.now.full_wins]
    beaten = all(one.now.full_wins for one in abreast)
    if beaten and not late:
        return {}, _CLEAR
    if beaten and not again:
        return dict.fromkeys(late, now), f"{full} beats the leader; whether it beats {', '.join(late)} as well is open"
    if now >= max_seeds and not again and late and all(one.now.full >= _LIKELY for one in abreast):
        # Nothing else is left to do, and without it the answer could not be FULL.
        return dict.fromkeys(late, now), f"{full} seems to beat the leader; whether it beats {', '.join(late)} is open"
    if now >= max_seeds:
        return {}, "all seeds that were planned"
    # Two seeds say too little about their spread to give up because of it.
    if now > 2 and not beaten and all(max(one.with_all, one.now.clear) < _HOPELESS for one in abreast):
        return {}, "more seeds would hardly decide"
    open_ones = late if beaten else [one.name for one in abreast if one.now.clear < _SURE]
    more = dict.fromkeys([full, *(one.name for one in abreast), *(late if beaten else [])], now + 1)
    return more, f"not clear yet: {', '.join(open_ones)}"


def _chances(gap: Uncertain, margin: float, level: float, rows_factor: float, seeds: tuple[int, int]) -> Chances:
    """Chances, from what is seen now, that the sealed rows give a clear answer with so many seeds of both."""
    now = Precision.of(gap)
    then = now.with_seeds(seeds).with_rows(rows_factor)
    same_seeds = all(one.num_seeds == count for one, count in zip(now.seeds, seeds, strict=True))
    scatter = math.sqrt(now.row_variance + then.row_variance + max(0.0, now.seed_variance - then.seed_variance))
    found = [
        _chances_at(gap.estimate, scatter, then.half_width(level, seen), then.half_width(2 * level, seen), margin)
        for seen in then.luck(same_seeds=same_seeds)
    ]
    count = len(found)
    return Chances(*(sum(one[place] for one in found) / count for place in range(3)))


def _chances_at(
    estimate: float, scatter: float, half: float, half_one_sided: float, margin: float
) -> tuple[float, float, float]:
    """The same with the interval's half width known: full better, equal, rival better."""
    needed, room = max(margin, half), margin - half_one_sided
    if scatter == 0:
        differs = abs(estimate) >= margin and abs(estimate) > half
        within = not differs and abs(estimate) < room
        return float(differs and estimate > 0), float(within), float(differs and estimate < 0)
    normal = NormalDist(estimate, scatter)
    equal = normal.cdf(room) - normal.cdf(-room) if room > 0 else 0.0
    return 1 - normal.cdf(needed), min(equal, 1.0), normal.cdf(-needed)
