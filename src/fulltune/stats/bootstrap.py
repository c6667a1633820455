"""Resamples of the rows: every trial's metric on the same thousands of draws of row clusters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fulltune.stats.row_scores import Count, Measure, Value
from fulltune.tasks import Predictions

SAMPLES = 10_000
SAMPLES_ANEW = 1_000
"""For a metric that has to be computed anew for each draw."""
_MOST_PRODUCTS = 2e10
"""Multiplications that a bootstrap may take; a metric of many counts (F1 of 150 classes) gets fewer draws."""
_FEWEST = 1_000
_WEIGHTS_AT_ONCE = 3_000_000


@dataclass(frozen=True)
class Drawn:
    """The metric of each arm's trials on all rows and on resamples of them."""

    point: tuple[np.ndarray, ...]
    """For each arm [seeds]."""
    draws: tuple[np.ndarray, ...]
    """For each arm [draws, seeds]; a draw is the same rows for all trials."""
    num_clusters: int
    num_rows: int

    @property
    def num_draws(self) -> int:
        return len(self.draws[0])


def draw(
    measure: Measure,
    arms: Sequence[Sequence[Predictions]],
    clusters: np.ndarray | None,
    samples: int = SAMPLES,
    seed: int = 0,
) -> Drawn:
    """Resample clusters of rows with replacement.

    Args:
        measure: The metric.
        arms: For each arm what its trials kept of the same rows.
        clusters: Number of the cluster that each row belongs to; None: each row is one.
        samples: Number of draws; fewer for metrics that are costly.
        seed: The same one draws the same rows.

    Raises:
        ValueError: When trials have other numbers of rows than there are cluster numbers.
    """
    trials = [kept for arm in arms for kept in arm]
    rows = {len(next(iter(kept.values()))) for kept in trials}
    if len(rows) > 1 or (clusters is not None and rows != {len(clusters)}):
        raise ValueError(f"trials of {sorted(rows)} rows cannot be compared row by row")
    num_rows = rows.pop()
    of_row = np.arange(num_rows) if clusters is None else np.unique(clusters, return_inverse=True)[1]
    if measure.counts is not None and measure.value is not None:
        point, drawn = _by_sums(measure.counts, measure.value, trials, of_row, samples, seed)
    else:
        point, drawn = _anew(measure, trials, of_row, min(samples, SAMPLES_ANEW), seed)
    ends = np.cumsum([len(arm) for arm in arms])[:-1]
    return Drawn(
        point=tuple(np.split(point, ends)),
        draws=tuple(np.split(drawn, ends, axis=1)),
        num_clusters=int(of_row.max()) + 1,
        num_rows=num_rows,
    )


def _by_sums(
    count: Count, value: Value, trials: Sequence[Predictions], of_row: np.ndarray, samples: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    sums = np.stack([_cluster_sums(count(kept), of_row) for kept in trials], axis=1)  # [clusters, trials, k]
    num_clusters, num_trials, width = sums.shape
    affordable = int(_MOST_PRODUCTS / sums.size)
    samples = min(samples, max(_FEWEST, affordable))
    flat = sums.reshape(num_clusters, -1)
    at_once, parts = max(1, _WEIGHTS_AT_ONCE // num_clusters), []
    for start in range(0, samples, at_once):
        size = min(at_once, samples - start)
        drawn = weights(num_clusters, size, (seed, start)) @ flat
        parts.append(value(drawn.reshape(size, num_trials, width)))
    return value(sums.sum(axis=0)), np.concatenate(parts)


def _cluster_sums(counts: np.ndarray, of_row: np.ndarray) -> np.ndarray:
    sums = np.zeros((int(of_row.max()) + 1, counts.shape[1]))
    np.add.at(sums, of_row, counts)
    return sums


def weights(num_clusters: int, size: int, seed: tuple[int, int]) -> np.ndarray:
    """How often each cluster was drawn, float64 [size, clusters]."""
    chosen = np.random.default_rng(seed).integers(0, num_clusters, (size, num_clusters), np.int32)
    offsets = np.arange(size, dtype=np.int64)[:, None] * num_clusters
    counts = np.bincount((chosen + offsets).ravel(), minlength=size * num_clusters)
    return counts.reshape(size, num_clusters).astype(np.float64)


def _anew(
    measure: Measure, trials: Sequence[Predictions], of_row: np.ndarray, samples: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    num_clusters = int(of_row.max()) + 1
    drawn = np.empty((samples, len(trials)))
    for number in range(samples):
        times = weights(num_clusters, 1, (seed, number))[0].astype(np.int64)
        rows = np.repeat(np.arange(len(of_row)), times[of_row])
        for place, kept in enumerate(trials):
            drawn[number, place] = measure.whole({name: array[rows] for name, array in kept.items()})
    return np.array([measure.whole(kept) for kept in trials]), np.nan_to_num(drawn)
