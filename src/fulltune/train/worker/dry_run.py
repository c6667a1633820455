"""The dry run before step 1: real steps on the longest batches, which leave no trace, and how long the training takes,
by the work of all its passes and a line (`fixed + per_work * work`) through two timed ones."""

from __future__ import annotations

import contextlib
import gc
import math
import random
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from accelerate.utils import send_to_device
from safetensors.torch import save_file

from fulltune import files
from fulltune.inference.run import Share, batches, by_length, longest_first
from fulltune.models import sharding
from fulltune.plan.time import GENERIC_TOKENS, further_seconds, occasions
from fulltune.records.plan import Plan, TimeNeed
from fulltune.records.training import Check
from fulltune.train.loop.guarded_step import gradients_are_finite
from fulltune.train.loop.inputs import AttemptInputs
from fulltune.train.loop.trainer import ITEMS, FullTrainer
from fulltune.train.worker import distributed

_PLAIN = (bool, int, float, str, torch.Tensor)
_WRAPPED = ("forward", "_original_forward", "_is_accelerate_prepared")
"""What accelerate sets on a model that it prepares."""


def dry_run(inputs: AttemptInputs, trainer: FullTrainer, evaluate: Callable[[Share], object]) -> list[Check]:
    """Two passes with a step at the longest micro batch, whose peak is that of a real step, an evaluation at the
    longest eval batch, and timed passes; afterwards all is as before. Loss and forecast are noted (none when the loss
    is not finite)."""
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
    inputs.usage.dry_run_loss, inputs.usage.forecast = loss, forecast
    if not plan.num_frozen_parameters:
        return [check]
    said = f"all but {without[0]} ({len(without)} such tensors)" if without else "all"
    return [check, Check(name="trained tensors that the loss reaches", result=said, passed=not without)]


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
    # Without tokens it is an image: its channels, height and width.
    first: Any = batch.get("input_ids", batch.get("pixel_values"))
    size = " x ".join(map(str, first.shape[1:])) + (" tokens" if "input_ids" in batch else " values")
    return Check(
        name="dry-run step",
        result=f"{len(first)} rows of {size}, loss {loss:.4g}, {time.monotonic() - began:.2f} s",
        passed=passed and math.isfinite(loss),
    )


def batch_of(trainer: Any, rows: Sequence[Any]) -> dict[str, torch.Tensor]:
    """These rows collated, on the trainer's device: `input_ids[rows, tokens]` and what else the task gives."""
    return {name: tensor.to(trainer.args.device) for name, tensor in trainer.data_collator(rows).items()}


# ---- how long the training takes ----------------------------------------------------------------------------------

Positions = Sequence[int]
MOST_COUNTED_ROWS = 200_000
"""Of more rows than this, only the first steps are counted, and the rest taken to be like them."""
LOOP_SECONDS = 0.002
"""What transformers' loop and a log line cost in each step beside the passes, measured with a tiny model."""
SAMPLE_BYTES = 2**25
"""Written to see how fast the disk is."""


def works(shapes: np.ndarray, quadratic: float) -> np.ndarray:
    """Work of each pass, by its rows and the tokens of its longest row: shapes[passes, 2]; `quadratic` is what each
    token adds for each one that it sees, as a share of its multiplications with the weights."""
    rows, length = shapes.astype(float).T
    return rows * length * (1 + quadratic * length)


@dataclass(frozen=True)
class Speed:
    """Seconds of a pass as a function of its work."""

    fixed: float
    per_work: float

    def seconds(self, passes: float, work: float) -> float:
        """Of so many passes, with this work together."""
        return self.fixed * passes + self.per_work * work


def speed(longest: tuple[float, float], typical: tuple[float, float] | None) -> Speed:
    """A line through two passes, each work and seconds, or through the origin where it would fall or start below 0."""
    work, seconds = longest if typical is None else typical
    through_origin = Speed(0.0, seconds / work)
    if typical is None or longest[0] <= typical[0]:
        return through_origin
    slope = (longest[1] - seconds) / (longest[0] - work)
    fixed = seconds - slope * work
    return Speed(fixed, slope) if slope > 0 and fixed >= 0 else through_origin


