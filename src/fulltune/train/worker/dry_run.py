"""The dry run: real steps on the longest batches before step 1, which leave no trace.

What does not fit fails here and not in an hour, and the timed passes say how long the run will take. The code of a real
step runs: the Trainer's loss, the model as accelerate prepares it, the plan's optimizer, with rates of 0.
"""

from __future__ import annotations

import contextlib
import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fulltune.inference.run import batches, by_length
from fulltune.records.plan import Plan, TimeNeed
from fulltune.records.training import Check
from fulltune.train.worker import buffers, distributed
from fulltune.train.worker.forecast import (
    Rates,
    Readings,
    Schedule,
    Shape,
    Speed,
    count,
    extra_seconds,
    forecast,
    is_cold,
    needs_another_shape,
    new_shape_seconds,
    num_evaluations,
    num_saves,
    quadratic_share,
    speed,
)
from fulltune.train.worker.saving_speed import save_seconds

MOST_COUNTED_ROWS = 200_000
"""Of more rows than this, only the first steps are counted, and the rest taken to be like them."""
LOOP_SECONDS = 0.002
"""What transformers' loop and a log line cost in each step beside the passes, measured with a tiny model."""
_LEAST_TIMED_SECONDS = 0.1
_MOST_REPEATS = 5
_WRAPPED = ("forward", "_original_forward", "_is_accelerate_prepared")
"""What accelerate sets on a model that it prepares."""
Positions = Sequence[int]


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


@dataclass(frozen=True)
class _Run:
    """What the parts of a dry run share."""

    trainer: Any
    rows: Any
    plan: Plan
    model: Any
    """As the Trainer's loop has it: with autocast, compiled, with several processes in `DistributedDataParallel`."""
    optimizer: Any
    evaluate: Callable[[Positions], object]
    lengths: np.ndarray
    """Of the train rows, in tokens."""
    eval_lengths: np.ndarray


def dry_run(
    trainer: Any,
    rows: Any,
    plan: Plan,
    *,
    evaluate: Callable[[Positions], object],
    eval_lengths: Any,
    first_step: int = 0,
    folder: Path | None = None,
) -> DryRun:
    """Two passes with a step at the longest micro batch, an evaluation at the longest eval batch, a few timed passes.

    The first pass and step create the optimizer's state, the second pass has it beside its activations, and with
    accumulation the first one's gradients too: its peak is that of a real step. Weights, buffers and random state are
    as before, everything else is released.

    Args:
        trainer: The `FullTrainer`, before training.
        rows: The train rows.
        plan: The trial's numbers.
        evaluate: Scores these eval rows, as training does it.
        eval_lengths: Tokens of each eval row.
        first_step: The steps up to this one are done: what is forecast is the rest.
        folder: Where checkpoints will lie, to try how fast it writes; None leaves saving out.
    """
    found = _tried(trainer, rows, plan, evaluate, np.asarray(eval_lengths), first_step, folder)
    if plan.num_processes > 1:
        gc.collect()  # `DistributedDataParallel` hooks into each gradient as long as it lives
    return found


def _tried(
    trainer: Any,
    rows: Any,
    plan: Plan,
    evaluate: Callable[[Positions], object],
    eval_lengths: np.ndarray,
    first_step: int,
    folder: Path | None,
) -> DryRun:
    """See `dry_run`."""
    began = time.monotonic()
    longest = by_length(rows)[: plan.micro_batch_size]
    with _without_trace(trainer, plan) as (model, optimizer):
        run = _Run(trainer, rows, plan, model, optimizer, evaluate, np.asarray(rows["length"]), eval_lengths)
        loss, first_seconds = _timed_pass(run, longest)
        if not math.isfinite(loss):
            return DryRun(_check(run, longest, loss, began), loss)
        without = _without_gradient(run)
        _timed_step(run)
        # With accumulation a pass finds the gradients of the one before.
        _, seconds = _timed_pass(run, longest, keep=plan.gradient_accumulation_steps > 1)
        step_seconds = _timed_step(run)
        optimizer.zero_grad()
        # As in training: the optimizer's state stays, the gradients are gone.
        found = _forecast(run, longest, (first_seconds, seconds), step_seconds, first_step, folder)
    return DryRun(_check(run, longest, loss, began), loss, found, without)


def _without_gradient(run: _Run) -> tuple[str, ...]:
    if run.plan.optimizer_in_backward:  # they are gone already
        return ()
    parameters = run.trainer.model.named_parameters()
    return tuple(name for name, parameter in parameters if parameter.requires_grad and parameter.grad is None)


