"""Records of test scores of models and baselines: metrics with intervals, answers and confusion matrices."""

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
    """Number of scored rows, or None if unknown. Generated answers have fewer than all."""
    clusters: int | None = None
    """Number of groups of dependent rows, which are resampled together. None if each row is its own group."""

    @property
    def no_interval_reason(self) -> str | None:
        """Why there is no interval, or None if there is an interval."""
        if self.rows == 1:
            return "one row"
        return "one group of rows" if self.clusters == 1 else None


class Calibration(Record):
    """How well predicted probabilities agree with accuracy."""

    temperature: float
    expected_calibration_error: float
    expected_calibration_error_scaled: float
    """The error after temperature scaling, with the temperature fitted on eval rows."""
    note: str | None = None
    """Why no temperature was fitted, or None."""


class Confusion(Record):
    """Number of test rows by true label (row) and predicted label (column)."""

    labels: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]


class Answer(Record):
    """A test row with the expected answer and the model's."""

    text: str
    expected: str
    predicted: str
    loss: float | None = None


class Scores(Record):
    """The scores of one model or baseline on the test rows."""

    name: str
    kind: Literal["baseline", "untouched", "trained"]
    rows: int
    metrics: dict[str, Estimate]
    main_metric: str
    greater_is_better: bool
    confidence: float
    differences: dict[str, Estimate] = Field(default_factory=dict)
    """Paired difference of the main metric from each other model or baseline, by its name."""
    num_leaks: int = 0
    near_leaks: bool = False
    metric_without_leaks: Estimate | None = None
    seconds: float = 0.0
    calibration: Calibration | None = None
    confusion: Confusion | None = None
    worst: tuple[Answer, ...] = ()
    answers: tuple[Answer, ...] = ()
    missing_metrics: str | None = None
    """Which metrics could not be computed, and why."""
