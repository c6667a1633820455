"""Bootstrap intervals cover the truth about as often as they say; a scaled model's temperature is found again."""

from __future__ import annotations

import numpy as np
import pytest

from fulltune.stats.bootstrap import bounds_of, resample_metrics
from fulltune.stats.calibration import calibrate, expected_calibration_error, fit_temperature


def mean(outputs: dict[str, np.ndarray]) -> dict[str, float]:
    return {"mean": float(outputs["right"].mean())}


def test_interval_of_a_share_covers_it_about_as_often_as_it_says() -> None:
    draw = np.random.default_rng(0)
    covered = 0
    for number in range(200):
        outputs = {"right": (draw.random(200) < 0.8).astype(float)}
        estimate = resample_metrics(outputs, mean, samples=200, seed=number)["mean"].estimate(0.9)
        covered += estimate.low <= 0.8 <= estimate.high
    assert 0.83 <= covered / 200 <= 0.96


def test_interval_is_about_as_wide_as_the_formula() -> None:
    outputs = {"right": np.repeat([1.0, 0.0], [700, 300])}
    estimate = resample_metrics(outputs, mean, samples=2000)["mean"].estimate(0.95)
    assert estimate.value == 0.7
    assert estimate.high - estimate.low == pytest.approx(2 * 1.96 * np.sqrt(0.7 * 0.3 / 1000), rel=0.1)


@pytest.mark.parametrize(
    ("value", "count", "metric", "expected"),
    [
        (1.0, 31, "accuracy", (0.888, 1)),  # Clopper and Pearson
        (1.0, 300, "accuracy", (0.988, 1)),
        (0.0, 12, "exact_match", (0, 0.265)),
        (0.5, 12, "f1", (0.368, 0.632)),
        (0.0, 12, "chrf", (0, 26.5)),
        (0.5, 12, "loss", (0.5, 0.5)),  # without bounds
        (7.0, 12, "of the user's own", (7, 7)),
    ],
)
def test_interval_of_rows_that_are_all_the_same_reaches_towards_the_bounds(
    value: float, count: int, metric: str, expected: tuple[float, float]
) -> None:
    estimate = resample_metrics({"right": np.full(count, value)}, mean, samples=100)["mean"].estimate(
        0.95, bounds_of(metric)
    )
    assert estimate.value == value
    assert (estimate.low, estimate.high) == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_temperature_of_scaled_logits_is_recovered(temperature: float) -> None:
    draw = np.random.default_rng(1)
    logits = draw.normal(0, 2, (5000, 4))
    chances = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    labels = np.array([draw.choice(4, p=row) for row in chances])
    assert fit_temperature(logits * temperature, labels) == pytest.approx(temperature, rel=0.08)
    calibration = calibrate(logits * temperature, labels, logits * temperature, labels)
    assert calibration.expected_calibration_error_scaled < 0.03
    if temperature != 1.0:
        assert calibration.expected_calibration_error > 2 * calibration.expected_calibration_error_scaled


def test_temperature_is_not_fitted_where_every_eval_row_is_right() -> None:
    logits = np.tile([1.4, 0.12], (31, 1))
    labels = np.zeros(31, int)
    calibration = calibrate(logits, labels, logits, labels)
    assert calibration.temperature == 1.0
    assert calibration.expected_calibration_error == calibration.expected_calibration_error_scaled
    assert calibration.note.startswith("all eval rows are predicted correctly")
    labels[0] = 1
    assert calibrate(logits, labels, logits, labels).note is None


def test_calibration_error_of_sure_and_wrong_is_one() -> None:
    logits = np.tile([50.0, 0.0], (30, 1))
    assert expected_calibration_error(logits, np.ones(30, int)) == pytest.approx(1.0)
    assert expected_calibration_error(logits, np.zeros(30, int)) == pytest.approx(0.0)
