"""Test scores of models and baselines: metrics with intervals, answers, confusions."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fulltune.records.base import Record


class Estimate(Record):
    """A metric with its bootstrap interval."""

    value: float
    low: float
    high: float
    rows: int | None = None
    """Rows scored, if known; fewer than all for generated answers."""
    clusters: int | None = None
    """Groups of dependent rows that are resampled; None for `rows`."""

    @property
    def no_interval_reason(self) -> str | None:
        """Why there is no interval; None if there is one."""
        if self.rows == 1:
            return "one row"
        return "one group of rows" if self.clusters == 1 else None


class Calibration(Record):
    """Agreement of probabilities with accuracy."""

    temperature: float
    expected_calibration_error: float
    expected_calibration_error_scaled: float
    """The error with the temperature, which is fitted on eval rows."""
    note: str | None = None
    """Why the temperature is 1, if it was not fitted."""


class Confusion(Record):
    """Test rows by true (row) and predicted label (column)."""

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
    """Paired differences of the main metric from each named row."""
    num_leaks: int = 0
    """Test rows whose content occurs in train."""
    near_leaks: bool = False
    """True if near duplicates count too."""
    metric_without_leaks: Estimate | None = None
    """Main metric without leaks, if enough rows remain."""
    seconds: float = 0.0
    calibration: Calibration | None = None
    confusion: Confusion | None = None
    worst: tuple[Answer, ...] = ()
    """Wrong rows, highest loss first."""
    answers: tuple[Answer, ...] = ()
    """Generated answers, drawn at random."""
    missing_metrics: str | None = None
    """Metrics that could not be computed, and why."""
