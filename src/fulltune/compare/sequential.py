from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from fulltune.compare.verdict import MethodOutputs, Terms
from fulltune.records.comparison import Look
from fulltune.stats.bootstrap import ResampledTrials
from fulltune.stats.intervals import UncertainValue, difference_of_methods, estimate_seed_spreads
from fulltune.stats.precision import ComparisonPrecision

SAMPLES = 2_000
_LATE = 4.0
_SURE = 0.95
"""If a clear answer is at least this probable, no more seeds run."""
_LIKELY = 0.5
"""If full wins with at least this probability, other methods get their missing seeds at the end."""
_CLEAR = "the answer is clear and would very likely be the same on the test rows"
_HOPELESS = 0.2
"""If a clear answer is less probable than this, no more seeds run."""
WAITING_SHARE = 0.25
"""Share of each interim look's alpha that methods with fewer seeds may spend."""


TIME_UP_SHARE = 0.5
"""Share of the unspent alpha that a verdict may spend when time is up (Bonferroni)."""


def alpha_spent(num_seeds: int, max_seeds: int, alpha: float, *, again: bool = False) -> float:
    """Return the part of `alpha`, the accepted error probability, that the decision after `num_seeds` seeds may spend.
    `again` marks a second decision after the same seeds, which may spend less."""
    looks = max(1, max_seeds - 1)  # after one seed nothing is decided
    this = num_seeds - (max_seeds > 1)
    share = (this / looks) ** _LATE - (max(0, this - 1) / looks) ** _LATE
    return alpha * share * (1 - WAITING_SHARE if again else 1)


def alpha_left(looks: Sequence[Look], alpha: float, *, time_was_up: bool = False) -> tuple[float, float]:
    """Return how much of `alpha` the next verdict may spend after these looks, and how much is left for later ones."""
    of_seeds: dict[int, float] = {}
    for earlier in looks:
        of_seeds.setdefault(earlier.num_seeds, earlier.spent)  # a second look after the same seeds spends no more
    unspent = alpha - sum(of_seeds.values())
    unspent = unspent if unspent > 1e-9 * alpha else 0.0  # the parts of all looks sum to alpha, except for rounding
    if looks and not looks[-1].wanted_seeds:
        level = looks[-1].spent
        again = len(looks) > 1 and looks[-2].num_seeds == looks[-1].num_seeds
        if again or not time_was_up:
            return level, unspent
        now = min(level, TIME_UP_SHARE * (unspent + level))
        return now, unspent + level - now
    if not unspent:  # the time was up while others caught up after the last seeds
        return (1 - WAITING_SHARE) * looks[-1].spent, 0.0
    now = TIME_UP_SHARE * unspent if time_was_up else unspent
    return now, unspent - now


@dataclass(frozen=True)
class Outlook:
    """The predicted result of comparing a rival with full fine-tuning on the test rows."""

    name: str
    score: float
    cost: float
    as_many: bool
    chances: tuple[float, float, float]
    """Probabilities of three verdicts without further seeds: full is better, both are equal, the rival is better."""
    with_all: float

    @property
    def clear(self) -> float:
        return sum(self.chances)

    @property
    def full_wins(self) -> bool:
        """True if the answer is clear and most likely in favour of full."""
        return self.clear >= _SURE and self.chances[0] == max(self.chances)


def plan_next_seeds(
    methods: Sequence[MethodOutputs],
    drawn: ResampledTrials,
    terms: Terms,
    max_seeds: int,
    test_rows: int,
    *,
    again: bool = False,
) -> Look:
    """Judge rivals on resampled eval rows and return each method's seeds. `again`: with the same seeds."""
    (full,) = (index for index, method in enumerate(methods) if method.kind == "full")
    counts, measure = [len(method.trials) for method in methods], terms.measure
    now, spreads = counts[full], estimate_seed_spreads(drawn, [method.kind == "base" for method in methods])
    rivals = [index for index, method in enumerate(methods) if method.decides]
    level, last = alpha_spent(now, max_seeds, terms.alpha, again=again), alpha_spent(max_seeds, max_seeds, terms.alpha)
    outlooks = []
    for index in rivals:
        gap = difference_of_methods(drawn, full, index, spreads, measure.sign, measure.span)
        as_many = counts[index] == now
        share = (1.0 if as_many else WAITING_SHARE) / len(rivals)
        stopped = planned = (0.0, 0.0, 0.0)  # one seed each gives no spread between seeds
        if now > 1:
            then = ComparisonPrecision.of(gap).with_rows(test_rows / drawn.num_rows)
            with_all = (max_seeds, max_seeds if as_many else counts[index])
            stopped = _answer_probabilities(gap, terms.margin, share * level, then, (now, counts[index]))
            planned = _answer_probabilities(gap, terms.margin, share * last, then, with_all)
        score = measure.sign * float(drawn.point[index].mean())
        outlooks.append(Outlook(methods[index].name, score, methods[index].cost, as_many, stopped, sum(planned)))
    wanted, reason = _choose_next_seeds(methods[full].name, outlooks, now, max_seeds, again=again)
    return Look(
        num_seeds=now,
        spent=level,
        reason=reason,
        wanted_seeds=wanted,
        waiting=tuple(
            method.name for method, count in zip(methods, counts, strict=True) if wanted.get(method.name, count) < now
        ),
    )


