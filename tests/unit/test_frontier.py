"""How much of a task costs how much of what was: tables of points, and two methods at the same metric."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest

from fulltune.forgetting.budget import at_equal_metric, drift_at, envelope
from fulltune.records.held import Drift, HeldRun, Point
from tests.preserved import preserved_record

Place = tuple[float, float]
"""Drift and metric."""


def run(*places: Place, greater_is_better: bool = True, error: float = 0.0) -> HeldRun:
    """The first place is the untouched model, the last one the trained one."""
    shares = [number / (len(places) - 1) for number in range(len(places))]
    points = tuple(
        Point(share=share, measured=Drift(drift=drift, error=error, texts=100), metric=metric)
        for share, (drift, metric) in zip(shares, places, strict=True)
    )
    metric = "accuracy" if greater_is_better else "loss"
    return preserved_record(points, points[-1], metric=metric, greater_is_better=greater_is_better)


RISING = run((0.0, 0.5), (0.01, 0.7), (0.02, 0.6), (0.04, 0.9))


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (RISING, [(0.0, 0.5), (0.01, 0.7), (0.04, 0.9)]),
        (run((0.0, 0.5), (0.01, 0.5), (0.02, 0.4)), [(0.0, 0.5)]),  # as good at more drift is no better
        (run((0.0, 0.5), (-0.01, 0.6), (0.02, 0.7)), [(-0.01, 0.6), (0.02, 0.7)]),  # generic text got likelier
        (run((0.0, 2.0), (0.1, 1.0), (0.2, 1.5), greater_is_better=False), [(0.0, 2.0), (0.1, 1.0)]),
        (run((0.0, math.nan), (0.1, 0.6)), [(0.1, 0.6)]),
        (run((0.0, 0.5), (math.nan, 0.9), (0.1, 0.6)), [(0.0, 0.5), (0.1, 0.6)]),
    ],
)
def test_envelope_has_what_no_other_point_beats(found: HeldRun, expected: list[Place]) -> None:
    assert [(point.measured.drift, point.metric) for point in envelope(found)] == expected


@pytest.mark.parametrize(
    ("metric", "drift"), [(0.4, 0.0), (0.5, 0.0), (0.6, 0.005), (0.7, 0.01), (0.8, 0.025), (0.9, 0.04)]
)
def test_drift_at_a_metric_lies_between_the_best_points(metric: float, drift: float) -> None:
    assert drift_at(RISING, metric)[0] == pytest.approx(drift)


def straight(farthest: float, best: float = 0.9, error: float = 0.0) -> HeldRun:
    return run((0.0, 0.5), (farthest, best), error=error)


@pytest.mark.parametrize(
    ("first", "second", "metric", "drifts", "error", "less"),
    [
        # One seed each: errors of the texts, as if they were independent; another seed may reverse it.
        ([straight(0.04, error=0.003)], [straight(0.02, error=0.004)], 0.9, (0.04, 0.02), 0.005, None),
        # Where one is ahead in the metric it is asked at the other's best.
        ([straight(0.04, error=0.001)], [straight(0.02, 0.7)], 0.7, (0.02, 0.02), 0.001, None),
        # Several seeds: Student's t of Welch's degrees of freedom; here about 2, so that 4.3 errors count.
        ([straight(0.040), straight(0.044)], [straight(0.02), straight(0.024)], 0.9, (0.042, 0.022), 0.0028, "second"),
        ([straight(0.030), straight(0.034)], [straight(0.02), straight(0.024)], 0.9, (0.032, 0.022), 0.0028, None),
        # All seeds read the same texts, so their error comes on top, however many seeds there are.
        (
            [straight(0.040, error=0.006), straight(0.044, error=0.006)],
            [straight(0.02, error=0.008), straight(0.024, error=0.008)],
            0.9,
            (0.042, 0.022),
            math.hypot(0.0028, 0.01),
            None,
        ),
        # Seeds that are all alike tell nothing of the error: that of the texts is taken.
        ([straight(0.04, error=0.01)] * 2, [straight(0.03)] * 2, 0.9, (0.04, 0.03), 0.01, None),
    ],
)
def test_two_methods_at_the_same_metric(
    first: Sequence[HeldRun],
    second: Sequence[HeldRun],
    metric: float,
    drifts: Place,
    error: float,
    less: str | None,
) -> None:
    found = at_equal_metric(first, second)
    assert found is not None
    assert found.metric == metric
    assert (found.first, found.second) == pytest.approx(drifts)
    assert found.error == pytest.approx(error, rel=0.02)
    assert found.less == less


def test_where_a_run_is_nowhere_better_than_the_untouched_model_there_is_nothing_to_compare() -> None:
    assert at_equal_metric([straight(0.04)], [straight(0.02), run((0.0, 0.5), (0.01, 0.4))]) is None


def test_where_smaller_is_better_the_best_metric_that_both_reach_is_the_larger_one() -> None:
    one = run((0.0, 3.0), (0.1, 2.0), greater_is_better=False)
    other = run((0.0, 3.0), (0.1, 1.0), greater_is_better=False)
    found = at_equal_metric([one], [other])
    assert found is not None
    assert (found.metric, found.first, found.second) == pytest.approx((2.0, 0.1, 0.05))
    assert found.less is None  # one seed of each
