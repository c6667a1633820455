"""Mean and spread of a regression's targets, and targets that have none."""

from __future__ import annotations

import numpy as np
import pytest

from fulltune.data.targets import far_off, scale_of
from fulltune.errors import DataError


@pytest.mark.parametrize(("mean", "spread"), [(0.0, 1.0), (1e8, 1e3), (-1e6, 1e3), (2e-4, 1e-5), (3e30, 1e29)])
def test_scale_is_found_whatever_the_size(mean: float, spread: float) -> None:
    wanted = np.resize([-1.0, 1.0], 1_000)
    assert scale_of(mean + spread * wanted, "rows.csv", "price") == pytest.approx((mean, spread), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        (
            [7.5] * 12,
            "rows.csv: all 12 train rows have the same target 7.5 in column 'price'; .*data.train.*data.label",
        ),
        (
            [1e9 + i % 3 for i in range(12)],
            "rows.csv: all 12 train rows have nearly the same target in column 'price': 1e[+]09, give or take 0.816, "
            "where numbers of 32 bits lie 64 apart; subtract 1e[+]09 from all targets",
        ),
    ],
)
def test_targets_without_a_spread_are_refused(numbers: list[float], said: str) -> None:
    with pytest.raises(DataError, match=said):
        scale_of(np.array(numbers), "rows.csv", "price")


@pytest.mark.parametrize("count", [40, 2_000])
def test_a_target_far_from_all_others_is_said(count: int) -> None:
    numbers = np.array([float(number % 5) for number in range(count)])
    assert far_off(numbers, scale_of(numbers, "rows.csv", "price")) == []
    numbers[7] = 1e38
    said = far_off(numbers, scale_of(numbers, "rows.csv", "price"))
    assert len(said) == 1
    assert said[0].startswith("the train target 1e+38 (row 8 of the prepared train rows) is ")
    assert "e+37 standard deviations (1.4" in said[0]
