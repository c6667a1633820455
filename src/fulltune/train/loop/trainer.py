from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import AutocastKwargs, broadcast_object_list
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainerCallback
from transformers.integrations.deepspeed import deepspeed_load_checkpoint
from transformers.trainer import SCHEDULER_NAME

from fulltune.inference.selective_head import SelectiveHead
from fulltune.models import sharding
from fulltune.models.experts import recording
from fulltune.records.events import StepSkipped
from fulltune.tasks import Row
from fulltune.tasks.padding import LENGTHS, TRAINED, trained_positions
from fulltune.text import first_few
from fulltune.train import checkpoints
from fulltune.train.loop.contrastive import ContrastiveLoss
from fulltune.train.loop.guarded_step import Guarded
from fulltune.train.loop.inputs import AttemptInputs
from fulltune.train.loop.parts import ExpertLoad, TrainingPart
from fulltune.train.loop.sampler import GlobalBatchSampler, MixedSource
from fulltune.train.loop.step_guard import StepHistory, StepVerdict, learning_rate_factor
from fulltune.train.optim import fsdp2, optimizers
from fulltune.train.optim.groups import planned_optimizer

_MAX_NAMED_ROWS = 32
ITEMS = "num_items"

Collate = Callable[[list[Row]], dict[str, Any]]


def _leave_process_group(worker: int) -> None:
    os.setpgrp()  # a stop signal must not reach the worker: the last step needs rows


def collate_with_counts(
    rows: list[Row],
    collate: Collate,
    count_items: Callable[[torch.Tensor], int],
    head: SelectiveHead | None,
) -> dict[str, Any]:
    """Collate rows; add the number of items in the loss, packed rows' lengths and, with a selective head, the trained
    positions. All are computed on the host, because reading them from the device is slow."""
    batch = collate(rows)
    batch = batch | {ITEMS: count_items(batch["labels"])}
    if "position_ids" in batch:
        batch[LENGTHS] = torch.tensor([len(row["input_ids"]) for row in rows])
    if head is not None:
        batch[TRAINED] = trained_positions(head.target_ids(batch["labels"]))
    return batch


