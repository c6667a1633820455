from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import accumulate, pairwise
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments
from transformers.integrations.integration_utils import TensorBoardCallback
from transformers.utils.generic import ModelOutput

from fulltune import methods, probe
from fulltune.inference.run import Batching, autocast, extract_logits, model_batch, positions_by_length, run_rows
from fulltune.inference.store import MIXED, Rows, make_record_batch, write_rows
from fulltune.methods.head import find_output_layer, head_paths, rescale_outputs, rescaled_parameters
from fulltune.models import dropout, evaluation_mode, experts, load, sharding
from fulltune.models.base import Base, with_decoded_images
from fulltune.models.kernels import apply_liger_kernels, compile_blocks
from fulltune.models.load import HeadOrigin, initialise_missing, initialise_missing_from_seed, load_model
from fulltune.probe.features import FeatureExtractor, pair_separators
from fulltune.recipe.fields import Recipe
from fulltune.records.data import DataSummary
from fulltune.records.plan import Plan
from fulltune.records.probe import Probe
from fulltune.records.training import Check
from fulltune.stream.files import files_digest
from fulltune.stream.training import streamed_of
from fulltune.tasks import LossSettings, Row, Target, Task, causal_lm, task_named
from fulltune.tasks.columns import in_batches
from fulltune.tasks.labels import class_weights
from fulltune.text import format_percent
from fulltune.train import checkpoints
from fulltune.train.journal import CHOOSING, PROBING
from fulltune.train.loop.arguments import training_arguments
from fulltune.train.loop.contrastive import ContrastiveLoss
from fulltune.train.loop.inputs import AttemptInputs
from fulltune.train.loop.sampler import MixedSource
from fulltune.train.loop.streamed import StreamedTrainer
from fulltune.train.loop.trainer import FullTrainer
from fulltune.train.optim import zero
from fulltune.train.worker import distributed, streamed

NEGATIVES = "negatives/check.json"  # in the run folder, saved after the rows beside it


def load_pretrained(
    recipe: Recipe,
    task: Task,
    target: Target,
    before_weights: Callable[[], None] = lambda: None,
    num_ranks: int = 1,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, HeadOrigin | None]:
    """Load the pretrained model with the task's head. Returns the model, its processor, and the head's origin or None.
    `before_weights` is called just before reading weights."""
    base, heads = Base.from_block(recipe.model, recipe.task, recipe.data.chat_template), list[HeadOrigin]()
    model = load_model(
        base,
        task.config_changes(target, base.processor),
        head_is_new=task.FACTS.head_is_new,
        before_weights=before_weights,
        on_head=heads.append,
        num_ranks=num_ranks,
    )
    if recipe.train.zero_enabled_by:
        zero.remove_unused_conversions(model)
    return model, base.processor, heads[0] if heads else None


def apply_method(model: PreTrainedModel, recipe: Recipe) -> methods.AppliedMethod:
    """Apply the recipe's method, such as LoRA, to a model that may be sharded."""
    copied = head_paths(model, recipe.task, recipe.method.label) if recipe.method.kind in ("lora", "peft") else ()
    with sharding.unsharded_while_copied(model, copied):
        applied = methods.apply_method(model, recipe.method, recipe.task)
    zero.cast_to_model_dtype(model)
    return applied


