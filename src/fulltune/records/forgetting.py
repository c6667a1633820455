"""Records of the drift on generic text, and of how a run stayed within its budget for it."""

from __future__ import annotations

import math

from fulltune.records.base import Record

OF_GENERIC_TEXT = ("drift", "drift_error")
"""Names of the drift and of its standard error among an evaluation's metrics."""
ONE_SIDED = 1.645
"""One-sided 95 % quantile of the normal distribution."""
BUDGET_FILES = "preserve/*.json"


def limit_of(budget: float, is_language_model: bool) -> float:
    """Convert a budget, a share between 0 and 1, to the units in which drift is measured."""
    return -math.log1p(-budget) if is_language_model else budget


class Drift(Record):
    """The mean drift over some generic texts."""

    mean: float
    error: float
    texts: int

    @property
    def upper(self) -> float:
        """Upper bound of the true drift, with 95 % confidence."""
        return self.mean + ONE_SIDED * self.error


class InterpolationPoint(Record):
    """A model with weights between the pretrained and the trained ones."""

    share: float
    """Position between the pretrained (0) and the trained model (1)."""
    drift: Drift
    metric: float

    @property
    def is_start(self) -> bool:
        return self.share == 0


class BudgetResult(Record):
    """How a trial stayed within its budget for forgetting."""

    trial: str
    budget: float
    """Maximum drift to accept, as a share between 0 and 1."""
    limit: float
    is_language_model: bool
    text_source: str
    metric: str
    greater_is_better: bool
    points: tuple[InterpolationPoint, ...]
    choice: InterpolationPoint
    sealed: Drift | None
    """Drift of the kept weights on the sealed texts, or None if the pretrained model was kept."""
    weights_digest: str
    weak_texts_reason: str | None = None
    """Why the texts are a poor measure of the pretrained model's abilities, if they are."""
    opening_times: tuple[str, ...]
    """Times (ISO 8601) at which the sealed texts were read, once for each new training."""

    @property
    def start(self) -> InterpolationPoint:
        return next(point for point in self.points if point.is_start)

    @property
    def end(self) -> InterpolationPoint:
        return next(point for point in self.points if point.share == 1)

    @property
    def passed(self) -> bool:
        """True if the drift's upper bound on the sealed texts is within the limit."""
        return self.sealed is not None and self.sealed.upper <= self.limit

    @property
    def weights_reason(self) -> str | None:
        """Why the kept weights are not the trained weights, or None if they are."""
        if self.choice.share == 1:
            return None
        if not self.is_feasible:
            return "the untouched model: no better point is within the budget for forgetting (preserve.budget)"
        return f"scaled back to {self.choice.share:.0%} of the way, within the budget for forgetting (preserve.budget)"

    @property
    def is_feasible(self) -> bool:
        """True if other weights than the pretrained ones are kept."""
        return not self.choice.is_start

    def gain_of(self, point: InterpolationPoint) -> float:
        """Return how much a point improves the metric over the pretrained model, or 0 if the metric is not finite."""
        better = (point.metric - self.start.metric) * (1 if self.greater_is_better else -1)
        return better if math.isfinite(better) else 0.0
