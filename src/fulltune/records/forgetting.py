from __future__ import annotations

import math

from fulltune.records.base import Record

OF_GENERIC_TEXT = ("drift", "drift_error")
"""Keys of the drift and its standard error in an evaluation's metrics."""
ONE_SIDED = 1.645
"""One-sided 95 % quantile of the normal distribution."""
BUDGET_FILES = "preserve/*.json"


def limit_of(budget: float, is_language_model: bool) -> float:
    """Convert a budget between 0 and 1 to the unit of drift: nats for language models, otherwise the same number."""
    return -math.log1p(-budget) if is_language_model else budget


class Drift(Record):
    mean: float
    error: float
    texts: int

    @property
    def upper(self) -> float:
        """Upper 95 % confidence bound of the true drift (normal approximation)."""
        return self.mean + ONE_SIDED * self.error


class InterpolationPoint(Record):
    """A model whose weights lie between the pretrained and the trained ones."""

    share: float
    """Position between the pretrained (0) and the trained model (1)."""
    drift: Drift
    metric: float

    @property
    def is_start(self) -> bool:
        return self.share == 0


class BudgetResult(Record):
    """The result of choosing weights within a trial's drift budget."""

    trial: str
    budget: float
    limit: float
    is_language_model: bool
    metric: str
    greater_is_better: bool
    points: tuple[InterpolationPoint, ...]
    choice: InterpolationPoint
    sealed: Drift | None
    """Drift of the chosen weights on held-out texts, or None if the pretrained model was saved."""
    weights_digest: str
    weak_texts_reason: str | None = None
    """Why the texts are unsuitable for measuring the pretrained model's abilities, or None if suitable."""
    opening_times: tuple[str, ...]
    """Times (ISO 8601) at which the held-out texts were read, one per training."""

    @property
    def start(self) -> InterpolationPoint:
        return next(point for point in self.points if point.is_start)

    @property
    def end(self) -> InterpolationPoint:
        return next(point for point in self.points if point.share == 1)

    @property
    def passed(self) -> bool:
        return self.sealed is not None and self.sealed.upper <= self.limit

    @property
    def weights_reason(self) -> str | None:
        """Why the chosen weights differ from the trained weights, or None if they do not."""
        if self.choice.share == 1:
            return None
        if self.choice.is_start:
            return (
                "the pretrained model, because no better weights are within the budget for forgetting (preserve.budget)"
            )
        return f"interpolated to {self.choice.share:.0%} of the way from the pretrained weights, within preserve.budget"

    def metric_gain(self, point: InterpolationPoint) -> float:
        """Return how much better a point's metric is than the pretrained model's, or 0 if the difference is not
        finite."""
        better = (point.metric - self.start.metric) * (1 if self.greater_is_better else -1)
        return better if math.isfinite(better) else 0.0
