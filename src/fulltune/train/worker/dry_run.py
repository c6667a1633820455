from __future__ import annotations

import contextlib
import gc
import math
import random
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from accelerate.utils import send_to_device
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from fulltune import files
from fulltune.errors import SetupError
from fulltune.inference.run import RowSubset, batches, positions_by_length, positions_longest_first, row_lengths
from fulltune.models import sharding
from fulltune.models.packing import fill_blocks
from fulltune.plan.time import GENERIC_TOKENS, count_interval_steps, dry_run_extra_seconds
from fulltune.records.plan import AnswersPlan, Plan, TimeNeed
from fulltune.records.training import Check
from fulltune.tasks import Row
from fulltune.train.loop.guarded_step import gradients_are_finite
from fulltune.train.loop.inputs import AttemptInputs
from fulltune.train.loop.trainer import ITEMS, FullTrainer
from fulltune.train.worker import distributed

_PLAIN = (bool, int, float, str, torch.Tensor)
_WRAPPED = ("forward", "_original_forward", "_is_accelerate_prepared")


AnswerBatch = Callable[[int], tuple[int, float]]
"""Generates up to a number of new tokens per answer of a batch of eval prompts that are as long as prompt and answer on
average. Returns the tokens of the longest answer, and the share of the prompts' tokens that are real."""


def dry_run(
    inputs: AttemptInputs,
    trainer: FullTrainer,
    evaluate: Callable[[RowSubset], object],
    answer: AnswerBatch | None = None,
) -> list[Check]:
    """Run two steps and an evaluation on the longest rows, time some passes, restore everything and return the checks.
    Stores the loss and the forecast (None after a non-finite loss) in `inputs.usage`."""
    began, plan, rows = time.monotonic(), inputs.plan, trainer.train_rows
    longest = worst_micro_batch(rows, plan)
    forecast: TimeNeed | None = None
    unreached: tuple[str, ...] = ()
    with _temporary_training_state(trainer, plan) as (model, optimizer):
        passes = PassTimer(inputs, trainer, model, optimizer, evaluate, answer)
        loss, first_seconds = passes.run_pass(longest)
        if not math.isfinite(loss) and inputs.has_own_loss:
            raise SetupError(f"your loss returned {loss} for the longest rows; expected a finite number; correct it")
        if math.isfinite(loss):
            parameters = trainer.model.named_parameters()
            unreached = tuple(name for name, weight in parameters if weight.requires_grad and weight.grad is None)
            passes.step()
            # Only with accumulation does a pass add to earlier gradients; parts may add gradients too.
            if plan.gradient_accumulation_steps == 1:
                optimizer.zero_grad()
            for part in trainer.parts:
                part.add_gradient()
            _, seconds = passes.run_pass(longest, keep_gradients=True)
            step_seconds = passes.step()
            optimizer.zero_grad()
            # Measured as between steps, with optimizer state but without gradients.
            forecast = forecast_from_passes(passes, longest, (first_seconds, seconds), step_seconds)
    del passes, model, optimizer
    if plan.num_processes > 1:
        gc.collect()  # `DistributedDataParallel` hooks into each gradient as long as it lives
    check = dry_run_check(collate_on_device(trainer, [rows[i] for i in longest]), loss, began)
    inputs.usage.dry_run_loss, inputs.usage.forecast = loss, forecast
    if not plan.num_frozen_parameters or plan.saves_all:  # full fine-tuning may not use every tensor
        return [check]
    result = f"all but {len(unreached)}, such as {unreached[0]}" if unreached else "all"
    return [check, Check(name="trained tensors with a gradient", result=result, passed=not unreached)]


def worst_micro_batch(rows: Sequence[Row], plan: Plan) -> list[int]:
    """Return the longest rows; with packing one is shorter, as only unequal rows get a mask, which costs memory."""
    order, lengths = positions_by_length(rows), row_lengths(rows)
    *first, last = order[: plan.micro_batch_size]
    shorter = (row for row in order[len(first) :] if lengths[row] < lengths[order[0]])
    return [*first, next(shorter, last) if plan.packing and first else last]


