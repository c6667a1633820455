"""Statistics of a comparison against SciPy, closed forms and simulations with fixed seeds."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from fulltune.stats import bootstrap, intervals
from fulltune.stats.bootstrap import ResampledTrials, find_metric, resample_trials
from fulltune.stats.intervals import correct_p_values, difference_of_methods, estimate_seed_spreads
from fulltune.tasks import Target
from tests.unit.compare.methods import ACCURACY, drawn_right, normal_drawn, predictions

LOSS = find_metric("multiple-choice", Target("choice", {}), "loss")


def losses(values: np.ndarray) -> dict[str, np.ndarray]:
    return {"loss": values}


# ---- draws -----------------------------------------------------------------------------------------------------


def test_draw_clusters_move_together_and_widen_the_spread() -> None:
    chance = np.random.default_rng(0)
    values = np.repeat(chance.normal(size=100), 5)  # five equal rows a cluster
    alone = resample_trials(LOSS, [[losses(values)]], None, 4000)
    together = resample_trials(LOSS, [[losses(values)]], np.repeat(np.arange(100), 5), 4000)
    assert (alone.num_clusters, together.num_clusters) == (500, 100)
    assert alone.point[0] == pytest.approx(together.point[0])
    ratio = together.draws[0].std() / alone.draws[0].std()
    assert ratio == pytest.approx(math.sqrt(5), rel=0.05)
    assert together.draws[0].std() == pytest.approx(values[::5].std() / 10, rel=0.05)


def test_draw_clusters_may_have_any_numbers_and_any_order() -> None:
    values = np.random.default_rng(0).normal(size=60)
    numbers = np.random.default_rng(1).integers(0, 12, 60)
    order = np.random.default_rng(2).permutation(60)
    one = resample_trials(LOSS, [[losses(values)]], numbers, 100)
    two = resample_trials(LOSS, [[losses(values[order])]], 7 * numbers[order] + 3, 100)
    assert two.draws[0] == pytest.approx(one.draws[0])


def test_draw_same_rows_for_every_trial() -> None:
    values = np.random.default_rng(0).normal(size=300)
    trials = resample_trials(LOSS, [[losses(values)], [losses(values + 1)]], None, 100)
    assert trials.draws[1] - trials.draws[0] == pytest.approx(np.ones((100, 1)))


def test_draw_metric_computed_anew_is_like_that_by_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "SAMPLES_ANEW", 150)
    target = Target("regression", {})
    chance = np.random.default_rng(0)
    labels = chance.normal(size=300)
    trial = {"labels": labels, "logits": (labels + chance.normal(size=300))[:, None]}
    rmse = find_metric("text-classification", target, "rmse")
    anew = find_metric("text-classification", target, "spearman")
    clusters = chance.integers(0, 150, 300)
    assert len(resample_trials(anew, [[trial]], clusters, 5000).draws[0]) == 150
    one = resample_trials(rmse, [[trial]], clusters, 2000)
    two = resample_trials(replace(rmse, row_terms=None), [[trial]], clusters, 5000)
    assert two.point[0] == pytest.approx(one.point[0])
    assert two.draws[0].std() == pytest.approx(one.draws[0].std(), rel=0.2)


def test_draw_trials_of_other_rows_are_refused() -> None:
    with pytest.raises(ValueError, match=r"the trials have \[3, 4\] rows"):
        resample_trials(LOSS, [[losses(np.ones(3))], [losses(np.ones(4))]], None)


# ---- differences -----------------------------------------------------------------------------------------------


def test_difference_of_one_certain_seed_is_the_paired_t_test() -> None:
    chance = np.random.default_rng(0)
    one, two = chance.normal(0.2, 1, 40), chance.normal(0, 1, 40)
    drawn = resample_trials(LOSS, [[losses(one)], [losses(two)]], None, 20_000)
    gap = difference_of_methods(drawn, 0, 1, [intervals.NO_SPREAD] * 2, 1.0, None)
    expected = stats.ttest_rel(one, two)
    interval = expected.confidence_interval(0.95)
    assert gap.estimate == pytest.approx(float((one - two).mean()))
    assert gap.interval(0.05) == pytest.approx((interval.low, interval.high), abs=0.03)
    assert gap.p_value() == pytest.approx(float(expected.pvalue), abs=0.02)
    assert gap.equivalence_p(0.5) == pytest.approx(
        max(
            stats.ttest_1samp(one - two, -0.5, alternative="greater").pvalue,
            stats.ttest_1samp(one - two, 0.5, alternative="less").pvalue,
        ),
        abs=0.02,
    )


def test_difference_where_only_seeds_matter_is_welchs_t_test() -> None:
    chance = np.random.default_rng(3)
    one, two = chance.normal(0.9, 0.01, 5), chance.normal(0.88, 0.004, 5)
    # Rows that are all alike: nothing comes from them.
    trials = [[losses(np.full(50, value)) for value in method] for method in (one, two)]
    drawn = resample_trials(LOSS, trials, None, 10_000)
    gap = difference_of_methods(drawn, 0, 1, estimate_seed_spreads(drawn, [False, False]), 1.0, None)
    expected = stats.ttest_ind(one, two, equal_var=False)
    interval = expected.confidence_interval(0.95)
    assert gap.interval(0.05) == pytest.approx((interval.low, interval.high), rel=0.05)
    assert gap.p_value() == pytest.approx(float(expected.pvalue), rel=0.2)
    assert gap.row_variance == pytest.approx(0, abs=1e-12)


def test_seed_spread_of_equal_models_comes_from_the_rows_alone() -> None:
    chance = np.random.default_rng(0)
    right = drawn_right(chance, 2000, [0.9], seeds=8)[0]
    drawn = resample_trials(ACCURACY, [[predictions(row) for row in right]], None, 3000)
    (spread,) = estimate_seed_spreads(drawn, [False])
    assert spread is not None
    # Half of the rows are certain, the other half right with a chance of 0.8.
    assert spread.by_rows == pytest.approx(0.5 * 0.8 * 0.2 / 2000, rel=0.1)
    assert spread.degrees == 7


def test_seed_spread_of_single_seed_is_borrowed_or_unknown() -> None:
    chance = np.random.default_rng(0)
    one, two = drawn_right(chance, 500, [0.9, 0.9], spread=0.02)
    drawn = resample_trials(ACCURACY, [[predictions(row) for row in one], [predictions(two[0])]], None, 500)
    full, method = estimate_seed_spreads(drawn, [False, False])
    assert full is not None
    assert method is not None
    assert method.borrowed
    assert (method.variance, method.degrees) == (full.variance, 2)
    single = resample_trials(ACCURACY, [[predictions(one[0])], [predictions(two[0])]], None, 500)
    assert estimate_seed_spreads(single, [False, False]) == [None, None]
    assert not difference_of_methods(single, 0, 1, [None, None], 1.0, 1.0).seeds_known
    assert estimate_seed_spreads(single, [False, True]) == [None, intervals.NO_SPREAD]


def test_difference_of_equal_predictions_is_not_certain_on_few_rows() -> None:
    right = np.ones((1, 20), bool)
    drawn = resample_trials(ACCURACY, [[predictions(right[0])], [predictions(right[0])]], None, 1000)
    low, high = difference_of_methods(drawn, 0, 1, [intervals.NO_SPREAD] * 2, 1.0, 1.0).interval(0.05)
    assert low == pytest.approx(-high, abs=1e-6)
    assert 2 / 20 < high < 4 / 20  # the rule of three: 3 / rows


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize(("between", "shared"), [(0, 0), (1, 0), (1, 1), (10, 0), (10, 1)])
def test_interval_of_equal_methods_leaves_out_zero_in_at_most_five_percent(
    seeds: int, between: float, shared: float
) -> None:
    wrong, count = 0, 500
    for number in range(count):
        drawn = normal_drawn(np.random.default_rng([seeds, number]), seeds, between, shared, 1.0)
        thinned = ResampledTrials(drawn.point, tuple(one[:500] for one in drawn.draws), 10_000, 10_000)
        gap = difference_of_methods(thinned, 0, 1, estimate_seed_spreads(thinned, [False, False]), 1.0, None)
        wrong += gap.p_value() < 0.05
    # Three standard errors above 5 %.
    assert wrong / count <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / count)


def test_quantile_and_below_agree() -> None:
    drawn = normal_drawn(np.random.default_rng(0), 3, 1.0, 1.0, 1.0)
    gap = difference_of_methods(drawn, 0, 1, estimate_seed_spreads(drawn, [False, False]), 1.0, None)
    for share in (0.001, 0.025, 0.5, 0.9):
        assert gap.below(gap.quantile(share)) == pytest.approx(share, abs=1e-5)
    low, _ = gap.interval(0.03)
    assert gap.below(low) == pytest.approx(0.015, abs=1e-4)


# ---- several tests ---------------------------------------------------------------------------------------------


def test_holm_by_hand() -> None:
    adjusted = correct_p_values([0.01, 0.04, 0.03, 0.005], 0.06)
    assert [adjusted_p for adjusted_p, _ in adjusted] == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert [level for _, level in adjusted] == pytest.approx([0.02, 0.06, 0.03, 0.015])
    assert [adjusted_p for adjusted_p, _ in correct_p_values([0.9, 0.6], 0.05)] == [1.0, 1.0]
    assert correct_p_values([], 0.05) == []