@dataclass(frozen=True)
class Objective:
    """Collates rows and computes their loss, for the Trainer of transformers or Lightning."""

    recipe: Recipe
    plan: Plan
    summary: DataSummary
    task: Task
    model: PreTrainedModel
    pad_token_id: int
    target: Target

    @cached_property
    def _loss_settings(self) -> LossSettings:
        return LossSettings(self.recipe.train.label_smoothing_factor, class_weights(self.recipe, self.summary))

    def collate(self, features: Sequence[Row]) -> dict[str, torch.Tensor]:
        """Collate train rows into `input_ids[rows or blocks, tokens]`, `labels` and the task's other inputs."""
        if self.plan.packing:
            return causal_lm.collate_packed(features, self.pad_token_id)
        return model_batch(self.model, self.task, features, self.pad_token_id)

    def loss(
        self, outputs: ModelOutput, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Sum the loss over logits[rows, ..., classes or vocabulary] and labels[rows] or [rows, tokens], and divide by
        `num_items_in_batch` if set."""
        summed = self.task.loss(extract_logits(outputs), labels, self.target, self._loss_settings)
        return summed / (num_items_in_batch if num_items_in_batch is not None else 1)


# ---- regression: numbers are learned in units of their spread, as AdamW moves a value by at most the rate a step ---


@dataclass(frozen=True)
class ScaledHead:
    """The last layer of a head that learns `(number - shift) / factor`."""

    layer: torch.nn.Linear
    shift: float
    factor: float

    def restore_units(self, model: PreTrainedModel) -> None:
        """Rescale the layer so that the trained model predicts in the user's units."""
        parameters = dict(self.layer.named_parameters())
        if not any(map(zero.is_in_engine, parameters.values())):
            sharding.free_gathered_weights(model)
            rescale_outputs(self.layer, self.shift, self.factor)
            return
        tensors = {name: zero.gather_tensor(parameter) for name, parameter in parameters.items()}
        for name, values in rescaled_parameters(tensors, self.shift, self.factor).items():
            zero.set_values(parameters[name], values)


def scale_head(
    model: PreTrainedModel,
    scale: tuple[float, float],
    batch: dict[str, torch.Tensor] | None,
    precision: str,
    *,
    predicts_numbers: bool,
    own_loss: bool = False,
) -> tuple[ScaledHead | None, str]:
    """Make the head's last layer learn standardized numbers; return the layer, or None if impossible, and a note.
    `scale` is (mean, standard deviation). `batch` is used to test that the model outputs the layer's values.
    `predicts_numbers` is True if the layer was already trained to predict numbers. `own_loss` (the user's loss)
    prevents scaling."""
    layer, problem = find_output_layer(model, 1), ""
    if own_loss:
        problem = "you supply the loss"
    elif streamed_of(model) is not None:
        problem = "the weights are on a disk"
    elif layer is None or not layer.weight.requires_grad:
        problem = "no last layer with one output was found in the head"
    elif batch is not None and not _returns_layer_output(model, layer, batch, precision):
        problem = "the model changes the output of its head's last layer"
    if problem or layer is None:
        return None, f"it learns the numbers unscaled: {problem}"
    mean, spread = scale
    # Without a bias the numbers can only be divided.
    shift, factor = (mean, spread) if layer.bias is not None else (0.0, math.hypot(mean, spread))
    sharding.free_gathered_weights(model)
    if predicts_numbers:
        rescale_outputs(layer, -shift / factor, 1 / factor)
    minus = f"(number - {shift:.6g})" if shift else "number"
    return (
        ScaledHead(layer, shift, factor),
        f"it learns {minus} / {factor:.6g}; the saved model predicts the numbers themselves",
    )


def _returns_layer_output(
    model: PreTrainedModel, layer: torch.nn.Linear, batch: dict[str, torch.Tensor], precision: str
) -> bool:
    """Return whether the model outputs this layer's values unchanged."""
    layer_outputs = list[torch.Tensor]()
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    hook = layer.register_forward_hook(lambda _, inputs, output: layer_outputs.append(output))
    with hook, evaluation_mode(model), torch.no_grad(), autocast(model, precision):
        logits = model(**inputs).logits
    return len(layer_outputs) == 1 and bool(torch.isin(logits.float(), layer_outputs[0].float()).all())


# ---- model, rows and trainer --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LoadedModel:
    arguments: TrainingArguments
    applied: methods.AppliedMethod
    tokenizer: PreTrainedTokenizerBase
    rows: Rows
    eval_rows: Rows
    objective: Objective
    head: HeadOrigin | None
    head_start: Probe | None
    scaled: ScaledHead | None
    scale_note: str | None
    base_digest: str | None
    """Digest of the pretrained weights, or None if ZeRO shards them."""


def load_for_training(inputs: AttemptInputs) -> LoadedModel:
    """Load model and rows, apply the method, and prepare them as planned."""
    plan, recipe, task, summary = inputs.plan, inputs.recipe, inputs.task, inputs.summary
    target = replace(Target.of(summary), loss_rows=plan.global_batch_size)
    inputs.recorder.phase("loading the model")
    transformers.logging.disable_progress_bar()
    if inputs.in_engine and inputs.layout is not None and inputs.is_main:
        zero.build_extensions(plan.device == "cpu", inputs.layout.offload_optimizer, inputs.recorder.phase)
    # Before the model: ZeRO stage 3 shards weights while they are read.
    arguments = training_arguments(recipe, plan, inputs.request.checkpoints)
    if inputs.in_engine:
        zero.init_process_group(arguments)
    transformers.set_seed(plan.seed)
    begin = partial(inputs.usage.start_measuring, plan.device, task.FACTS.writes)
    num_ranks = plan.num_processes if plan.placement == "fsdp2" else 1
    if inputs.is_streamed:
        model, tokenizer, head, source = streamed.load_skeleton(recipe, task, target, begin)
    else:
        model, tokenizer, head = load_pretrained(recipe, task, target, begin, num_ranks)
    if sharding.is_fsdp2_sharded(model):  # each rank has drawn its shard; from here on all have the same random state
        transformers.set_seed(plan.seed)
        if head is not None and head.has_new_rows:
            initialise_missing(model, head)
    in_zero = sharding.needs_all_ranks(model) and not sharding.is_fsdp2_sharded(model)
    base_digest = None if in_zero or inputs.is_streamed else checkpoints.weights_digest(model)
    head_start, objective = None, Objective(recipe, plan, summary, task, model, tokenizer.pad_token_id, target)
    if plan.head_init != "random" and not inputs.request.probe and head is not None and head.has_new_rows:
        head_start = _init_head_and_record(inputs, objective, head, tokenizer, arguments.device)
    rows = rows_with_negatives(inputs, objective, arguments) if recipe.data.hard_negatives else None
    applied = apply_method(model, recipe)
    model = applied.model
    install_speedups(model, recipe, plan, summary)
    experts.watch(model)
    if inputs.is_streamed:
        streamed.open_state(inputs, model, source)
        base_digest = files_digest(source.stored)
    elif not inputs.in_engine and not sharding.needs_all_ranks(model):
        model.to(arguments.device)  # type: ignore[arg-type]  # a wrapped method
    rows = rows or rows_with_mixed(inputs.data, summary, tokenizer)
    scaled, scale_note = None, None
    if summary.scale is not None:
        two_rows = None
        if not inputs.in_engine:
            batch = model_batch(model, task, [rows[i] for i in positions_by_length(rows)[-2:]], tokenizer.pad_token_id)
            two_rows = {name: tensor.to(arguments.device) for name, tensor in batch.items()}
        has_trained_head = head is not None and head.order is not None
        has_probe_head = head_start is not None and head_start.head is not None
        scaled, scale_note = scale_head(
            model,
            summary.scale,
            two_rows,
            plan.precision,
            predicts_numbers=has_probe_head or has_trained_head,
            own_loss=inputs.has_own_loss,
        )
    if scaled is not None:
        target = replace(target, logit_scale=(scaled.shift, scaled.factor))
    return LoadedModel(
        arguments=arguments,
        applied=applied,
        tokenizer=tokenizer,
        rows=rows,
        eval_rows=task_rows(inputs.data, tokenizer)[1],
        objective=replace(objective, model=model, target=target),
        head=head,
        head_start=head_start,
        scaled=scaled,
        scale_note=scale_note,
        base_digest=base_digest,
    )


def make_trainer(inputs: AttemptInputs, loaded: LoadedModel) -> FullTrainer:
    plan, recipe, objective = inputs.plan, inputs.recipe, loaded.objective
    model = loaded.applied.model
    trainer_class = StreamedTrainer if inputs.is_streamed else FullTrainer
    trainer = trainer_class(
        inputs,
        model=model,
        args=loaded.arguments,
        train_dataset=loaded.rows,
        eval_dataset=loaded.eval_rows,
        data_collator=objective.collate,
        processing_class=loaded.tokenizer,
        compute_loss_func=inputs.hooks.compute_loss or objective.loss,
        lengths=loaded.rows["length"],
        mixed=mixed_sources(inputs.summary),
        head_modules=() if plan.head_learning_rate is None else head_paths(model, recipe.task, recipe.method.label),
        base_digest=loaded.base_digest,
    )
    if objective.task.FACTS.contrasts and inputs.hooks.compute_loss is None:
        losses = partial(objective.task.row_losses, sizes=recipe.train.matryoshka)
        trainer.contrast = trainer.compute_loss_func = ContrastiveLoss(losses, trainer.accelerator)
    trainer.remove_callback(transformers.PrinterCallback)
    for callback in trainer.callback_handler.callbacks:
        # Its default is inside the checkpoints' folder, which is deleted; TENSORBOARD_LOGGING_DIR takes precedence.
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = str(inputs.request.tensorboard)
    return trainer


def install_speedups(model: PreTrainedModel, recipe: Recipe, plan: Plan, summary: DataSummary) -> None:
    """Apply Liger's kernels if the recipe enables them. Compile blocks if planned, or else use faster dropout on
    CPU."""
    if recipe.train.use_liger_kernel:
        apply_liger_kernels(model)
    if plan.torch_compile:
        # Packed rows have one length, and images one size.
        same_sizes = summary.packed or task_named(recipe.task).FACTS.reads == "image"
        compile_blocks(model, plan.device, dynamic=None if same_sizes else True)
    elif plan.device == "cpu":
        dropout.replace_dropout(model)


def task_rows(data: Path, tokenizer: PreTrainedTokenizerBase) -> list[Rows]:
    return [with_decoded_images(Rows(data / split), tokenizer) for split in ("train", "eval")]


def rows_with_mixed(data: Path, summary: DataSummary, tokenizer: PreTrainedTokenizerBase) -> Rows:
    folders = ["train", MIXED] if summary.mixed else ["train"]
    return with_decoded_images(Rows(*(data / folder for folder in folders)), tokenizer)


def mixed_sources(summary: DataSummary) -> tuple[MixedSource, ...]:
    """Return each mixed-in source with its row numbers."""
    ends = accumulate((source.counts.rows for source in summary.mixed), initial=summary.splits["train"].rows)
    return tuple(
        MixedSource(range(start, end), source.rows_per_epoch)
        for source, (start, end) in zip(summary.mixed, pairwise(ends), strict=True)
    )


def rows_with_negatives(inputs: AttemptInputs, objective: Objective, arguments: TrainingArguments) -> Rows:
    """Return the train rows with hard negatives, which the first attempt chooses with the untouched model."""
    model, task, plan = objective.model, objective.task, objective.plan
    count, size, together = objective.recipe.data.hard_negatives, plan.eval_batch_size, sharding.needs_all_ranks(model)
    record, rows = inputs.data.parent / NEGATIVES, Rows(inputs.data / "train")
    if record.exists():
        return Rows(record.parent)
    inputs.recorder.phase(CHOOSING)
    placed = model if together else model.to(arguments.device)  # type: ignore[arg-type]  # a wrapped method
    options = task, objective.target, objective.pad_token_id, Batching(size, plan.precision)
    with inputs.journal.phase_within("evaluation"):  # it needs memory as an evaluation does, with the same fallbacks
        predictions = distributed.predict_shared(rows, size, arguments, lambda some: run_rows(placed, some, *options))
        if inputs.is_main:
            chosen, share = task.choose_negatives(predictions, count, str(arguments.device))
            joined = (task.with_negatives(rows[i], [rows[int(n)] for n in of]) for i, of in enumerate(chosen))
            write_rows(record.parent, (make_record_batch(part, [""] * len(part)) for part in in_batches(joined)))
            result = f"{count} in each row; {format_percent(share)} of the nearest may be false negatives and come last"
            Check(name="hard negatives", result=result, passed=True).save(record)
    if not together:
        model.to("cpu")  # type: ignore[arg-type]  # the method must draw its values on the CPU
    if inputs.usage.meter is not None:
        inputs.usage.meter.reset_peak()
    distributed.all_gather(None)  # the other processes wait until the rows are written
    return Rows(record.parent)


def _init_head_and_record(
    inputs: AttemptInputs,
    objective: Objective,
    head: HeadOrigin,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
) -> Probe:
    """Initialise the head from a linear probe; warn if fitting failed."""
    inputs.recorder.phase(PROBING)
    with inputs.journal.phase_within("evaluation"):  # it needs memory as an evaluation does, with the same fallbacks
        probed = init_head_from_probe(objective, head, tokenizer, Path(inputs.request.run_folder), device)
    if inputs.usage.meter is not None:
        inputs.usage.meter.reset_peak()  # only one trial of a comparison fits it, and memory is compared
    if probed.head is None:
        inputs.recorder.warn(f"no linear probe ({probed.failure}), so the head starts at random")
    return probed


def init_head_from_probe(
    objective: Objective, head: HeadOrigin, tokenizer: PreTrainedTokenizerBase, folder: Path, device: torch.device
) -> Probe:
    """Initialise a new head from the run folder's linear probe, fitting the probe if it is missing. If fitting fails,
    the head is random."""
    model, recipe, plan, target = objective.model, objective.recipe, objective.plan, objective.target
    together, reading = sharding.needs_all_ranks(model), contextlib.ExitStack()

    def create_extractor() -> FeatureExtractor:
        """Initialise the new head and return the model's feature extractor."""
        initialise_missing_from_seed(model, head, probe.SEED)
        reading.enter_context(sharding.callable_before_engine(model))
        return FeatureExtractor(
            model if together else model.to(device),  # type: ignore[arg-type]  # a wrapped method
            recipe.task,
            target,
            objective.pad_token_id,
            plan.eval_batch_size,
            plan.precision,
            class_weights(recipe, objective.summary),
            pair_separators(tokenizer, target),
            keeps_dense=bool(head.known_rows),
        )

    train_rows, eval_rows = task_rows(folder / "data", tokenizer)
    with reading:
        probed = probe.load_or_fit_probe(folder, create_extractor, train_rows, eval_rows, on_all_ranks=together)
    if not together:
        model.to("cpu")  # type: ignore[arg-type]  # the method must draw its values on the CPU, whether the probe was fitted here or before
    if probed.head is None:
        initialise_missing_from_seed(model, head, plan.seed)
    else:
        probe.initialise_head_from_probe(model, folder, for_training=recipe.method.kind != "head")
        load.restore_known_rows(model, head)
    return probed
