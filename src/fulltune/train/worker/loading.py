"""The model as training starts with it, and the trainer around it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.integrations.integration_utils import TensorBoardCallback

from fulltune import methods, probe
from fulltune.inference.run import autocast, by_length, logits_of, model_batch
from fulltune.inference.store import MIXED, Rows
from fulltune.methods.head import names_of, output_layer_of, rescale, rescaled
from fulltune.models import dropout, evaluating, sharding
from fulltune.models.base import Base, opened
from fulltune.models.kernels import compile_blocks, put_kernels
from fulltune.models.load import Head, draw, draw_again, load
from fulltune.recipe.fields import Recipe
from fulltune.records.data import DataSummary
from fulltune.records.plan import Plan
from fulltune.records.probe import Probe
from fulltune.tasks import Target, Task, task_named
from fulltune.tasks.labels import class_weights
from fulltune.train import checkpoints
from fulltune.train.journal import PROBING
from fulltune.train.loop.arguments import training_arguments
from fulltune.train.loop.inputs import AttemptInputs
from fulltune.train.loop.sampler import MixedSource
from fulltune.train.loop.trainer import FullTrainer
from fulltune.train.optim import zero


def untouched(
    recipe: Recipe,
    task: Task,
    target: Target,
    before_weights: Callable[[], None] = lambda: None,
    shared_by: int = 1,
) -> tuple[Any, Any, Head | None]:
    """The pretrained model with the task's head, its processor, and what became of the head where it may be new."""
    base, heads = Base.of(recipe.model, recipe.task, recipe.data.chat_template), list[Head]()
    model = load(
        base,
        task.config_changes(target, base.processor),
        head_is_new=task.FACTS.head_is_new,
        before_weights=before_weights,
        on_head=heads.append,
        shared_by=shared_by,
    )
    if recipe.train.engine_by:
        zero.forget_unused_conversions(model)
    return model, base.processor, heads[0] if heads else None


def with_method(model: Any, recipe: Recipe) -> methods.Applied:
    """The model with what the method adds and freezes."""
    copied = names_of(model, recipe.task, recipe.method.label) if recipe.method.kind in ("lora", "peft") else ()
    with sharding.whole_while_copied(model, copied):
        applied = methods.apply(model, recipe.method, recipe.task)
    zero.give_one_type(model)
    return applied