@dataclass(frozen=True)
class Passes:
    """Runs passes; all processes are given the first one's seconds, so that all decide on the same further passes."""

    inputs: AttemptInputs
    trainer: FullTrainer
    model: Any
    """As the Trainer's loop has it: with autocast, compiled, with several processes in `DistributedDataParallel`."""
    optimizer: Any
    evaluate: Callable[[Share], object]
    """Takes eval rows as an evaluation does."""

    def train(self, positions: Positions, *, keep: bool = False) -> tuple[float, float]:
        """Forward and backward of these rows, added to present gradients with `keep`: the loss and the seconds."""
        trainer, rows = self.trainer, cast("Any", self.trainer.train_dataset)
        if not keep:
            self.optimizer.zero_grad()
        began = self._now()
        self.model.train()
        batch = send_to_device(trainer.collated([rows[i] for i in positions]), trainer.args.device)
        # All processes try the same rows, and the Trainer multiplies by their number.
        num_items = torch.tensor(batch.pop(ITEMS) * trainer.args.world_size, device=trainer.args.device)
        loss = trainer.compute_loss(self.model, batch, num_items_in_batch=num_items)
        value = float(loss.detach())
        if self._all(math.isfinite(value)):
            loss.backward()
        return value, self._since(began)

    def step(self) -> float:
        """Clip and update with a rate of 0: the seconds; gradients that are not finite are left to step 1's guard."""
        model = self.trainer.model
        if not self._all(gradients_are_finite(model.parameters())):
            return 0.0
        began = self._now()
        if self.trainer.args.max_grad_norm:
            self.trainer._clip_grad_norm(model)
        self.optimizer.step()
        return self._since(began)

    def _all(self, finite: bool) -> bool:
        """Whether it is so in all processes that share out the weights: they go on together."""
        return all(distributed.all_gather(finite)) if self.trainer.is_shared else finite

    def score(self, positions: Positions) -> float:
        """These eval rows as an evaluation takes them: the seconds."""
        began = self._now()
        self.evaluate(Share(cast("Any", self.trainer.eval_dataset), positions))
        return self._since(began)

    def _now(self) -> float:
        if self.inputs.plan.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _since(self, began: float) -> float:
        seconds = self._now() - began
        return float(distributed.all_gather(seconds)[0]) if self.trainer.args.world_size > 1 else seconds


