"""The model as training starts with it, and the trainer around it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.integrations.integration_utils import TensorBoardCallback

from fulltune import methods, probe
from fulltune.forgetting.budget import LANGUAGE, STATES
from fulltune.forgetting.generic_text import parts
from fulltune.inference.run import by_length, logits_of, model_batch
from fulltune.inference.store import MIXED, Rows
from fulltune.methods.head import names_of
from fulltune.models import dropout, sharding
from fulltune.models.base import Base, opened
from fulltune.models.checkpoint_head import Head, draw, draw_again
from fulltune.models.kernels import compile_blocks, put_kernels
from fulltune.models.load import load
from fulltune.recipe.fields import Recipe
from fulltune.records.data import DataSummary
from fulltune.records.events import StepSkipped
from fulltune.records.forgetting import limit_of
from fulltune.records.plan import Plan
from fulltune.records.probe import Probe
from fulltune.system import deepspeed
from fulltune.tasks import LossSettings, Target, Task, task_named
from fulltune.tasks.settings import class_weights
from fulltune.text import first_few
from fulltune.train import checkpoints
from fulltune.train.loop.arguments import training_arguments
from fulltune.train.loop.callbacks import MEASUREMENTS, AtBegin, Heartbeat, Seals, StopWhenDiverged, UpdateMeter
from fulltune.train.loop.sampler import Mixed
from fulltune.train.loop.trainer import FullTrainer
from fulltune.train.run_time import PROBING
from fulltune.train.worker import distributed, scaling, weights
from fulltune.train.worker.against_start import AgainstStart, score_first
from fulltune.train.worker.context import AttemptContext
from fulltune.train.worker.drifting import DriftMonitor
from fulltune.train.worker.passes import batch_of
from fulltune.train.worker.replay import Replay, Steering

_MOST_NAMED = 32
"""Rows of a skipped step."""
_MOST_LOGITS = 2**24
"""Of generic text at once: 64 MiB."""


def load_for_training(
    recipe: Any,
    task: Task,
    target: Target,
    before_weights: Callable[[], None] = lambda: None,
    on_head: Callable[[Head], None] = lambda head: None,
    before_method: Callable[[Any, Any], None] = lambda model, processor: None,
    shared_by: int = 1,
) -> tuple[methods.Applied, Any]:
    """The pretrained model with head and method, and the tokenizer; `before_method` gets the untouched model."""
    base = Base.of(recipe.model, recipe.task, recipe.data.chat_template)
    model = load(
        base,
        task.config_changes(target, base.processor),
        head_is_new=task.FACTS.head_is_new,
        before_weights=before_weights,
        on_head=on_head,
        shared_by=shared_by,
    )
    if deepspeed.wanted(recipe):
        weights.forget_unused_conversions(model)
    before_method(model, base.processor)
    copied = names_of(model, recipe.task, recipe.method.arm) if recipe.method.kind in ("lora", "peft") else ()
    with sharding.whole_while_copied(model, copied):
        applied = methods.apply(model, recipe.method, recipe.task)
    weights.give_one_type(model)
    return applied, base.processor


@dataclass(frozen=True)
class Learning:
    """What training makes of a run's rows, a batch and its loss, for transformers' Trainer and Lightning's."""

    recipe: Recipe
    plan: Plan
    summary: DataSummary
    task: Task
    model: Any
    pad_token_id: int
    target: Callable[[], Target]
    """What is learned, with the units of the logits as they are when it is asked."""

    @cached_property
    def _settings(self) -> LossSettings:
        weights = class_weights(self.recipe, self.summary)
        return LossSettings(self.recipe.train.label_smoothing_factor, weights)

    def collate(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """A batch of rows, as the model reads it: `input_ids[rows, tokens]`, `labels` and what else the task gives."""
        return model_batch(self.model, self.task, features, self.pad_token_id)

    def loss(self, outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        """labels[rows] or [rows, tokens]; the model's logits[rows, ..., classes or vocabulary]."""
        summed = self.task.loss(logits_of(outputs), labels, self.target(), self._settings)
        return summed / (num_items_in_batch if num_items_in_batch is not None else 1)


def make_trainer(attempt: AttemptContext) -> tuple[Any, Any]:
    """Load the model and the rows, and put the trainer together; returns the train and the eval rows."""
    plan, recipe, task, target = attempt.plan, attempt.recipe, attempt.task, attempt.target
    attempt.recorder.phase("loading the model")
    transformers.logging.disable_progress_bar()
    if attempt.in_deepspeed and attempt.sharing is not None and attempt.is_main:
        offload = attempt.sharing.offload_optimizer
        distributed.build_extensions(plan.device == "cpu", offload, attempt.recorder.phase)
    # Before the model: with DeepSpeed's stage 3 its weights are shared out while they are read.
    arguments = training_arguments(recipe, plan, attempt.request.checkpoints)
    if attempt.in_deepspeed:
        distributed.start_deepspeed(arguments)
    transformers.set_seed(plan.seed)
    begin = partial(attempt.observed.measure, plan.device, task.FACTS.writes)
    attempt.applied, tokenizer = load_for_training(
        *(recipe, task, target, begin, partial(setattr, attempt, "head")),
        partial(_untouched, attempt, arguments.device),
        plan.num_processes if plan.placement == "fsdp2" else 1,
    )
    model = attempt.applied.model
    make_faster(model, recipe, plan, attempt.summary)
    _, eval_rows = task_rows(attempt.data, tokenizer)
    rows = rows_with_mixed(attempt.data, attempt.summary, tokenizer)
    learning = Learning(recipe, plan, attempt.summary, task, model, tokenizer.pad_token_id, lambda: attempt.target)
    attempt.trainer = FullTrainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        eval_dataset=eval_rows,
        data_collator=learning.collate,
        processing_class=tokenizer,
        compute_loss_func=attempt.hooks.compute_loss or learning.loss,
        lengths=rows["length"],
        mixed=mixed_ranges(attempt.summary),
        plan=plan,
        score=lambda: attempt.scores(eval_rows),
        count_items=task.count_items,
        journal=attempt.journal,
        trained_only=recipe.method.kind != "full",
        head_modules=() if plan.head_learning_rate is None else names_of(model, recipe.task, recipe.method.arm),
        skips=recipe.train.skip_suspect_steps and attempt.hooks.compute_loss is None,
        on_skip=partial(_say_skipped, attempt),
        on_repeat=partial(_say_repeated, attempt),
        callbacks=_callbacks(attempt),
    )
    attempt.trainer.remove_callback(transformers.PrinterCallback)
    for callback in attempt.trainer.callback_handler.callbacks:
        # Beside the checkpoints' folder, which is deleted; TENSORBOARD_LOGGING_DIR goes first.
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = str(attempt.request.tensorboard)
    attempt.drifting = DriftMonitor(
        plan,
        recipe.preserve,
        attempt.summary.form.reads_any_text,
        attempt.trainer,
        tokenizer,
        attempt.journal,
        attempt.recorder.warn,
        attempt.alive,
    )
    attempt.drifting.open_texts(Path(attempt.request.run_folder))
    attempt.trainer.generic_identity = attempt.drifting.identity
    attempt.trainer.base_weights = attempt.base_weights
    _replay(attempt)
    _scale(attempt, rows)
    attempt.recorder.tokens = lambda: float(attempt.trainer.tokens_seen)
    return rows, eval_rows


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


def _replay(attempt: AttemptContext) -> None:
    """Train generic text along, where the plan does; the model is still the untouched one."""
    plan, trainer = attempt.plan, attempt.trainer
    if plan.preserving is None or not plan.preserving.replay_rows or attempt.request.probe:
        return
    rows = plan.preserving.replay_rows
    with attempt.journal.during("evaluation"):  # memory as for an evaluation, and the same way out
        text = attempt.drifting.text_of(parts(attempt.recipe.preserve).replayed[: plan.total_steps * rows])
    # No more tokens at once than a micro batch has, and of a language model no more logits than are small; one text
    # where activations are recomputed, which happens in training mode alone.
    at_once = plan.micro_batch_size * attempt.summary.max_length // attempt.drifting.most_tokens
    if text.writes:
        at_once = min(at_once, _MOST_LOGITS // (attempt.drifting.most_tokens * trainer.model.config.vocab_size))
    at_once = 1 if plan.activation_checkpointing else max(1, min(rows, at_once))
    weighing = LANGUAGE if text.writes else STATES
    limit = limit_of(plan.preserving.budget, text.writes)
    trainer.replay = replay = Replay(text, rows, at_once, plan.seed, weighing.first / limit)
    attempt.recorder.phase("reading generic text with the untouched model")
    with attempt.journal.during("evaluation"):
        replay.remember(trainer, attempt.alive)
    trainer.add_callback(Steering(attempt, replay, limit, weighing, plan.preserving.steer_steps))


def _scale(attempt: AttemptContext, rows: Rows) -> None:
    """Have a head learn numbers in units of their spread, where that can be undone."""
    if attempt.summary.scale is None:
        return
    probed = attempt.head_start is not None and attempt.head_start.head is not None
    two = None if attempt.in_deepspeed else batch_of(attempt.trainer, [rows[i] for i in by_length(rows)[-2:]])
    attempt.scaled, attempt.about_scale = scaling.scaled_head(
        attempt.applied.model,
        attempt.summary.scale,
        two,
        attempt.plan.precision,
        gives_numbers=probed or (attempt.head is not None and attempt.head.order is not None),
        own_loss=attempt.hooks.compute_loss is not None,
    )


def task_rows(data: Path, tokenizer: Any) -> list[Any]:
    """The task's prepared train and eval rows, from the folder of a run's data."""
    return [opened(Rows(data / split), tokenizer) for split in ("train", "eval")]


def rows_with_mixed(data: Path, summary: DataSummary, tokenizer: Any) -> Any:
    """The rows that are trained on: the task's, and behind them those that are mixed in."""
    folders = ["train", MIXED] if summary.mixed else ["train"]
    return opened(Rows(*(data / folder for folder in folders)), tokenizer)


def mixed_ranges(summary: DataSummary) -> tuple[Mixed, ...]:
    """Where the rows of each mixed source lie among those that are trained on."""
    ends = accumulate((source.counts.rows for source in summary.mixed), initial=summary.splits["train"].rows)
    return tuple(
        Mixed(range(start, end), source.rows_per_epoch)
        for source, (start, end) in zip(summary.mixed, pairwise(ends), strict=True)
    )


def _untouched(attempt: AttemptContext, device: torch.device, model: Any, tokenizer: Any) -> None:
    """What the pretrained model is asked for before any method is applied."""
    if sharding.is_shared(model):  # each process has drawn its own part; from here on all are as one alone
        transformers.set_seed(attempt.plan.seed)
        if attempt.head is not None and attempt.head.order is None:
            draw(model, attempt.head)
    if sharding.is_shared(model) or not sharding.runs_together(model):  # DeepSpeed's parts are not told from others
        attempt.base_weights = checkpoints.weights_seen(model)
    _start_head(attempt, device, model, tokenizer)


def _start_head(attempt: AttemptContext, device: torch.device, model: Any, tokenizer: Any) -> None:
    """Have a new head start from a linear probe of the untouched model, which is fitted once in a run folder."""
    request, plan, head = attempt.request, attempt.plan, attempt.head
    if plan.head_init == "random" or request.probe or head is None or head.order is not None:
        return
    attempt.recorder.phase(PROBING)
    with attempt.journal.during("evaluation"):  # memory as for an evaluation, and the same way out
        attempt.head_start = start_from_probe(
            *(model, head, attempt.recipe, plan, attempt.summary),
            *(tokenizer, Path(request.run_folder), device),
        )
    if attempt.observed.meter is not None:
        attempt.observed.meter.forget_peak()  # only one trial of a comparison fits it, and memory is compared
    if attempt.head_start.head is None:
        attempt.recorder.warn(f"no linear probe ({attempt.head_start.why_not}): the head starts at random")


def start_from_probe(
    model: Any,
    head: Head,
    recipe: Recipe,
    plan: Plan,
    summary: DataSummary,
    tokenizer: Any,
    folder: Path,
    device: torch.device,
) -> Probe:
    """Give a new head the run folder's linear probe, fitted when it is not there, or random values without one."""
    target, together = Target.of(summary), sharding.runs_together(model)
    reading = contextlib.ExitStack()

    def extractor() -> probe.Extractor:
        draw_again(model, head, probe.SEED)
        reading.enter_context(sharding.read_by_block(model))
        return probe.Extractor(
            model if together else model.to(device),
            recipe.task,
            target,
            tokenizer.pad_token_id,
            plan.eval_batch_size,
            plan.precision,
            class_weights(recipe, summary),
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


def _say_skipped(attempt: AttemptContext, step: int, reason: str, rows: list[int]) -> None:
    """In the journal, and to whoever listens."""
    named = first_few([f"{row + 1:,}" for row in sorted(rows)], _MOST_NAMED)
    attempt.journal.write("skipped", f"step {step}: {reason}; train rows {named}")
    attempt.recorder.write(StepSkipped(step=step, reason=reason, rows=tuple(sorted(rows))))


def _say_repeated(attempt: AttemptContext, text: str) -> None:
    attempt.journal.write("computed again", text)
    attempt.recorder.warn(text)


def _callbacks(attempt: AttemptContext) -> list[transformers.TrainerCallback]:
    request, observed = attempt.request, attempt.observed
    seals = Seals(
        request.checkpoints,
        attempt.recipe.train.save_total_limit,
        lambda: observed.disk(request.checkpoints, *request.all_initial_weights),
        attempt.journal,
    )
    # A loss of the user's own may rise for good reasons.
    judged = attempt.hooks.compute_loss is None
    guards = [StopWhenDiverged(lambda: attempt.untrained_loss, attempt.highest_rate)] if judged else []
    attempt.at_begin += [lambda: attempt.journal.at("step"), lambda: score_first(attempt)]
    begins, alive = AtBegin(attempt.at_begin), Heartbeat(attempt.journal)
    total, warm_up = attempt.plan.total_steps, attempt.plan.warmup_steps
    meter = UpdateMeter(
        every=max(1, total // MEASUREMENTS),
        first=min(warm_up + 2, total // 2),
        say=attempt.recorder.write,
        warn=attempt.recorder.warn,
        was_skipped=lambda step: step in attempt.trainer.seen.skipped,
        rounds_on_average=attempt.plan.bf16_rounding in ("stochastic", "kahan"),
    )
    meters = [] if attempt.in_deepspeed else [meter]
    watching = [*meters, attempt.recorder, *guards, AgainstStart(attempt, judged)]
    return [begins, alive, *watching, attempt.early_stopping, seals, attempt.stop]
