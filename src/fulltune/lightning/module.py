"""The model of a run as a `LightningModule`: its loss, its optimizer and schedule, and the metrics of its task."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
import transformers
from lightning_utilities.core.rank_zero import rank_zero_warn
from transformers.training_args import OptimizerNames

from fulltune import methods
from fulltune.errors import SetupError
from fulltune.inference.run import logits_of, whole_numbers
from fulltune.inference.selective_head import SelectiveHead
from fulltune.lightning import settings
from fulltune.lightning.data import POSITIONS
from fulltune.methods.head import names_of
from fulltune.recipe.fields import Recipe
from fulltune.recipe.training import OWN_OPTIMIZERS
from fulltune.records.data import DataSummary
from fulltune.records.plan import Plan
from fulltune.tasks import Target, Task
from fulltune.tasks.padding import TRAINED
from fulltune.train.loop.trainer import ITEMS
from fulltune.train.optim import optimizers
from fulltune.train.optim.groups import planned_groups
from fulltune.train.worker import distributed
from fulltune.train.worker.learning import Learning
from fulltune.train.worker.scaling import Scaled

PREFIX = "eval_"
"""Before the names of the task's metrics."""
TRAIN_LOSS = "train_loss"


class FineTuningModule:
    """A model that is fully fine-tuned by a plan; see `based`.

    Logged are `train_loss`, the loss of each whole step over all processes, and after each validation the task's
    metrics, `eval_loss`, `eval_accuracy` ...; a schedule is followed step by step.

    Args:
        applied: The model, every parameter of which is trained.
        recipe: The recipe.
        plan: Its plan.
        summary: Of the prepared data.
        task: Of the recipe.
        tokenizer: The model's.
        head: Gives only the logits that the loss uses; None: gives all.
        scaled: The last layer of a head that learns numbers in other units.
    """

    # What the `LightningModule` beside has.
    trainer: Any
    device: Any
    log: Any
    train: Any
    load_state_dict: Any

    def __init__(
        self,
        applied: methods.Applied,
        recipe: Recipe,
        plan: Plan,
        summary: DataSummary,
        task: Task,
        tokenizer: Any,
        head: SelectiveHead | None,
        scaled: Scaled | None,
    ) -> None:
        super().__init__()
        self.model = applied.model
        self.applied, self.tokenizer, self.head, self.scaled = applied, tokenizer, head, scaled
        self.recipe, self.plan, self.task, self.summary = recipe, plan, task, summary
        self.learning = Learning(recipe, plan, summary, task, self.model, tokenizer.pad_token_id, lambda: self.target)
        self.shared_out_by = ""
        """The strategy that shared the weights out, so that this process does not have all of them."""
        self._items: torch.Tensor | float = 1.0
        """In the loss of the step at hand, over all processes."""
        self._step_loss: torch.Tensor | float = 0.0
        """This process's part of it so far."""
        self._scores: list[distributed.Part] = []
        self.train()  # a model is loaded for evaluation, and Lightning leaves it as it finds it

    @property
    def target(self) -> Target:
        """What is learned, with the units of the logits as they are now."""
        target = Target.of(self.summary)
        return target if self.scaled is None else replace(target, logit_scale=(self.scaled.shift, self.scaled.factor))

    @property
    def backward_factor(self) -> float:
        """What a micro batch's part of the step's loss is multiplied by, because Lightning divides each by the number
        of micro batches, and processes' gradients are averaged."""
        return self.trainer.accumulate_grad_batches * self.trainer.world_size * self.extra_factor

    @property
    def extra_factor(self) -> float:
        """DeepSpeed's engine divides by the number of micro batches once more (Lightning 2.6.6, DeepSpeed 0.19.8)."""
        twice = self.trainer.strategy.handles_gradient_accumulation
        return float(self.trainer.accumulate_grad_batches) if twice else 1.0

    # ---- training --------------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        """Refuse a Trainer that would train other global batches than planned.

        Raises:
            SetupError: Saying what differs.
        """
        trainer = self.trainer
        problems = settings.disagreements(self.plan, trainer.world_size, trainer.accumulate_grad_batches)
        strategy = settings.strategy_of([kind.__name__ for kind in type(trainer.strategy).__mro__])
        problems += settings.wrong_in_deepspeed(self.plan, self.summary, strategy, str(trainer.precision))
        if problems:
            raise SetupError(problems)
        if said := settings.misplaced(self.plan, strategy):
            rank_zero_warn(said)
        self.shared_out_by = "" if settings.holds_whole(strategy) else strategy

    def on_train_start(self) -> None:
        """As in a run, all processes begin with one seed; Lightning keeps no random state, so that a training which
        goes on draws other numbers than one that was not stopped."""
        transformers.set_seed(self.plan.seed + self.trainer.global_step)

    def on_train_epoch_start(self) -> None:
        """The draw that a run's loader takes at each epoch: so dropout draws the same numbers as there."""
        torch.empty((), dtype=torch.int64).random_()

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        """The loss of a micro batch as a part of its step's, which is a mean over the items of the global batch."""
        items = batch[ITEMS]
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            count = torch.as_tensor(items, dtype=torch.int64, device=self.device)
            self._items = self.trainer.strategy.reduce(count, reduce_op="sum")
            self._step_loss = 0.0
        loss = self._loss({name: one for name, one in batch.items() if name != ITEMS}) / self._items
        self._step_loss = self._step_loss + loss.detach().float()
        self._log_step(batch_idx)
        return loss * self.backward_factor

    def _log_step(self, batch_idx: int) -> None:
        trainer = self.trainer
        if (batch_idx + 1) % trainer.accumulate_grad_batches and not trainer.is_last_batch:
            return
        whole = self._step_loss * trainer.world_size  # each process has its part, and their mean is logged
        self.log(TRAIN_LOSS, whole, prog_bar=True, sync_dist=trainer.world_size > 1, batch_size=1)

    def _loss(self, batch: dict[str, Any]) -> torch.Tensor:
        """Of each item, summed."""
        labels, trained = batch.pop("labels"), batch.pop(TRAINED, None)
        wanted = labels
        selecting: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if self.head is not None:
            in_pieces = self.head.in_pieces and self.plan.chunked_loss
            selecting = self.head.only(labels, trained, in_pieces=in_pieces)
            wanted = self.head.wanted(labels).flatten().index_select(0, trained)
        with selecting:
            return self.learning.loss(self.model(**batch), wanted)

    # ---- scoring ---------------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        self._scores = []

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Keep a few numbers of each row."""
        positions, labels = batch.pop(POSITIONS), batch.pop("labels")
        selecting = (
            contextlib.nullcontext() if self.head is None else self.head.only(labels, in_pieces=self.head.in_pieces)
        )
        with selecting, whole_numbers(self.model, self.target):
            logits = logits_of(self.model(**batch))
        reduced = self.task.reduce(logits, labels, self.target)
        kept = {name: one if isinstance(one, np.ndarray) else one.cpu().numpy() for name, one in reduced.items()}
        self._scores.append(distributed.part_of(kept, positions))

    def on_validation_epoch_end(self) -> None:
        """The task's metrics of all processes' rows, which are the same in each."""
        parts, self._scores = [part for part in self._scores if part[0]], []
        if self.trainer.world_size > 1:
            every: list[Any] = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(every, parts)
            parts = [part for one in every for part in one]
        for name, value in self.task.metrics(distributed.merged(parts), self.target).items():
            self.log(PREFIX + name, float(value), prog_bar=name == self.plan.metric, sync_dist=True, batch_size=1)

    # ---- optimizer -------------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        """The plan's optimizer with its groups, and its schedule."""
        optimizer = self._optimizer()
        schedule = transformers.get_scheduler(
            self.plan.lr_scheduler_type,
            optimizer,
            num_warmup_steps=self.plan.warmup_steps,
            num_training_steps=self.plan.total_steps,
            scheduler_specific_kwargs=self.recipe.train.lr_scheduler_kwargs or None,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _optimizer(self) -> torch.optim.Optimizer:
        plan, train = self.plan, self.recipe.train
        heads = (
            () if plan.head_learning_rate is None else names_of(self.model, self.recipe.task, self.recipe.method.arm)
        )
        decayed = set(
            transformers.Trainer.get_decay_parameter_names(cast(Any, self), self.model)
        )  # reads nothing of it
        groups = planned_groups(self.model, decayed, plan, train.weight_decay, heads)
        # With mixed precision Lightning 2.6.6 clips no gradients of a fused optimizer, also with bf16.
        is_mixed = plan.precision != "fp32" and plan.weights_dtype == "fp32"
        unfused = plan.optim in OWN_OPTIMIZERS or (is_mixed and plan.optim == "adamw_torch_fused")
        name = "adamw_torch" if unfused else plan.optim
        given: Any = SimpleNamespace(
            **{name: getattr(train, name) for name in ("adam_beta1", "adam_beta2", "adam_epsilon")},
            **{"learning_rate": plan.learning_rate, "optim": OptimizerNames(name), "optim_args": None},
        )
        kind, options = transformers.Trainer.get_optimizer_cls_and_kwargs(given)
        own = optimizers.settings(plan.optim, plan.bf16_rounding, plan.seed)
        if own is not None:
            kind, options = optimizers.AdamW, {name: options[name] for name in ("lr", "betas", "eps")} | own
        if kind is torch.optim.AdamW and _is_offloaded(self.trainer.strategy):
            from deepspeed.ops.adam import DeepSpeedCPUAdam  # DeepSpeed takes no other one on the host

            kind, options = DeepSpeedCPUAdam, {name: options[name] for name in ("lr", "betas", "eps")}
        return kind(groups, **options)


def _is_offloaded(strategy: Any) -> bool:
    """DeepSpeed keeps the optimizer's state on the host."""
    config = getattr(strategy, "config", None)
    zero = config.get("zero_optimization", {}) if isinstance(config, dict) else {}
    return bool(zero.get("offload_optimizer"))
