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
    clusters: int | None = None
    """Number of groups of dependent rows that are resampled together, or None if all rows are independent."""

    @property
    def no_interval_reason(self) -> str | None:
        """Why the metric has no interval, or None if it has one."""
        if self.rows == 1:
            return "one row"
        return "one group of rows" if self.clusters == 1 else None


class Calibration(Record):
    """How well predicted probabilities agree with accuracy."""

    temperature: float
    expected_calibration_error: float
    expected_calibration_error_scaled: float
    """Calibration error after temperature scaling, with the temperature fitted on eval rows."""
    note: str | None = None
    """Why no temperature was fitted, or None if one was."""


class Threshold(Record):
    """Calibrated probability from which on a class is predicted, fitted on eval rows with `positives` of the class."""

    label: str
    value: Estimate
    positives: int
    f1_without: Estimate
    """F1 on the test rows if the most probable class is predicted instead."""


class Confusion(Record):
    """Number of test rows by true label (row) and predicted label (column)."""

    labels: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]


class Answer(Record):
    """A test row with the expected and the predicted answer."""

    text: str
    expected: str
    predicted: str
    loss: float | None = None


class Slice(Record):
    """Metrics on the test rows with the same value of a column."""

    value: str
    metrics: dict[str, Estimate]


class Scores(Record):
    name: str
    kind: Literal["baseline", "untouched", "trained"]
    rows: int
    metrics: dict[str, Estimate]
    main_metric: str
    greater_is_better: bool
    confidence: float
    differences: dict[str, Estimate] = Field(default_factory=dict)
    """Paired differences in the main metric to each other model or baseline, by name."""
    num_leaks: int = 0
    near_leaks: bool = False
    metric_without_leaks: Estimate | None = None
    seconds: float = 0.0
    calibration: Calibration | None = None
    threshold: Threshold | None = None
    confusion: Confusion | None = None
    worst: tuple[Answer, ...] = ()
    answers: tuple[Answer, ...] = ()
    slice_by: str | None = None
    slices: tuple[Slice, ...] = ()
    """The metrics by value of the column `slice_by`, worst first by the main metric."""
    missing_metrics: str | None = None
    """Which metrics could not be computed, and why."""
