"""Metrics on resamples of the rows' clusters, and their intervals. Layer 1: numpy only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fulltune.records.scores import Estimate


@dataclass(frozen=True)
class Resampled:
    """A metric on all rows, and on resamples of them."""

    value: float
    draws: np.ndarray
    """float64 [samples]. The same seed and the same clusters draw the same rows, whoever is scored on them."""
    num_rows: int
    num_clusters: int
    """What was drawn: rows that depend on each other come together."""

    def estimate(self, confidence: float) -> Estimate:
        """The value with its percentile interval.

        Args:
            confidence: Level, for example 0.95.
        """
        tail = (1 - confidence) / 2
        low, high = (float(np.nanquantile(self.draws, share)) for share in (tail, 1 - tail))
        return Estimate(value=self.value, low=low, high=high, rows=self.num_rows, clusters=self.num_clusters)

    def save(self, path: Path) -> None:
        part = path.with_name(path.name + ".part.npz")
        path.parent.mkdir(parents=True, exist_ok=True)
        fields: dict[str, Any] = vars(self)
        np.savez(part, **fields)
        part.replace(path)

    @classmethod
    def load(cls, path: Path) -> Resampled:
        with np.load(path, allow_pickle=False) as file:
            num_rows = int(file["num_rows"])
            # Earlier versions drew rows one by one.
            num_clusters = int(file["num_clusters"]) if "num_clusters" in file else num_rows
            return cls(float(file["value"]), file["draws"], num_rows, num_clusters)


def resample(
    kept: Mapping[str, np.ndarray],
    metrics: Callable[[Mapping[str, np.ndarray]], Mapping[str, float]],
    *,
    samples: int,
    clusters: np.ndarray | None = None,
    seed: int = 0,
) -> dict[str, Resampled]:
    """Draw clusters of rows anew with replacement and compute every metric again.

    Rows of one cluster (the same text, prompt or passage, or nearly so) are right or wrong together: drawn one by one
    they would look like more evidence than they are.

    Args:
        kept: Name to array whose first axis is the row.
        metrics: From such arrays to numbers.
        samples: Number of resamples.
        clusters: Number of the cluster that each row belongs to; None: each row is one.
        seed: The same seed draws the same rows for every model, so that their draws can be subtracted.

    Raises:
        ValueError: When there are more or fewer rows than cluster numbers.
    """
    value = dict(metrics(kept))
    num_rows = len(next(iter(kept.values())))
    if clusters is not None and len(clusters) != num_rows:
        raise ValueError(f"{num_rows} rows with the clusters of {len(clusters)}")
    rows = np.arange(num_rows)
    of_row = rows if clusters is None else np.unique(clusters, return_inverse=True)[1]
    num_clusters = int(of_row.max(initial=-1)) + 1
    draw = np.random.default_rng(seed)
    drawn: dict[str, list[float]] = {name: [] for name in value}
    for _ in range(samples):
        times = np.bincount(draw.integers(0, num_clusters, num_clusters), minlength=num_clusters)
        chosen = np.repeat(rows, times[of_row])
        found = metrics({name: array[chosen] for name, array in kept.items()})
        for name in value:
            drawn[name].append(found[name])
    return {name: Resampled(value[name], np.array(drawn[name], np.float64), num_rows, num_clusters) for name in value}
