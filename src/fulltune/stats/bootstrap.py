from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fulltune.errors import SetupError
from fulltune.files import replace_atomically
from fulltune.recipe.functions import is_own
from fulltune.recipe.tasks import FACTS, TaskName, greater_is_better
from fulltune.records.scores import Estimate
from fulltune.tasks import FromSums, Predictions, RowTerms, Target, task_named
from fulltune.tasks.classes import ROWS, ratio, stack_arrays

SAMPLES = 10_000
SAMPLES_ANEW = 1_000
"""Number of resamples for metrics that are recomputed from all rows."""
_MAX_PRODUCTS = 2e10
"""Maximum number of multiplications in resampling; a metric with many terms gets fewer resamples."""
_MIN_SAMPLES = 1_000
_WEIGHTS_AT_ONCE = 3_000_000
_SEED = 0

# ---- metrics as sums over rows ---------------------------------------------------------------------------------

_BOUNDS = {
    **dict.fromkeys(("loss", "perplexity", "rmse", "r2")),
    **dict.fromkeys(("mcc", "spearman", "kendall"), (-1.0, 1.0)),
    **dict.fromkeys(("chrf", "bleu"), (0.0, 100.0)),
}
"""Bounds of metrics whose range is not 0 to 1, or None if unbounded."""


@dataclass(frozen=True)
class ResamplableMetric:
    """A metric with the functions that resampling needs."""

    name: str
    greater_is_better: bool
    compute: Callable[[Predictions], float]
    row_terms: RowTerms | None
    """Computes each row's terms, or None if the metric is not a function of sums over rows."""
    from_sums: FromSums | None

    def compute_as_dict(self, outputs: Predictions) -> dict[str, float]:
        return {self.name: self.compute(outputs)}

    @property
    def bounds(self) -> tuple[float, float] | None:
        return bounds_of(self.name)

    @property
    def span(self) -> float | None:
        """Largest possible difference, or None if unbounded."""
        return None if self.bounds is None else self.bounds[1] - self.bounds[0]

    @property
    def sign(self) -> float:
        """1 if larger is better, else -1."""
        return 1.0 if self.greater_is_better else -1.0


def bounds_of(metric: str) -> tuple[float, float] | None:
    return None if is_own(metric) else _BOUNDS.get(metric, (0.0, 1.0))


def find_metric(task_name: TaskName, target: Target, metric: str, more_is_better: bool = True) -> ResamplableMetric:
    """Return a task's metric with functions for resampling, or raise `SetupError` if the task does not have it. An own
    metric is read from the predictions, and `more_is_better` is the recipe's."""
    facts = FACTS[task_name]
    if is_own(metric):
        terms = stack_arrays(metric, ROWS)
        return ResamplableMetric(metric, more_is_better, lambda outputs: float(outputs[metric].mean()), terms, ratio)
    if metric not in facts.metrics:
        raise SetupError(f"{task_name} has no metric '{metric}'; choose one of {', '.join(facts.metrics)}")
    task = task_named(task_name)
    row_terms, from_sums = task.metrics_from_sums(target, metric).get(metric, (None, None))
    return ResamplableMetric(
        metric, greater_is_better(metric), lambda outputs: task.metrics(outputs, target)[metric], row_terms, from_sums
    )


# ---- draws ---------------------------------------------------------------------------------------------------


def _draw_cluster_counts(random: np.random.Generator, num_clusters: int, size: int) -> np.ndarray:
    """Draw `size` resamples of clusters; return how often each occurs [size, num_clusters]."""
    clusters = random.integers(0, num_clusters, (size, num_clusters), np.int32)
    offsets = np.arange(size, dtype=np.int64)[:, None] * num_clusters
    counts = np.bincount((clusters + offsets).ravel(), minlength=size * num_clusters)
    return counts.reshape(size, num_clusters)


def _cluster_indices(clusters: np.ndarray | None, num_rows: int) -> tuple[np.ndarray, int]:
    """Return each row's cluster index and the number of clusters. Without `clusters`, each row is its own cluster."""
    of_row = np.arange(num_rows) if clusters is None else np.unique(clusters, return_inverse=True)[1]
    return of_row, int(of_row.max(initial=-1)) + 1


# ---- one model -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Resampled:
    """A metric's value on all rows and on resamples."""

    value: float
    draws: np.ndarray
    """The metric on each resample, float64 [samples]."""
    num_rows: int
    num_clusters: int
    num_seen: int = 0
    unseen: Resampled | None = None
    """The metric on rows that do not occur in train, or None if too few remain."""
    slices: Mapping[str, Resampled] = field(default_factory=dict)
    """The metric by value of a column."""

    def estimate(self, confidence: float, bounds: tuple[float, float] | None = None) -> Estimate:
        """Return the value with its percentile bootstrap interval at level `confidence`, such as 0.95.

        If all resamples give the same value, the interval is an exact binomial one within the metric's `bounds`.
        """
        tail = (1 - confidence) / 2
        low, high = (float(np.nanquantile(self.draws, share)) for share in (tail, 1 - tail))
        if bounds is not None and bounds[0] <= low == high == self.value <= bounds[1]:
            # Resamples of equal rows do not vary, so use an exact bound (Clopper and Pearson 1934).
            share = tail ** (1 / max(1, self.num_clusters))
            low, high = (bound + share * (self.value - bound) for bound in bounds)
        return Estimate(value=self.value, low=low, high=high, rows=self.num_rows, clusters=self.num_clusters)

    def save(self, path: Path) -> None:
        names = ("value", "draws", "num_rows", "num_clusters")
        fields: dict[str, Any] = {name: getattr(self, name) for name in names}
        with replace_atomically(path) as part, part.open("wb") as file:
            np.savez(file, **fields)

    @classmethod
    def load(cls, path: Path) -> Resampled:
        with np.load(path, allow_pickle=False) as file:
            return cls(float(file["value"]), file["draws"], int(file["num_rows"]), int(file["num_clusters"]))


