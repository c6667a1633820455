"""One training step: transformers' own, with a guard before its update.

The loop is transformers' (`Trainer._run_epoch`, 5.24). For each micro batch it calls `training_step`, which calls
`compute_loss` and runs the backward pass; after a global batch's last one it clips, calls `_get_grad_norm` and takes
the optimizer's step. These three methods are overridden here, so that no loss or gradient that is not finite reaches
the weights; what else of the Trainer differs is in `trainer.py`.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from fulltune.errors import Diverged
from fulltune.tasks.padding import IGNORED
from fulltune.train.loop.guards import WINDOW, not_finite
from fulltune.train.optim.in_backward import InBackward


class GuardedStep:
    """Mixin for a `Trainer`: sees each loss and gradient norm and stops before a bad update.

    A callback could not do this: it sees the norm only after clipping and after the update. With several processes the
    loss is reduced over all of them once per optimizer step, so that all stop together; otherwise the healthy ones
    would wait for the broken one. DeepSpeed updates inside its backward pass: there each loss is judged before it, and
    a gradient norm that is not finite makes DeepSpeed itself leave the update out. With `InBackward` each loss is
    judged before it as well, and each gradient by its hook.
    """

    # What the `Trainer` beside this mixin has.
    accelerator: Any
    args: Any
    model: Any
    state: Any
    is_deepspeed_enabled: Any

    passes_per_row: int = 1
    """A batch has its rows so many times."""
    in_backward: InBackward | None = None
    """The optimizer, when it updates in the backward pass."""
    tokens_seen: torch.Tensor | int = 0
    tensors_with_gradient: frozenset[str] = frozenset()
    largest_grad_norm: float | None = None
    first_loss: float | None = None
    """Of the first step here, before its update."""
    last_losses: tuple[float, ...] = ()
    """Of the last `2 * WINDOW` steps."""
    _losses: torch.Tensor | float = 0.0
    """Sum of this step's micro batches so far."""

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Forward and backward of one micro batch (`input_ids[rows, tokens]`); after the last one its step is judged.

        Returns:
            The loss, a number.
        """
        if "attention_mask" in inputs:
            self.tokens_seen = self.tokens_seen + inputs["attention_mask"].sum() // self.passes_per_row
        elif "input_ids" in inputs:  # packed texts fill their rows
            self.tokens_seen = self.tokens_seen + inputs["input_ids"].numel() // self.passes_per_row
        if "decoder_input_ids" in inputs:
            self.tokens_seen = self.tokens_seen + (inputs["labels"] != IGNORED).sum()
        loss = super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]  # the Trainer's
        if self._updates_in_backward:
            return loss
        self._losses = self._losses + loss.detach().float()
        if self.accelerator.sync_gradients:
            losses, self._losses = self._losses, 0.0
            self._judge(loss=self._summed(losses))
        return loss

    def compute_loss(self, model: Any, inputs: Any, *rest: Any, **keywords: Any) -> Any:
        """The Trainer's loss of one micro batch, a number; judged here where the backward pass updates."""
        loss = super().compute_loss(model, inputs, *rest, **keywords)  # type: ignore[misc]  # the Trainer's
        if self._updates_in_backward and model.training:
            self._stop_unless_finite(self._summed(loss.detach().float()))
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Called after clipping, with the norm before clipping (pinned by a contract test), before the update."""
        if self.in_backward is not None:
            # The gradients are gone; each was judged before its tensor was updated.
            self.tensors_with_gradient |= frozenset(self.in_backward.updated)
            return None
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)  # type: ignore[misc]  # the Trainer's
        scaled = getattr(self.accelerator, "scaler", None) is not None
        if self.is_deepspeed_enabled:
            scaled = self.args.fp16
            if self.accelerator.optimizer_step_was_skipped:
                norm = float("nan")
        if self.is_deepspeed_enabled or not self.tensors_with_gradient:
            self.tensors_with_gradient = frozenset(
                name
                # Not of `model`, which DDP wraps: its names would begin with `module.`.
                for name, parameter in self.model.named_parameters()
                # DeepSpeed has taken the gradients; the optimizer's second moments say which were there.
                if self.is_deepspeed_enabled or parameter.grad is not None
            )
        known = None if norm is None else float(norm)
        self._stop_unless_finite(0.0, known, scaled)
        if known is not None and math.isfinite(known):
            self.largest_grad_norm = max(self.largest_grad_norm or 0.0, known)
        return norm

    @property
    def _updates_in_backward(self) -> bool:
        return self.is_deepspeed_enabled or self.in_backward is not None

    def _summed(self, loss: Any) -> float:
        """Over all processes."""
        several = self.accelerator.num_processes > 1
        return float(self.accelerator.reduce(loss, reduction="sum") if several else loss)

    def _judge(self, loss: float) -> None:
        """A step's loss, summed over all processes, before its update."""
        self._stop_unless_finite(loss)
        as_logged = loss / self.accelerator.num_processes
        self.first_loss = as_logged if self.first_loss is None else self.first_loss
        self.last_losses = (*self.last_losses, as_logged)[-2 * WINDOW :]

    def _stop_unless_finite(self, loss: float, grad_norm: float | None = None, loss_scaled: bool = False) -> None:
        decision = not_finite(self.state.global_step + 1, loss, grad_norm, loss_scaled)
        if decision.action == "stop":
            raise Diverged(decision.reason)
