from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import islice
from types import SimpleNamespace
from typing import Any, cast

import torch
import transformers
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase
from transformers.training_args import OptimizerNames

from fulltune.errors import SetupError, Spiked
from fulltune.inference.run import Batching, RowSubset, positions_by_length, run_rows
from fulltune.inference.selective_head import SelectiveHead
from fulltune.inference.store import Rows
from fulltune.methods.head import head_paths
from fulltune.recipe.training import OWN_OPTIMIZERS
from fulltune.tasks.padding import LENGTHS, TRAINED
from fulltune.train.loop import step_guard
from fulltune.train.loop.guarded_step import rows_in
from fulltune.train.loop.sampler import GlobalBatchSampler
from fulltune.train.loop.trainer import ITEMS, collate_with_counts
from fulltune.train.optim.groups import planned_optimizer
from fulltune.train.worker import distributed, loading
from fulltune.train.worker.loading import Objective

PREFIX = "eval_"


class FineTuningModule:
    """Fine-tunes all parameters as planned; `with_lightning_base` adds `LightningModule` as a base. It logs
    `train_loss` of each step over all processes, `eval_loss`, `eval_accuracy` and other eval metrics."""

    # Attributes of `LightningModule`.
    trainer: Any
    device: torch.device
    global_rank: int
    log: Callable[..., None]
    load_state_dict: Callable[..., object]

    def __init__(
        self,
        objective: Objective,
        tokenizer: PreTrainedTokenizerBase,
        head: SelectiveHead | None,
        rows: Rows,
        eval_rows: Rows,
    ) -> None:
        """Store the prepared model and rows. If `head` is None, all logits are computed."""
        super().__init__()
        self.objective, self.plan, self.model = objective, objective.plan, objective.model
        self.tokenizer, self.rows, self.eval_rows = tokenizer, rows, eval_rows
        self.head = head
        self.sharded_by = ""
        self.guard_history = step_guard.StepHistory()
        self._items: torch.Tensor | float = 1.0
        self._loss: torch.Tensor | float = 0.0
        self._rows = 0
        self._is_last = False
        self.model.train()  # it is loaded in evaluation mode, and Lightning does not change that

    def on_fit_start(self) -> None:
        """Raise `SetupError` for a Trainer whose global batches differ from the plan."""
        trainer, plan, summary = self.trainer, self.plan, self.objective.summary
        kinds = [kind.__name__ for kind in type(trainer.strategy).__mro__]
        in_deepspeed = "DeepSpeedStrategy" in kinds  # a subclass of DDPStrategy
        is_whole = not in_deepspeed and not {"SingleDeviceStrategy", "DDPStrategy"}.isdisjoint(kinds)
        self.sharded_by = "" if is_whole else kinds[0]
        passes, planned = trainer.accumulate_grad_batches, plan.gradient_accumulation_steps
        if (trainer.world_size, passes) != (plan.num_processes, planned):
            raise SetupError(
                f"Trainer: has world_size={trainer.world_size} and accumulate_grad_batches={passes}, but the plan "
                f"expects {plan.num_processes} and {planned} for a global batch of {plan.global_batch_size} rows; "
                f"call prepare(..., overrides=['train.num_processes={trainer.world_size}']), and give the Trainer "
                "job.trainer_arguments()"
            )
        last = summary.splits["train"].rows + sum(source.rows_per_epoch for source in summary.mixed)
        last %= plan.global_batch_size
        if in_deepspeed and 0 < last <= plan.global_batch_size - plan.micro_batch_size * plan.num_processes:
            raise SetupError(
                f"Trainer: an epoch's last step has fewer micro batches than {passes}, and DeepSpeed would add them to "
                "the next epoch's first step; set train.global_batch_size so that it is train.micro_batch_size times "
                "train.num_processes"
            )

    def on_train_start(self) -> None:
        # All processes start with one seed, as in a run. Lightning saves no random state: resuming changes the draws.
        transformers.set_seed(self.plan.seed + self.trainer.global_step)

    def on_train_epoch_start(self) -> None:
        # A run's loader draws once per epoch: with this draw, dropout has the same random numbers.
        torch.empty((), dtype=torch.int64).random_()

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        """Return this micro batch's loss, scaled so that Lightning's averages give the mean over the global batch."""
        trainer = self.trainer
        passes, processes = trainer.accumulate_grad_batches, trainer.world_size
        batch = dict(batch)
        items = batch.pop(ITEMS)
        if batch_idx % passes == 0:
            count = torch.as_tensor(items, dtype=torch.int64, device=self.device)
            self._items = trainer.strategy.reduce(count, reduce_op="sum")
            self._loss, self._rows = 0.0, 0
        self._rows += rows_in(batch)
        loss = self._summed_loss(batch) / self._items
        self._loss = self._loss + loss.detach().float()
        self._is_last = (batch_idx + 1) % passes == 0 or trainer.is_last_batch
        if self._is_last:  # the mean over processes is logged
            self.log("train_loss", self._loss * processes, prog_bar=True, sync_dist=processes > 1, batch_size=1)
        # Lightning divides by the number of micro batches and averages the gradients of processes. DeepSpeed's engine
        # divides by the number of micro batches once more (Lightning 2.6.6, DeepSpeed 0.19.8).
        return loss * processes * passes * (passes if trainer.strategy.handles_gradient_accumulation else 1)

    def _summed_loss(self, batch: dict[str, Any]) -> torch.Tensor:
        """Return the loss summed over the micro batch's rows or trained tokens."""
        labels, trained, head = batch.pop("labels"), batch.pop(TRAINED, None), self.head
        batch.pop(LENGTHS, None)
        if head is None:
            return self.objective.loss(self.model(**batch), labels)
        wanted = head.target_ids(labels).flatten().index_select(0, trained)
        with head.computing_only(labels, trained, chunked=head.can_chunk and self.plan.chunked_loss):
            return self.objective.loss(self.model(**batch), wanted)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Skip a step with a non-finite or outlying loss or gradient; raise `Spiked` if skipping does not help."""
        if not self._is_last:
            return  # DeepSpeed's strategy calls this after each micro batch
        trainer, step = self.trainer, self.trainer.global_step + 1
        values = [self._loss * trainer.world_size, self._rows]
        if not self.sharded_by:
            gradients = [parameter.grad for group in optimizer.param_groups for parameter in group["params"]]
            values.append(torch.nn.utils.get_total_norm([grad for grad in gradients if grad is not None]))
        own = torch.stack([torch.as_tensor(value, device=self.device).float() for value in values])
        loss, rows, norm = [*trainer.strategy.reduce(own, reduce_op="mean").tolist(), None][:3]
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        scaled = scaler is not None and scaler.get_scale() >= 1
        finite_only = not self.objective.recipe.train.skip_suspect_steps
        verdict = step_guard.judge_step(
            self.guard_history, step, loss, norm, rows=rows, is_loss_scaled=scaled, finite_only=finite_only
        )
        self.guard_history = verdict.history
        if verdict.action == "stop" or (verdict.action == "skip" and self.sharded_by):
            raise Spiked(f"step {step}, before the update: {verdict.reason}", verdict.since or step)
        if verdict.action == "skip":
            if trainer.is_global_zero:
                warnings.warn(f"step {step} is skipped: {verdict.reason}", stacklevel=2)
            optimizer.zero_grad(set_to_none=True)  # optimizers ignore parameters without gradients: moments stay

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["fulltune"] = asdict(self.guard_history)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.guard_history = step_guard.StepHistory.from_json(checkpoint["fulltune"])

    def validation_step(self, batch: object, batch_idx: int) -> None:
        """Log the task's metrics on all eval rows; `batch` is ignored."""
        trainer, plan, objective = self.trainer, self.plan, self.objective
        order, size = positions_by_length(self.eval_rows), plan.eval_batch_size
        positions, count = distributed.rows_of_rank(order, size, trainer.global_rank, trainer.world_size)
        rows, batching = RowSubset(self.eval_rows, positions), Batching(size, plan.precision, self.head)
        reduced = run_rows(self.model, rows, objective.task, objective.target, objective.pad_token_id, batching)
        predictions = distributed.gather_scores(reduced, positions[:count])
        for name, value in objective.task.metrics(predictions, objective.target).items():
            self.log(PREFIX + name, float(value), prog_bar=name == plan.metric, sync_dist=True, batch_size=1)

    def configure_optimizers(self) -> dict[str, Any]:
        plan, recipe = self.plan, self.objective.recipe
        # With mixed precision Lightning 2.6.6 does not clip gradients of a fused optimizer.
        is_mixed = plan.precision != "fp32" and plan.weights_dtype == "fp32"
        unfused = plan.optim in OWN_OPTIMIZERS or (is_mixed and plan.optim == "adamw_torch_fused")
        arguments = SimpleNamespace(
            **recipe.train.model_dump(include={"adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay"}),
            learning_rate=plan.learning_rate,
            optim=OptimizerNames("adamw_torch" if unfused else plan.optim),
            optim_args=None,
        )
        heads = () if plan.head_learning_rate is None else head_paths(self.model, recipe.task, recipe.method.label)
        kind, groups, options = planned_optimizer(self.model, plan, arguments, heads)
        config = getattr(self.trainer.strategy, "config", None) or {}
        if kind is torch.optim.AdamW and config.get("zero_optimization", {}).get("offload_optimizer"):
            from deepspeed.ops.adam import DeepSpeedCPUAdam  # DeepSpeed accepts no other optimizer on the host

            kind, options = DeepSpeedCPUAdam, {name: options[name] for name in ("lr", "betas", "eps")}
        optimizer = kind(groups, **options)
        steps, more = (plan.warmup_steps, plan.total_steps), recipe.train.lr_scheduler_kwargs or None
        schedule = transformers.get_scheduler(plan.lr_scheduler_type, optimizer, *steps, more)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class TrainBatches:
    """Iterates over one process's micro batches. Each batch contains, as `ITEMS`, the process's number of rows or
    trained tokens in the whole step. This is not a `DataLoader`, because Lightning would replace the sampler."""

    def __init__(self, module: FineTuningModule, trainer: Any) -> None:
        self.module, self.trainer = module, trainer
        plan = module.plan
        batches = (plan.global_batch_size, plan.micro_batch_size, plan.seed, plan.group_by_length, trainer.world_size)
        mixed = loading.mixed_sources(module.objective.summary)
        classes = module.rows["labels"] if module.objective.recipe.train.sampling == "balanced" else None
        self.sampler = GlobalBatchSampler(module.rows["length"], *batches, mixed=mixed, classes=classes)
        self.position = 0
        self.first = 0
        """Number of micro batches that the next epoch skips after resuming."""

    def __len__(self) -> int:
        return len(self.sampler) // self.sampler.num_processes

    def __iter__(self) -> Iterator[dict[str, Any]]:
        plan, objective, head = self.module.plan, self.module.objective, self.module.head
        self.sampler.set_epoch(self.trainer.current_epoch)
        self.position, self.first = self.first, 0
        # Processes take batches in turn, as in accelerate.
        own = list(islice(self.sampler, self.trainer.global_rank, None, self.sampler.num_processes))
        loader: DataLoader[Any] = DataLoader(
            cast("Any", self.module.rows),
            batch_sampler=own[self.position :],
            collate_fn=lambda rows: collate_with_counts(rows, objective.collate, objective.task.count_items, head),
            num_workers=plan.loader_workers,
            multiprocessing_context="fork" if plan.loader_workers else None,
            pin_memory=plan.device != "cpu",
            # The loader draws a seed, which must not come from dropout's generator.
            generator=torch.Generator().manual_seed(plan.seed),
        )
        batches = iter(loader)
        while step := list(islice(batches, plan.gradient_accumulation_steps)):
            items = sum(batch[ITEMS] for batch in step)
            for batch in step:
                self.position += 1
                yield batch | {ITEMS: items}

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position % len(self)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.first = state["position"]


class FineTuningData:
    """Data loaders that yield a recipe's rows in a run's order; `with_lightning_base` adds `LightningDataModule`."""

    trainer: Any

    def __init__(self, module: FineTuningModule) -> None:
        super().__init__()
        self.module = module

    def train_dataloader(self) -> TrainBatches:
        return TrainBatches(self.module, self.trainer)

    def val_dataloader(self) -> range:
        return range(1)  # the module scores all eval rows in one validation step
