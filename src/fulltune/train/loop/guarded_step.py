from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from torch import nn
from torch.utils._pytree import tree_leaves
from transformers.trainer_utils import TrainOutput

from fulltune.errors import Spiked
from fulltune.inference.selective_head import attention_precision
from fulltune.models import evaluation_mode, sharding
from fulltune.stats.curves import LOSS_WINDOW
from fulltune.stream.training import streamed_of
from fulltune.tasks.padding import IGNORED, LENGTHS, TRAINED
from fulltune.train.loop import step_guard
from fulltune.train.loop.step_guard import StepHistory, StepVerdict

_log = logging.getLogger(__name__)


def rows_in(batch: Mapping[str, object]) -> int:
    tensors = (batch.get(LENGTHS), *batch.values())
    return next((len(value) for value in tensors if isinstance(value, torch.Tensor) and value.dim()), 0)


class Guarded:
    """Mixin for a `Trainer` that skips a bad update, or stops training before it.

    Skipping frees the gradients, so the optimizer's moments do not change either. DeepSpeed updates weights inside its
    backward pass, so each loss is judged before that pass, and no step is skipped. If skipping does not help, training
    raises `Diverged`. Put the mixin first:

        class Mine(fulltune.Guarded, SFTTrainer): ...
    """

    # Attributes of the `Trainer` beside this mixin.
    accelerator: Accelerator
    args: transformers.TrainingArguments
    model: Any
    state: transformers.TrainerState
    optimizer: Any
    lr_scheduler: Any
    is_deepspeed_enabled: bool

    tokens_seen: torch.Tensor | int = 0
    tensors_with_gradient: frozenset[str] = frozenset()
    largest_grad_norm: float | None = None
    first_loss: float | None = None
    last_losses: tuple[float, ...] = ()
    guard_history: StepHistory = StepHistory()
    skips: bool = True
    """If False, only non-finite steps are skipped."""
    batches: Sequence[Mapping[str, object]] = ()
    _losses: torch.Tensor | float = 0.0
    usual_loss: float = 0.0
    """Loss of the last accepted step, which is logged instead of a non-finite loss."""

    _has_trained: bool = False

    def train(self, *positional: object, **keywords: object) -> TrainOutput:
        """Call the Trainer's `train`. A second call starts with an empty guard history."""
        if self._has_trained:
            self.guard_history, self.last_losses = StepHistory(), ()
            self.first_loss, self.usual_loss = None, 0.0
        self._has_trained = True
        return super().train(*positional, **keywords)  # type: ignore[misc]  # the Trainer's

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Run forward and backward on one micro batch (`input_ids[rows, tokens]`), add its tokens and loss to the
        step's totals and return the loss."""
        if "attention_mask" in inputs:
            self.tokens_seen = self.tokens_seen + inputs["attention_mask"].sum()
        elif LENGTHS in inputs:
            self.tokens_seen = self.tokens_seen + inputs[LENGTHS].sum()
        elif "input_ids" in inputs:
            self.tokens_seen = self.tokens_seen + inputs["input_ids"].numel()
        if "decoder_input_ids" in inputs:
            self.tokens_seen = self.tokens_seen + (inputs["labels"] != IGNORED).sum()
        self.batches = [*self.batches, inputs]
        try:
            loss = super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]  # the Trainer's
        except BaseException:  # an aborted step may be restarted, as `auto_find_batch_size` does
            self.batches, self._losses = [], 0.0
            raise
        self._losses = self._losses + loss.detach().float()
        # The Trainer sums the losses for its log, where one NaN would hide the others.
        return torch.where(loss.isfinite(), loss, self.usual_loss / self.args.gradient_accumulation_steps)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *rest: Any, **keywords: Any) -> Any:
        """Return the Trainer's loss for a micro batch. Raise `Spiked` if the loss is not finite and the backward pass
        itself updates weights."""
        loss = super().compute_loss(model, inputs, *rest, **keywords)  # type: ignore[misc]  # the Trainer's
        if self._updates_in_backward and model.training:
            (total,) = self._sum_over_ranks(loss.detach().float())
            if not math.isfinite(total):
                step = self.state.global_step + 1
                reason = f"the loss is {total} at step {step}, before the update, so the weights are still good"
                raise Spiked(f"{reason}. Usual cause: a learning rate that is too high", step)
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: torch.Tensor | float | None = None) -> float | None:
        """Judge the step after clipping and before the update. Skip a bad step or raise `Spiked`. Return the unclipped
        norm, or None if the norm is not finite."""
        losses, self._losses = self._losses, 0.0
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)  # type: ignore[misc]  # the Trainer's
        if self.is_deepspeed_enabled and self.accelerator.optimizer_step_was_skipped:
            norm = float("nan")
        if self.is_deepspeed_enabled or not self.tensors_with_gradient:
            self.tensors_with_gradient = frozenset(
                name
                # `model` may be wrapped by DDP, where names begin with `module.`.
                for name, parameter in self.model.named_parameters()
                # DeepSpeed has removed the gradients; the optimizer's second moments tell which existed.
                if self.is_deepspeed_enabled or parameter.grad is not None
            )
        step = self.state.global_step + 1
        verdict, loss, mean_norm = self._judge_step(losses, norm)
        norm = mean_norm if mean_norm is not None and math.isfinite(mean_norm) else None
        self.batches = []
        self.guard_history = verdict.history
        if verdict.action == "stop" or (verdict.action == "skip" and self._updates_in_backward):
            when = "" if self._updates_in_backward else ", before the update"
            raise Spiked(f"step {step}{when}: {verdict.reason}", verdict.since or step)
        if verdict.action == "skip":
            model.zero_grad(set_to_none=True)
            self.on_skip(step, verdict)
        else:
            self.usual_loss = loss
            self.first_loss = loss if self.first_loss is None else self.first_loss
            self.last_losses = (*self.last_losses, loss)[-2 * LOSS_WINDOW :]
            self.largest_grad_norm = (
                self.largest_grad_norm if norm is None else max(self.largest_grad_norm or 0.0, norm)
            )
        return norm

    def on_skip(self, step: int, verdict: StepVerdict) -> None:
        _log.warning("step %d is skipped: %s", step, verdict.reason)

    @property
    def _updates_in_backward(self) -> bool:
        is_layerwise = any(word in str(self.args.optim).upper() for word in ("LOMO", "LAYERWISE"))
        return is_layerwise or bool(self.is_deepspeed_enabled)

    def _sum_over_ranks(self, *values: torch.Tensor | float) -> list[float]:
        totals = torch.stack([torch.as_tensor(value, device=self.args.device).float() for value in values])
        if self.accelerator.num_processes > 1:
            totals = self.accelerator.reduce(totals, reduction="sum")
        return totals.tolist()

    def _judge_step(
        self, losses: torch.Tensor | float, norm: torch.Tensor | float | None
    ) -> tuple[StepVerdict, float, float | None]:
        """Judge a step by this rank's summed losses and gradient norm. Returns the verdict, the mean loss over the
        ranks, and the mean norm or None."""
        in_engine = bool(self.is_deepspeed_enabled)
        if isinstance(norm, torch.Tensor):  # sharded by FSDP2
            norm = sharding.full_tensor(norm)
        rows = sum(rows_in(batch) for batch in self.batches)
        values = [losses, rows] if norm is None else [losses, rows, norm]
        # A norm is the same in each process.
        loss, rows, *norms = [total / self.accelerator.num_processes for total in self._sum_over_ranks(*values)]
        grad_norm = norms[0] if norms else None
        finite = grad_norm is None or math.isfinite(grad_norm)
        scaler = None if finite else getattr(self.accelerator, "scaler", None)
        # Read only if needed: the host waits for the device.
        scaled = self.args.fp16 if in_engine else scaler is not None and scaler.get_scale() >= 1
        if in_engine and grad_norm is not None and grad_norm < 0:  # DeepSpeed's mark of a non-finite norm
            grad_norm = math.nan
        # DeepSpeed has updated already: too late to skip a suspect step.
        finite_only, step = not self.skips or in_engine, self.state.global_step + 1
        verdict = step_guard.judge_step(
            self.guard_history, step, loss, grad_norm, rows=rows, is_loss_scaled=scaled, finite_only=finite_only
        )
        if not verdict.is_finite and self.accelerator.num_processes == 1 and not in_engine:
            verdict = replace(verdict, reason=f"{verdict.reason}; {explain_non_finite(self.model, self.batches)}")
        return verdict, loss, grad_norm


