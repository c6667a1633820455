"""The search for a rate: tables of numbers."""

from __future__ import annotations

import math

import pytest

from fulltune.compare import rates
from fulltune.compare.rates import MetricScale
from fulltune.records.comparison import Search

SHARE = MetricScale(greater_is_better=True, eval_rows=1003, is_share=True)
LOSS = MetricScale(greater_is_better=False, eval_rows=1003, is_share=False)


def test_grid_is_logarithmic_around_the_usual_rate() -> None:
    assert rates.rates_to_try(2e-4, None, None) == (6.3e-05, 0.0002, 0.00063)
    assert rates.rates_to_try(2e-4, (1e-3, 1e-4), None) == (1e-4, 1e-3)
    assert rates.rates_to_try(2e-4, None, 5e-5) == (5e-5,)


@pytest.mark.parametrize(
    ("metrics", "greater", "following"),
    [
        ({1e-4: 0.5, 3e-4: 0.7, 1e-3: 0.6}, True, None),
        ({1e-4: 0.5, 3e-4: 0.6, 1e-3: 0.7}, True, 0.0032),
        ({1e-4: 0.7, 3e-4: 0.6, 1e-3: 0.5}, True, 3.2e-05),
        ({1e-4: 0.7, 3e-4: 0.6, 1e-3: 0.5}, False, 0.0032),
        ({1e-4: 0.7, 3e-4: 0.7, 1e-3: 0.5}, True, None),  # as good as its neighbour
        ({1e-4: 0.5, 3e-4: 0.69, 1e-3: 0.7}, True, None),  # by a standard error, which is 0.014 here
        ({1e-4: 0.3, 3e-4: math.nan, 1e-3: math.nan}, True, 3.2e-05),
        ({1e-4: math.nan, 3e-4: math.nan}, True, 3.2e-05),
    ],
)
def test_beyond_best_at_the_edge_extends_the_grid(
    metrics: dict[float, float], greater: bool, following: float | None
) -> None:
    assert rates.next_rate_beyond_grid(metrics, MetricScale(greater, 1000, True)) == following


def test_best_of_equal_rates_the_lowest_comes_first() -> None:
    assert rates.best_rates({1e-4: 0.5, 3e-4: 0.9, 1e-3: 0.9}, SHARE) == [3e-4, 1e-3]
    assert rates.best_rates({1e-4: 2.0, 3e-4: 2.0, 1e-3: 2.5}, LOSS) == [1e-4, 3e-4]
    assert rates.best_rates({1e-4: math.nan, 3e-4: 0.1}, SHARE) == [3e-4]


@pytest.mark.parametrize(
    ("grid", "usual", "nearest"),
    [
        ((6.3e-05, 0.0002, 0.00063), 2e-4, 2e-4),
        ((6.3e-05, 0.0002, 0.00063), 2.04e-4, 2e-4),  # rates of a grid are rounded
        ((1e-4, 1e-3), 2e-4, 1e-4),
        ((1e-3, 1e-2), 3.16e-3, 1e-3),  # equally near: the lower
    ],
)
def test_usual_rate_is_the_default_or_the_nearest_of_given_ones(
    grid: tuple[float, ...], usual: float, nearest: float
) -> None:
    assert rates.nearest_rate(grid, rates.rounded(usual)) == nearest


FEW = MetricScale(greater_is_better=True, eval_rows=28, is_share=True)
"""A standard error at 86 % is 1.9 rows."""


@pytest.mark.parametrize(
    ("metrics", "scale", "rate"),
    [
        ((24 / 28, 25 / 28, 20 / 28), FEW, 3e-4),
        ((25 / 28, 24 / 28, 20 / 28), FEW, 3e-4),  # one row more is luck, on either side
        ((20 / 28, 24 / 28, 25 / 28), FEW, 3e-4),
        ((28 / 28, 24 / 28, 20 / 28), FEW, 1e-4),
        ((20 / 28, 24 / 28, 27 / 28), FEW, 1e-3),
        ((0.857, 0.857, 0.893), SHARE, 1e-3),  # the same difference on a thousand rows is none
        ((0.9, 0.9, 0.5), SHARE, 3e-4),
        ((0.5, 0.5, 0.5), SHARE, 3e-4),
        ((math.nan, math.nan, math.nan), SHARE, 3e-4),
        ((0.1, math.nan, math.nan), SHARE, 1e-4),
        ((2.0, 2.01, 2.5), LOSS, 3e-4),
        ((1.9, 2.01, 2.5), LOSS, 1e-4),
    ],
)
def test_usual_rate_is_kept_unless_another_is_ahead_by_a_standard_error(
    metrics: tuple[float, float, float], scale: MetricScale, rate: float
) -> None:
    tried = dict(zip((1e-4, 3e-4, 1e-3), metrics, strict=True))
    assert rates.choose_rate(tried, scale, 3e-4) == rate


