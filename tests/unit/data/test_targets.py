"""What follows from targets: their spread, and how much they tell about a row's length."""

from __future__ import annotations

import random

import numpy as np
import pytest

from fulltune.data.written import length_explained_by_class, length_explained_by_value, target_mean_and_std
from fulltune.errors import DataError
from fulltune.plan.defaults import should_group_by_length


@pytest.mark.parametrize(("mean", "spread"), [(0.0, 1.0), (1e8, 1e3), (-1e6, 1e3), (2e-4, 1e-5), (3e30, 1e29)])
def test_scale_is_found_whatever_the_size(mean: float, spread: float) -> None:
    wanted = np.resize([-1.0, 1.0], 1_000)
    assert target_mean_and_std(mean + spread * wanted, "rows.csv", "price") == pytest.approx(
        (mean, spread), rel=1e-9, abs=1e-12
    )


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        (
            [7.5] * 12,
            "rows.csv: all 12 train rows have the target 7.5 in column 'price', .*data.train.*data.label",
        ),
        (
            [1e9 + i % 3 for i in range(12)],
            "rows.csv: all 12 train rows have the target 1e[+]09 in column 'price', or targets that 32-bit numbers "
            "cannot distinguish from it; .* subtract 1e[+]09 from all targets",
        ),
    ],
)
def test_targets_without_a_spread_are_refused(numbers: list[float], message: str) -> None:
    with pytest.raises(DataError, match=message):
        target_mean_and_std(np.array(numbers), "rows.csv", "price")


def test_explained_by_class_when_class_sets_the_length_is_one() -> None:
    assert length_explained_by_class(np.array([5, 5, 9, 9]), np.array([0, 0, 1, 1])) == pytest.approx(1.0)


def test_explained_by_class_with_random_classes_is_near_zero() -> None:
    draw = random.Random(0)
    lengths = [draw.randint(5, 60) for _ in range(2000)]
    assert length_explained_by_class(np.array(lengths), np.array([draw.randrange(8) for _ in lengths])) < 0.02


def test_explained_by_class_with_one_class_per_row_or_one_length_is_zero() -> None:
    assert length_explained_by_class(np.array([1, 2, 3]), np.array([0, 1, 2])) == 0.0
    assert length_explained_by_class(np.array([4, 4, 4]), np.array([0, 1, 0])) == 0.0


def test_explained_by_value_follows_the_correlation() -> None:
    assert length_explained_by_value(np.arange(4), np.arange(4) * 2.0) == pytest.approx(1.0)
    assert length_explained_by_value(np.arange(4), np.ones(4)) == 0.0


@pytest.mark.parametrize(("share", "grouped"), [(0.0, True), (0.13, True), (0.25, False), (0.9, False)])
def test_group_by_length_by_share_is_off_where_batches_would_be_one_sided(share: float, grouped: bool) -> None:
    chosen, reason = should_group_by_length(share)
    assert chosen is grouped
    assert ("explains" in reason) == (share > 0)
