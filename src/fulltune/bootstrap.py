"""Metrics on resamples of the rows, and their intervals. Layer 1: numpy only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fulltune.records import Estimate


@dataclass(frozen=True)
class Resampled:
    """A metric on all rows, and on resamples of them."""

    value: float
    draws: np.ndarray
    """float64 [samples]. The same seed and number of rows draw the same rows, whoever is scored on them."""
    num_rows: int

    def estimate(self, confidence: float) -> Estimate:
        """The value with its percentile interval.

        Args:
            confidence: Level, for example 0.95.
        """
        tail = (1 - confidence) / 2
        low, high = (float(np.nanquantile(self.draws, share)) for share in (tail, 1 - tail))
        return Estimate(value=self.value, low=low, high=high, rows=self.num_rows)

    def save(self, path: Path) -> None:
        part = path.with_name(path.name + ".part.npz")
        path.parent.mkdir(parents=True, exist_ok=True)
        fields: dict[str, Any] = vars(self)
        np.savez(part, **fields)
        part.replace(path)

    @classmethod
    def load(cls, path: Path) -> Resampled:
        with np.load(path, allow_pickle=False) as file:
            return cls(float(file["value"]), file["draws"], int(file["num_rows"]))


def resample(
    kept: Mapping[str, np.ndarray],
    metrics: Callable[[Mapping[str, np.ndarray]], Mapping[str, float]],
    *,
    samples: int,
    seed: int = 0,
) -> dict[str, Resampled]:
    """Draw the rows anew with replacement and compute every metric again.

    Args:
        kept: Name to array whose first axis is the row.
        metrics: From such arrays to numbers.
        samples: Number of resamples.
        seed: The same seed draws the same rows for every model, so that their draws can be subtracted.
    """
    value = dict(metrics(kept))
    count = len(next(iter(kept.values())))
    draw = np.random.default_rng(seed)
    drawn: dict[str, list[float]] = {name: [] for name in value}
    for _ in range(samples):
        chosen = draw.integers(0, count, count)
        found = metrics({name: array[chosen] for name, array in kept.items()})
        for name in value:
            drawn[name].append(found[name])
    return {name: Resampled(value[name], np.array(drawn[name], np.float64), count) for name in value}