@pytest.mark.parametrize(("steps", "share"), [(1000, 0.06), (100, 0.1), (20, 0.5), (4, 1.0)])
def test_short_trials_have_ten_steps_at_least(steps: int, share: float) -> None:
    assert rates.share_of_steps(0.06, steps) == pytest.approx(share)


def tried(**metrics: float) -> dict[float, float]:
    """Rates of one search, as in `r2e_4=0.7`."""
    return {float(name[1:].replace("_", "-")): metric for name, metric in metrics.items()}


def finished(short: dict[float, float], scale: MetricScale = SHARE, usual: float = 2e-4) -> Search:
    return rates.search_from_short_trials("full", short, 0.06, scale, usual)


def test_finished_takes_the_best_rate() -> None:
    result = finished(tried(r1e_4=0.91, r3e_4=0.93, r1e_3=0.7), SHARE, 3e-4)
    assert (result.chosen, result.on_edge, result.usual) == (3e-4, False, 3e-4)
    assert result.reason == "the best of 3 short runs of 6% of the steps"
    edge = finished(tried(r1e_4=2.0, r3e_4=2.1, r1e_3=math.nan), LOSS, 3e-4)
    assert (edge.chosen, edge.on_edge) == (1e-4, True)
    assert edge.reason.endswith("of the steps, at the edge of the rates tried")
    near = finished(tried(r1e_4=2.0, r3e_4=2.01, r1e_3=math.nan), LOSS, 1e-4)
    assert (near.chosen, near.on_edge) == (1e-4, False)  # as good as its neighbour: nothing says that it gets better
    default = finished(tried(r1e_4=2.0, r3e_4=2.01, r1e_3=math.nan), LOSS, 3e-4)
    assert (default.chosen, default.on_edge) == (3e-4, False)
    reason = "the default rate, because no other rate was better by more than 1 % in short runs of 6% of the steps"
    assert default.reason == reason


def test_after_divergence_a_lower_rate_is_taken_tried_or_not_unless_it_was_given() -> None:
    result = Search(method="lora", tried=tried(r1e_3=0.9, r1e_2=0.9), chosen=1e-2)
    lower_rates = []
    while (lower := rates.lower_rate_after_divergence(result)) is not None:
        result = rates.with_lower_rate(result, lower, "it diverged")
        lower_rates.append(lower)
    assert lower_rates == [1e-3, 3.2e-4, 1e-4]
    assert result.on_edge
    assert rates.lower_rate_after_divergence(Search(method="lora", chosen=1e-2)) is None


FULL = {"r6e_5": 0.3, "r2e_4": 0.613, "r6e_4": 0.766}
"""Short trials flatter high rates."""


@pytest.mark.parametrize(
    ("short", "second"),
    [
        (FULL, 2e-4),
        ({"r6e_5": 0.03, "r2e_4": 0.194, "r6e_4": 0.185}, 6e-4),  # as good, with few steps
        ({"r6e_5": 0.7, "r2e_4": 0.613, "r6e_4": 0.766}, 2e-4),  # the usual one, though it was the worst
        ({"r6e_5": 0.3, "r2e_4": 0.613, "r6e_4": 0.7, "r1.9e_3": 0.766}, 2e-4),
        ({"r6e_5": 0.3, "r2e_4": math.nan, "r6e_4": math.nan}, None),
        ({"r6e_5": 0.3, "r2e_4": 0.766, "r6e_4": 0.613}, 6e-4),  # it may only have been slower to begin
        ({"r6e_5": 0.3, "r2e_4": 0.3, "r6e_4": math.nan}, 6e-5),  # of equal ones the usual was taken first
        ({"r6e_5": 0.218, "r2e_4": 0.201, "r6e_4": 0.201}, 2e-4),  # of equal ones the nearest
        ({"r2e_4": 0.0, "r6.3e_5": 0.0, "r6.3e_4": 0.0}, 6.3e-5),  # of equally near ones the lower
        ({"r2e_4": 0.3, "r6e_4": math.nan}, None),
    ],
)
def test_next_whole_is_first_the_usual_rate_else_the_second_best(short: dict[str, float], second: float | None) -> None:
    result = finished(tried(**short), SHARE)
    assert rates.next_rate_for_whole_run(result, {result.chosen: 0.9}, SHARE, True, 4) == second
    assert rates.next_rate_for_whole_run(Search(method="full", chosen=1e-3), {1e-3: 0.9}, SHARE, True, 4) is None