class FullTrainer(Guarded, Trainer):
    """The `transformers.Trainer` of a run."""

    head: SelectiveHead | None = None
    """Selective head, or None if the model computes all logits."""
    contrast: ContrastiveLoss | None = None
    parts: Sequence[TrainingPart] = ()
    experts: ExpertLoad | None = None

    def __init__(
        self,
        inputs: AttemptInputs,
        *,
        lengths: Sequence[int],
        mixed: tuple[MixedSource, ...] = (),
        head_modules: Sequence[str] = (),
        base_digest: str | None = None,
        **keywords: Any,
    ) -> None:
        """Create the Trainer for train rows with these `lengths` in tokens. Modules in `head_modules` get their own
        learning rate. `base_digest` is a hash of the pretrained weights, or None if they are sharded."""
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
            cast("Any", self.train_dataset)["labels"] if inputs.recipe.train.sampling == "balanced" else None,
        )
        if self.is_shared:
            # The cache would keep a 16-bit copy of each weight until the forward pass ends, and each unit is gathered
            # again for its backward pass anyway.
            self.accelerator.autocast_handler = AutocastKwargs(cache_enabled=False)
        self.skips = inputs.recipe.train.skip_suspect_steps and not inputs.has_own_loss
        self._journal, self._recorder = inputs.journal, inputs.recorder
        self._base_digest, self._head_modules = base_digest, head_modules
        self._keeps_best = inputs.recipe.train.load_best_model_at_end
        self.count_items = inputs.task.count_items
        self.trained_only = inputs.recipe.method.kind != "full"

    @property
    def is_shared(self) -> bool:
        return sharding.is_fsdp2_sharded(self.model)

    @property
    def forward_model(self) -> nn.Module:
        """DeepSpeed's engine if used, else the model."""
        return self.model_wrapped if self.is_deepspeed_enabled else self.model

    @property
    def train_rows(self) -> Sequence[Row]:
        return cast("Sequence[Row]", self.train_dataset)

    @property
    def eval_rows(self) -> Sequence[Row]:
        return cast("Sequence[Row]", self.eval_dataset)

    def add_parts(self, parts: Sequence[TrainerCallback]) -> None:
        """Add callbacks; `TrainingPart`s among them also get their additional hooks."""
        self.parts = [*self.parts, *(part for part in parts if isinstance(part, TrainingPart))]
        for part in parts:
            self.add_callback(part)

    def guard_state(self) -> dict[str, Any]:
        """Return the state of the step guard and all parts for a checkpoint, by name."""
        state = asdict(self.guard_history) | {"base_weights": self._base_digest}
        for part in self.parts:
            state |= part.state()
        return state

    def restore_guard_state(self, state: Mapping[str, Any]) -> None:
        self.guard_history = StepHistory.from_json(state)
        for part in self.parts:
            part.resume(state)

    def write_heartbeat(self, *_: object) -> None:
        """Write a heartbeat, but not during the dry run's scoring."""
        if self.is_in_train:
            self._journal.write_heartbeat(self.state.global_step)

    def agreed(self, value: Any) -> Any:
        """Return rank 0's value if ranks share a sharded model, else this process's own."""
        return broadcast_object_list([value])[0] if self.is_shared or self.is_deepspeed_enabled else value

    def on_skip(self, step: int, verdict: StepVerdict) -> None:
        """Record a skipped step with its reason and train rows."""
        rows = sorted(next(self.sampler.batches_of_steps(step - 1, step)))
        named = first_few([f"{row + 1:,}" for row in rows], _MAX_NAMED_ROWS)
        self._journal.write("skipped", f"step {step}: {verdict.reason}; train rows {named}")
        self._recorder.write(StepSkipped(step=step, reason=verdict.reason, rows=tuple(rows)))

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LRScheduler:
        """Create the Trainer's schedule with learning rates lowered by past rollbacks."""
        schedule: Any = super().create_scheduler(num_training_steps, optimizer)
        if (lower := learning_rate_factor(self._plan.rollbacks)) < 1:
            schedule.lr_lambdas = [lambda step, theirs=theirs: theirs(step) * lower for theirs in schedule.lr_lambdas]
        return schedule

    def lower_rates(self) -> None:
        """Lower the learning rates restored from the checkpoint, according to past rollbacks."""
        if learning_rate_factor(self._plan.rollbacks) == 1:
            return
        schedule = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)  # accelerate's wrapper
        groups = self.optimizer.param_groups
        for group, rate, factor in zip(groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
            group["lr"] = rate * factor(schedule.last_epoch)
        schedule._last_lr = [group["lr"] for group in groups]  # what is logged

    def computing_needed_logits(
        self, labels: torch.Tensor, trained_positions: torch.Tensor | None = None, *, all_logits: bool = False
    ) -> contextlib.AbstractContextManager[None]:
        """Return a context in which the model computes only the logits that the loss needs. They are chunked if
        planned, unless `all_logits` is set. By default `trained_positions` are derived from `labels`."""
        if self.head is None:
            return contextlib.nullcontext()
        chunked = self.head.can_chunk and self._plan.chunked_loss and not all_logits
        return self.head.computing_only(labels, trained_positions, chunked=chunked)

    def collated(self, rows: list[Row]) -> dict[str, Any]:
        return collate_with_counts(rows, cast("Collate", self.data_collator), self.count_items, self.head)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Train on one micro batch. Before a step's first one, parts add gradients; a contrastive loss reads all."""
        if not self.batches:
            for part in self.parts:
                part.add_gradient()
            if self.contrast is not None and len(self._micro_batches) > 1:
                self.contrast.begin_step(model, self._micro_batches)
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *rest: Any, **keywords: Any) -> Any:
        """Compute the loss; with a selective head, only from trained tokens' logits."""
        inputs = dict(inputs)
        labels, trained, _ = inputs["labels"], inputs.pop(TRAINED, None), inputs.pop(LENGTHS, None)
        items = inputs.pop(ITEMS, 1)
        if self.head is not None and trained is not None:
            inputs["labels"] = self.head.target_ids(labels).flatten().index_select(0, trained)
        if self.contrast is not None:
            self.contrast.restore_random_state()
        with self.computing_needed_logits(labels, trained), recording() as routing:
            loss = super().compute_loss(model, inputs, *rest, **keywords)
        if self.experts is not None:
            share = items / keywords.get("num_items_in_batch", 1)
            loss = loss + self.experts.after_pass(routing, inputs.get("attention_mask"), share)
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs | (self.experts.logged() if self.experts is not None and "loss" in logs else {}), start_time)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        # This is not logged, and the Trainer would walk through all modules at each micro batch.
        return 0

    def _clip_grad_norm(self, model: nn.Module) -> torch.Tensor | float | None:
        """Clip gradients as the Trainer does, but faster on a CPU; return the unclipped norm."""
        if self.args.device.type != "cpu" or self.is_deepspeed_enabled or self.is_shared:
            return super()._clip_grad_norm(model)
        # Same numbers as the Trainer, which multiplies all gradients by 1 if there is nothing to clip.
        parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
        norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        if norm + 1e-6 > self.args.max_grad_norm:
            nn.utils.clip_grads_with_norm_(parameters, self.args.max_grad_norm, norm)
        return norm

    def get_train_dataloader(self) -> DataLoader[Row]:
        loader = DataLoader(
            cast("Dataset[Row]", self.train_dataset),
            batch_sampler=self.sampler,
            collate_fn=self.collated,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            persistent_workers=self.args.dataloader_persistent_workers,
            multiprocessing_context=self.args.dataloader_multiprocessing_context,
            in_order=self.args.dataloader_in_order,
            worker_init_fn=_leave_process_group,
        )
        return self.accelerator.prepare(loader)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> torch.Tensor:
        # The Trainer counts every label that is not -100: each label of a row for multi_label, and no number -100.0 for
        # regression. Filled on the device: copying would make the host wait.
        self._micro_batches = [{name: one for name, one in batch.items() if name != ITEMS} for batch in batch_samples]
        count = torch.full((), sum(batch[ITEMS] for batch in batch_samples), dtype=torch.int64, device=device)
        count = self.accelerator.reduce(count, reduction="sum") if self.args.world_size > 1 else count
        return count.clamp(min=1)  # none if no row of an embedding's batch has a positive

    def load_weights(self, checkpoint: Path) -> None:
        """Load a checkpoint's weights, sharded or not."""
        if self.is_deepspeed_enabled:
            deepspeed_load_checkpoint(self.model_wrapped, str(checkpoint))
        elif fsdp2.is_sharded_checkpoint(checkpoint):
            fsdp2.load_weights(self.model, checkpoint, self.trained_only)
        else:
            checkpoints.load_weights(self.model, checkpoint, self.trained_only)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.load_weights(Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load a checkpoint's optimizer and scheduler, sharded or not; do nothing for None."""
        if checkpoint is None or not (self.is_shared or fsdp2.is_sharded_checkpoint(Path(checkpoint))):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        # The Trainer (transformers 5.24) refuses it.
        fsdp2.load_optimizer(self.model, self.optimizer.optimizer, Path(checkpoint))
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))
        for group, rate in zip(self.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = rate

    @contextlib.contextmanager
    def _defer_fsdp_gradient_reduction(self) -> Iterator[None]:
        # The Trainer keeps unsharded gradients until a step's last micro batch: as much memory as unsharded weights.
        yield

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save a checkpoint, including the sharded state and guard state that the Trainer does not save."""
        with self._journal.phase_within("saving"):
            super()._save_checkpoint(model, trial)
            folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
            if self.is_shared:  # the Trainer does not save these then
                state = fsdp2.sharded_optimizer_state(self.model, self.optimizer.optimizer)
                fsdp2.save_sharded_checkpoint(self.model, state, folder, self.trained_only)
                if self.args.should_save:
                    torch.save(self.lr_scheduler.state_dict(), folder / SCHEDULER_NAME)
                self._save_scaler(str(folder))
                self._save_rng_state(str(folder))
            if self.args.should_save:
                checkpoints.save_guard_state(folder, self.guard_state())

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the weights as the Trainer does; if they are sharded, only create the folder."""
        if self.is_shared or self.is_deepspeed_enabled:  # the Trainer would gather the whole model in one process
            Path(str(output_dir)).mkdir(parents=True, exist_ok=True)  # each rank writes its shard beside it
        else:
            super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Save the processor and the weights (for LoRA and similar methods, only the trained ones)."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir or ".")
        if self.trained_only:
            checkpoints.save_trained_weights(self.model, folder)
        else:  # under the names that are trained: in the original format experts have others
            self.model.save_pretrained(folder, state_dict=state_dict, save_original_format=False)
        cast("Any", self.processing_class).save_pretrained(folder)

    def evaluate(self, *_: object, **__: object) -> dict[str, float]:
        """Score the eval rows without changing the random state; return metrics prefixed with `eval_`."""
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            metrics = {f"eval_{name}": value for part in self.parts for name, value in part.scores().items()}
        if self.args.world_size > 1:
            # Last digits can differ between ranks, and with them early stopping: rank 0 decides.
            metrics = broadcast_object_list([metrics])[0]
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Set the step with the best weights, as a part chooses it, or else the Trainer by the metric alone."""
        chosen = next(filter(None, (part.chosen_step() for part in self.parts)), None)
        if chosen is None:
            return bool(super()._determine_best_metric(metrics, trial))
        before, (self.state.best_global_step, self.state.best_metric) = self.state.best_global_step, chosen
        return chosen[0] != before

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        plan, model = self._plan, self.model if model is None else model
        own = optimizers.adamw_arguments(plan.optim, plan.bf16_rounding, plan.seed) is not None
        if self.optimizer is None and (own or plan.layerwise_lr_decay != 1.0 or plan.head_learning_rate is not None):
            kind, groups, options = planned_optimizer(model, plan, self.args, self._head_modules)
            self.optimizer = kind(groups, **options)
        return super().create_optimizer(model)

    @contextlib.contextmanager
    def zero_rate_optimizer(self) -> Iterator[torch.optim.Optimizer]:
        """Yield an optimizer like the run's, but with learning rate and weight decay 0, so that no weight changes. ZeRO
        is not supported."""
        sharding.free_gathered_weights(self.model)
        present, self.optimizer = self.optimizer, None
        optimizer = self.create_optimizer()
        self.optimizer = present
        for group in optimizer.param_groups:
            group.update(lr=0.0, weight_decay=0.0)
        try:
            yield optimizer
        finally:
            self.model.zero_grad(set_to_none=True)
