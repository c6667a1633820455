"""transformers' `Trainer` as a run uses it: our order of the rows, evaluation, checkpoints and optimizers."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import AutocastKwargs, broadcast_object_list
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainerCallback
from transformers.trainer import SCHEDULER_NAME

from fulltune.inference.selective_head import SelectiveHead
from fulltune.models import sharding
from fulltune.records.events import StepSkipped
from fulltune.tasks.padding import TRAINED, trained_places
from fulltune.text import first_few
from fulltune.train import checkpoints
from fulltune.train.loop.guarded_step import Guarded
from fulltune.train.loop.inputs import AttemptInputs
from fulltune.train.loop.sampler import GlobalBatchSampler, Mixed
from fulltune.train.loop.step_guard import Judged, StepMemory, rate_factor
from fulltune.train.optim import fsdp2, optimizers, zero
from fulltune.train.optim.groups import planned_optimizer

_MOST_NAMED = 32
"""Rows of a skipped step."""
ITEMS = "num_items"
"""Of a batch, the number of items in its loss."""


def _out_of_the_group(worker: int) -> None:
    """Move the DataLoader worker to its own process group so that stop signals do not reach it."""
    if hasattr(os, "setpgrp"):  # not on Windows; rows are needed until the last step is saved
        os.setpgrp()


def collated(
    rows: list[Any],
    collate: Callable[[list[Any]], dict[str, Any]],
    count_items: Callable[[torch.Tensor], int],
    head: SelectiveHead | None,
) -> dict[str, Any]:
    """A batch on the host, with what would have to be read from the device later: the number of `ITEMS` in its loss,
    and for a selective head which places are `TRAINED`."""
    batch = collate(rows)
    known: dict[str, Any] = {ITEMS: count_items(batch["labels"])}
    if head is not None:
        known[TRAINED] = trained_places(head.wanted(batch["labels"]))
    return batch | known


class TrainingPart(TrainerCallback):
    """A part of training: acts at transformers' events, and where these are not enough. All parts are listed
    in `train/worker/attempt.py: _parts`."""

    def add_gradient(self) -> None:
        """Before the first micro batch of a step."""

    def scores(self) -> Mapping[str, float]:
        """What it measures at an evaluation, by name, without a prefix."""
        return {}

    def state(self) -> Mapping[str, Any]:
        """What it keeps in a checkpoint, in one record with the others: plain values and arrays, by its own names."""
        return {}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Take back what all parts kept in the checkpoint that a run resumes from."""


