"""Compare an exported model's answers with its source's on test rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fulltune.export.source import Source
from fulltune.inference.run import batches, extract_logits, model_batch, positions_by_length
from fulltune.models.base import with_decoded_images
from fulltune.recipe.tasks import greater_is_better
from fulltune.records.export import ExportCheck, MetricPair
from fulltune.stats.bootstrap import find_metric
from fulltune.stats.intervals import paired_difference
from fulltune.tasks import Predictions, Tensor

_MAX_ROWS, _MAX_TEXTS = 1000, 64
"""Maximum number of test rows, for classifiers and for language models."""
_TOKENS_AT_ONCE = 256
_MAX_DIFFERENCE = 1e-4
"""Largest accepted difference of two logits, relative to the largest logit if that is above 1."""
_TOLERATED, _TOLERATED_IN_4_BITS = 0.02, 0.1
"""Accepted loss of the main metric after rounding or quantization: 2 points, or 2 % of a loss; 10 for q4_k_m."""


@dataclass(frozen=True)
class Exported:
    """An exported model on its own runtime."""

    model: Any
    """Called with a batch's tensors, returns an object with the same outputs as the model in transformers."""
    processor: Any = None
    max_kl: float | None = None
    """Largest accepted mean KL divergence per row or token in nats, or None if logits are compared."""


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

    def update(self, expected: Tensor, actual: Tensor, are_classes: bool) -> None:
        """Compare logits [items, classes]. The last two fields are only updated if one class per item is right."""
        scale = max(1.0, expected.abs().max().item())
        difference = (actual - expected).abs().max().item() / scale
        self.largest = max(self.largest, math.inf if math.isnan(difference) else difference)
        for p, q in zip(expected.split(_TOKENS_AT_ONCE), actual.split(_TOKENS_AT_ONCE), strict=True):
            if are_classes:
                log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
                self.divergences.append((log_p.exp() * (log_p - log_q)).sum(-1).numpy())
                self.same.append((p.argmax(-1) == q.argmax(-1)).numpy())


def compare_answers(source: Source, exported: Exported) -> ComparedAnswers:
    """Run both models over test rows, evenly spread over the file, and compare their logits and metrics."""
    rows = with_decoded_images(source.scoring.rows("test"), source.processor)
    count = min(len(rows), _MAX_TEXTS if source.scoring.task.FACTS.writes else _MAX_ROWS)
    chosen = [len(rows) * number // count for number in range(count)]
    differences, both = _run_both(source, exported.model, rows, chosen)
    metrics = _pair_metrics(source, both, chosen)
    checks = [_check_metric(source, metrics)] if source.request.is_lossy else []
    if differences.divergences:
        divergence = float(np.concatenate(differences.divergences).mean())
        if exported.max_kl is not None:
            checks.append(_at_most("mean KL divergence, in nats", divergence, exported.max_kl))
        same = f"{np.concatenate(differences.same).mean():.2%}"
        checks.append(ExportCheck(name="same highest logit", result=same, expected="-"))
    if exported.max_kl is None and not source.request.is_lossy:
        checks.append(_at_most("largest relative difference of logits", differences.largest, _MAX_DIFFERENCE))
    return ComparedAnswers(count, checks, metrics)


def _at_most(name: str, value: float, limit: float) -> ExportCheck:
    return ExportCheck(name=name, result=f"{value:.1e}", expected=f"at most {limit:.0e}", passed=value <= limit)


def _run_both(
    source: Source, exported: Callable[..., Any], rows: Sequence[Mapping[str, Any]], chosen: Sequence[int]
) -> tuple[_Differences, list[Predictions]]:
    """Return the differences of both models' logits, and their predictions for the chosen positions."""
    import torch

    task, target = source.scoring.task, source.scoring.target
    are_classes = not (target.form.is_number or target.form.several_labels or target.form.has_windows)
    differences = _Differences()
    parts: tuple[list[Predictions], list[Predictions]] = ([], [])
    wanted = set(chosen)
    order = [position for position in positions_by_length(rows) if position in wanted]
    for positions in batches(order, 1 if task.FACTS.writes else 32):
        batch = model_batch(source.reference, task, [rows[i] for i in positions], source.processor.pad_token_id)
        labels, attended = batch.pop("labels"), batch.get("attention_mask")
        with torch.no_grad():
            logits = [extract_logits(model(**batch)).float() for model in (source.reference, exported)]
        for part, values in zip(parts, logits, strict=True):
            part.append({name: np.asarray(one) for name, one in task.reduce_logits(values, labels, target).items()})
        # Logits of padding mean nothing.
        if attended is not None and logits[0].dim() == 3 and logits[0].shape[:2] == attended.shape:
            logits = [one[attended.bool()] for one in logits]
        differences.update(logits[0].flatten(0, -2), logits[1].flatten(0, -2), are_classes)
    place = np.argsort(order)
    return differences, [
        {name: np.concatenate([one[name] for one in part])[place] for name in part[0]} for part in parts
    ]


def _pair_metrics(source: Source, both: Sequence[Predictions], chosen: Sequence[int]) -> dict[str, MetricPair]:
    """Return each metric of both models on the chosen test rows, with the interval of the difference."""
    scoring = source.scoring
    before, after = (scoring.estimate_metrics(predictions, chosen) for predictions in both)
    pairs = {}
    for name, value in before.items():
        span = find_metric(scoring.recipe.task, scoring.target, name).span
        difference = paired_difference(after[name], value, span, scoring.recipe.evaluate.confidence)
        pairs[name] = MetricPair(source=value.value, export=after[name].value, difference=difference)
    return pairs


def _check_metric(source: Source, metrics: Mapping[str, MetricPair]) -> ExportCheck:
    """Check that the main metric is not worse by more than is tolerated, unless chance can explain it."""
    plan = source.scoring.plan
    # The user's own metrics are not computed here.
    name = plan.metric if plan.metric in metrics else source.scoring.target.form.metrics[0]
    pair, sign = metrics[name], 1 if greater_is_better(name) else -1
    tolerated = _TOLERATED_IN_4_BITS if source.request.quantize == "q4_k_m" else _TOLERATED
    limit = tolerated * (1.0 if sign > 0 else abs(pair.source))
    interval, is_worse = pair.difference, sign * (pair.source - pair.export) > limit
    is_chance = interval is not None and max(sign * interval.low, sign * interval.high) >= 0
    return ExportCheck(
        name=f"{name} of the source, of the export",
        result=f"{pair.source:.4g}, {pair.export:.4g}{' (too few rows to tell)' if is_worse and is_chance else ''}",
        expected=f"worse by at most {limit:.2g}",
        passed=not is_worse or is_chance,
    )
