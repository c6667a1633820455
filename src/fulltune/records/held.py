"""What a run with a budget for forgetting measured and chose; drift is nats a token for language models, else 1 -
cosine.
"""

from __future__ import annotations

import math

from fulltune.records.base import Record

OF_GENERIC_TEXT = ("drift", "drift_error")
"""Of an evaluation's numbers those that are not about eval rows: how far generic text has moved, and its error."""
ONE_SIDED = 1.645
"""Standard errors above the mean below which the true one lies with 95 %."""
HELD_FILES = "preserve/*.json"
"""Of the run folder: a `HeldRun` for each trial."""


def limit_of(budget: float, writes: bool) -> float:
    """A budget in the units of the drift: nats a token for language models, else 1 - cosine."""
    return -math.log1p(-budget) if writes else budget


class Drift(Record):
    """The drift on some generic texts."""

    drift: float
    """Mean over the texts."""
    error: float
    """Standard error of that mean."""
    texts: int

    @property
    def upper(self) -> float:
        """Above the true drift with 95 %."""
        return self.drift + ONE_SIDED * self.error


class Point(Record):
    """The untouched model moved a part of the way to the trained one."""

    share: float
    """Of the way from the untouched model to the trained one."""
    measured: Drift
    """On the selection texts."""
    metric: float
    """On the eval rows."""

    @property
    def is_start(self) -> bool:
        """The untouched model."""
        return self.share == 0


class HeldRun(Record):
    """How a trial kept its budget."""

    trial: str
    budget: float
    """As a share."""
    limit: float
    """The same in the units of the drift."""
    writes: bool
    """A language model, so that the drift is in nats a token."""
    text: str
    """Where the texts come from."""
    metric: str
    greater_is_better: bool
    points: tuple[Point, ...]
    chosen: Point
    sealed: Drift | None
    """What the sealed texts said, opened once; None: the untouched model was kept, and they stayed sealed."""
    trained: str
    """Tells the trained weights from those of another training in the same folder."""
    says_little: str = ""
    """Why the texts say little about what the untouched model could do; empty: they say enough."""
    opened: tuple[str, ...]
    """When the sealed texts were opened, ISO 8601; more than once where the model was trained anew."""

    @property
    def start(self) -> Point:
        """The untouched model."""
        return next(point for point in self.points if point.is_start)

    @property
    def end(self) -> Point:
        """The trained model."""
        return next(point for point in self.points if point.share == 1)

    @property
    def passed(self) -> bool:
        """The sealed texts say that the budget was kept."""
        return self.sealed is not None and self.sealed.upper <= self.limit

    @property
    def why(self) -> str:
        """Why the kept weights are not the trained ones; empty: they are."""
        if self.chosen.share == 1:
            return ""
        if not self.is_feasible:
            return (
                "the untouched model: no other point is within the budget for forgetting (preserve.budget) and better"
            )
        return f"scaled back to {self.chosen.share:.0%} of the way, within the budget for forgetting (preserve.budget)"

    @property
    def is_feasible(self) -> bool:
        """Whether anything but the untouched model was kept."""
        return not self.chosen.is_start

    def gain_of(self, point: Point) -> float:
        """How much better than the untouched model, in the metric's units; not above 0 where it is not known."""
        better = (point.metric - self.start.metric) * (1 if self.greater_is_better else -1)
        return better if math.isfinite(better) else 0.0
