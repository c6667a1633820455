"""Bootstrap intervals of metrics over rows. Layer 1: numpy only."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from fulltune.records import Estimate


def intervals(
    kept: Mapping[str, np.ndarray],
    metrics: Callable[[Mapping[str, np.ndarray]], Mapping[str, float]],
    *,
    samples: int,
    confidence: float,
    seed: int = 0,
) -> dict[str, Estimate]:
    """Percentile intervals: the rows are drawn anew with replacement and every metric is computed again.

    Args:
        kept: Name to array whose first axis is the row.
        metrics: From such arrays to numbers.
        samples: Number of resamples.
        confidence: Level, for example 0.95.
        seed: The same seed draws the same rows for every model, so that intervals are comparable.

    Returns:
        For each metric its value on all rows and its interval.
    """
    value = dict(metrics(kept))
    count = len(next(iter(kept.values())))
    draw = np.random.default_rng(seed)
    drawn: dict[str, list[float]] = {name: [] for name in value}
    for _ in range(samples):
        chosen = draw.integers(0, count, count)
        resample = metrics({name: array[chosen] for name, array in kept.items()})
        for name in value:
            drawn[name].append(resample[name])
    tail = (1 - confidence) / 2
    return {
        name: Estimate(
            value=value[name],
            low=float(np.nanquantile(drawn[name], tail)),
            high=float(np.nanquantile(drawn[name], 1 - tail)),
        )
        for name in value
    }