@contextlib.contextmanager
def _temporary_training_state(trainer: FullTrainer, plan: Plan) -> Iterator[tuple[nn.Module, torch.optim.Optimizer]]:
    """Yield the prepared model and a zero-rate optimizer; afterwards restore model, buffers and random state."""
    model, accelerator = trainer.model, trainer.accelerator
    own = {name: model.__dict__[name] for name in _WRAPPED if name in model.__dict__}
    if plan.activation_checkpointing:  # the Trainer does it again when training begins
        model.activation_checkpointing_enable()
    with restored_buffers(model), restored_random_state(on_gpu=plan.device == "cuda"):
        # As in the Trainer, sharded weights are not wrapped again.
        is_whole = not sharding.is_fsdp2_sharded(model)
        prepared = accelerator.prepare_model(model, device_placement=is_whole, evaluation_mode=not is_whole)
        try:
            with trainer.zero_rate_optimizer() as optimizer:
                yield prepared, optimizer
        finally:
            # accelerate 1.15 also unwraps decorators of the model's own forward, but leaves its mark on the model: it
            # would then not prepare it for training, which would run in fp32.
            for name in _WRAPPED:
                model.__dict__.pop(name, None)
            model.__dict__.update(own)
            accelerator.free_memory()


@contextlib.contextmanager
def restored_random_state(*, on_gpu: bool = True) -> Iterator[None]:
    """Restore all random generators after the block, including the GPUs' if `on_gpu`, which initialises the GPUs."""
    python, numbers = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if on_gpu else ()):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numbers)


@contextlib.contextmanager
def restored_buffers(model: nn.Module) -> Iterator[None]:
    """Restore buffers and their modules' plain attributes after the block, even if `forward` replaced or added some."""
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
        for module, buffers, attributes in before:
            for name in module._buffers.keys() - buffers.keys():
                delattr(module, name)
            for name, (buffer, values) in buffers.items():
                now = module._buffers.get(name)
                if values is not None and now is not None and now is buffer and now.shape == values.shape:
                    now.copy_(values)
                else:
                    module._buffers[name] = values if now is None or values is None else values.to(now.device)
            vars(module).update(attributes)


def dry_run_check(batch: Mapping[str, torch.Tensor], loss: float, started: float, passed: bool = True) -> Check:
    """Return the dry run's check, which fails if `passed` is False or the loss is not finite."""
    # An image has no tokens; its shape is channels, height and width.
    first = batch["input_ids" if "input_ids" in batch else "pixel_values"]
    size = " x ".join(map(str, first.shape[1:])) + (" tokens" if "input_ids" in batch else " values")
    return Check(
        name="dry-run step",
        result=f"{len(first)} rows of {size}, loss {loss:.4g}, {time.monotonic() - started:.2f} s",
        passed=passed and math.isfinite(loss),
    )


