"""Expected calibration error and temperature scaling (Guo et al. 2017, arXiv 1706.04599)."""

from __future__ import annotations

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax

from fulltune.records.scores import Calibration

BINS = 15


def expected_calibration_error(logits: np.ndarray, labels: np.ndarray) -> float:
    """Return the mean absolute difference between confidence and accuracy over 15 bins with equal numbers of rows."""
    probabilities = softmax(logits, axis=-1)
    confidence = probabilities.max(axis=-1)
    right = probabilities.argmax(axis=-1) == labels
    parts = np.array_split(np.argsort(confidence, kind="stable"), min(BINS, len(labels)))
    return float(sum(len(part) * abs(confidence[part].mean() - right[part].mean()) for part in parts) / len(labels))


ALL_RIGHT = "all eval rows are predicted correctly, so the temperature stays 1"


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float | None:
    """Return the temperature (0.05 to 20) with the lowest cross entropy, or None if every row is predicted
    correctly."""
    if (logits.argmax(axis=-1) == labels).all():
        return None

    def loss(log_temperature: float) -> float:
        scaled = log_softmax(logits / np.exp(log_temperature), axis=-1)
        return float(-scaled[np.arange(len(labels)), labels].mean())

    best = minimize_scalar(loss, bounds=(np.log(0.05), np.log(20.0)), method="bounded")
    return float(np.exp(best.x))


def calibrate(
    eval_logits: np.ndarray, eval_labels: np.ndarray, test_logits: np.ndarray, test_labels: np.ndarray
) -> Calibration:
    """Fit a temperature on eval rows, and measure the calibration error on test rows with and without it.

    Logits are [rows, classes], labels [rows].
    """
    fitted = fit_temperature(eval_logits, eval_labels)
    temperature = fitted or 1.0
    return Calibration(
        note=None if fitted else ALL_RIGHT,
        temperature=temperature,
        expected_calibration_error=expected_calibration_error(test_logits, test_labels),
        expected_calibration_error_scaled=expected_calibration_error(test_logits / temperature, test_labels),
    )
