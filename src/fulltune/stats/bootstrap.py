"""The bootstrap: metrics on resamples of clusters of rows (docs/concepts/statistics.md)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fulltune.errors import SetupError
from fulltune.files import replace_atomically
from fulltune.recipe.tasks import FACTS, TaskName, greater_is_better
from fulltune.records.scores import Estimate
from fulltune.tasks import FromSums, Predictions, RowTerms, Target, task_named
from fulltune.tasks.classes import NUMBER_METRICS, predict_labels

SAMPLES = 10_000
SAMPLES_ANEW = 1_000
"""Number of resamples for a metric that must be recomputed on each of them."""
_MAX_PRODUCTS = 2e10
"""Maximum number of multiplications; a metric with many counts gets fewer resamples."""
_MIN_SAMPLES = 1_000
_WEIGHTS_AT_ONCE = 3_000_000
_SEED = 0

# ---- metrics as sums over rows ---------------------------------------------------------------------------------

_BOUNDS = {
    **dict.fromkeys(("loss", "perplexity", "rmse", "r2")),
    **dict.fromkeys(("mcc", "spearman", "kendall"), (-1.0, 1.0)),
    **dict.fromkeys(("chrf", "bleu"), (0.0, 100.0)),
}
"""Bounds of metrics that may leave the range 0 to 1, or None if one bound is missing."""


@dataclass(frozen=True)
class ResamplableMetric:
    """A metric with the functions that resampling needs."""

    name: str
    greater_is_better: bool
    whole: Callable[[Predictions], float]
    """Computes the metric from all predictions, as the task does."""
    counts: RowTerms | None
    """Computes each row's terms, or None if the metric is not a function of sums."""
    value: FromSums | None

    def alone(self, outputs: Predictions) -> dict[str, float]:
        return {self.name: self.whole(outputs)}

    @property
    def bounds(self) -> tuple[float, float] | None:
        return bounds_of(self.name)

    @property
    def span(self) -> float | None:
        """Largest possible difference of the metric, or None if it is unbounded."""
        return None if self.bounds is None else self.bounds[1] - self.bounds[0]

    @property
    def sign(self) -> float:
        """1, or -1 if smaller is better, so that a positive signed difference is an improvement."""
        return 1.0 if self.greater_is_better else -1.0


def bounds_of(metric: str) -> tuple[float, float] | None:
    """Return the minimum and maximum of a metric, or None if either is missing."""
    return _BOUNDS.get(metric, (0.0, 1.0))


def measure_of(task_name: TaskName, target: Target, metric: str) -> ResamplableMetric:
    """Return a task's metric in a form that can be resampled; raise `SetupError` if the task has no such metric."""
    facts = FACTS[task_name]
    if metric not in facts.metrics:
        raise SetupError(f"{task_name} has no metric '{metric}'; choose one of {', '.join(facts.metrics)}")
    counts, value = task_named(task_name).sums(target, metric).get(metric, (None, None))
    return ResamplableMetric(
        metric, greater_is_better(metric), _single_metric(task_name, target, metric), counts, value
    )


def _single_metric(task_name: TaskName, target: Target, metric: str) -> Callable[[Predictions], float]:
    """Return a function that computes this metric alone, because others, such as Kendall's tau, are slow."""
    if target.form.is_number and metric in NUMBER_METRICS:
        return lambda outputs: NUMBER_METRICS[metric](
            outputs["labels"].astype(np.float64), predict_labels(outputs["logits"], target).astype(np.float64)
        )
    return lambda outputs: task_named(task_name).metrics(outputs, target)[metric]


# ---- draws ---------------------------------------------------------------------------------------------------


def _draw_cluster_counts(random: np.random.Generator, num_clusters: int, size: int) -> np.ndarray:
    """Draw clusters with replacement, and return how often each was drawn [size, num_clusters]."""
    clusters = random.integers(0, num_clusters, (size, num_clusters), np.int32)
    offsets = np.arange(size, dtype=np.int64)[:, None] * num_clusters
    counts = np.bincount((clusters + offsets).ravel(), minlength=size * num_clusters)
    return counts.reshape(size, num_clusters)


def _number_clusters(clusters: np.ndarray | None, num_rows: int) -> tuple[np.ndarray, int]:
    """Return the cluster number of each row, from 0, and the number of clusters. Without clusters, each row is its
    own."""
    of_row = np.arange(num_rows) if clusters is None else np.unique(clusters, return_inverse=True)[1]
    return of_row, int(of_row.max(initial=-1)) + 1