@contextlib.contextmanager
def _without_trace(trainer: Any, plan: Plan) -> Iterator[tuple[Any, Any]]:
    """The prepared model and the optimizer; afterwards everything is as before."""
    model, accelerator = trainer.model, trainer.accelerator
    own = {name: model.__dict__[name] for name in _WRAPPED if name in model.__dict__}
    if plan.activation_checkpointing:  # the Trainer does it again when training begins
        model.activation_checkpointing_enable()
    devices = range(torch.cuda.device_count()) if plan.device == "cuda" else ()
    with buffers.put_back(model), torch.random.fork_rng(devices=devices):
        prepared = accelerator.prepare_model(model)
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


def _timed_pass(run: _Run, positions: Positions, *, keep: bool = False) -> tuple[float, float]:
    """Forward and backward of these rows: the loss and the seconds. A loss that is not finite is not sent back.

    Args:
        run: The dry run.
        positions: The rows.
        keep: Add to the gradients that are there.
    """
    trainer = run.trainer
    if not keep:
        run.optimizer.zero_grad()
    began = _now(run)
    run.model.train()
    batch = trainer.data_collator([run.rows[i] for i in positions])
    batch = {name: tensor.to(trainer.args.device) for name, tensor in batch.items()}
    # All processes try the same rows, and the Trainer multiplies by their number.
    count = trainer.count_items(batch["labels"]) * trainer.args.world_size
    num_items = torch.tensor(count, device=trainer.args.device)
    loss = trainer.compute_loss(run.model, batch, num_items_in_batch=num_items)
    value = float(loss.detach())
    if math.isfinite(value):
        loss.backward()
        if run.plan.optimizer_in_backward:
            run.optimizer.step()  # ends the step, whose updates have happened
    return value, _now(run) - began


def _timed_step(run: _Run) -> float:
    """Clip and update, as at the end of a step: the seconds. With a rate of 0 finite gradients move nothing; others
    would, and are left to the guard of step 1."""
    parameters = [parameter for parameter in run.trainer.model.parameters() if parameter.grad is not None]
    if run.plan.optimizer_in_backward or not all(map(_is_finite, parameters)):
        return 0.0
    began = _now(run)
    if run.trainer.args.max_grad_norm:
        run.trainer._clip_grad_norm(run.trainer.model)
    run.optimizer.step()
    return _now(run) - began


def _is_finite(parameter: torch.Tensor) -> bool:
    """Of the gradient; NaN goes through both numbers, which cost no copy of it, as `isfinite` would."""
    assert parameter.grad is not None, "only parameters with a gradient are asked"
    return not parameter.grad.numel() or bool(torch.stack(parameter.grad.aminmax()).isfinite().all())


def _now(run: _Run) -> float:
    if run.plan.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _check(run: _Run, positions: Positions, loss: float, began: float) -> Check:
    batch = run.trainer.data_collator([run.rows[i] for i in positions])
    return check_of(batch, loss, began)


def check_of(batch: dict[str, Any], loss: float, began: float, passed: bool = True) -> Check:
    """A line for the table before step 1."""
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


# ---- the forecast ----------------------------------------------------------------------------------------------


def _forecast(
    run: _Run,
    longest: Positions,
    seconds: tuple[float, float],
    step_seconds: float,
    first_step: int,
    folder: Path | None,
) -> TimeNeed:
    """Time more passes where they cost little against the run, and add everything up."""
    quadratic = _quadratic(run.trainer.model)
    schedule, parts = _schedule(run, first_step)
    first, again = seconds[0], _agreed(run.trainer, seconds[1])
    longest_shape = _shape(run.lengths, longest)
    long = Readings(longest_shape.work(quadratic), (first, again))
    rough = again / long.work * schedule.work(quadratic) + step_seconds * schedule.steps
    budget = _agreed(run.trainer, extra_seconds(rough))
    typical = _typical(run, parts, long, schedule, quadratic, budget)
    train = speed(long.warm, typical[0].warm if typical else None)
    # With torch.compile the second shape makes it give up fixed shapes, and that is all.
    compiled = run.trainer.args.torch_compile
    rates = Rates(
        train=train,
        evaluation=_eval_speed(run, train, quadratic, budget),
        step_seconds=step_seconds + LOOP_SECONDS,
        new_shape_seconds=0.0 if compiled else new_shape_seconds(one.first_time_seconds for one in typical),
        save_seconds=save_seconds(run.trainer, run.optimizer, folder) if folder else 0.0,
        start_seconds=sum(one.first_time_seconds for one in (long, *typical)) if compiled else 0.0,
    )
    return forecast(schedule, rates, quadratic)