def resample_metrics(
    outputs: Predictions,
    metrics: Callable[[Predictions], Mapping[str, float]],
    *,
    samples: int,
    clusters: np.ndarray | None = None,
    seed: int = 0,
) -> dict[str, Resampled]:
    """Compute each metric on all rows and on `samples` bootstrap resamples; return the results by metric name. Rows of
    a cluster are drawn together. The same seed and clusters give the same resamples."""
    value, num_rows = dict(metrics(outputs)), len(next(iter(outputs.values())))
    if clusters is not None and len(clusters) != num_rows:
        raise ValueError(f"expected a cluster for each of {num_rows} rows, found {len(clusters)}")
    of_row, num_clusters = _cluster_indices(clusters, num_rows)
    random, drawn = np.random.default_rng(seed), []
    for _ in range(samples):
        rows = np.repeat(np.arange(num_rows), _draw_cluster_counts(random, num_clusters, 1)[0][of_row])
        drawn.append(metrics({name: array[rows] for name, array in outputs.items()}))
    return {
        name: Resampled(value[name], np.array([values[name] for values in drawn], np.float64), num_rows, num_clusters)
        for name in value
    }


def paired_improvement(measure: ResamplableMetric, before: np.ndarray, after: np.ndarray) -> tuple[float, float]:
    """Return how much a metric improved from row terms `before` to `after` (both [rows, k]), and the bootstrap standard
    error."""
    assert measure.from_sums is not None
    both = np.stack([before, after], axis=1)
    difference = np.diff(measure.from_sums(both.sum(axis=0)))[0]
    draws = np.diff(_resample_sums(both, measure.from_sums, _MIN_SAMPLES), axis=1)
    return float(measure.sign * difference), float(np.std(draws))


# ---- methods of several trials ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class ResampledTrials:
    """Metric values of each method's trials, as computed by `resample_trials`."""

    point: tuple[np.ndarray, ...]
    """Values on all rows: one array [seeds] for each method."""
    draws: tuple[np.ndarray, ...]
    """Values on the resamples: one array [draws, seeds] for each method."""
    num_clusters: int
    num_rows: int


def resample_trials(
    measure: ResamplableMetric,
    methods: Sequence[Sequence[Predictions]],
    clusters: np.ndarray | None,
    samples: int = SAMPLES,
) -> ResampledTrials:
    """Compute a metric for each method's trials, on all rows and on resamples that the trials share."""
    trials = [outputs for method in methods for outputs in method]
    rows = {len(next(iter(outputs.values()))) for outputs in trials}
    if len(rows) > 1 or (clusters is not None and rows != {len(clusters)}):
        raise ValueError(f"all trials and the clusters must have the same rows; the trials have {sorted(rows)} rows")
    num_rows = rows.pop()
    of_row, num_clusters = _cluster_indices(clusters, num_rows)
    if measure.row_terms is not None and measure.from_sums is not None:
        sums = np.stack([_cluster_sums(measure.row_terms, outputs, of_row) for outputs in trials], axis=1)
        point, drawn = measure.from_sums(sums.sum(axis=0)), _resample_sums(sums, measure.from_sums, samples)
    else:
        samples = min(samples, SAMPLES_ANEW)
        anew = [
            resample_metrics(outputs, measure.compute_as_dict, samples=samples, clusters=clusters)[measure.name]
            for outputs in trials
        ]
        # A metric that is undefined on a resample counts as 0.
        point = np.array([model.value for model in anew])
        drawn = np.nan_to_num(np.stack([model.draws for model in anew], axis=1))
    ends = np.cumsum([len(method) for method in methods])[:-1]
    return ResampledTrials(tuple(np.split(point, ends)), tuple(np.split(drawn, ends, axis=1)), num_clusters, num_rows)


def _cluster_sums(row_terms: RowTerms, outputs: Predictions, row_clusters: np.ndarray) -> np.ndarray:
    """Sum each cluster's row terms: float64 [clusters, k]."""
    counts = row_terms(outputs)
    sums = np.zeros((int(row_clusters.max()) + 1, counts.shape[1]))
    np.add.at(sums, row_clusters, counts)
    return sums


def _resample_sums(sums: np.ndarray, from_sums: FromSums, samples: int) -> np.ndarray:
    """Compute the metric on bootstrap resamples [draws, trials] from cluster sums [clusters, trials, k]."""
    num_clusters, *of_trials = sums.shape
    samples = min(samples, max(_MIN_SAMPLES, int(_MAX_PRODUCTS / sums.size)))
    at_once, parts = max(1, _WEIGHTS_AT_ONCE // num_clusters), []
    for start in range(0, samples, at_once):
        size = min(at_once, samples - start)
        drawn = _draw_cluster_counts(np.random.default_rng((_SEED, start)), num_clusters, size).astype(
            np.float64
        ) @ sums.reshape(num_clusters, -1)
        parts.append(from_sums(drawn.reshape(size, *of_trials)))
    return np.concatenate(parts)
