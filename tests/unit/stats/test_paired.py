"""The difference of two models on the same rows: sharper than two intervals, and careful with few rows."""

from __future__ import annotations

import numpy as np
import pytest

from fulltune.stats.bootstrap import Resampled, resample_metrics
from fulltune.stats.intervals import paired_difference


def accuracy(right: np.ndarray) -> Resampled:
    return resample_metrics(
        {"right": right.astype(float)}, lambda rows: {"a": float(rows["right"].mean())}, samples=1000
    )["a"]


def grouped(right: np.ndarray, clusters: np.ndarray, samples: int = 200) -> Resampled:
    outputs = {"right": right.astype(float)}
    return resample_metrics(
        outputs, lambda rows: {"a": float(rows["right"].mean())}, samples=samples, clusters=clusters
    )["a"]


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
    gap = paired_difference(accuracy(first), accuracy(second), 1.0, 0.95)
    assert gap is not None
    assert gap.value == pytest.approx(first.mean() - second.mean())
    assert gap.low <= gap.value <= gap.high
    assert (gap.high < 0 or gap.low > 0) == resolved


def test_difference_of_a_metric_without_bound_keeps_its_sign_and_size() -> None:
    draw = np.random.default_rng(0)
    before = draw.gamma(4.0, 0.5, 300)
    after = before - 0.2 + draw.normal(0, 0.05, 300)
    gap = paired_difference(accuracy(after), accuracy(before), None, 0.95)
    assert gap is not None
    assert gap.low < -0.19
    assert -0.21 < gap.value < -0.19
    assert gap.high < -0.19 + 0.01
    assert gap.high - gap.low < 0.03  # each mean alone is known to 0.2 only


def test_rows_that_are_not_the_same_have_no_difference() -> None:
    some, others = np.ones(30, bool), np.ones(31, bool)
    assert paired_difference(accuracy(some), accuracy(others), 1.0, 0.95) is None
    never = Resampled(float("nan"), np.full(1000, np.nan), 30, 30)
    assert paired_difference(accuracy(some), never, 1.0, 0.95) is None


def test_equal_models_on_rows_that_depend_on_each_other_are_seldom_told_apart() -> None:
    draw = np.random.default_rng(0)
    prompts = np.repeat(np.arange(40), 10)
    wrong = 0
    for _ in range(100):
        one, other = (grouped((draw.random(40) < 0.7)[prompts], prompts) for _ in range(2))
        gap = paired_difference(one, other, 1.0, 0.95)
        assert gap is not None
        wrong += gap.low > 0 or gap.high < 0
    assert wrong <= 10


@pytest.mark.parametrize("span", [1.0, None])
def test_one_row_or_one_cluster_tells_nothing(span: float | None) -> None:
    one, other = np.array([0.9]), np.array([0.8])
    whole = [
        resample_metrics({"x": x}, lambda rows: {"a": float(rows["x"].mean())}, samples=100)["a"] for x in (one, other)
    ]
    assert paired_difference(whole[0], whole[1], span, 0.95) is None
    passage = np.zeros(30, int)
    assert paired_difference(grouped(np.ones(30), passage), grouped(np.zeros(30), passage), span, 0.95) is None


def test_models_whose_rows_were_drawn_differently_have_no_difference() -> None:
    right = np.arange(40) % 2
    by_clusters, by_rows = (grouped(right, numbers) for numbers in (np.arange(40) // 2, np.arange(40)))
    assert paired_difference(by_clusters, by_rows, 1.0, 0.95) is None