def _typical(
    run: _Run, parts: Sequence[Positions], long: Readings, schedule: Schedule, quadratic: float, budget: float
) -> tuple[Readings, ...]:
    """A micro batch of the mean work, and a second one where the first pass of the first one took suspiciously long;
    none when that would take too long.

    The longest pass alone says too little: its blocks go back to the system after each use and come anew, which makes
    its tokens up to twice as slow as those of shorter passes. So two typical passes may take as long as a longest one.
    """
    if not parts:
        return ()
    shapes = {_shape(run.lengths, part): part for part in parts}
    mean = schedule.work(quadratic) / sum(schedule.train.values())
    nearest = sorted(shapes, key=lambda shape: abs(shape.work(quadratic) - mean))
    work = nearest[0].work(quadratic)
    if 2 * long.warm.seconds * work / long.work > max(budget, long.warm.seconds):
        return ()
    keep = run.plan.gradient_accumulation_steps > 1

    def read(shape: Shape) -> Readings:
        part = shapes[shape]
        times = _repeated(run, lambda: _timed_pass(run, part, keep=keep)[1], budget)
        return Readings(shape.work(quadratic), tuple(times))

    found = read(nearest[0])
    excess = _agreed(run.trainer, found.first_time_seconds)
    rough = _agreed(run.trainer, found.warm.seconds / work * schedule.work(quadratic))
    if len(nearest) > 1 and needs_another_shape(excess, schedule, rough):
        return found, read(nearest[1])
    return (found,)


def _eval_speed(run: _Run, train: Speed, quadratic: float, budget: float) -> Speed:
    """The longest eval batch must be tried; one from the middle says how long the others take. What a pass costs is
    judged by training's, because the first evaluation is cold."""
    run.optimizer.zero_grad()
    chosen = list(batches([int(i) for i in np.argsort(-run.eval_lengths, kind="stable")], run.plan.eval_batch_size))

    def seconds(positions: Positions) -> float:
        began = _now(run)
        run.evaluate(positions)
        return _agreed(run.trainer, _now(run) - began)

    longest, middle = chosen[0], chosen[len(chosen) // 2]
    work, usual = (_shape(run.eval_lengths, one).work(quadratic) for one in (longest, middle))
    times = [seconds(longest)]
    both = _agreed(run.trainer, train.seconds(work))
    # Of forward and backward together the forward pass is a third.
    forward = min(times[0], both / 3)
    if forward <= budget / 3 or is_cold(times[0], both):
        times.append(seconds(longest))
    long = Readings(work, tuple(times)).warm
    if 2 * long.seconds * usual / work > budget:
        return speed(long, None)
    return speed(long, Readings(usual, tuple(_repeated(run, lambda: seconds(middle), budget))).warm)


def _repeated(run: _Run, measure: Callable[[], float], budget: float) -> list[float]:
    """The first time, in which kernels are made, and one or more further ones."""
    times = [measure(), measure()]
    most = min(budget, _LEAST_TIMED_SECONDS)
    while len(times) <= _MOST_REPEATS and _agreed(run.trainer, sum(times[1:])) < most:
        times.append(measure())
    return times


def _agreed(trainer: Any, seconds: float) -> float:
    """The first process's, so that all run the same passes."""
    return float(distributed.from_first(seconds)) if trainer.args.world_size > 1 else seconds


def _schedule(run: _Run, first_step: int) -> tuple[Schedule, list[list[int]]]:
    """What is left to do, and its first micro batches."""
    plan = run.plan
    steps = max(0, plan.total_steps - first_step)
    counted = min(steps, -(-MOST_COUNTED_ROWS // plan.global_batch_size))
    parts = [part for step in run.trainer.sampler.passes(first_step, first_step + counted) for part in step]
    order = [int(i) for i in np.argsort(-run.eval_lengths, kind="stable")]
    # Several processes take the eval batches in turn.
    evaluation = list(batches(order, plan.eval_batch_size))[:: plan.num_processes]
    schedule = Schedule(
        steps=steps,
        train=count((_shape(run.lengths, part) for part in parts), steps / counted if counted else 0.0),
        evaluation=count(_shape(run.eval_lengths, part) for part in evaluation),
        evaluations=num_evaluations(first_step, plan.total_steps, plan.eval_steps),
        saves=num_saves(first_step, plan.total_steps, plan.eval_steps, plan.save_steps),
        num_processes=plan.num_processes,
    )
    return schedule, parts


def _shape(lengths: np.ndarray, positions: Positions) -> Shape:
    return Shape(len(positions), int(lengths[list(positions)].max()))


def _quadratic(model: Any) -> float:
    """See `quadratic_share`; 0 for a model that is not made of layers of one width."""
    config = model.config.get_text_config()
    layers, hidden = getattr(config, "num_hidden_layers", None), getattr(config, "hidden_size", None)
    if not isinstance(layers, int) or not isinstance(hidden, int):
        return 0.0
    tables = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    others = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in tables)
    return quadratic_share(layers, hidden, others)
