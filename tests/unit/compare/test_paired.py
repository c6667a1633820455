"""The difference of two models on the same rows: sharper than two intervals, and careful with few rows."""

from __future__ import annotations

import numpy as np
import pytest

from fulltune.bootstrap import Resampled, resample
from fulltune.compare.paired import paired


def accuracy(right: np.ndarray) -> Resampled:
    return resample({"right": right.astype(float)}, lambda rows: {"a": float(rows["right"].mean())}, samples=1000)["a"]


def rows(both: int, first: int, second: int, neither: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Whether each of two models has a row right, from how many rows both, only one or no model has right."""
    counts = (both, first, second, neither)
    return np.repeat([True, True, False, False], counts), np.repeat([True, False, True, False], counts)


@pytest.mark.parametrize(
    ("counts", "resolved"),
    [
        ((120, 7, 33, 40), True),  # 63.5 % against 76.5 % of 200 rows, whose intervals overlap
        ((250, 20, 50, 80), True),  # 67.5 % against 75 % of 400 rows
        ((90, 5, 5, 0), False),
        ((95, 0, 4, 1), False),  # by McNemar's exact test p = 0.125
        ((91, 0, 8, 1), True),
        ((3, 0, 3, 0), False),
        ((20, 0, 0, 0), False),
    ],
)
def test_difference_is_resolved_by_the_rows_that_differ(counts: tuple[int, int, int, int], resolved: bool) -> None:
    first, second = rows(*counts)
    found = paired(accuracy(first), accuracy(second), 1.0, 0.95)
    assert found is not None
    assert found.value == pytest.approx(first.mean() - second.mean())
    assert found.low <= found.value <= found.high
    assert (found.high < 0 or found.low > 0) == resolved


def test_difference_of_a_metric_without_bound_keeps_its_sign_and_size() -> None:
    draw = np.random.default_rng(0)
    before = draw.gamma(4.0, 0.5, 300)
    after = before - 0.2 + draw.normal(0, 0.05, 300)
    found = paired(accuracy(after), accuracy(before), None, 0.95)
    assert found is not None
    assert found.low < -0.19
    assert -0.21 < found.value < -0.19
    assert found.high < -0.19 + 0.01
    assert found.high - found.low < 0.03  # each mean alone is known to 0.2 only


def test_rows_that_are_not_the_same_have_no_difference() -> None:
    some, others = np.ones(30, bool), np.ones(31, bool)
    assert paired(accuracy(some), accuracy(others), 1.0, 0.95) is None
    never = Resampled(float("nan"), np.full(1000, np.nan), 30)
    assert paired(accuracy(some), never, 1.0, 0.95) is None
