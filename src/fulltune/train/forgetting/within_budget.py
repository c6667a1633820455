from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from fulltune import methods
from fulltune.errors import InterruptedRun
from fulltune.forgetting.budget import (
    MAX_ROWS,
    MIN_SHARE_STEP,
    REFINEMENTS,
    SHARES,
    best_point_within,
    is_within,
    share_at_limit,
)
from fulltune.forgetting.generic_text import load_budget_texts, mean_drift
from fulltune.inference.run import GenericText, RowSubset
from fulltune.models import sharding
from fulltune.records.events import Certified
from fulltune.records.forgetting import BudgetResult, InterpolationPoint, limit_of
from fulltune.tasks import Row
from fulltune.train.forgetting.generic import DriftMonitor
from fulltune.train.loop.inputs import AttemptInputs
from fulltune.train.loop.trainer import FullTrainer

PHASE = "choosing weights within the budget for forgetting"


class WeightInterpolation:
    """Interpolates between a model's trainable weights before step 1 and after training."""

    def __init__(self, model: PreTrainedModel, before: Path, after: Path) -> None:
        """Save the trained weights to `after`. `before` holds the weights before step 1."""
        sharding.free_gathered_weights(model)
        self.model, self.trained, self.before, self.after = model, methods.trainable_parameters(model), before, after
        tensors = {name: sharding.local_tensor(parameter.detach()).cpu() for name, parameter in self.trained.items()}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, after)
        digest = hashlib.sha256()
        for parameter in self.trained.values():  # gathered, so that the digest is the same for any world size
            digest.update(sharding.full_tensor(parameter.detach()).cpu().flatten().view(torch.uint8).numpy().data)
        self.digest = digest.hexdigest()[:16]

    def set_weights(self, share: float) -> None:
        """Set the weights to `share` of the way from pretrained (0) to trained (1). For LoRA, only the B matrices are
        scaled."""
        sharding.free_gathered_weights(self.model)
        with safe_open(self.before, "pt") as before, safe_open(self.after, "pt") as after, torch.no_grad():
            for name, parameter in self.trained.items():
                begin, end = before.get_tensor(name), after.get_tensor(name)
                weight = 1.0 if ".lora_A." in name else share
                # Exact at both ends.
                value = end if weight == 1 else begin if weight == 0 else torch.lerp(begin.float(), end.float(), weight)
                sharding.local_tensor(parameter).copy_(value.to(parameter.dtype))


def keep_within_budget(
    inputs: AttemptInputs, trainer: FullTrainer, monitor: DriftMonitor, score: Callable[[Sequence[Row]], float]
) -> BudgetResult | None:
    """Interpolate the model's weights in place, between initial and trained ones, so that drift stays within the
    budget. Returns the measurements, including drift on held-out texts, or None if no budget is set. Reuses a result
    saved for the same weights. `score` computes the metric on eval rows."""
    plan, request = inputs.plan, inputs.request
    if plan.generic.budget is None:
        return None
    record = Path(request.run_folder) / "preserve" / f"{plan.trial}.json"
    rank = trainer.args.process_index
    before, after = request.initial_weights(rank), request.trained_weights(rank)
    try:
        interpolation = WeightInterpolation(trainer.model, before, after)
        # Rank 0's file counts for all ranks.
        earlier, digest = trainer.agreed((BudgetResult.load(record) if record.exists() else None, interpolation.digest))
        result = earlier
        if earlier is None or earlier.weights_digest != digest:
            inputs.recorder.phase(PHASE)
            result = _choose_and_certify(
                inputs, interpolation, monitor, score, earlier.opening_times if earlier else ()
            )
            if inputs.is_main:
                record.parent.mkdir(exist_ok=True)
                result.save(record)
            inputs.recorder.write(Certified(result=result))
        assert result is not None
        interpolation.set_weights(result.choice.share)
        return result
    finally:
        after.unlink(missing_ok=True)


