from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fulltune.models.experts import Routing, expert_modules, find_router_loss
from fulltune.records.training import describe_unreached, expert_shares
from fulltune.train.loop.inputs import AttemptInputs


class TrainingPart(TrainerCallback):
    """A Trainer callback with five additional hooks."""

    def add_gradient(self) -> None:
        """Add gradients before a step's first micro batch."""

    def scores(self) -> Mapping[str, float]:
        """Return the metrics of an evaluation, without the `eval_` prefix."""
        return {}

    def chosen_step(self) -> tuple[int, float] | None:
        """Return the step whose weights to keep and its metric, or None if this part does not choose."""
        return None

    def state(self) -> Mapping[str, Any]:
        """Return values and arrays for the checkpoint, under names that no other part uses."""
        return {}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Restore this part from `state`, a checkpoint's values of all parts."""


class ExpertLoad(TrainingPart):
    """Balances the experts of a mixture with the router loss, and counts the tokens that train each, over all ranks."""

    def __init__(self, inputs: AttemptInputs, trainer: Trainer, model: PreTrainedModel) -> None:
        modules = expert_modules(model)
        self._inputs, self._trainer, self._loss = inputs, trainer, find_router_loss(model)
        sizes = 3, len(modules), len(next(modules[0].parameters()))  # since step 1, before this epoch, in this step
        self._counts = torch.zeros(sizes, dtype=torch.int64, device=trainer.args.device)
        self.tokens, self._before_epoch, self._of_step = self._counts
        self._sums = torch.zeros(2, device=trainer.args.device)

    def after_pass(self, routing: Routing, mask: Tensor | None, share: Tensor | float) -> Tensor | float:
        """Take a micro batch's routing; return 0 with the gradient of its router loss: the loss stays as it is."""
        is_counted = self._trainer.is_in_train  # not in the dry run
        for counts, chosen in zip(self._of_step, routing.chosen, strict=True) if is_counted else ():
            real = torch.ones_like(chosen) if mask is None else mask.flatten()[:, None].expand_as(chosen)
            counts.scatter_add_(0, chosen.flatten(), real.flatten())
        if self._loss is None:
            return 0.0
        # Each micro batch balances its own tokens, as in transformers: this loss is no sum over rows. Its weight is the
        # micro batch's share of what the step's loss counts; transformers' Trainer adds it unweighted.
        loss = share * self._loss(routing, mask)
        if is_counted:
            self._sums += torch.stack([loss.detach(), torch.as_tensor(share, device=loss.device)])
        # The Trainer averages gradients over ranks.
        return self._trainer.accelerator.num_processes * (loss - loss.detach())

    def logged(self) -> dict[str, float]:
        loss, weight = self._trainer.accelerator.reduce(self._sums, reduction="sum").tolist()
        self._sums = torch.zeros_like(self._sums)
        return {"router_loss": loss / weight} if weight else {}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        if args.world_size > 1:
            torch.distributed.all_reduce(self._of_step)
        self.tokens += self._of_step
        self._of_step.zero_()

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        unreached = describe_unreached(expert_shares((self.tokens - self._before_epoch).tolist()))
        self._before_epoch.copy_(self.tokens)
        if unreached and abs(round(epoch := state.epoch or 0.0) - epoch) < 1e-6:  # training may end within an epoch
            self._inputs.warn(f"epoch {epoch:.0f}: {unreached}")

    def state(self) -> Mapping[str, np.ndarray]:
        return {"expert_tokens": self._counts.cpu().numpy()}

    def resume(self, state: Mapping[str, np.ndarray]) -> None:
        self._counts.copy_(torch.from_numpy(state["expert_tokens"]))
