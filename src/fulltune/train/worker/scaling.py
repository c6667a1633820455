"""Regression in units of the targets' spread, because a step of AdamW moves a value by the rate at most; the finished
model gets the user's units in its head's weights (docs/tasks.md)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from fulltune.inference.run import autocast
from fulltune.methods import head
from fulltune.models import sharding
from fulltune.train.optim import zero


@dataclass(frozen=True)
class Scaled:
    """The last layer of a head that learns (number - shift) / factor."""

    layer: torch.nn.Linear
    shift: float
    factor: float

    def fold(self, model: Any) -> None:
        """Give the finished model the user's units; who trains on takes that back by `unfold`."""
        self._rescale(model, self.shift, self.factor)

    def unfold(self, model: Any) -> None:
        """Go on in the units that are learned."""
        self._rescale(model, -self.shift / self.factor, 1 / self.factor)

    def _rescale(self, model: Any, shift: float, factor: float) -> None:
        parameters = dict(self.layer.named_parameters())
        if not any(map(zero.is_in_engine, parameters.values())):
            sharding.free(model)
            head.rescale(self.layer, shift, factor)
            return
        tensors = {name: zero.whole(one) for name, one in parameters.items()}
        for name, values in head.rescaled(tensors, shift, factor).items():
            zero.put(parameters[name], values)


def scaled_head(
    model: Any,
    scale: tuple[float, float],
    batch: dict[str, torch.Tensor] | None,
    precision: str,
    *,
    gives_numbers: bool,
    own_loss: bool = False,
) -> tuple[Scaled | None, str]:
    """The last layer of a head, which now learns numbers in units of their spread, in words; or None and why not."""
    layer, problem = head.output_layer_of(model, 1), ""
    if own_loss:
        problem = "compute_loss is your own"
    elif layer is None or not layer.weight.requires_grad:
        problem = "no last layer with one output was found in the head"
    elif batch is not None and not _ends_with(model, layer, batch, precision):
        problem = "the model changes what its head's last layer gives"
    if problem or layer is None:
        return None, f"it learns the numbers as they are: {problem}"
    mean, spread = scale
    # Without a bias nothing can be added: what is left is their size.
    shift, factor = (mean, spread) if layer.bias is not None else (0.0, math.hypot(mean, spread))
    sharding.free(model)
    if gives_numbers:
        head.rescale(layer, -shift / factor, 1 / factor)
    minus = f"(number - {shift:.6g})" if shift else "number"
    return (
        Scaled(layer, shift, factor),
        f"it learns {minus} / {factor:.6g}, and gives the numbers themselves when it is saved",
    )


def _ends_with(model: Any, layer: torch.nn.Linear, batch: dict[str, torch.Tensor], precision: str) -> bool:
    """Whether the model's logits are what this layer gives, for two short rows."""
    seen = list[torch.Tensor]()
    hook = layer.register_forward_hook(lambda _, inputs, output: seen.append(output))
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), autocast(model, precision):
            logits = model(**inputs).logits
    finally:
        model.train(was_training)
        hook.remove()
    return len(seen) == 1 and bool(torch.isin(logits.float(), seen[0].float()).all())
