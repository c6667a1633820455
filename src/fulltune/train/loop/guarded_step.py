"""One training step: transformers' own (`Trainer._run_epoch`, 5.24), with a guard just before the update."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from fulltune.errors import Spiked
from fulltune.inference.selective_head import as_its_attention_can
from fulltune.models import sharding
from fulltune.stats.curves import LOSS_WINDOW
from fulltune.tasks.padding import IGNORED, TRAINED
from fulltune.train.loop import step_guard
from fulltune.train.loop.step_guard import Judged, StepMemory

_log = logging.getLogger(__name__)


def rows_in(batch: Mapping[str, Any]) -> int:
    """Of a batch: the length of its first tensor."""
    return next((len(one) for one in batch.values() if isinstance(one, torch.Tensor) and one.dim()), 0)


class Guarded:
    """Mixin for a `Trainer`: sees each loss and gradient norm, and skips or stops before a bad update.

    A callback sees the norm only after clipping, and has no veto. A step is skipped by freeing its gradients, so that
    moments stay as well. DeepSpeed updates inside its backward pass: there each loss is judged before it, and nothing
    is skipped.

    With a Trainer of one's own it stands first; where trouble stays it raises `Diverged`, and what to resume from is
    the script's decision:

        class Mine(fulltune.Guarded, SFTTrainer): ...
    """

    # What the `Trainer` beside this mixin has.
    accelerator: Any
    args: Any
    model: Any
    state: Any
    optimizer: Any
    is_deepspeed_enabled: Any

    tokens_seen: torch.Tensor | int = 0
    tensors_with_gradient: frozenset[str] = frozenset()
    largest_grad_norm: float | None = None
    first_loss: float | None = None
    """Of the first step here, before its update."""
    last_losses: tuple[float, ...] = ()
    """Of the last `2 * LOSS_WINDOW` steps."""
    seen: StepMemory = StepMemory()
    """What the guard remembers."""
    skips: bool = True
    """Leave out the updates of suspect steps; False: only of those that are not finite."""
    batches: Sequence[dict[str, Any]] = ()
    """The micro batches of this step so far."""
    _losses: torch.Tensor | float = 0.0
    """Sum of this step's micro batches so far."""
    usual_loss: float = 0.0
    """What is logged in the place of a loss that is not finite: that of the last clean step."""

    _has_trained: bool = False

    def train(self, *positional: Any, **keywords: Any) -> Any:
        """Train as the Trainer does; the guard's history is reset when `train()` is called again."""
        if self._has_trained:
            self.seen, self.first_loss, self.last_losses, self.usual_loss = StepMemory(), None, (), 0.0
        self._has_trained = True
        return super().train(*positional, **keywords)  # type: ignore[misc]  # the Trainer's

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Forward and backward of one micro batch (`input_ids[rows, tokens]`); returns its loss, a number."""
        if "attention_mask" in inputs:
            self.tokens_seen = self.tokens_seen + inputs["attention_mask"].sum()
        elif "input_ids" in inputs:  # packed texts fill their rows
            self.tokens_seen = self.tokens_seen + inputs["input_ids"].numel()
        if "decoder_input_ids" in inputs:
            self.tokens_seen = self.tokens_seen + (inputs["labels"] != IGNORED).sum()
        self.batches = [*self.batches, inputs]
        try:
            loss = super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]  # the Trainer's
        except BaseException:  # a step that is left in its middle and begun anew, as `auto_find_batch_size` does
            self.batches, self._losses = [], 0.0
            raise
        self._losses = self._losses + loss.detach().float()
        # The Trainer adds the losses up for its log, where one that is not a number would hide the others.
        return torch.where(loss.isfinite(), loss, self.usual_loss / self.args.gradient_accumulation_steps)

    def compute_loss(self, model: Any, inputs: Any, *rest: Any, **keywords: Any) -> Any:
        """The Trainer's loss of one micro batch, a number; judged here where the backward pass updates."""
        loss = super().compute_loss(model, inputs, *rest, **keywords)  # type: ignore[misc]  # the Trainer's
        if self._updates_in_backward and model.training:
            (total,) = self._summed(loss.detach().float())
            if not math.isfinite(total):
                step = self.state.global_step + 1
                said = f"the loss is {total} at step {step}, before the update: the weights are still good"
                raise Spiked(f"{said}. Usual cause: a learning rate that is too high", step)
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Called after clipping, with the norm before clipping (pinned by a contract test), before the update."""
        losses, self._losses = self._losses, 0.0
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)  # type: ignore[misc]  # the Trainer's
        if self.is_deepspeed_enabled and self.accelerator.optimizer_step_was_skipped:
            norm = float("nan")
        if self.is_deepspeed_enabled or not self.tensors_with_gradient:
            self.tensors_with_gradient = frozenset(
                name
                # Not of `model`, which DDP wraps: its names would begin with `module.`.
                for name, parameter in self.model.named_parameters()
                # DeepSpeed has taken the gradients; the optimizer's second moments say which were there.
                if self.is_deepspeed_enabled or parameter.grad is not None
            )
        step = self.state.global_step + 1
        judged, loss, grad_norm = self._judge(losses, norm)
        norm = grad_norm if grad_norm is not None and math.isfinite(grad_norm) else None
        self.batches = []
        self.seen = judged.seen
        if judged.action == "stop" or (judged.action == "skip" and self._updates_in_backward):
            when = "" if self._updates_in_backward else ", before the update"
            raise Spiked(f"step {step}{when}: {judged.reason}", judged.since or step)
        if judged.action == "skip":
            model.zero_grad(set_to_none=True)
            self.on_skip(step, judged)
        else:
            self.usual_loss = loss
            self.first_loss = loss if self.first_loss is None else self.first_loss
            self.last_losses = (*self.last_losses, loss)[-2 * LOSS_WINDOW :]
            self.largest_grad_norm = (
                self.largest_grad_norm if norm is None else max(self.largest_grad_norm or 0.0, norm)
            )
        return norm

    def on_skip(self, step: int, judged: Judged) -> None:
        """Say that a step is skipped."""
        _log.warning("step %d is skipped: %s", step, judged.reason)

    @property
    def _updates_in_backward(self) -> bool:
        # LOMO and the layerwise ones do so by themselves.
        its_own = any(word in str(self.args.optim).upper() for word in ("LOMO", "LAYERWISE"))
        return its_own or bool(self.is_deepspeed_enabled)

    def _summed(self, *values: Any) -> list[float]:
        """Over all processes; the host waits for the device once."""
        several = self.accelerator.num_processes > 1
        found = torch.stack([torch.as_tensor(one, device=self.args.device).float() for one in values])
        return (self.accelerator.reduce(found, reduction="sum") if several else found).tolist()

    def _judge(self, losses: torch.Tensor | float, norm: Any) -> tuple[Judged, float, float | None]:
        """Decide, over all processes, whether a step is applied; also returns its loss and gradient norm."""
        in_engine = bool(self.is_deepspeed_enabled)
        if hasattr(norm, "full_tensor"):  # sharded by FSDP2
            norm = norm.full_tensor()
        rows = sum(rows_in(batch) for batch in self.batches)
        values = [losses, rows] if norm is None else [losses, rows, norm]
        # A norm is the same in each process.
        loss, rows, *norms = [one / self.accelerator.num_processes for one in self._summed(*values)]
        grad_norm = norms[0] if norms else None
        finite = grad_norm is None or math.isfinite(grad_norm)
        scaler = None if finite else getattr(self.accelerator, "scaler", None)
        # Reading the scale is another wait for the device.
        scaled = self.args.fp16 if in_engine else scaler is not None and scaler.get_scale() >= 1
        if in_engine and grad_norm is not None and grad_norm < 0:  # its sign for a norm that is not finite
            grad_norm = math.nan
        # DeepSpeed has updated already: a suspect step is too late to be skipped.
        finite_only, step = not self.skips or in_engine, self.state.global_step + 1
        judged = step_guard.judge(self.seen, step, loss, grad_norm, rows=rows, scaled=scaled, finite_only=finite_only)
        if not judged.is_finite and self.accelerator.num_processes == 1 and not in_engine:
            judged = replace(judged, reason=f"{judged.reason}; {explain(self.model, self.batches)}")
        return judged, loss, grad_norm


def gradients_are_finite(parameters: Iterable[torch.Tensor]) -> bool:
    """Whether all gradients that there are, or this process's parts, are finite; `aminmax` copies no gradient."""
    gradients = [sharding.local(parameter.grad) for parameter in parameters if parameter.grad is not None]
    return all(bool(torch.stack(one.aminmax()).isfinite().all()) for one in gradients if one.numel())


