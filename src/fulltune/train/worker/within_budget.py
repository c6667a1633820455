"""After training: of the points between the untouched and the trained model the best one within the budget is kept,
and certified on texts that nothing has read before.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fulltune import methods
from fulltune.errors import InterruptedRun
from fulltune.forgetting.budget import BISECTIONS, MOST_ROWS, SHARES, best, certified, is_within
from fulltune.forgetting.drift import GenericText, measured
from fulltune.forgetting.generic_text import parts
from fulltune.inference.run import Share
from fulltune.recipe.tasks import LANGUAGE_MODELS
from fulltune.records.events import Certified
from fulltune.records.forgetting import Drift, Kind, Point, Preserved, limit_of
from fulltune.train.optim.groups import depths
from fulltune.train.worker.context import AttemptContext

PHASE = "choosing how far to go within the budget for forgetting"


class Line:
    """The trained values of a model, anywhere between those before step 1 and those after training.

    Args:
        model: Has the values after training.
        before: File with those before step 1.
        after: File that is written with the present ones.
    """

    def __init__(self, model: Any, before: Path, after: Path) -> None:
        self.trained, self.before, self.after = methods.trained(model), before, after
        self.depths = depths(list(self.trained))
        save_file({name: one.detach().cpu().contiguous() for name, one in self.trained.items()}, after)
        with after.open("rb") as file:
            self.digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]

    def put(self, kind: Kind, share: float) -> None:
        """Move the model there. Of LoRA's two matrices the second alone is scaled, and with it their product."""
        deepest = max(self.depths.values(), default=0)
        with safe_open(self.before, "pt") as before, safe_open(self.after, "pt") as after, torch.no_grad():
            for name, parameter in self.trained.items():
                begin, end = before.get_tensor(name), after.get_tensor(name)
                part = 1.0 if ".lora_A." in name else share
                if kind == "by layer" and deepest and ".lora_A." not in name:
                    part = share + (1 - share) * self.depths[name] / deepest
                # Exactly the ends at the ends.
                moved = end if part == 1 else begin if part == 0 else torch.lerp(begin.float(), end.float(), part)
                parameter.copy_(moved.to(parameter.dtype))


def keep_within(attempt: AttemptContext) -> Preserved | None:
    """Move the trained model back as far as its budget asks for, once; None: the recipe gives none.

    A certificate of these weights that is there already is kept with its choice: their sealed texts are opened once.
    """
    plan, request = attempt.plan, attempt.request
    if plan.preserving is None:
        return None
    record = Path(request.run_folder) / "preserve" / f"{plan.trial}.json"
    try:
        line = Line(attempt.trainer.model, request.initial_weights, request.trained_weights)
        earlier = Preserved.load(record) if record.exists() else None
        found = earlier
        if earlier is None or earlier.trained != line.digest:
            found = _chosen(attempt, line, earlier.opened if earlier else ())
            record.parent.mkdir(exist_ok=True)
            found.save(record)
            attempt.recorder.write(Certified(preserved=found))
        assert found is not None
        line.put(found.chosen.kind, found.chosen.share)
        return found
    finally:
        request.trained_weights.unlink(missing_ok=True)


def _chosen(attempt: AttemptContext, line: Line, opened: tuple[str, ...]) -> Preserved:
    plan, trainer = attempt.plan, attempt.trainer
    assert plan.preserving is not None
    attempt.recorder.phase(PHASE)
    texts, drifting = parts(attempt.recipe.preserve), attempt.drifting
    choosing, sealed = drifting.text_of(texts.choosing), drifting.text_of(texts.sealed)
    writes = attempt.summary.problem_type in LANGUAGE_MODELS
    limit = limit_of(plan.preserving.budget, writes)
    rows = _eval_rows(attempt)
    line.put("whole", 0.0)
    start = choosing.read(trainer.model, trainer.head, attempt.alive)

    def at(kind: Kind, share: float) -> Point:
        if attempt.stop.asked:
            raise InterruptedRun("stopped on request while a point within the budget was chosen; training is done")
        line.put(kind, share)
        now = choosing.read(trainer.model, trainer.head, attempt.alive)
        # Not `attempt.score`, in which all processes have a part: the first one is alone by now.
        metric = float(attempt.task.metrics(attempt.reduced(rows), attempt.target)[plan.metric])
        return Point(kind=kind, share=share, measured=measured(start, now), metric=metric)

    with attempt.journal.during("evaluation"):
        points = [at("whole", 0.0), *(at(kind, share) for kind, shares in SHARES.items() for share in shares)]
        points += _between(points, limit, at)
        chosen = best(points, limit, plan.greater_is_better)
        certificate = None
        if not chosen.is_start:
            opened = (*opened, datetime.now().astimezone().isoformat(timespec="seconds"))
            certificate = certified(_of_sealed(attempt, line, sealed, chosen), limit)
    said = "infeasible; the sealed generic texts stayed sealed"
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
        points=tuple(sorted(points, key=lambda point: (point.kind, point.share), reverse=True)),
        chosen=chosen,
        certificate=certificate,
        trained=line.digest,
        opened=opened,
    )


def _eval_rows(attempt: AttemptContext) -> Any:
    """The eval rows, or some of them; the same for all trials of a comparison."""
    rows: Any = attempt.trainer.eval_dataset
    count = len(rows["length"])
    if count <= MOST_ROWS:
        return rows
    return Share(rows, sorted(random.Random(attempt.recipe.data.split_seed).sample(range(count), MOST_ROWS)))


def _between(points: list[Point], limit: float, at: Callable[[Kind, float], Point]) -> list[Point]:
    """More points of whole shares, around the largest that is within the limit."""
    found: list[Point] = []
    for _ in range(BISECTIONS):
        whole = sorted((one for one in [*points, *found] if one.kind == "whole"), key=lambda point: point.share)
        outside = [point.share for point in whole if point.share and not is_within(point.measured, limit)]
        if not outside:
            break
        inside = max(point.share for point in whole if point.share < min(outside))
        found.append(at("whole", (inside + min(outside)) / 2))
    return found


def _of_sealed(attempt: AttemptContext, line: Line, sealed: GenericText, chosen: Point) -> Drift:
    """The drift of the chosen point on the texts that nothing has read before."""
    trainer = attempt.trainer
    line.put("whole", 0.0)
    before = sealed.read(trainer.model, trainer.head, attempt.alive)
    line.put(chosen.kind, chosen.share)
    return measured(before, sealed.read(trainer.model, trainer.head, attempt.alive))