def test_next_whole_none_where_one_that_whole_runs_chose_came_apart() -> None:
    result = finished(tried(r6e_5=0.3, r2e_4=0.766, r6e_4=0.613), SHARE)
    climbed = rates.search_after_whole_runs(result, {2e-4: 0.8, 6e-4: 0.9}, SHARE)
    back = rates.with_lower_rate(climbed, 2e-4, "it diverged")
    assert rates.next_rate_for_whole_run(back, {2e-4: 0.8}, SHARE, True, 4) is None  # or it would choose 6e-4 for ever


AT_CHANCE = {"r6e_5": 0.218, "r2e_4": 0.201, "r6e_4": 0.201}
"""The higher rates have not left the share of the most frequent class: 1,000 docstrings after 15 steps."""


@pytest.mark.parametrize(
    ("short", "whole", "following"),
    [
        (AT_CHANCE, {6e-5: 0.32, 2e-4: 0.40}, 6e-4),
        (AT_CHANCE, {6e-5: 0.32, 6e-4: 0.40}, 2e-4),  # the one between them first
        (AT_CHANCE, {6e-5: 0.32, 2e-4: 0.40, 6e-4: 0.45}, 1.9e-3),  # beyond the grid
        (AT_CHANCE, {6e-5: 0.32, 2e-4: 0.40, 6e-4: 0.39}, None),  # the best one has neighbours on both sides
        (AT_CHANCE, {6e-5: 0.32, 2e-4: 0.40, 6e-4: math.nan}, None),
        (AT_CHANCE, {6e-5: 0.32, 2e-4: 0.40, 6e-4: 0.45, 1.9e-3: 0.5}, None),  # enough
        (AT_CHANCE, {6e-5: 0.32, 2e-4: 0.34}, None),  # ahead by less than two standard errors
        (AT_CHANCE, {6e-5: 0.32, 2e-4: math.nan}, None),  # says nothing of what lies below
        ({"r6e_4": 0.0, "r2e_3": 0.0, "r6e_3": 0.0}, {2e-3: 0.0, 6e-4: 0.0}, None),  # none learned anything
        ({"r6e_4": 0.0, "r2e_3": 0.0, "r6e_3": 0.0}, {2e-3: 0.0, 6e-4: 0.4}, 1.9e-4),
        ({"r6e_4": 0.0, "r2e_3": 0.0, "r6e_3": 0.0}, {2e-3: 0.0, 6e-4: 0.4, 1.9e-4: 0.3}, None),
        (FULL, {6e-4: 0.80, 2e-4: 0.90}, 6e-5),  # downward however bad its short trial was
        (FULL, {6e-4: 0.80, 2e-4: 0.90, 6e-5: 0.95}, 1.9e-5),
        (FULL, {6e-4: 0.90, 2e-4: 0.80}, 1.9e-3),
        (FULL | {"r2e_3": 0.76}, {6e-4: 0.90, 2e-4: 0.80}, 2e-3),
    ],
)
def test_next_whole_goes_on_while_it_gets_clearly_better(
    short: dict[str, float], whole: dict[float, float], following: float | None
) -> None:
    result = finished(tried(**short), SHARE)
    assert rates.next_rate_for_whole_run(result, whole, SHARE, may_extend=True, max_runs=4) == following
    inside = following if following in result.tried else None
    assert rates.next_rate_for_whole_run(result, whole, SHARE, may_extend=False, max_runs=4) == inside


@pytest.mark.parametrize(
    ("metrics", "scale", "expected_rate", "on_edge"),
    [
        ((0.919, 0.925), SHARE, 2e-4, False),
        ((0.919, 0.919), SHARE, 2e-4, False),  # equal: the lower one
        ((0.925, 0.919), SHARE, 2e-4, False),  # the usual one, which the other is not ahead of by a standard error
        ((0.925, 0.912), SHARE, 6e-4, False),  # ahead by less than two standard errors
        ((0.925, 0.87), SHARE, 6e-4, True),
        ((2.0, 1.9), LOSS, 2e-4, False),
        ((1.8, 1.9), LOSS, 6e-4, True),
        ((0.95, math.nan), SHARE, 6e-4, False),
    ],
)
def test_after_whole_the_better_run_counts(
    metrics: tuple[float, float], scale: MetricScale, expected_rate: float, on_edge: bool
) -> None:
    search = finished(tried(r6e_5=0.5, r2e_4=0.6, r6e_4=0.7), SHARE)
    result = rates.search_after_whole_runs(search, dict(zip((6e-4, 2e-4), metrics, strict=True)), scale)
    assert (result.chosen, result.on_edge) == (expected_rate, on_edge)
    assert list(result.whole) == [6e-4, 2e-4]
    default = "the default rate, because no other rate was better by more than the error of the eval rows in whole runs"
    assert result.reason == (default if metrics == (0.925, 0.919) else "the best of 2 whole runs")
