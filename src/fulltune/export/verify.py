"""Compare an exported model's answers with its source's on test rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from fulltune.export.source import Source
from fulltune.inference.run import batches, extract_logits, model_batch, positions_by_length
from fulltune.models.base import with_decoded_images
from fulltune.records.export import ExportCheck, MetricPair
from fulltune.stats.bootstrap import find_metric
from fulltune.stats.intervals import paired_difference
from fulltune.tasks import Predictions, Tensor

_MAX_ROWS, _MAX_TEXTS = 1000, 64
"""Maximum number of test rows, for classifiers and for language models."""
_TOKENS_AT_ONCE = 256
_MAX_DIFFERENCE = 1e-4
"""Largest accepted difference of two logits, relative to the largest logit if that is above 1."""
_TOLERATED = 0.02
"""Accepted loss of the main metric after quantization: 2 points, or 2 % of a loss."""


class Exported(Protocol):
    """An exported model on its own runtime."""

    max_kl: float | None
    """Largest accepted mean KL divergence per token in nats, or None if logits are compared."""

    def __call__(self, **batch: Tensor) -> Any:
        """Return an object with the same outputs as the model in transformers."""


@dataclass(frozen=True)
class ComparedAnswers:
    rows: int = 0
    checks: Sequence[ExportCheck] = ()
    metrics: dict[str, MetricPair] = field(default_factory=dict)


@dataclass
class _Differences:
    """Differences between two models' logits, updated batch by batch."""

    largest: float = 0.0
    """Largest difference of two logits, divided by the batch's largest logit if that is above 1."""
    divergences: list[np.ndarray] = field(default_factory=list)
    """KL divergence of each row or token in nats, from the source to the export."""
    same: list[np.ndarray] = field(default_factory=list)
    """Whether the highest logit is the same, for each row or token."""

    def update(self, expected: Tensor, actual: Tensor) -> None:
        """Compare logits [items, classes]."""
        scale = max(1.0, expected.abs().max().item())
        difference = (actual - expected).abs().max().item() / scale
        self.largest = max(self.largest, math.inf if math.isnan(difference) else difference)
        for p, q in zip(expected.split(_TOKENS_AT_ONCE), actual.split(_TOKENS_AT_ONCE), strict=True):
            log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
            self.divergences.append((log_p.exp() * (log_p - log_q)).sum(-1).numpy())
        self.same.append((expected.argmax(-1) == actual.argmax(-1)).numpy())


def compare_answers(source: Source, exported: Exported) -> ComparedAnswers:
    """Run both models over the first test rows, and compare their logits and metrics."""
    rows = with_decoded_images(source.scoring.rows("test"), source.processor)
    count = min(len(rows), _MAX_TEXTS if source.scoring.task.FACTS.writes else _MAX_ROWS)
    differences, both = _run_both(source, exported, rows, count)
    metrics = _pair_metrics(source, both, count)
    checks = [_check_metric(source, metrics)] if source.request.is_lossy else []
    if exported.max_kl is not None:
        mean = float(np.concatenate(differences.divergences).mean())
        checks.append(_at_most("mean KL divergence per token, in nats", mean, exported.max_kl))
    elif not source.request.is_lossy:
        checks.append(_at_most("largest relative difference of logits", differences.largest, _MAX_DIFFERENCE))
    same = f"{np.concatenate(differences.same).mean():.2%}"
    return ComparedAnswers(count, [*checks, ExportCheck(name="same highest logit", result=same, expected="-")], metrics)


def _at_most(name: str, value: float, limit: float) -> ExportCheck:
    expected = "-" if limit == math.inf else f"at most {limit:.0e}"
    return ExportCheck(name=name, result=f"{value:.1e}", expected=expected, passed=value <= limit)


def _run_both(
    source: Source, exported: Exported, rows: Sequence[Mapping[str, Any]], count: int
) -> tuple[_Differences, list[Predictions]]:
    """Return the differences of both models' logits, and their predictions in the rows' order."""
    import torch

    task, target = source.scoring.task, source.scoring.target
    differences = _Differences()
    parts: tuple[list[Predictions], list[Predictions]] = ([], [])
    order = [position for position in positions_by_length(rows) if position < count]
    for positions in batches(order, 1 if task.FACTS.writes else 32):
        batch = model_batch(source.model, task, [rows[i] for i in positions], source.processor.pad_token_id)
        labels, attended = batch.pop("labels"), batch.get("attention_mask")
        with torch.no_grad():
            logits = [extract_logits(model(**batch)).float() for model in (source.model, exported)]
        for part, values in zip(parts, logits, strict=True):
            part.append({name: np.asarray(one) for name, one in task.reduce_logits(values, labels, target).items()})
        # Logits of padding mean nothing.
        if attended is not None and logits[0].shape[:2] == attended.shape:
            logits = [one[attended.bool()] for one in logits]
        differences.update(*(one.flatten(0, -2) for one in logits))
    place = np.argsort(order)
    return differences, [
        {name: np.concatenate([one[name] for one in part])[place] for name in part[0]} for part in parts
    ]


def _pair_metrics(source: Source, both: Sequence[Predictions], count: int) -> dict[str, MetricPair]:
    """Return each metric of both models on the first `count` test rows, with the interval of the difference."""
    scoring = source.scoring
    before, after = (scoring.estimate_metrics(predictions, range(count)) for predictions in both)
    pairs = {}
    for name, value in before.items():
        span = find_metric(scoring.recipe.task, scoring.target, name).span
        difference = paired_difference(after[name], value, span, scoring.recipe.evaluate.confidence)
        pairs[name] = MetricPair(source=value.value, export=after[name].value, difference=difference)
    return pairs


def _check_metric(source: Source, metrics: Mapping[str, MetricPair]) -> ExportCheck:
    """Check that the main metric is not worse by more than `_TOLERATED`, unless the rows are too few to tell."""
    plan = source.scoring.plan
    pair, sign = metrics[plan.metric], 1 if plan.greater_is_better else -1
    limit = _TOLERATED * (1.0 if plan.greater_is_better else abs(pair.source))
    interval = pair.difference
    certain = interval is None or max(sign * interval.low, sign * interval.high) < 0
    return ExportCheck(
        name=f"{plan.metric} of the source, of the export",
        result=f"{pair.source:.4g}, {pair.export:.4g}",
        expected=f"worse by at most {limit:.2g}",
        passed=not certain or sign * (pair.source - pair.export) <= limit,
    )
