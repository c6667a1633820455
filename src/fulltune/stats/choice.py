from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fulltune.stats.bootstrap import ResamplableMetric, paired_improvement

TIE_STANDARD_ERRORS = 2.0


def choose_evaluation(
    measure: ResamplableMetric, terms: Sequence[np.ndarray], losses: Sequence[float]
) -> tuple[int, int]:
    """Return the indices of the evaluation whose weights to keep and of the one with the best metric.

    Of evaluations whose paired difference from the best is within two standard errors, the one with the lowest loss is
    chosen. An earlier evaluation can only be chosen if it was chosen until now, because others are deleted.

    Args:
        terms: Each evaluation's terms of the metric for the same rows: float64 [rows, k].
        losses: Each evaluation's loss on the eval rows.
    """

    def improvement(now: int, before: int) -> tuple[float, bool]:
        better, error = paired_improvement(measure, terms[before], terms[now])
        return better, abs(better) <= TIE_STANDARD_ERRORS * error

    chosen = best = 0
    for now in range(1, len(terms)):
        better, is_tied = improvement(now, best)
        if better > 0:
            best = now
            chosen = chosen if improvement(now, chosen)[1] and losses[chosen] <= losses[now] else now
        elif is_tied and losses[now] < losses[chosen]:
            chosen = now
    return chosen, best