class FullTrainer(Guarded, Trainer):
    """The `transformers.Trainer` of a run.

    Args:
        mixed: Which of the train rows are mixed into the task's.
        head_modules: Names of the modules that learn at a rate of their own.
        base_weights: Tells the pretrained weights from others; None: a process has only a part of them.
    """

    head: SelectiveHead | None = None
    """Gives only the logits that the loss uses; None gives all."""
    parts: Sequence[TrainingPart] = ()
    """In the order in which they act."""

    def __init__(
        self,
        inputs: AttemptInputs,
        *,
        lengths: Sequence[int],
        mixed: tuple[Mixed, ...] = (),
        head_modules: Sequence[str] = (),
        base_weights: str | None = None,
        **keywords: Any,
    ) -> None:
        super().__init__(**keywords)
        plan = self._plan = inputs.plan
        self.sampler = GlobalBatchSampler(
            lengths,
            plan.global_batch_size,
            self.args.per_device_train_batch_size,
            self.args.seed,
            plan.group_by_length,
            self.args.world_size,
            plan.rollbacks,
            mixed,
        )
        if self.is_shared:
            # Its cache would hold a copy in 16 bits of each weight until the forward pass ends, and the unit is put
            # together anew for its backward pass in any case.
            self.accelerator.autocast_handler = AutocastKwargs(cache_enabled=False)
        self.skips = inputs.recipe.train.skip_suspect_steps and not inputs.has_own_loss
        self._journal, self._recorder = inputs.journal, inputs.recorder
        self._base_weights, self._head_modules = base_weights, head_modules
        self.count_items = inputs.task.count_items
        self.trained_only = inputs.recipe.method.kind != "full"

    @property
    def is_shared(self) -> bool:
        """FSDP2 shares out the model."""
        return sharding.is_shared(self.model)

    @property
    def passing(self) -> Any:
        """The module that forward passes use: DeepSpeed's engine where there is one, else the model."""
        return self.model_wrapped if self.is_deepspeed_enabled else self.model

    def add_parts(self, parts: Sequence[TrainerCallback]) -> None:
        """Have these act, in this order."""
        self.parts = [*self.parts, *(part for part in parts if isinstance(part, TrainingPart))]
        for part in parts:
            self.add_callback(part)

    def resume_parts(self, state: Mapping[str, Any]) -> None:
        """Give the guard and all parts what they kept in a checkpoint."""
        self.seen = StepMemory.from_json(state)
        for part in self.parts:
            part.resume(state)

    def alive(self, *_: Any) -> None:
        """Give a sign of life; the dry run scores rows, too, and is not watched."""
        if self.is_in_train:
            self._journal.alive(self.state.global_step)

    def agreed(self, value: Any) -> Any:
        """What the first process has, where all take part in what follows."""
        return broadcast_object_list([value])[0] if self.is_shared or self.is_deepspeed_enabled else value

    def on_skip(self, step: int, judged: Judged) -> None:
        rows = sorted(next(self.sampler.steps(step - 1, step)))
        named = first_few([f"{row + 1:,}" for row in rows], _MOST_NAMED)
        self._journal.write("skipped", f"step {step}: {judged.reason}; train rows {named}")
        self._recorder.write(StepSkipped(step=step, reason=judged.reason, rows=tuple(rows)))

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The Trainer's scheduler, scaled down after rollbacks."""
        schedule: Any = super().create_scheduler(num_training_steps, optimizer)
        if (lower := rate_factor(self._plan.rollbacks)) < 1:
            schedule.lr_lambdas = [lambda step, theirs=theirs: theirs(step) * lower for theirs in schedule.lr_lambdas]
        return schedule

    def lower_rates(self) -> None:
        """Reset the learning rates restored from the checkpoint to the reduced rate."""
        if rate_factor(self._plan.rollbacks) == 1:
            return
        schedule: Any = self.lr_scheduler
        schedule = getattr(schedule, "scheduler", schedule)  # accelerate's wrapper
        groups = cast("Any", self.optimizer).param_groups
        for group, rate, factor in zip(groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
            group["lr"] = rate * factor(schedule.last_epoch)
        schedule._last_lr = [group["lr"] for group in groups]  # what is logged

    def selecting(
        self, labels: torch.Tensor, trained: torch.Tensor | None = None, *, whole: bool = False
    ) -> contextlib.AbstractContextManager[None]:
        """Inside, the model gives only the logits that the loss uses, when it can: chunked by the plan, or `whole`."""
        if self.head is None:
            return contextlib.nullcontext()
        in_pieces = self.head.in_pieces and self._plan.chunked_loss and not whole
        return self.head.only(labels, trained, in_pieces=in_pieces)

    def collated(self, rows: list[Any]) -> dict[str, Any]:
        """See the function of this name."""
        return collated(rows, self.data_collator, self.count_items, self.head)

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        if not self.batches:
            for part in self.parts:
                part.add_gradient()
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(self, model: Any, inputs: Any, *rest: Any, **keywords: Any) -> Any:
        inputs = dict(inputs)
        labels, trained = inputs["labels"], inputs.pop(TRAINED, None)
        if self.head is not None and trained is not None:
            inputs["labels"] = self.head.wanted(labels).flatten().index_select(0, trained)
        with self.selecting(labels, trained):
            return super().compute_loss(model, inputs, *rest, **keywords)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        # A figure for logs that we do not show; theirs walks through all modules at each micro batch.
        return 0

    def _clip_grad_norm(self, model: Any) -> Any:
        if self.args.device.type != "cpu" or self.is_deepspeed_enabled or self.is_shared:
            return super()._clip_grad_norm(model)
        # The same numbers as theirs, which multiplies all gradients by 1 when there is nothing to clip.
        parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters])
        if norm + 1e-6 > self.args.max_grad_norm:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.args.max_grad_norm, norm)
        return norm

    def get_train_dataloader(self) -> DataLoader[Any]:
        loader = DataLoader(
            cast("Dataset[Any]", self.train_dataset),
            batch_sampler=self.sampler,
            collate_fn=self.collated,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            persistent_workers=self.args.dataloader_persistent_workers,
            multiprocessing_context=self.args.dataloader_multiprocessing_context,
            in_order=self.args.dataloader_in_order,
            worker_init_fn=_out_of_the_group,
        )
        return self.accelerator.prepare(loader)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> torch.Tensor:
        # Theirs counts every label that is not -100: each of a row's labels for multi_label, no number -100.0 for
        # regression.
        # Filled there: a number that is copied has the host wait until the device has come so far.
        count = torch.full((), sum(batch.pop(ITEMS) for batch in batch_samples), dtype=torch.int64, device=device)
        return self.accelerator.reduce(count, reduction="sum") if self.args.world_size > 1 else count

    def load_weights(self, checkpoint: Path) -> None:
        """Put a checkpoint's weights into the model, wherever they lie."""
        if self.is_deepspeed_enabled:
            zero.load_weights(self.model_wrapped, checkpoint)
        elif fsdp2.is_in(checkpoint):
            fsdp2.load_weights(self.model, checkpoint, self.trained_only)
        else:
            checkpoints.load_weights(self.model, checkpoint, self.trained_only)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.load_weights(Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not (self.is_shared or fsdp2.is_in(Path(checkpoint))):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        # Theirs refuses what was shared out (transformers 5.24).
        optimizer: Any = self.optimizer
        fsdp2.load_optimizer(self.model, optimizer.optimizer, Path(checkpoint))
        schedule: Any = self.lr_scheduler
        schedule.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))
        for group, rate in zip(optimizer.param_groups, schedule.get_last_lr(), strict=True):
            group["lr"] = rate

    @contextlib.contextmanager
    def _defer_fsdp_gradient_reduction(self) -> Iterator[None]:
        # Theirs keeps whole gradients until a step's last micro batch: as much memory as whole weights.
        yield

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        with self._journal.during("saving"):
            super()._save_checkpoint(model, trial)
            folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
            if self.is_shared:  # what the Trainer leaves out of a checkpoint then
                optimizer, schedule = cast("Any", self.optimizer), cast("Any", self.lr_scheduler)
                fsdp2.save(self.model, fsdp2.state_of(self.model, optimizer.optimizer), folder, self.trained_only)
                if self.args.should_save:
                    torch.save(schedule.state_dict(), folder / SCHEDULER_NAME)
                self._save_scaler(str(folder))
                self._save_rng_state(str(folder))
            if self.args.should_save:
                state = asdict(self.seen) | {"base_weights": self._base_weights}
                for part in self.parts:
                    state |= part.state()
                checkpoints.save_guard_state(folder, state)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if self.is_shared or self.is_deepspeed_enabled:  # theirs would put the whole model together in one process
            Path(str(output_dir)).mkdir(parents=True, exist_ok=True)  # each process writes its part beside it
        else:
            super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not self.trained_only:
            super()._save(output_dir, state_dict)
        elif self.args.should_save:
            folder = Path(output_dir or self.args.output_dir or ".")
            checkpoints.save_trained(self.model, folder)
            cast("Any", self.processing_class).save_pretrained(folder)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Score the eval rows, drawing no random number that training would miss; the best step is chosen by it."""
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            metrics = {f"eval_{name}": value for part in self.parts for name, value in part.scores().items()}
        if self.args.world_size > 1:
            # The last digits can differ between processes, and with them the decision to stop early: rank 0 decides.
            metrics = broadcast_object_list([metrics])[0]
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Theirs, unless the plan has an optimizer of ours or more rates than one."""
        plan, model = self._plan, self.model if model is None else model
        own = optimizers.settings(plan.optim, plan.bf16_rounding, plan.seed) is not None
        if self.optimizer is None and (own or plan.layerwise_lr_decay != 1.0 or plan.head_learning_rate is not None):
            kind, groups, options = planned_optimizer(model, plan, self.args, self._head_modules)
            self.optimizer = kind(groups, **options)
        return super().create_optimizer(model)

    @contextlib.contextmanager
    def rehearsal(self) -> Iterator[torch.optim.Optimizer]:
        """The run's optimizer for one step that changes no weight: rate and decay are 0. Not in an engine."""
        sharding.free(self.model)
        present, self.optimizer = self.optimizer, None
        optimizer = self.create_optimizer()
        self.optimizer = present
        for group in optimizer.param_groups:
            group.update(lr=0.0, weight_decay=0.0)
        try:
            yield optimizer
        finally:
            self.model.zero_grad(set_to_none=True)
