"""Methods with planted rows, and looks at them, for the tests of statistics and verdicts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from fulltune.compare.sequential import alpha_spent
from fulltune.compare.verdict import MethodOutputs, Terms, decide_verdict
from fulltune.recipe.methods import MethodKind
from fulltune.records.comparison import Decision, Look
from fulltune.stats.bootstrap import ResamplableMetric, ResampledTrials, find_metric, resample_trials
from fulltune.tasks import Predictions, Target

TARGET = Target("single_label", {}, ("no", "yes"))
ACCURACY: ResamplableMetric = find_metric("text-classification", TARGET, "accuracy")


def predictions(right: np.ndarray) -> Predictions:
    """Predictions that are right in these rows: bool [rows]."""
    return {"labels": np.ones(len(right), np.int64), "logits": np.stack([~right, right], axis=1).astype(float)}


def method(name: str, kind: MethodKind, right: np.ndarray, cost: float = 1.0) -> MethodOutputs:
    """From bool [seeds, rows]."""
    return MethodOutputs(name, kind, [predictions(row) for row in right], cost)


def decided(
    methods: Sequence[MethodOutputs], measure: ResamplableMetric = ACCURACY, margin: float = 0.01, alpha: float = 0.05
) -> Decision:
    """The verdict on a thousand resamples."""
    drawn = resample_trials(measure, [one.trials for one in methods], None, 1000)
    return decide_verdict(methods, drawn, Terms(measure, margin, alpha=alpha))


def drawn_right(
    chance: np.random.Generator, rows: int, accuracies: Sequence[float], spread: float = 0.0, seeds: int = 3
) -> list[np.ndarray]:
    """For each accuracy a method's right rows, [seeds, rows]; half the rows are easy: all methods have them right."""
    easy = chance.random(rows) < 0.5
    results = []
    for accuracy in accuracies:
        hard = 2 * (accuracy + chance.normal(0, spread, (seeds, 1))) - 1
        results.append(easy | (chance.random((seeds, rows)) < hard))
    return results


def normal_drawn(
    chance: np.random.Generator, seeds: int, between: float, shared: float, noise: float
) -> ResampledTrials:
    """Two equal methods: variance between seeds, of rows for the difference, and of rows for each run."""
    count = 4000
    point, drawn = [], []
    for sign in (1, -1):
        run_noise = chance.normal(0, math.sqrt(noise), (count, seeds))
        of_rows = sign * chance.normal(0, math.sqrt(shared) / 2, (count, 1))
        truth = chance.normal(0, math.sqrt(between), seeds)
        observed = truth + chance.normal(0, math.sqrt(noise), seeds) + sign * chance.normal(0, math.sqrt(shared) / 2)
        point.append(observed)
        drawn.append(observed + run_noise + of_rows)
    return ResampledTrials(tuple(point), tuple(drawn), 10_000, 10_000)


def looks_of(count: int, most: int = 0, alpha: float = 0.05, *, ends: bool = False) -> list[Look]:
    """After each seed; none was enough, or only the last."""
    most = most or count
    return [
        Look(
            num_seeds=n,
            spent=alpha_spent(n, most, alpha),
            reason="",
            wanted_seeds={} if ends and n == count else {"full": n + 1},
        )
        for n in range(1, count + 1)
    ]
