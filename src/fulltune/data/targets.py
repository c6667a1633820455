"""What follows from the train rows' targets: the units of numbers, and how far a target tells the length of its row."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fulltune.data.split import Split
from fulltune.errors import DataError
from fulltune.inference.store import Rows
from fulltune.tasks import Target


def scale_of(numbers: np.ndarray, where: str, column: str) -> tuple[float, float]:
    """Mean and standard deviation. Raises `DataError` when they are all the same, or as good as the same for numbers of
    32 bits, which models give."""
    mean, spread = float(numbers.mean()), float(numbers.std())
    rows = f"{where}: all {len(numbers):,} train rows have"
    if numbers.min() == numbers.max():
        raise DataError(
            f"{rows} the same target {numbers[0]:g} in column '{column}'; there is nothing to learn: give rows with "
            "other targets (data.train), or name another column (data.label)"
        )
    apart = float(np.spacing(np.float32(abs(mean))))
    if spread < apart:
        raise DataError(
            f"{rows} nearly the same target in column '{column}': {mean:.9g}, give or take {spread:.3g}, where numbers "
            f"of 32 bits lie {apart:.3g} apart; subtract {mean:.3g} from all targets"
        )
    return mean, spread


def explained_by_class(lengths: np.ndarray, classes: np.ndarray) -> float:
    """Share of the variance of length that lies between classes, corrected for chance (epsilon squared, Kelley
    1935)."""
    counts, total = np.bincount(classes), float(len(lengths) * np.var(lengths))
    num_groups = int((counts > 0).sum())
    if total == 0 or len(lengths) <= num_groups:
        return 0.0
    means = np.bincount(classes, weights=lengths) / np.maximum(counts, 1)
    within = float(((lengths - means[classes]) ** 2).sum())
    return max(0.0, 1 - (within / (len(lengths) - num_groups)) / (total / (len(lengths) - 1)))


def explained_by_value(lengths: np.ndarray, values: np.ndarray) -> float:
    """Squared correlation of length and a numeric target; 0 when one of them is constant."""
    if np.ptp(lengths) == 0 or np.ptp(values) == 0:
        return 0.0
    return float(np.corrcoef(lengths, values)[0, 1]) ** 2


def of_target(target: Target, train: Split, folder: Path) -> tuple[tuple[float, float] | None, float]:
    """What follows from the train rows' targets: `scale` and `length_explained` of the summary."""
    whole, chosen = train.source, train.examples
    lengths = whole.lengths[chosen]
    if target.form.is_number:
        values = np.asarray(Rows(folder)["labels"])
        return scale_of(values, whole.where, target.columns["label"]), explained_by_value(lengths, values)
    return None, explained_by_class(lengths, whole.labels[whole.row_of[chosen]]) if target.labels else 0.0
