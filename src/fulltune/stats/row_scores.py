"""Metrics as sums over rows, which a bootstrap resamples by the thousand; rank correlations and BLEU are no sums."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fulltune.errors import SetupError
from fulltune.recipe.tasks import FACTS, TaskName, greater_is_better
from fulltune.tasks import Count, Predictions, Target, Value, task_named
from fulltune.tasks.classes import NUMBER_METRICS, predict_labels

_BOUNDS = {
    **dict.fromkeys(("loss", "perplexity", "rmse", "r2")),
    **dict.fromkeys(("mcc", "spearman", "kendall"), (-1.0, 1.0)),
    **dict.fromkeys(("chrf", "bleu"), (0.0, 100.0)),
}
"""Of metrics that may leave 0 to 1."""


@dataclass(frozen=True)
class Measure:
    """A metric, ready to be resampled."""

    name: str
    greater_is_better: bool
    whole: Callable[[Predictions], float]
    """The metric by the task itself."""
    counts: Count | None
    """None: the metric is no function of sums, and has to be computed anew for each resample."""
    value: Value | None

    @property
    def bounds(self) -> tuple[float, float] | None:
        """Least and most; None: without a bound on one side."""
        return bounds_of(self.name)

    @property
    def span(self) -> float | None:
        """How much the metric can differ at most; None: without bound."""
        return None if self.bounds is None else self.bounds[1] - self.bounds[0]

    @property
    def sign(self) -> float:
        """Turns a difference so that positive is better."""
        return 1.0 if self.greater_is_better else -1.0


def bounds_of(metric: str) -> tuple[float, float] | None:
    """The least and the most that a metric can be; None: without a bound on one side."""
    return _BOUNDS.get(metric, (0.0, 1.0))


def measure_of(task_name: TaskName, target: Target, metric: str) -> Measure:
    """How a metric of a task is resampled; `SetupError` when the task has no such metric."""
    facts = FACTS[task_name]
    if metric not in facts.metrics:
        raise SetupError(f"{task_name} has no metric '{metric}'; choose one of {', '.join(facts.metrics)}")
    counts, value = task_named(task_name).sums(target, metric).get(metric, (None, None))
    return Measure(metric, greater_is_better(metric), _alone(task_name, target, metric), counts, value)


def _alone(task_name: TaskName, target: Target, metric: str) -> Callable[[Predictions], float]:
    """The metric by the task; of numbers without the others, since Kendall's takes long."""
    if target.form.is_number and metric in NUMBER_METRICS:
        return lambda kept: NUMBER_METRICS[metric](
            kept["labels"].astype(np.float64), predict_labels(kept["logits"], target).astype(np.float64)
        )
    return lambda kept: task_named(task_name).metrics(kept, target)[metric]