# ---- one model -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Resampled:
    """A metric on all rows, and on resamples of them."""

    value: float
    draws: np.ndarray
    """The metric on each resample, float64 [samples]. The same seed and clusters give the same resamples."""
    num_rows: int
    num_clusters: int
    num_seen: int = 0
    unseen: Resampled | None = None
    """The metric on rows that do not occur in train, or None if too few remain."""

    def estimate(self, confidence: float, bounds: tuple[float, float] | None = None) -> Estimate:
        """Return the value with its percentile interval at level `confidence`, such as 0.95.

        If all rows score the same, the interval is widened towards the bounds as far as this number of rows allows.
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


def resample(
    outputs: Predictions,
    metrics: Callable[[Predictions], Mapping[str, float]],
    *,
    samples: int,
    clusters: np.ndarray | None = None,
    seed: int = 0,
) -> dict[str, Resampled]:
    """Compute metrics on all rows and on resamples of clusters. Equal seeds draw equal rows for every model."""
    value, num_rows = dict(metrics(outputs)), len(next(iter(outputs.values())))
    if clusters is not None and len(clusters) != num_rows:
        raise ValueError(f"expected a cluster for each of {num_rows} rows, found {len(clusters)}")
    of_row, num_clusters = _number_clusters(clusters, num_rows)
    random, drawn = np.random.default_rng(seed), []
    for _ in range(samples):
        rows = np.repeat(np.arange(num_rows), _draw_cluster_counts(random, num_clusters, 1)[0][of_row])
        drawn.append(metrics({name: array[rows] for name, array in outputs.items()}))
    return {
        name: Resampled(value[name], np.array([values[name] for values in drawn], np.float64), num_rows, num_clusters)
        for name in value
    }


def gain(measure: ResamplableMetric, before: np.ndarray, now: np.ndarray) -> tuple[float, float]:
    """Return how much a metric of sums improved, with the standard error of this paired difference."""
    assert measure.value is not None
    both = np.stack([before, now], axis=1)
    difference = np.diff(measure.value(both.sum(axis=0)))[0]
    draws = np.diff(_resample_sums(both, measure.value, _MIN_SAMPLES), axis=1)
    return float(measure.sign * difference), float(np.std(draws))


# ---- methods of several trials ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class ResampledTrials:
    """The metric of each method's trials, on all rows and on shared resamples."""

    point: tuple[np.ndarray, ...]
    """Values on all rows: [seeds] for each method."""
    draws: tuple[np.ndarray, ...]
    """Values on the resamples: [draws, seeds] for each method."""
    num_clusters: int
    num_rows: int

    @property
    def num_draws(self) -> int:
        return len(self.draws[0])


def draw(
    measure: ResamplableMetric,
    methods: Sequence[Sequence[Predictions]],
    clusters: np.ndarray | None,
    samples: int = SAMPLES,
) -> ResampledTrials:
    """Compute each trial's metric on shared resamples of clusters, with fewer resamples for costly metrics."""
    trials = [outputs for method in methods for outputs in method]
    rows = {len(next(iter(outputs.values()))) for outputs in trials}
    if len(rows) > 1 or (clusters is not None and rows != {len(clusters)}):
        raise ValueError(f"expected trials and clusters of the same rows, found trials of {sorted(rows)} rows")
    num_rows = rows.pop()
    of_row, num_clusters = _number_clusters(clusters, num_rows)
    if measure.counts is not None and measure.value is not None:
        sums = np.stack([_cluster_sums(measure.counts, outputs, of_row) for outputs in trials], axis=1)
        point, drawn = measure.value(sums.sum(axis=0)), _resample_sums(sums, measure.value, samples)
    else:
        samples = min(samples, SAMPLES_ANEW)
        anew = [
            resample(outputs, measure.alone, samples=samples, clusters=clusters)[measure.name] for outputs in trials
        ]
        # A metric that is undefined on a resample counts as 0.
        point, drawn = (
            np.array([model.value for model in anew]),
            np.nan_to_num(np.stack([model.draws for model in anew], axis=1)),
        )
    ends = np.cumsum([len(method) for method in methods])[:-1]
    return ResampledTrials(tuple(np.split(point, ends)), tuple(np.split(drawn, ends, axis=1)), num_clusters, num_rows)


def _cluster_sums(count: RowTerms, outputs: Predictions, of_row: np.ndarray) -> np.ndarray:
    """Sum the terms of the rows of each cluster, float64 [clusters, k]."""
    counts = count(outputs)
    sums = np.zeros((int(of_row.max()) + 1, counts.shape[1]))
    np.add.at(sums, of_row, counts)
    return sums


def _resample_sums(sums: np.ndarray, value: FromSums, samples: int) -> np.ndarray:
    """Compute the metric on resamples [draws, trials] from sums over clusters [clusters, trials, k]."""
    num_clusters, *of_trials = sums.shape
    samples = min(samples, max(_MIN_SAMPLES, int(_MAX_PRODUCTS / sums.size)))
    at_once, parts = max(1, _WEIGHTS_AT_ONCE // num_clusters), []
    for start in range(0, samples, at_once):
        size = min(at_once, samples - start)
        drawn = _draw_cluster_counts(np.random.default_rng((_SEED, start)), num_clusters, size).astype(
            np.float64
        ) @ sums.reshape(num_clusters, -1)
        parts.append(value(drawn.reshape(size, *of_trials)))
    return np.concatenate(parts)
