"""Test scores of models and baselines: metrics with intervals, answers, confusions."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fulltune.records.base import Record


class Estimate(Record):
    """A metric on the test rows with its bootstrap interval."""

    value: float
    low: float
    high: float
    rows: int | None = None
    """Test rows scored, fewer than all for generated answers; None if unknown or if the metric is not about rows."""
    clusters: int | None = None
    """Groups of dependent rows (same or similar text, prompt or passage) that the interval resamples; None for
    `rows`."""

    @property
    def no_interval_reason(self) -> str | None:
        """Why there is no interval; None if there is one."""
        if self.rows == 1:
            return "one row"
        return "one group of rows" if self.clusters == 1 else None


class Calibration(Record):
    """Agreement of probabilities with accuracy; the temperature is fitted on the eval rows."""

    temperature: float
    expected_calibration_error: float
    expected_calibration_error_scaled: float
    """The error after the logits are divided by the temperature."""
    note: str = ""
    """Why the temperature was not fitted and is 1, if so."""


class Confusion(Record):
    """Counts of test rows by true label (row) and predicted label (column)."""

    labels: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]


class Answer(Record):
    """A test row with a model's answer."""

    text: str
    expected: str
    predicted: str
    loss: float | None = None


class Scores(Record):
    """Scores of one model or baseline on the test rows."""

    name: str
    """`majority class`, `nearest centroid (frozen)`, `before training`, or the trial's name."""
    kind: Literal["baseline", "untouched", "trained"]
    rows: int
    metrics: dict[str, Estimate]
    main_metric: str
    greater_is_better: bool
    confidence: float
    differences: dict[str, Estimate] = Field(default_factory=dict)
    """Main metric of a trained model minus that of each named row, with the interval of the paired difference."""
    num_leaks: int = 0
    """Test rows that share their text, prompt or passage with train rows."""
    near_leaks: bool = False
    """True if near duplicates count as leaks too."""
    metric_without_leaks: Estimate | None = None
    """Main metric without the leaks; None if there are none, or too few rows remain."""
    seconds: float = 0.0
    calibration: Calibration | None = None
    confusion: Confusion | None = None
    worst: tuple[Answer, ...] = ()
    """Wrong rows, highest loss first."""
    answers: tuple[Answer, ...] = ()
    """Generated answers to test rows with different prompts, drawn at random."""
    missing_metrics: str = ""
    """Metrics that could not be computed, and the packages that they need."""