def gradients_are_finite(parameters: Iterable[torch.Tensor]) -> bool:
    gradients = [sharding.local_tensor(parameter.grad) for parameter in parameters if parameter.grad is not None]
    return all(bool(torch.stack(gradient.aminmax()).isfinite().all()) for gradient in gradients if gradient.numel())


def explain_non_finite(model: nn.Module, batches: Sequence[Mapping[str, object]]) -> str:
    """Describe what made a step on `batches` non-finite, such as the first module whose output is not finite."""
    try:
        if all(_is_all_masked(batch.get("labels")) for batch in batches):
            return "all labels are masked, so there is nothing to learn from"
        for name, parameter in [] if streamed_of(model) else model.named_parameters():
            if not bool(parameter.isfinite().all()):
                return f"the weights of {name} are not finite"
        dtypes = sorted({str(parameter.dtype).removeprefix("torch.") for parameter in model.parameters()})
        computed = "in fp32" if dtypes == ["float32"] else f"computed in {', '.join(dtypes)}"
        for batch in batches:
            if module := first_non_finite_module(model, batch):
                return f"the weights are finite, but {module} is the first module whose output is not finite {computed}"
    except Exception as error:  # a model that cannot be called without labels, or memory that runs out
        return f"the cause could not be determined ({type(error).__name__}: {str(error)[:80]})"
    causes = "the loss, the gradients or a dtype with too small a range"
    return f"every module's output is finite {computed}; possible causes are {causes}"


def _is_all_masked(labels: object) -> bool:
    return isinstance(labels, torch.Tensor) and not labels.is_floating_point() and bool((labels == IGNORED).all())


def first_non_finite_module(model: nn.Module, batch: Mapping[str, object]) -> str | None:
    """Run the batch and return "name (class)" of the first module whose output is not finite, or None."""
    names: list[str] = []

    def record_if_non_finite(name: str, module: nn.Module, _: object, output: object) -> None:
        # Masks contain infinities on purpose, but no module outputs only a mask.
        tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]
        if not names and any(leaf.is_floating_point() and not bool(leaf.isfinite().all()) for leaf in tensors):
            names.append(f"{name or 'the model'} ({type(module).__name__})")

    device = next(model.parameters()).device
    tensors = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
    inputs = {name: tensor.to(device) for name, tensor in tensors.items() if name not in ("labels", LENGTHS, TRAINED)}
    with contextlib.ExitStack() as hooks:
        for name, module in model.named_modules():
            hooks.enter_context(module.register_forward_hook(partial(record_if_non_finite, name)))
        # Without dropout, so that no random number is drawn.
        with evaluation_mode(model), torch.no_grad(), attention_precision(model, device.type):
            model(**inputs)
    return names[0] if names else None
