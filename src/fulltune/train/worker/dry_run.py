"""The dry run: real steps on the longest batches before step 1, which leave no trace."""

from __future__ import annotations

import contextlib
import gc
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch

from fulltune.inference.run import Share, by_length
from fulltune.models import sharding
from fulltune.records.plan import Plan, TimeNeed
from fulltune.records.training import Check
from fulltune.train.loop.inputs import AttemptInputs
from fulltune.train.loop.trainer import FullTrainer
from fulltune.train.worker.forecast import Passes, timed_forecast

_PLAIN = (bool, int, float, str, torch.Tensor)
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


def dry_run(inputs: AttemptInputs, trainer: FullTrainer, evaluate: Callable[[Share], object]) -> DryRun:
    """Two passes with a step at the longest micro batch, whose peak is that of a real step, an evaluation at the
    longest eval batch, and timed passes; afterwards all is as before."""
    began, plan, rows = time.monotonic(), inputs.plan, cast("Any", trainer.train_dataset)
    longest = by_length(rows)[: plan.micro_batch_size]
    forecast: TimeNeed | None = None
    without: tuple[str, ...] = ()
    with _without_trace(trainer, plan) as (model, optimizer):
        passes = Passes(inputs, trainer, model, optimizer, evaluate)
        loss, first_seconds = passes.train(longest)
        if math.isfinite(loss):
            named = trainer.model.named_parameters()
            without = tuple(name for name, one in named if one.requires_grad and one.grad is None)
            passes.step()
            # With accumulation a pass finds the gradients of the one before, else at most those that parts add.
            if plan.gradient_accumulation_steps == 1:
                optimizer.zero_grad()
            for part in trainer.parts:
                part.add_gradient()
            _, seconds = passes.train(longest, keep=True)
            step_seconds = passes.step()
            optimizer.zero_grad()
            # As in training: the optimizer's state stays, the gradients are gone.
            forecast = timed_forecast(passes, longest, (first_seconds, seconds), step_seconds)
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


@contextlib.contextmanager
def same_randomness(*, on_gpu: bool = True) -> Iterator[None]:
    """Put back the state of all random generators; asking for GPUs' makes torch set them up."""
    python, numbers = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if on_gpu else ()):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numbers)


@contextlib.contextmanager
def same_buffers(model: Any) -> Iterator[None]:
    """Afterwards all buffers are as before, also those that `forward` replaced, enlarged or added, and so are the plain
    numbers and tensors that their modules note about them."""
    before = [
        (
            module,
            {name: (buffer, None if buffer is None else buffer.clone()) for name, buffer in module._buffers.items()},
            {name: value for name, value in vars(module).items() if isinstance(value, _PLAIN) and module._buffers},
        )
        for module in model.modules()
    ]
    try:
        yield
    finally:
        for module, buffers, noted in before:
            for name in module._buffers.keys() - buffers.keys():
                delattr(module, name)
            for name, (buffer, values) in buffers.items():
                now = module._buffers.get(name)
                if values is not None and now is buffer and now.shape == values.shape:
                    now.copy_(values)
                else:
                    module._buffers[name] = values if now is None or values is None else values.to(now.device)
            vars(module).update(noted)


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


def batch_of(trainer: Any, rows: Sequence[Any]) -> dict[str, torch.Tensor]:
    """These rows collated, on the trainer's device: `input_ids[rows, tokens]` and what else the task gives."""
    return {name: tensor.to(trainer.args.device) for name, tensor in trainer.data_collator(rows).items()}
