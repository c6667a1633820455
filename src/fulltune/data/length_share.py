"""How much the target tells about a row's length: decides whether batches by length would be one-sided."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def explained_by_class(lengths: Sequence[int] | np.ndarray, classes: Sequence[int] | np.ndarray) -> float:
    """Share of the variance of length that lies between classes, corrected for chance (epsilon squared, Kelley
    1935)."""
    values, numbers = np.asarray(lengths, float), np.asarray(classes)
    counts = np.bincount(numbers)
    num_groups = int((counts > 0).sum())
    total = float(((values - values.mean()) ** 2).sum())
    if total == 0 or len(values) <= num_groups:
        return 0.0
    means = np.bincount(numbers, weights=values) / np.maximum(counts, 1)
    within = float(((values - means[numbers]) ** 2).sum())
    return max(0.0, 1 - (within / (len(values) - num_groups)) / (total / (len(values) - 1)))


def explained_by_value(lengths: Sequence[int] | np.ndarray, values: Sequence[float] | np.ndarray) -> float:
    """Squared correlation of length and a numeric target; 0 when one of them is constant."""
    if np.ptp(lengths) == 0 or np.ptp(values) == 0:
        return 0.0
    return float(np.corrcoef(lengths, values)[0, 1]) ** 2
