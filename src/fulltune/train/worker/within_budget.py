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
    certified,
    crossing,
    is_within,
)
from fulltune.forgetting.drift import GenericText, measured
from fulltune.forgetting.generic_text import parts
from fulltune.inference.run import Share
from fulltune.models import sharding
from fulltune.records.events import Certified
from fulltune.records.forgetting import Drift, Point, Preserved, limit_of
from fulltune.train.worker.context import AttemptContext
from fulltune.train.worker.weights import held

PHASE = "choosing how far to go within the budget for forgetting"


class Line:
    """The trained values of a model, anywhere between those before step 1 and those after training."""

    def __init__(self, model: Any, before: Path, after: Path) -> None:
        sharding.free(model)
        self.model, self.trained, self.before, self.after = model, methods.trained(model), before, after
        save_file({name: held(one).contiguous() for name, one in self.trained.items()}, after)
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


def _read(attempt: AttemptContext, text: GenericText) -> np.ndarray:
    """What the model, as it is now, makes of generic texts."""
    return text.read(attempt.trainer.model, attempt.trainer.head, attempt.alive)


def keep_within(attempt: AttemptContext) -> Preserved | None:
    """Move the trained model back as far as its budget asks for; an earlier certificate of these weights is kept with
    its choice. None: the recipe gives no budget."""
    plan, request = attempt.plan, attempt.request
    if plan.preserving is None:
        return None
    record = Path(request.run_folder) / "preserve" / f"{plan.trial}.json"
    before, after = attempt.initial_weights, attempt.trained_weights
    try:
        line = Line(attempt.trainer.model, before, after)
        # What the first process finds there holds for all of them.
        earlier, digest = attempt.agreed((Preserved.load(record) if record.exists() else None, line.digest))
        found = earlier
        if earlier is None or earlier.trained != digest:
            found = _chosen(attempt, line, earlier.opened if earlier else ())
            if attempt.is_main:
                record.parent.mkdir(exist_ok=True)
                found.save(record)
            attempt.recorder.write(Certified(preserved=found))
        assert found is not None
        line.put(found.chosen.share)
        return found
    finally:
        after.unlink(missing_ok=True)


def _chosen(attempt: AttemptContext, line: Line, opened: tuple[str, ...]) -> Preserved:
    plan = attempt.plan
    assert plan.preserving is not None
    attempt.recorder.phase(PHASE)
    texts, drifting = parts(attempt.recipe.preserve), attempt.drifting
    choosing, sealed = drifting.text_of(texts.choosing), drifting.text_of(texts.sealed)
    writes = attempt.summary.form.reads_any_text
    limit = limit_of(plan.preserving.budget, writes)
    rows = _eval_rows(attempt)
    line.put(0.0)
    start = _read(attempt, choosing)

    def at(share: float) -> Point:
        # Others than the first are here only where all have a part.
        if attempt.stop.agreed(attempt.trainer.args) if attempt.trainer.is_shared else attempt.stop.asked:
            raise InterruptedRun("stopped on request while a point within the budget was chosen; training is done")
        line.put(share)
        drift = measured(start, start if share == 0 else _read(attempt, choosing))
        # Not `attempt.score`, in which all processes have a part: the first one is alone by now, unless the weights are
        # shared out, and then all score all rows.
        metric = float(attempt.task.metrics(attempt.reduced(rows), attempt.target)[plan.metric])
        return Point(share=share, measured=drift, metric=metric)

    with attempt.journal.during("evaluation"):
        points = [at(share) for share in (0.0, *SHARES)]
        points += _between(points, limit, at)
        chosen = best(points, limit, plan.greater_is_better)
        certificate = None
        if not chosen.is_start:
            opened = (*opened, datetime.now().astimezone().isoformat(timespec="seconds"))
            certificate = certified(_of_sealed(attempt, line, sealed, chosen), limit)
    said = "infeasible; what is sealed stayed sealed"
    if certificate is not None:
        said = f"{len(sealed.ids)} sealed generic texts were opened: {'PASS' if certificate.passed else 'FAIL'}"
    attempt.journal.write("budget for forgetting", said)
    return Preserved(
        trial=plan.trial,
        budget=plan.preserving.budget,
        limit=limit,
        writes=writes,
        text=texts.source,
        metric=plan.metric,
        greater_is_better=plan.greater_is_better,
        points=tuple(sorted(points, key=lambda point: point.share, reverse=True)),
        chosen=chosen,
        certificate=certificate,
        trained=line.digest,
        says_little=drifting.says_little(choosing, start),
        identity=drifting.identity,
        opened=opened,
    )


def _eval_rows(attempt: AttemptContext) -> Any:
    """The eval rows, or some of them; the same for all trials of a comparison."""
    rows: Any = attempt.trainer.eval_dataset
    count = len(rows["length"])
    if count <= MOST_ROWS:
        return rows
    return Share(rows, sorted(random.Random(attempt.recipe.data.split_seed).sample(range(count), MOST_ROWS)))


def _between(points: list[Point], limit: float, at: Callable[[float], Point]) -> list[Point]:
    """More points, between the largest that is within the limit and the next one."""
    found: list[Point] = []
    for _ in range(REFINEMENTS):
        tried = sorted([*points, *found], key=lambda point: point.share)
        first = next((at for at, one in enumerate(tried) if at and not is_within(one.measured, limit)), None)
        if first is None:
            break
        share = crossing(tried[first - 1], tried[first], limit)
        if share - tried[first - 1].share < LEAST_FURTHER:
            break  # the budget is used up
        found.append(at(share))
    return found


def _of_sealed(attempt: AttemptContext, line: Line, sealed: GenericText, chosen: Point) -> Drift:
    """How far the chosen point has moved on what nothing has read before."""
    line.put(0.0)
    before = _read(attempt, sealed)
    line.put(chosen.share)
    return measured(before, _read(attempt, sealed))
