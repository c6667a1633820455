"""Models and baselines on the test rows: metrics with their intervals, answers, what was confused."""

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
    """Test rows that it is of: fewer than all where answers were generated for some. None: not written down (records of
    earlier versions), or no metric of rows."""
    clusters: int | None = None
    """Groups of dependent rows (the same text, prompt or passage, or nearly so) that the interval rests on; None: as
    `rows`."""

    @property
    def lone(self) -> str:
        """Why it has no interval: it is of one row, or of rows that all depend on each other; empty: it has one."""
        if self.rows == 1:
            return "one row"
        return "one group of rows" if self.clusters == 1 else ""


class Calibration(Record):
    """How far the probabilities can be believed; the temperature is fitted on the eval rows."""

    temperature: float
    expected_calibration_error: float
    expected_calibration_error_scaled: float
    """After dividing the logits by the temperature."""
    note: str = ""
    """Why the temperature was not fitted and is 1; empty: it was."""


class Confusion(Record):
    """Counts of test rows: true label (row) by predicted label (column)."""

    labels: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]


class Answer(Record):
    """One test row and what a model said to it."""

    text: str
    expected: str
    predicted: str
    loss: float | None = None


class Scores(Record):
    """One model, or one baseline, on the test rows."""

    name: str
    """`majority class`, `nearest centroid (frozen)`, `before training`, or the trial's name."""
    kind: Literal["baseline", "untouched", "trained"]
    rows: int
    metrics: dict[str, Estimate]
    main_metric: str
    greater_is_better: bool
    confidence: float
    differences: dict[str, Estimate] = Field(default_factory=dict)
    """Of a trained model: its main metric minus that of the row with this name, on the same test rows, with the
    interval of the difference itself."""
    num_leaks: int = 0
    """Of the main metric's test rows: those that share their text, prompt or passage with train rows."""
    near_leaks: bool = False
    """Nearly equal ones count as shared."""
    unseen: Estimate | None = None
    """The main metric without them; None: there are none, or hardly any row is left."""
    seconds: float = 0.0
    calibration: Calibration | None = None
    confusion: Confusion | None = None
    worst: tuple[Answer, ...] = ()
    """The rows with the highest loss among the wrong ones, highest first."""
    answers: tuple[Answer, ...] = ()
    """For text generation: test rows, drawn at random among those with different prompts, and what was generated."""
    left_out: str = ""
    """Metrics that could not be computed here, and what they need."""