def _choose_next_seeds(
    full: str, rivals: Sequence[Outlook], num_seeds: int, max_seeds: int, *, again: bool
) -> tuple[dict[str, int], str]:
    """Return the number of seeds that each method needs (empty if no more are needed) and the reason."""
    if num_seeds == max_seeds == 1:
        return {}, "all planned seeds are finished"
    if num_seeds == 1:
        leader = max(rivals, key=lambda rival: (rival.score, -rival.cost)).name
        best = f"the best method other than {full} is {leader}; " if len(rivals) > 1 else ""
        return {full: 2, leader: 2}, f"{best}one seed does not show the spread between seeds"
    leading = [one for one in rivals if one.as_many]
    if any(one.clear >= _SURE and not one.full_wins for one in leading):
        return {}, _CLEAR
    late = [one.name for one in rivals if not one.as_many and not one.full_wins]
    beaten = all(one.full_wins for one in leading)
    if beaten and not late:
        return {}, _CLEAR
    rest = f"train as many seeds of {', '.join(late)}"
    if beaten and not again:
        return dict.fromkeys(late, num_seeds), f"{full} beats the best other method; {rest}"
    if num_seeds >= max_seeds and not again and late and all(one.chances[0] >= _LIKELY for one in leading):
        # Nothing else is left to do, and without this the answer could not be FULL.
        return dict.fromkeys(late, num_seeds), f"{full} seems to beat the best other method; {rest}"
    if num_seeds >= max_seeds:
        return {}, "all planned seeds are finished"
    # Two seeds say too little about their spread to give up because of it.
    if num_seeds > 2 and not beaten and all(max(one.with_all, one.clear) < _HOPELESS for one in leading):
        return {}, "more seeds are unlikely to decide"
    open_ones = late if beaten else [one.name for one in leading if one.clear < _SURE]
    more = dict.fromkeys([full, *(one.name for one in leading), *(late if beaten else [])], num_seeds + 1)
    return more, f"no clear answer yet for {', '.join(open_ones)}"


def _answer_probabilities(
    difference: UncertainValue, margin: float, level: float, test_precision: ComparisonPrecision, seeds: tuple[int, int]
) -> tuple[float, float, float]:
    """Estimate (by normal approximation) the probabilities of three answers on the test rows: full clearly better, both
    equal, rival clearly better. `seeds` are how many seeds full and rival will have."""
    now, test_precision = ComparisonPrecision.of(difference), test_precision.with_seeds(seeds)
    same_seeds = all(one.num_seeds == count for one, count in zip(now.seeds, seeds, strict=True))
    scatter = math.sqrt(
        now.row_variance + test_precision.row_variance + max(0.0, now.seed_variance - test_precision.seed_variance)
    )
    normal, chances = NormalDist(difference.estimate, max(scatter, 1e-12)), []
    for luck in test_precision.variance_ratios(same_seeds=same_seeds):
        needed = max(margin, test_precision.half_width(level, luck))
        room = margin - test_precision.half_width(2 * level, luck)  # equivalence is tested on one side
        equivalent = normal.cdf(room) - normal.cdf(-room) if room > 0 else 0.0
        chances.append((1 - normal.cdf(needed), min(equivalent, 1.0), normal.cdf(-needed)))
    full, equal, rival = (float(np.mean(each)) for each in zip(*chances, strict=True))
    return full, equal, rival