@dataclass(frozen=True)
class Learning:
    """What training makes of a run's rows, a batch and its loss, for transformers' Trainer and Lightning's."""

    recipe: Recipe
    plan: Plan
    summary: DataSummary
    task: Task
    model: Any
    pad_token_id: int
    target: Target
    """What is learned, with the units of the logits."""

    @cached_property
    def _class_weights(self) -> Sequence[float] | None:
        return class_weights(self.recipe, self.summary)

    def collate(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """A batch of rows, as the model reads it: `input_ids[rows, tokens]`, `labels` and what else the task gives."""
        return model_batch(self.model, self.task, features, self.pad_token_id)

    def loss(self, outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        """labels[rows] or [rows, tokens]; the model's logits[rows, ..., classes or vocabulary]."""
        smoothing = self.recipe.train.label_smoothing_factor
        summed = self.task.loss(logits_of(outputs), labels, self.target, smoothing, self._class_weights)
        return summed / (num_items_in_batch if num_items_in_batch is not None else 1)


# ---- numbers are learned in units of their spread, because a step of AdamW moves a value by the rate at most -------


@dataclass(frozen=True)
class Scaled:
    """The last layer of a head that learns (number - shift) / factor."""

    layer: torch.nn.Linear
    shift: float
    factor: float

    def fold(self, model: Any) -> None:
        """Give the finished model the user's units."""
        parameters = dict(self.layer.named_parameters())
        if not any(map(zero.is_in_engine, parameters.values())):
            sharding.free(model)
            rescale(self.layer, self.shift, self.factor)
            return
        tensors = {name: zero.whole(one) for name, one in parameters.items()}
        for name, values in rescaled(tensors, self.shift, self.factor).items():
            zero.put(parameters[name], values)


def scaled_head(
    model: Any,
    scale: tuple[float, float],
    batch: dict[str, torch.Tensor] | None,
    precision: str,
    *,
    gives_numbers: bool,
    own_loss: bool = False,
) -> tuple[Scaled | None, str]:
    """The last layer of a head, which now learns numbers in units of their spread, in words; or None and why not."""
    layer, problem = output_layer_of(model, 1), ""
    if own_loss:
        problem = "compute_loss is your own"
    elif layer is None or not layer.weight.requires_grad:
        problem = "no last layer with one output was found in the head"
    elif batch is not None and not _ends_with(model, layer, batch, precision):
        problem = "the model changes what its head's last layer gives"
    if problem or layer is None:
        return None, f"it learns the numbers as they are: {problem}"
    mean, spread = scale
    # Without a bias nothing can be added: what is left is their size.
    shift, factor = (mean, spread) if layer.bias is not None else (0.0, math.hypot(mean, spread))
    sharding.free(model)
    if gives_numbers:
        rescale(layer, -shift / factor, 1 / factor)
    minus = f"(number - {shift:.6g})" if shift else "number"
    return (
        Scaled(layer, shift, factor),
        f"it learns {minus} / {factor:.6g}, and gives the numbers themselves when it is saved",
    )


def _ends_with(model: Any, layer: torch.nn.Linear, batch: dict[str, torch.Tensor], precision: str) -> bool:
    """Whether the model's logits are what this layer gives, for two short rows."""
    seen = list[torch.Tensor]()
    hook = layer.register_forward_hook(lambda _, inputs, output: seen.append(output))
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    try:
        with evaluating(model), torch.no_grad(), autocast(model, precision):
            logits = model(**inputs).logits
    finally:
        hook.remove()
    return len(seen) == 1 and bool(torch.isin(logits.float(), seen[0].float()).all())


# ---- all of it ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loaded:
    """The model as training starts with it, and its rows."""

    arguments: Any
    """transformers' `TrainingArguments`."""
    applied: methods.Applied
    tokenizer: Any
    rows: Any
    eval_rows: Any
    learning: Learning
    head: Head | None
    """What became of the head, for tasks that may need a new one."""
    head_start: Probe | None
    """What was fitted for a new head to start from."""
    scaled: Scaled | None
    """The last layer of a head that learns numbers in other units than the user's."""
    about_scale: str
    """Those units in words, or why they are the user's; empty: no numbers are learned."""
    base_digest: str | None
    """Digest of the pretrained weights, or None if they are sharded by ZeRO."""


def load_for_training(inputs: AttemptInputs) -> Loaded:
    """Load the pretrained model with head and method, and the rows."""
    plan, recipe, task, summary = inputs.plan, inputs.recipe, inputs.task, inputs.summary
    target = Target.of(summary)
    inputs.recorder.phase("loading the model")
    transformers.logging.disable_progress_bar()
    if inputs.in_engine and inputs.sharing is not None and inputs.is_main:
        zero.build_extensions(plan.device == "cpu", inputs.sharing.offload_optimizer, inputs.recorder.phase)
    # Before the model: with ZeRO's stage 3 its weights are shared out while they are read.
    arguments = training_arguments(recipe, plan, inputs.request.checkpoints)
    if inputs.in_engine:
        zero.connect(arguments)
    transformers.set_seed(plan.seed)
    begin = partial(inputs.observed.measure, plan.device, task.FACTS.writes)
    shared_by = plan.num_processes if plan.placement == "fsdp2" else 1
    model, tokenizer, head = untouched(recipe, task, target, begin, shared_by)
    if sharding.is_shared(model):  # each process has drawn its own part; from here on all are as one alone
        transformers.set_seed(plan.seed)
        if head is not None and head.order is None:
            draw(model, head)
    in_parts = sharding.runs_together(model) and not sharding.is_shared(model)  # by ZeRO, and not told from others
    base_digest = None if in_parts else checkpoints.weights_digest(model)
    head_start, learning = None, Learning(recipe, plan, summary, task, model, tokenizer.pad_token_id, target)
    if plan.head_init != "random" and not inputs.request.probe and head is not None and head.order is None:
        head_start = _start_head(inputs, learning, head, tokenizer, arguments.device)
    applied = with_method(model, recipe)
    model = applied.model
    make_faster(model, recipe, plan, summary)
    if not inputs.in_engine and not sharding.runs_together(model):
        model.to(arguments.device)
    rows = rows_with_mixed(inputs.data, summary, tokenizer)
    scaled, about_scale = None, ""
    if summary.scale is not None:
        two = None
        if not inputs.in_engine:
            batch = model_batch(model, task, [rows[i] for i in by_length(rows)[-2:]], tokenizer.pad_token_id)
            two = {name: tensor.to(arguments.device) for name, tensor in batch.items()}
        learned = head is not None and head.order is not None
        probed = head_start is not None and head_start.head is not None
        scaled, about_scale = scaled_head(
            model, summary.scale, two, plan.precision, gives_numbers=probed or learned, own_loss=inputs.has_own_loss
        )
    if scaled is not None:
        target = replace(target, logit_scale=(scaled.shift, scaled.factor))
    return Loaded(
        arguments=arguments,
        applied=applied,
        tokenizer=tokenizer,
        rows=rows,
        eval_rows=task_rows(inputs.data, tokenizer)[1],
        learning=replace(learning, model=model, target=target),
        head=head,
        head_start=head_start,
        scaled=scaled,
        about_scale=about_scale,
        base_digest=base_digest,
    )


def make_trainer(inputs: AttemptInputs, loaded: Loaded) -> FullTrainer:
    """transformers' `Trainer` around what was loaded, without the parts of training."""
    plan, recipe, learning = inputs.plan, inputs.recipe, loaded.learning
    model = loaded.applied.model
    trainer = FullTrainer(
        inputs,
        model=model,
        args=loaded.arguments,
        train_dataset=loaded.rows,
        eval_dataset=loaded.eval_rows,
        data_collator=learning.collate,
        processing_class=loaded.tokenizer,
        compute_loss_func=inputs.hooks.compute_loss or learning.loss,
        lengths=loaded.rows["length"],
        mixed=mixed_ranges(inputs.summary),
        head_modules=() if plan.head_learning_rate is None else names_of(model, recipe.task, recipe.method.label),
        base_digest=loaded.base_digest,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    for callback in trainer.callback_handler.callbacks:
        # Beside the checkpoints' folder, which is deleted; TENSORBOARD_LOGGING_DIR goes first.
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = str(inputs.request.tensorboard)
    return trainer


def make_faster(model: Any, recipe: Recipe, plan: Plan, summary: DataSummary) -> None:
    """Liger's kernels, compiled blocks, or on a CPU a dropout whose draws cannot be taken into a block's code."""
    if recipe.train.use_liger_kernel:
        put_kernels(model)
    if plan.torch_compile:
        # Packed rows have one length, and images one size.
        same_sizes = summary.packed or task_named(recipe.task).FACTS.reads == "image"
        compile_blocks(model, plan.device, dynamic=None if same_sizes else True)
    elif plan.device == "cpu":
        dropout.install(model)


def task_rows(data: Path, tokenizer: Any) -> list[Any]:
    """The task's prepared train and eval rows, from the folder of a run's data."""
    return [opened(Rows(data / split), tokenizer) for split in ("train", "eval")]


def rows_with_mixed(data: Path, summary: DataSummary, tokenizer: Any) -> Any:
    """The rows that are trained on: the task's, and behind them those that are mixed in."""
    folders = ["train", MIXED] if summary.mixed else ["train"]
    return opened(Rows(*(data / folder for folder in folders)), tokenizer)


def mixed_ranges(summary: DataSummary) -> tuple[MixedSource, ...]:
    """Where the rows of each mixed source lie among those that are trained on."""
    ends = accumulate((source.counts.rows for source in summary.mixed), initial=summary.splits["train"].rows)
    return tuple(
        MixedSource(range(start, end), source.rows_per_epoch)
        for source, (start, end) in zip(summary.mixed, pairwise(ends), strict=True)
    )


def _start_head(inputs: AttemptInputs, learning: Learning, head: Head, tokenizer: Any, device: torch.device) -> Probe:
    """Have a new head start from a linear probe of the untouched model, which is fitted once in a run folder."""
    inputs.recorder.phase(PROBING)
    with inputs.journal.during("evaluation"):  # memory as for an evaluation, and the same way out
        found = start_from_probe(learning, head, tokenizer, Path(inputs.request.run_folder), device)
    if inputs.observed.meter is not None:
        inputs.observed.meter.forget_peak()  # only one trial of a comparison fits it, and memory is compared
    if found.head is None:
        inputs.recorder.warn(f"no linear probe ({found.failure}): the head starts at random")
    return found


def start_from_probe(learning: Learning, head: Head, tokenizer: Any, folder: Path, device: torch.device) -> Probe:
    """Give a new head the run folder's linear probe, fitted when it is not there, or random values without one."""
    model, recipe, plan, target = learning.model, learning.recipe, learning.plan, learning.target
    together, reading = sharding.runs_together(model), contextlib.ExitStack()

    def extractor() -> probe.Extractor:
        draw_again(model, head, probe.SEED)
        reading.enter_context(sharding.read_by_block(model))
        return probe.Extractor(
            model if together else model.to(device),
            recipe.task,
            target,
            learning.pad_token_id,
            plan.eval_batch_size,
            plan.precision,
            class_weights(recipe, learning.summary),
            probe.separators(tokenizer, target),
        )

    train_rows, eval_rows = task_rows(folder / "data", tokenizer)
    with reading:
        found = probe.fitted(folder, extractor, train_rows, eval_rows, together=together)
    if not together:
        model.to("cpu")  # where the method draws its values, whoever has fitted the probe
    if found.head is None:
        draw_again(model, head, plan.seed)
    else:
        probe.put_head(model, folder, eased=recipe.method.kind != "head")
    return found