def timed_forecast(passes: Passes, longest: Positions, seconds: tuple[float, float], step_seconds: float) -> TimeNeed:
    """Seconds from the first step to the last, with evaluations and checkpoints, and of scoring the test rows; more
    passes are timed where they cost little. `seconds` are those of the first two at the longest micro batch."""
    inputs, plan, quadratic = passes.inputs, passes.inputs.plan, _quadratic(passes.trainer.model)
    lengths, first_step = passes.trainer.sampler.lengths, inputs.request.first_step
    steps = max(0, plan.total_steps - first_step)
    counted = min(steps, -(-MOST_COUNTED_ROWS // plan.global_batch_size))
    parts = [part for step in passes.trainer.sampler.passes(first_step, first_step + counted) for part in step]
    scale, shapes = steps / max(1, counted), _shapes(lengths, parts)
    work, [long] = works(shapes, quadratic), works(_shapes(lengths, [longest]), quadratic)
    each = step_seconds + LOOP_SECONDS
    budget = further_seconds(seconds[1] / long * float(work.sum()) * scale + each * steps)
    line, once = _train_speed(passes, parts, work, (float(long), *seconds), budget)
    # Texts that are trained along, by each process.
    texts = steps * plan.generic.replay_rows / plan.num_processes
    all_work = float(work.sum()) * scale + texts * _generic_work(quadratic)
    once *= 1 if plan.torch_compile else len(np.unique(shapes, axis=0))
    train = line.seconds(len(parts) * scale + texts, all_work) + each * steps + once
    tokens = plan.num_processes * (float(shapes.prod(axis=1).sum()) * scale + texts * GENERIC_TOKENS)
    evaluation, evaluations = _evaluation(passes, line, quadratic, budget)
    save = _save_seconds(passes) if inputs.is_main and not inputs.request.probe else 0.0
    splits, around = inputs.summary.splits, dict[str, float]()
    if evaluations and splits["eval"].tokens and splits["test"].tokens:
        scoring = round(evaluation * splits["test"].tokens / splits["eval"].tokens, 3)
        around = {"scoring one model on the test rows": scoring}
    to_stop = save + (evaluation if evaluations else 0.0)
    # Also at each evaluation.
    saves = occasions(plan.total_steps, plan.eval_steps, plan.save_steps, after=first_step)
    return TimeNeed(
        train_seconds=round(train, 3),
        eval_seconds=round(evaluation * evaluations, 3),
        save_seconds=round(save * saves, 3),
        tokens=round(tokens),
        tokens_per_second=round(tokens / train, 1) if train else 0.0,
        source="dry-run step",
        stop_seconds=round(train / steps + to_stop, 3) if steps else 0.0,
        around=around,
    )


def _train_speed(
    passes: Passes, parts: Sequence[Positions], work: np.ndarray, longest: tuple[float, float, float], budget: float
) -> tuple[Speed, float]:
    """The speed by the longest pass (its work, its seconds cold and warm) and a typical one; and what is paid
    once for compiling, or for each shape, because kernels are made for it."""
    long, first_seconds, seconds = longest
    compiled = max(0.0, first_seconds - seconds)
    at = int(np.argmin(abs(work - work.mean()))) if len(work) else 0
    # The longest pass alone says too little: its blocks go back to the system after each use and come anew, which makes
    # its tokens up to twice as slow as those of shorter passes.
    if not len(work) or 2 * seconds * work[at] / long > max(budget, seconds):
        return speed((long, seconds), None), compiled if passes.inputs.plan.torch_compile else 0.0
    keep = passes.inputs.plan.gradient_accumulation_steps > 1
    first, warm = (passes.train(parts[at], keep=keep)[1] for _ in range(2))
    cold = max(0.0, first - warm)
    # At most as much as the pass itself: a process's first passes also pay for what is done once.
    once = compiled + cold if passes.inputs.plan.torch_compile else min(cold, warm)
    return speed((long, seconds), (float(work[at]), warm)), once


def _evaluation(passes: Passes, train: Speed, quadratic: float, budget: float) -> tuple[float, int]:
    """Seconds of an evaluation, by its longest batch beside a training pass of the same work, and how many come."""
    plan, first_step = passes.inputs.plan, passes.inputs.request.first_step
    lengths = np.asarray(cast("Any", passes.trainer.eval_dataset)["length"])
    parts = list(batches(longest_first(lengths), plan.eval_batch_size))
    passes.optimizer.zero_grad()
    seconds = passes.score(parts[0])
    both = train.seconds(1, float(works(_shapes(lengths, parts[:1]), quadratic)[0]))
    if min(seconds, both) <= budget or seconds > both:  # the first one is cold
        seconds = passes.score(parts[0])
    evaluations = occasions(plan.total_steps, plan.eval_steps, after=first_step)
    evaluations += plan.eval_on_start and first_step == 0
    more = evaluations + plan.generic.scored_rows / max(1, len(lengths))
    steered = plan.total_steps // plan.generic.steer_steps if plan.generic.steer_steps else 0
    texts = plan.generic.texts_per_evaluation * (evaluations + steered) + plan.generic.texts_read_once
    read = texts / max(1.0, more)  # of all that is read an evaluation's share
    mine = parts[:: plan.num_processes]  # several processes take the eval batches in turn
    work = float(works(_shapes(lengths, mine), quadratic).sum()) + read * _generic_work(quadratic)
    return min(1.0, seconds / both) * train.seconds(len(mine) + read, work), round(more)


def _generic_work(quadratic: float) -> float:
    return float(works(np.array([[1, GENERIC_TOKENS]]), quadratic)[0])


def _shapes(lengths: np.ndarray, parts: Iterable[Positions]) -> np.ndarray:
    """Rows and tokens of the longest row of each pass: [passes, 2]."""
    return np.array([(len(part), lengths[list(part)].max()) for part in parts], np.int64).reshape(-1, 2)


def _quadratic(model: Any) -> float:
    """Work of attention for each token of the row as a share of the work with the weights, embeddings not counted
    (Kaplan et al. 2020, arXiv 2001.08361, table 1); 0 for a model that is not made of layers of one width."""
    config = model.config.get_text_config()
    layers, hidden = getattr(config, "num_hidden_layers", None), getattr(config, "hidden_size", None)
    if not isinstance(layers, int) or not isinstance(hidden, int):
        return 0.0
    tables = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    others = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in tables)
    return 2 * layers * hidden / max(1, others)


def _save_seconds(passes: Passes) -> float:
    """Seconds of one checkpoint with its checksums, by its small files and a sample of its tensors."""
    trainer, trial = passes.trainer, passes.inputs.request.checkpoints / "write-trial"
    weights = [weight for weight in trainer.model.parameters() if weight.requires_grad or not trainer.trained_only]
    states = [value for state in passes.optimizer.state.values() for value in state.values()]
    whole = sum(tensor.nbytes for tensor in (*weights, *states) if isinstance(tensor, torch.Tensor))
    sample = torch.rand(max(1, min(whole, SAMPLE_BYTES) // 4))
    try:
        began = time.perf_counter()
        cast("Any", trainer.processing_class).save_pretrained(trial)
        files.seal(trial)
        small = time.perf_counter() - began
        (trial / "sample").mkdir()  # of its own, so that the small files are not read once more
        save_file({"sample": sample}, trial / "sample" / "sample.safetensors")
        files.seal(trial / "sample")
        seconds = time.perf_counter() - began - small
    finally:
        shutil.rmtree(trial, ignore_errors=True)
    return small + seconds * max(1.0, whole / sample.nbytes)