def _choose_and_certify(
    inputs: AttemptInputs,
    interpolation: WeightInterpolation,
    monitor: DriftMonitor,
    score: Callable[[Sequence[Row]], float],
    opening_times: tuple[str, ...],
) -> BudgetResult:
    """Choose the best interpolation within the budget and measure its drift on held-out texts. `opening_times` are the
    times of earlier uses of these texts."""
    plan, trainer, stop = inputs.plan, monitor.trainer, inputs.stop
    budget = plan.generic.budget
    assert budget is not None
    texts = load_budget_texts(inputs.recipe.preserve)
    selection, held_out = monitor.tokenize(texts.selection), monitor.tokenize(texts.held_out)
    is_language_model = inputs.summary.form.reads_any_text
    limit = limit_of(budget, is_language_model)
    rows = trainer.eval_rows
    if len(rows) > MAX_ROWS:
        draw = random.Random(inputs.recipe.data.split_seed)
        rows = RowSubset(rows, sorted(draw.sample(range(len(rows)), MAX_ROWS)))

    def measure_outputs(share: float, text: GenericText) -> np.ndarray:
        interpolation.set_weights(share)
        return text.measure(trainer.model, trainer.head, trainer.write_heartbeat)

    start = measure_outputs(0.0, selection)

    def measure_point(share: float) -> InterpolationPoint:
        """Measure drift and metric with this share of the update; raise `InterruptedRun` after a stop request."""
        # With sharded weights all ranks run this and must stop together; otherwise only rank 0 does.
        if stop.is_requested_on_any_rank(trainer.args) if trainer.is_shared else stop.is_requested:
            raise InterruptedRun("stopped on request while choosing weights within the budget; training is complete")
        interpolation.set_weights(share)
        drift = mean_drift(start, start if share == 0 else measure_outputs(share, selection))
        return InterpolationPoint(share=share, drift=drift, metric=score(rows))

    with inputs.journal.phase_within("evaluation"):
        points = [measure_point(share) for share in (0.0, *SHARES)]
        points += _refine_near_limit(points, limit, measure_point)
        choice = best_point_within(points, limit, plan.greater_is_better)
        held_out_drift = None
        if not choice.is_start:
            opening_times = (*opening_times, datetime.now().astimezone().isoformat(timespec="seconds"))
            held_out_drift = mean_drift(measure_outputs(0.0, held_out), measure_outputs(choice.share, held_out))
    result = "no trained weights are within the budget; the held-out texts were not used"
    if held_out_drift is not None:
        verdict = "PASS" if held_out_drift.upper <= limit else "FAIL"
        result = f"drift measured on {len(held_out.ids)} held-out generic texts: {verdict}"
    inputs.journal.write("budget for forgetting", result)
    return BudgetResult(
        trial=plan.trial,
        budget=budget,
        limit=limit,
        is_language_model=is_language_model,
        metric=plan.metric,
        greater_is_better=plan.greater_is_better,
        points=tuple(sorted(points, key=lambda point: point.share, reverse=True)),
        choice=choice,
        sealed=held_out_drift,
        weights_digest=interpolation.digest,
        weak_texts_reason=monitor.weak_texts_reason(selection, start),
        opening_times=opening_times,
    )


def _refine_near_limit(
    points: list[InterpolationPoint], limit: float, measure: Callable[[float], InterpolationPoint]
) -> list[InterpolationPoint]:
    """Measure further points near the share at which drift first exceeds `limit`, and return only the new ones."""
    refined: list[InterpolationPoint] = []
    for _ in range(REFINEMENTS):
        tried = sorted([*points, *refined], key=lambda point: point.share)
        first = next((i for i, point in enumerate(tried) if i and not is_within(point.drift, limit)), None)
        if first is None:
            break
        share = share_at_limit(tried[first - 1], tried[first], limit)
        if share - tried[first - 1].share < MIN_SHARE_STEP:
            break  # the budget is used up
        refined.append(measure(share))
    return refined
