"""The dry run: real steps on the longest batches before step 1, which leave no trace."""

from __future__ import annotations

import contextlib
import gc
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fulltune.inference.run import by_length
from fulltune.models import sharding
from fulltune.records.plan import Plan, TimeNeed
from fulltune.records.training import Check
from fulltune.train.worker.forecast import timed_forecast
from fulltune.train.worker.no_trace import same_buffers, same_randomness
from fulltune.train.worker.passes import Passes, Positions, batch_of

_WRAPPED = ("forward", "_original_forward", "_is_accelerate_prepared")
"""What accelerate sets on a model that it prepares."""


@dataclass(frozen=True)
class DryRun:
    """What was found out."""

    check: Check
    loss: float
    """Of the longest micro batch."""
    forecast: TimeNeed | None = None
    """None when the loss was not finite."""
    without_gradient: tuple[str, ...] = ()
    """Trained tensors that the loss does not reach."""


def dry_run(
    trainer: Any,
    rows: Any,
    plan: Plan,
    *,
    evaluate: Callable[[Positions], object],
    eval_lengths: Any,
    first_step: int = 0,
    test_share: float = 0.0,
    folder: Path | None = None,
) -> DryRun:
    """Two passes with a step at the longest micro batch, whose peak is that of a real step, an evaluation at the
    longest eval batch, and timed passes; afterwards all is as before."""
    began = time.monotonic()
    longest = by_length(rows)[: plan.micro_batch_size]
    forecast: TimeNeed | None = None
    without: tuple[str, ...] = ()
    with _without_trace(trainer, plan) as (model, optimizer):
        lengths = np.asarray(rows["length"]), np.asarray(eval_lengths)
        passes = Passes(trainer, rows, plan, model, optimizer, evaluate, *lengths)
        loss, first_seconds = passes.train(longest)
        if math.isfinite(loss):
            named = trainer.model.named_parameters()
            without = tuple(name for name, one in named if one.requires_grad and one.grad is None)
            passes.step()
            # With accumulation a pass finds the gradients of the one before, with a budget those of generic text.
            if trainer.replay is not None:
                optimizer.zero_grad()
                trainer.replay.add_gradient(trainer)
            keep = trainer.replay is not None or plan.gradient_accumulation_steps > 1
            _, seconds = passes.train(longest, keep=keep)
            step_seconds = passes.step()
            optimizer.zero_grad()
            # As in training: the optimizer's state stays, the gradients are gone.
            forecast = timed_forecast(
                passes,
                longest,
                (first_seconds, seconds),
                step_seconds,
                first_step=first_step,
                test_share=test_share,
                folder=folder,
            )
    del passes, model, optimizer
    if plan.num_processes > 1:
        gc.collect()  # `DistributedDataParallel` hooks into each gradient as long as it lives
    check = check_of(batch_of(trainer, [rows[i] for i in longest]), loss, began)
    return DryRun(check, loss, forecast, without)


@contextlib.contextmanager
def _without_trace(trainer: Any, plan: Plan) -> Iterator[tuple[Any, Any]]:
    """The prepared model and the optimizer; afterwards everything is as before."""
    model, accelerator = trainer.model, trainer.accelerator
    own = {name: model.__dict__[name] for name in _WRAPPED if name in model.__dict__}
    if plan.activation_checkpointing:  # the Trainer does it again when training begins
        model.activation_checkpointing_enable()
    with same_buffers(model), same_randomness(on_gpu=plan.device == "cuda"):
        # Weights that are shared out already are not to be wrapped once more: as the Trainer does it.
        together = not sharding.is_shared(model)
        prepared = accelerator.prepare_model(model, device_placement=together, evaluation_mode=not together)
        try:
            with trainer.rehearsal() as optimizer:
                yield prepared, optimizer
        finally:
            # accelerate 1.15 unwraps too much, the decorators of the model's own forward, and too little: with its
            # mark left on the model it would not prepare it for the training, which would then run in fp32.
            for name in _WRAPPED:
                model.__dict__.pop(name, None)
            model.__dict__.update(own)
            accelerator.free_memory()


def check_of(batch: dict[str, Any], loss: float, began: float, passed: bool = True) -> Check:
    """The dry run's line in the table of checks before step 1."""
    ids = batch.get("input_ids")
    first = next(tensor for name, tensor in batch.items() if name != "labels")
    # Without tokens it is an image: its channels, height and width.
    sides = first.shape[1:] if ids is None else ids.shape[1:]
    size = " x ".join(str(side) for side in sides) + (" values" if ids is None else " tokens")
    return Check(
        name="dry-run step",
        result=f"{len(first)} rows of {size}, loss {loss:.4g}, {time.monotonic() - began:.2f} s",
        passed=passed and math.isfinite(loss),
    )