def collate_on_device(trainer: FullTrainer, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
    batch = trainer.data_collator(cast("list[Any]", rows))
    return {name: tensor.to(trainer.args.device) for name, tensor in batch.items()}


# ---- how long the training takes ----------------------------------------------------------------------------------

Positions = Sequence[int]
MAX_COUNTED_ROWS = 200_000
"""Maximum number of rows whose work is computed; later steps are extrapolated."""
LOOP_SECONDS = 0.002
"""Seconds per step for transformers' loop and a log line."""
DISK_SAMPLE_BYTES = 2**25
ANSWER_TOKENS = 8
"""Tokens generated to time a new token."""


def pass_work(shapes: np.ndarray, quadratic: float) -> np.ndarray:
    """Compute the relative work of each pass from shapes[passes, 2]: its number of rows and its longest row's tokens.
    `quadratic` is the relative work of attention (`_attention_work_ratio`)."""
    rows, length = shapes.astype(float).T
    return rows * length * (1 + quadratic * length)


@dataclass(frozen=True)
class PassTime:
    """A pass's duration in seconds as a linear function of its work."""

    fixed: float
    per_work: float

    def seconds(self, passes: float, work: float) -> float:
        return self.fixed * passes + self.per_work * work


def fit_pass_time(longest: tuple[float, float], typical: tuple[float, float] | None) -> PassTime:
    """Fit a line to two passes' (work, seconds), or a line through the origin if only one is usable."""
    work, seconds = longest if typical is None else typical
    through_origin = PassTime(0.0, seconds / work)
    if typical is None or longest[0] <= typical[0]:
        return through_origin
    slope = (longest[1] - seconds) / (longest[0] - work)
    fixed = seconds - slope * work
    return PassTime(fixed, slope) if slope > 0 and fixed >= 0 else through_origin


@dataclass(frozen=True)
class PassTimer:
    """Runs and times forward and backward passes. All ranks use rank 0's times."""

    inputs: AttemptInputs
    trainer: FullTrainer
    model: nn.Module
    """The model as prepared by the Trainer: with autocast, compiled and wrapped."""
    optimizer: torch.optim.Optimizer
    evaluate: Callable[[RowSubset], object]
    answer: AnswerBatch | None = None

    def run_pass(self, positions: Positions, *, keep_gradients: bool = False) -> tuple[float, float]:
        """Run a forward and backward pass on train rows, after clearing gradients unless `keep_gradients`; return loss
        and seconds."""
        trainer, rows = self.trainer, self.trainer.train_rows
        if not keep_gradients:
            self.optimizer.zero_grad()
        began = self._synchronized_time()
        self.model.train()
        batch = send_to_device(trainer.collated([rows[i] for i in positions]), trainer.args.device)
        # All ranks run the same rows, and the Trainer multiplies the loss by their number.
        num_items = torch.tensor(max(1, batch.pop(ITEMS)) * trainer.args.world_size, device=trainer.args.device)
        if trainer.contrast is not None and self.inputs.plan.gradient_accumulation_steps > 1:
            trainer.contrast.begin_step(self.model, [batch])
        loss = trainer.compute_loss(self.model, batch, num_items_in_batch=num_items)
        value = float(loss.detach())
        if self._on_all_ranks(math.isfinite(value)):
            loss.backward()
        return value, self._seconds_since(began)

    def step(self) -> float:
        """Clip gradients, update at learning rate 0 and return the seconds, or 0 if gradients are not finite."""
        model = self.trainer.model
        if not self._on_all_ranks(gradients_are_finite(model.parameters())):
            return 0.0
        began = self._synchronized_time()
        if self.trainer.args.max_grad_norm:
            self.trainer._clip_grad_norm(model)
        self.optimizer.step()
        return self._seconds_since(began)

    def _on_all_ranks(self, finite: bool) -> bool:
        # Ranks with sharded weights must run the same passes.
        return all(distributed.all_gather(finite)) if self.trainer.is_shared else finite

    def time_scoring(self, positions: Positions) -> float:
        began = self._synchronized_time()
        self.evaluate(RowSubset(self.trainer.eval_rows, positions))
        return self._seconds_since(began)

    def time_answers(self, sample: AnswersPlan) -> float:
        """Return the seconds of one evaluation's answers of full length, from a batch's first and later tokens."""
        assert self.answer is not None
        tokens, real, seconds = 0, 0.0, list[float]()
        for new_tokens in (1, 1, min(ANSWER_TOKENS, sample.max_new_tokens)):  # the first one is cold
            began = self._synchronized_time()
            tokens, real = self.answer(new_tokens)
            seconds.append(self._seconds_since(began))
        _, first, several = seconds
        each = max(0.0, several - first) / max(1, tokens - 1)
        batches = -(-sample.rows // (sample.batch_size * self.inputs.plan.num_processes))
        return batches * (real * first + (sample.max_new_tokens - 1) * each)

    def _synchronized_time(self) -> float:
        """Return the time in seconds once GPU work is done."""
        if self.inputs.plan.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _seconds_since(self, began: float) -> float:
        seconds = self._synchronized_time() - began
        return float(distributed.all_gather(seconds)[0]) if self.trainer.args.world_size > 1 else seconds


def forecast_from_passes(
    passes: PassTimer, longest: Positions, longest_seconds: tuple[float, float], step_seconds: float
) -> TimeNeed:
    """Forecast the remaining training time from the seconds of two passes on the longest rows, an optimizer step and,
    within a time budget, further passes."""
    inputs, plan, quadratic = passes.inputs, passes.inputs.plan, _attention_work_ratio(passes.trainer.model)
    lengths, first_step = passes.trainer.sampler.lengths, inputs.request.first_step
    steps = max(0, plan.total_steps - first_step)
    counted = min(steps, -(-MAX_COUNTED_ROWS // plan.global_batch_size))
    parts = [part for step in passes.trainer.sampler.forward_passes(first_step, first_step + counted) for part in step]
    scale, shapes = steps / max(1, counted), _shapes(lengths, parts, plan.packing)
    work, [long] = pass_work(shapes, quadratic), pass_work(_shapes(lengths, [longest], plan.packing), quadratic)
    each = step_seconds + LOOP_SECONDS
    budget = dry_run_extra_seconds(longest_seconds[1] / long * float(work.sum()) * scale + each * steps)
    pass_time, once = _fit_train_time(passes, parts, work, (float(long), *longest_seconds), budget)
    # Replayed texts per process.
    texts = steps * plan.generic.replay_rows / plan.num_processes
    all_work = float(work.sum()) * scale + texts * _work_of_generic_text(quadratic)
    once *= 1 if plan.torch_compile else len(np.unique(shapes, axis=0))
    train = pass_time.seconds(len(parts) * scale + texts, all_work) + each * steps + once
    tokens = plan.num_processes * (float(shapes.prod(axis=1).sum()) * scale + texts * GENERIC_TOKENS)
    evaluation, evaluations, answering = _forecast_evaluations(passes, pass_time, quadratic, budget)
    save = _estimate_save_seconds(passes) if inputs.is_main and not inputs.request.probe else 0.0
    to_stop = save + (evaluation + answering / evaluations if evaluations else 0.0)
    # A checkpoint is also saved at each evaluation.
    saves = count_interval_steps(plan.total_steps, plan.eval_steps, plan.save_steps, after=first_step)
    return TimeNeed(
        train_seconds=round(train, 3),
        eval_seconds=round(evaluation * evaluations + answering, 3),
        save_seconds=round(save * saves, 3),
        tokens=round(tokens),
        tokens_per_second=round(tokens / train, 1) if train else 0.0,
        source="dry-run step",
        answers_seconds=round(answering, 3),
        stop_seconds=round(train / steps + to_stop, 3) if steps else 0.0,
    )


def _fit_train_time(
    passes: PassTimer,
    parts: Sequence[Positions],
    work: np.ndarray,
    longest: tuple[float, float, float],
    budget: float,
) -> tuple[PassTime, float]:
    """Fit the formula for a pass's time to the longest pass (work, first seconds, second seconds) and, if `budget`
    seconds allow, to a typical one. Also return one-time seconds for compiling or else for each new shape."""
    long, first_seconds, seconds = longest
    compiled = max(0.0, first_seconds - seconds)
    at = int(np.argmin(abs(work - work.mean()))) if len(work) else 0
    # The longest pass alone is not enough: its large blocks are returned to the system after each use, which makes its
    # tokens up to twice as slow as those of shorter passes.
    if not len(work) or 2 * seconds * work[at] / long > max(budget, seconds):
        return fit_pass_time((long, seconds), None), compiled if passes.inputs.plan.torch_compile else 0.0
    keep_gradients = passes.inputs.plan.gradient_accumulation_steps > 1
    first, warm = (passes.run_pass(parts[at], keep_gradients=keep_gradients)[1] for _ in range(2))
    cold = max(0.0, first - warm)
    # At most the pass itself: the first passes of a process also include other one-time costs.
    once = compiled + cold if passes.inputs.plan.torch_compile else min(cold, warm)
    return fit_pass_time((long, seconds), (float(work[at]), warm)), once


def _forecast_evaluations(
    passes: PassTimer, train: PassTime, quadratic: float, budget: float
) -> tuple[float, int, float]:
    """Return the seconds per evaluation without answers, the number of evaluations, and the seconds of all answers.
    `budget` limits the measuring time, in seconds;
    `quadratic` comes from `_attention_work_ratio`."""
    plan, first_step = passes.inputs.plan, passes.inputs.request.first_step
    lengths = np.asarray(cast("Any", passes.trainer.eval_dataset)["length"])
    parts = list(batches(positions_longest_first(lengths), plan.eval_batch_size))
    passes.optimizer.zero_grad()
    seconds = passes.time_scoring(parts[0])
    both = train.seconds(1, float(pass_work(_shapes(lengths, parts[:1]), quadratic)[0]))
    if min(seconds, both) <= budget or seconds > both:  # the first one is cold
        seconds = passes.time_scoring(parts[0])
    evaluations = count_interval_steps(plan.total_steps, plan.eval_steps, after=first_step)
    evaluations += plan.eval_on_start and first_step == 0
    more = evaluations + plan.generic.scored_rows / max(1, len(lengths))
    steered = plan.total_steps // plan.generic.steer_steps if plan.generic.steer_steps else 0
    texts = plan.generic.texts_per_evaluation * (evaluations + steered) + plan.generic.texts_read_once
    read = texts / max(1.0, more)  # generic texts per evaluation
    mine = parts[:: plan.num_processes]  # ranks take the eval batches in turn
    work = float(pass_work(_shapes(lengths, mine), quadratic).sum()) + read * _work_of_generic_text(quadratic)
    answering = 0.0 if plan.answers is None else evaluations * passes.time_answers(plan.answers)
    return min(1.0, seconds / both) * train.seconds(len(mine) + read, work), round(more), answering


def _work_of_generic_text(quadratic: float) -> float:
    return float(pass_work(np.array([[1, GENERIC_TOKENS]]), quadratic)[0])


def _shapes(lengths: np.ndarray, parts: Iterable[Positions], packing: bool = False) -> np.ndarray:
    shapes = []
    for part in (lengths[list(part)] for part in parts):
        blocks = fill_blocks(part.tolist()) if packing else [[row] for row in range(len(part))]
        shapes.append((len(blocks), max(part[block].sum() for block in blocks)))
    return np.array(shapes, np.int64).reshape(-1, 2)


def _attention_work_ratio(model: PreTrainedModel) -> float:
    """Return the attention work per visible token, divided by the weights' work without embeddings (Kaplan et al. 2020,
    arXiv 2001.08361, table 1), or 0 if the layers' width is unknown."""
    config = model.config.get_text_config()
    layers, hidden = getattr(config, "num_hidden_layers", None), getattr(config, "hidden_size", None)
    if not isinstance(layers, int) or not isinstance(hidden, int):
        return 0.0
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    others = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in tables)
    return 2 * layers * hidden / max(1, others)


def _estimate_save_seconds(passes: PassTimer) -> float:
    """Estimate the seconds to save a checkpoint by timing the writing of a sample."""
    trainer, trial = passes.trainer, passes.inputs.request.checkpoints / "write-trial"
    weights = [weight for weight in trainer.model.parameters() if weight.requires_grad or not trainer.trained_only]
    states = [value for state in passes.optimizer.state.values() for value in state.values()]
    size = sum(tensor.nbytes for tensor in (*weights, *states) if isinstance(tensor, torch.Tensor))
    sample = torch.rand(max(1, min(size, DISK_SAMPLE_BYTES) // 4))
    try:
        began = time.perf_counter()
        cast("Any", trainer.processing_class).save_pretrained(trial)
        files.write_checksums(trial)
        small = time.perf_counter() - began
        (trial / "sample").mkdir()  # apart, so that the small files are not read again
        save_file({"sample": sample}, trial / "sample" / "sample.safetensors")
        files.write_checksums(trial / "sample")
        seconds = time.perf_counter() - began - small
    finally:
        shutil.rmtree(trial, ignore_errors=True)
    return small + seconds * max(1.0, size / sample.nbytes)
