"""The difference of two models that were scored once each on the same rows. Pure functions of numbers."""

from __future__ import annotations

import numpy as np

from fulltune.records.scores import Estimate
from fulltune.stats.bootstrap import Drawn
from fulltune.stats.intervals import NO_SPREAD, difference
from fulltune.stats.metric_intervals import Resampled

_LEAST_CLUSTERS = 2
"""One tells nothing of others: all its resamples are the same."""


def paired(one: Resampled, other: Resampled, span: float | None, confidence: float) -> Estimate | None:
    """The first minus the second, with the interval of their difference; it covers the rows, not another seed.

    Rows that depend on each other were drawn together, so the evidence is as much as there are clusters.

    Args:
        one: A metric of one model.
        other: The same metric of another one, on the same resamples of the same rows.
        span: How much the metric can differ at most; None: without bound.
        confidence: Level of the interval.

    Returns:
        None when they are not of the same rows, of fewer than two clusters, or have no finite value in common.
    """
    sizes = [(model.num_rows, model.num_clusters, model.draws.shape) for model in (one, other)]
    if sizes[0] != sizes[1] or one.num_clusters < _LEAST_CLUSTERS:
        return None
    finite = np.isfinite(one.draws) & np.isfinite(other.draws)
    if not finite.any() or not np.isfinite([one.value, other.value]).all():
        return None
    both = (one, other)
    drawn = Drawn(
        point=tuple(np.array([model.value]) for model in both),
        draws=tuple(model.draws[finite, None] for model in both),
        num_clusters=one.num_clusters,
        num_rows=one.num_rows,
    )
    found = difference(drawn, 0, 1, [NO_SPREAD, NO_SPREAD], 1.0, span)
    low, high = found.interval(1 - confidence)
    return Estimate(value=found.estimate, low=low, high=high)
