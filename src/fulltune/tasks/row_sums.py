"""Metrics as functions of sums over rows: what a row contributes, and what is made of the sums; without torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from fulltune.tasks import Count, Predictions, Value

ROWS = ""
"""In place of an array's name: 1 for each row."""

# ---- what a row contributes ------------------------------------------------------------------------------------


def numbers(*values: np.ndarray) -> np.ndarray:
    """The numbers of each row, side by side."""
    return np.stack([np.asarray(one, np.float64) for one in values], axis=-1)


def arrays(*names: str) -> Count:
    """What `reduce` kept under these names."""
    return lambda kept: numbers(*(kept[name] if name else np.ones(len(kept[names[0]])) for name in names))


def mean_of(score: Callable[[Predictions], np.ndarray]) -> Count:
    """A number of each row, and 1."""

    def count(kept: Predictions) -> np.ndarray:
        values = score(kept)
        return numbers(values, np.ones(len(values)))

    return count


def flat(matches: np.ndarray) -> np.ndarray:
    return matches.reshape(len(matches), -1)


def over_all(sums: Mapping[str, tuple[Count, Value]], kept: Predictions) -> dict[str, float]:
    """The metrics of all rows together."""
    return {name: float(value(count(kept).sum(axis=0))) for name, (count, value) in sums.items()}


# ---- what is made of the sums ----------------------------------------------------------------------------------


def ratio(sums: np.ndarray) -> np.ndarray:
    """First sum by the second; nothing of nothing is 0."""
    return share(sums[..., 0], sums[..., 1])


def share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.zeros(np.broadcast(part, whole).shape), where=whole != 0)


def per_token(sums: np.ndarray) -> np.ndarray:
    return sums[..., 0] / np.maximum(sums[..., 1], 1.0)


def f1(sums: np.ndarray) -> np.ndarray:
    """Of right, found and expected ones."""
    return share(2 * sums[..., 0], sums[..., 1] + sums[..., 2])


def by_three(sums: np.ndarray) -> np.ndarray:
    return sums.reshape(*sums.shape[:-1], -1, 3)


def f1_of_all(sums: np.ndarray) -> np.ndarray:
    return np.asarray(f1(by_three(sums)).mean(axis=-1))


def f1_of_present(sums: np.ndarray) -> np.ndarray:
    """Mean over the classes that were found or expected, as scikit-learn takes it."""
    parts = by_three(sums)
    present = (parts[..., 1] + parts[..., 2] > 0).sum(axis=-1)
    return share(f1(parts).sum(axis=-1), present)


def mcc(sums: np.ndarray) -> np.ndarray:
    """Matthews' coefficient of several classes from their counts alone."""
    parts = by_three(sums)
    right, found, expected = parts[..., 0].sum(axis=-1), parts[..., 1], parts[..., 2]
    rows = found.sum(axis=-1)
    scale = (rows**2 - (found**2).sum(axis=-1)) * (rows**2 - (expected**2).sum(axis=-1))
    return share(right * rows - (found * expected).sum(axis=-1), np.sqrt(scale))


def r2(sums: np.ndarray) -> np.ndarray:
    errors, rows, values, squares = np.moveaxis(sums, -1, 0)
    return np.asarray(1 - share(errors, squares - values**2 / rows))
