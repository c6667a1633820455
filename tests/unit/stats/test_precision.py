"""What a comparison can find and what would decide it, against closed forms and SciPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from fulltune.stats.bootstrap import resample_trials
from fulltune.stats.intervals import SeedSpread, difference_of_methods, estimate_seed_spreads
from fulltune.stats.precision import ComparisonPrecision, planned_detectable_difference, rows_and_seeds_needed
from tests.unit.compare.methods import ACCURACY, drawn_right, normal_drawn, predictions


def test_detectable_with_certain_spread_is_the_closed_form() -> None:
    precision = ComparisonPrecision(0.1 / 1000, ())
    # 2.8 sqrt(discordance / rows): 2.8 points.
    assert precision.detectable_difference(0.0, 0.05) == pytest.approx(2.8016 * 0.01, rel=1e-3)
    assert precision.detectable_difference(0.05, 0.05) == pytest.approx(0.05 + 0.8416 * 0.01, rel=1e-3)


def test_half_width_where_only_seeds_matter_is_students() -> None:
    one = SeedSpread(4, 4.0, 0.0, 3)
    expected = stats.t.ppf(0.975, 6) * math.sqrt(2.0)
    assert ComparisonPrecision(0.0, (one, one)).half_width(0.05) == pytest.approx(expected, rel=0.01)
    borrowed = SeedSpread(1, 4.0, 0.0, 3, borrowed=True)
    expected = stats.t.ppf(0.975, 3) * math.sqrt(5.0)
    assert ComparisonPrecision(0.0, (one, borrowed)).half_width(0.05) == pytest.approx(expected, rel=0.01)


def test_precision_says_of_now_what_the_draws_say() -> None:
    drawn = normal_drawn(np.random.default_rng(5), 3, 20.0, 1.0, 1.0)
    gap = difference_of_methods(drawn, 0, 1, estimate_seed_spreads(drawn, [False, False]), 1.0, None)
    low, high = gap.interval(0.05)
    assert ComparisonPrecision.of(gap).half_width(0.05) == pytest.approx((high - low) / 2, rel=0.1)


def test_detectable_gets_smaller_with_rows_and_seeds() -> None:
    sizes = [
        planned_detectable_difference(rows, seeds, 0.005, 0.01, 0.05)
        for rows, seeds in ((500, 3), (2000, 3), (2000, 5))
    ]
    assert sizes == sorted(sizes, reverse=True)
    assert planned_detectable_difference(2000, 3, 0.005, 0.01, 0.05 / 4) > sizes[1]
    assert planned_detectable_difference(10**7, 30, 0.0, 0.01, 0.05) == pytest.approx(0.01, abs=0.0005)


def test_needed_rows_or_seeds_would_decide() -> None:
    chance = np.random.default_rng(0)
    full, method = drawn_right(chance, 400, [0.93, 0.90], spread=0.015)
    drawn = resample_trials(ACCURACY, [[predictions(row) for row in one] for one in (full, method)], None, 2000)
    gap = difference_of_methods(drawn, 0, 1, estimate_seed_spreads(drawn, [False, False]), 1.0, 1.0)
    now = ComparisonPrecision.of(gap)
    assert now.half_width(0.05) > abs(gap.estimate) > 0.02
    rows, seeds = rows_and_seeds_needed(gap, 400, 0.01, 0.05, 0.05)
    assert seeds is not None
    assert seeds > 3
    assert now.with_seeds([seeds] * 2).half_width(0.05) < gap.estimate
    assert now.with_seeds([seeds - 1] * 2).half_width(0.05) >= gap.estimate
    # Where equivalence alone is open, the level at which it is tested counts.
    plain, strict = (rows_and_seeds_needed(gap, 400, 0.07, 0.05, level)[1] for level in (0.05, 0.001))
    assert plain is not None
    assert strict is None or strict > plain
    assert (
        rows_and_seeds_needed(gap, 400, 0.5, 0.05, 0.05)[0] == 420
    )  # it is decided as it is: the next step up, never what there is
    if rows is not None:
        assert now.with_rows(rows / 400).half_width(0.05) < gap.estimate
