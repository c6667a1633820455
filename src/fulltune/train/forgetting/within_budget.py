"""After training, keep the best point between the untouched and the trained model within the budget for forgetting,
certified on texts that nothing has read before."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fulltune import methods
from fulltune.errors import InterruptedRun
from fulltune.forgetting.budget import (
    LEAST_FURTHER,
    MOST_ROWS,
    REFINEMENTS,
    SHARES,
    best,
    crossing,
    is_within,
)
from fulltune.forgetting.generic_text import measured, parts
from fulltune.inference.run import GenericText, Share
from fulltune.models import sharding
from fulltune.records.events import Certified
from fulltune.records.forgetting import BudgetResult, InterpolationPoint, limit_of
from fulltune.train.forgetting.generic import DriftMonitor
from fulltune.train.loop.inputs import AttemptInputs
from fulltune.train.loop.trainer import FullTrainer

PHASE = "choosing how far to go within the budget for forgetting"


class Line:
    """The trained values of a model, anywhere between those before step 1 and those after training."""

    def __init__(self, model: Any, before: Path, after: Path) -> None:
        sharding.free(model)
        self.model, self.trained, self.before, self.after = model, methods.trained(model), before, after
        save_file({name: sharding.local(one.detach()).cpu().contiguous() for name, one in self.trained.items()}, after)
        digest = hashlib.sha256()
        for one in self.trained.values():  # whole, so that it is the same in any number of processes
            digest.update(sharding.whole(one.detach()).cpu().flatten().view(torch.uint8).numpy().data)
        self.digest = digest.hexdigest()[:16]

    def put(self, share: float) -> None:
        """Move the model there. Of LoRA's two matrices the second alone is scaled, and with it their product."""
        sharding.free(self.model)
        with safe_open(self.before, "pt") as before, safe_open(self.after, "pt") as after, torch.no_grad():
            for name, parameter in self.trained.items():
                begin, end = before.get_tensor(name), after.get_tensor(name)
                part = 1.0 if ".lora_A." in name else share
                # Exactly the ends at the ends.
                moved = end if part == 1 else begin if part == 0 else torch.lerp(begin.float(), end.float(), part)
                sharding.local(parameter).copy_(moved.to(parameter.dtype))


def keep_within(
    inputs: AttemptInputs, trainer: FullTrainer, monitor: DriftMonitor, score: Callable[[Any], float]
) -> BudgetResult | None:
    """Move the trained model back as far as its budget asks for; an earlier certificate of these weights is kept with
    its choice. `score` gives the metric of some eval rows. None: the recipe gives no budget."""
    plan, request = inputs.plan, inputs.request
    if plan.generic.budget is None:
        return None
    record = Path(request.run_folder) / "preserve" / f"{plan.trial}.json"
    rank = trainer.args.process_index
    before, after = request.initial_weights(rank), request.trained_weights(rank)
    try:
        line = Line(trainer.model, before, after)
        # What the first process finds there holds for all of them.
        earlier, digest = trainer.agreed((BudgetResult.load(record) if record.exists() else None, line.digest))
        found = earlier
        if earlier is None or earlier.weights_digest != digest:
            inputs.recorder.phase(PHASE)
            found = _chosen(inputs, line, monitor, score, earlier.opening_times if earlier else ())
            if inputs.is_main:
                record.parent.mkdir(exist_ok=True)
                found.save(record)
            inputs.recorder.write(Certified(result=found))
        assert found is not None
        line.put(found.choice.share)
        return found
    finally:
        after.unlink(missing_ok=True)


def _chosen(
    inputs: AttemptInputs,
    line: Line,
    monitor: DriftMonitor,
    score: Callable[[Any], float],
    opened: tuple[str, ...],
) -> BudgetResult:
    plan, trainer, stop = inputs.plan, monitor.trainer, inputs.stop
    budget = plan.generic.budget
    assert budget is not None
    texts = parts(inputs.recipe.preserve)
    choosing, sealed = monitor.text_of(texts.choosing), monitor.text_of(texts.sealed)
    writes = inputs.summary.form.reads_any_text
    limit = limit_of(budget, writes)
    rows = _eval_rows(inputs, trainer)

    def read(share: float, text: GenericText) -> np.ndarray:
        line.put(share)
        return text.read(trainer.model, trainer.head, trainer.alive)

    start = read(0.0, choosing)

    def at(share: float) -> InterpolationPoint:
        # With sharded weights all processes run this, and must stop together; else only the first does.
        if stop.any_asked(trainer.args) if trainer.is_shared else stop.is_asked:
            raise InterruptedRun("stopped on request while a point within the budget was chosen; training is done")
        line.put(share)
        drift = measured(start, start if share == 0 else read(share, choosing))
        return InterpolationPoint(share=share, drift=drift, metric=score(rows))

    with inputs.journal.during("evaluation"):
        points = [at(share) for share in (0.0, *SHARES)]
        points += _between(points, limit, at)
        chosen = best(points, limit, plan.greater_is_better)
        moved = None
        if not chosen.is_start:
            opened = (*opened, datetime.now().astimezone().isoformat(timespec="seconds"))
            moved = measured(read(0.0, sealed), read(chosen.share, sealed))
    said = "infeasible; the sealed texts were not opened"
    if moved is not None:
        said = f"{len(sealed.ids)} sealed generic texts were opened: {'PASS' if moved.upper <= limit else 'FAIL'}"
    inputs.journal.write("budget for forgetting", said)
    return BudgetResult(
        trial=plan.trial,
        budget=budget,
        limit=limit,
        is_language_model=writes,
        text_source=texts.source,
        metric=plan.metric,
        greater_is_better=plan.greater_is_better,
        points=tuple(sorted(points, key=lambda point: point.share, reverse=True)),
        choice=chosen,
        sealed=moved,
        weights_digest=line.digest,
        weak_texts_reason=monitor.says_little(choosing, start) or None,
        opening_times=opened,
    )


def _eval_rows(inputs: AttemptInputs, trainer: FullTrainer) -> Any:
    """The eval rows, or some of them; the same for all trials of a comparison."""
    rows: Any = trainer.eval_dataset
    count = len(rows["length"])
    if count <= MOST_ROWS:
        return rows
    return Share(rows, sorted(random.Random(inputs.recipe.data.split_seed).sample(range(count), MOST_ROWS)))


def _between(
    points: list[InterpolationPoint], limit: float, at: Callable[[float], InterpolationPoint]
) -> list[InterpolationPoint]:
    """More points, between the largest that is within the limit and the next one."""
    found: list[InterpolationPoint] = []
    for _ in range(REFINEMENTS):
        tried = sorted([*points, *found], key=lambda point: point.share)
        first = next((at for at, one in enumerate(tried) if at and not is_within(one.drift, limit)), None)
        if first is None:
            break
        share = crossing(tried[first - 1], tried[first], limit)
        if share - tried[first - 1].share < LEAST_FURTHER:
            break  # the budget is used up
        found.append(at(share))
    return found