def explain(model: Any, batches: Sequence[Mapping[str, Any]]) -> str:
    """Say in words what the first thing is that is not finite in a step's micro batches; gradients are left alone."""
    try:
        return _why(model, batches)
    except Exception as error:  # a model that cannot be called without labels, or memory that runs out
        return f"where it came from could not be found ({type(error).__name__}: {str(error)[:80]})"


def _why(model: Any, batches: Sequence[Mapping[str, Any]]) -> str:
    labels = [batch.get("labels") for batch in batches]
    if all(isinstance(one, torch.Tensor) and not one.is_floating_point() and (one == IGNORED).all() for one in labels):
        return "all its labels are masked, so that there is nothing to learn from"
    ruined = next((name for name, one in model.named_parameters() if not bool(one.isfinite().all())), None)
    if ruined is not None:
        return f"the weights of {ruined} are not finite"
    kinds = sorted({str(one.dtype).removeprefix("torch.") for one in model.parameters()})
    computed = "in fp32" if kinds == ["float32"] else f"computed in {', '.join(kinds)}"
    for batch in batches:
        if found := _first_not_finite(model, batch):
            return f"with finite weights, {found} is the first module whose output is not finite {computed}"
    return f"each module's output is finite {computed}: it is the loss, the gradients, or a type with too small a range"


def _first_not_finite(model: Any, batch: Mapping[str, Any]) -> str:
    """The first module, in the order of the computation, whose output is not finite; empty: none is."""
    found: list[str] = []

    def look(name: str, module: Any) -> Any:
        def hook(_: Any, __: Any, output: Any) -> None:
            # Masks hold infinities on purpose, but no module gives a mask alone.
            tensors = [one for one in tree_leaves(output) if isinstance(one, torch.Tensor) and one.is_floating_point()]
            if not found and any(not bool(one.isfinite().all()) for one in tensors):
                found.append(f"{name or 'the model'} ({type(module).__name__})")

        return module.register_forward_hook(hook)

    device = next(model.parameters()).device
    tensors = {name: one for name, one in batch.items() if isinstance(one, torch.Tensor)}
    inputs = {name: one.to(device) for name, one in tensors.items() if name not in ("labels", TRAINED)}
    hooks = [look(name, module) for name, module in model.named_modules()]
    model.eval()  # without dropout, so that no random number is drawn
    try:
        with torch.no_grad(), as_its_attention_can(model, device.type):
            model(**inputs)
    finally:
        model.train()
        for hook in hooks:
            hook.remove()
    return found[0] if found else ""
