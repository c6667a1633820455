"""The spread of the train rows' numbers: regression is trained in units of it."""

from __future__ import annotations

import numpy as np

from fulltune.errors import DataError

FAR = 30.0
"""Standard deviations."""


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


def far_off(numbers: np.ndarray, scale: tuple[float, float]) -> list[str]:
    """A note about a target that is so far away from all others that these are nearly the same beside it."""
    place = int(np.argmax(np.abs(numbers - scale[0])))
    farthest, others = float(numbers[place]), np.delete(numbers, place)
    # Of the others: in a spread that has it in it none of n numbers is more than the root of n away.
    mean, spread = float(others.mean()), float(others.std())
    if spread == 0 or abs(farthest - mean) < FAR * spread:
        return []
    return [
        f"the train target {farthest:g} (row {place + 1:,} of the prepared train rows) is "
        f"{abs(farthest - mean) / spread:,.3g} standard deviations ({spread:.3g}) from the mean of the others "
        f"({mean:.3g}), which are nearly the same beside it: remove the row if it is a mistake"
    ]
