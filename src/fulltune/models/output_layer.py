"""The last linear layer of a head: which it is, and other units for what it gives."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from fulltune.models.checkpoint_head import put_together

if TYPE_CHECKING:
    import torch
    from torch import nn


def linear_of(model: Any, head_names: Iterable[str], num_outputs: int) -> nn.Linear | None:
    """The last linear layer of this size among the head's modules; where PEFT trains a copy of the head, that of the
    copy.

    Args:
        model: With a head, as it was loaded or with a method.
        head_names: Paths of the head's modules, from below.
        num_outputs: Numbers that it gives for each row, or token.

    Returns:
        The layer, or None where there is none.
    """
    from torch import nn

    found = None
    for name in head_names:
        for path, module in model.get_submodule(name).named_modules():
            kept_by_peft = "original_module" in path.split(".")
            if isinstance(module, nn.Linear) and module.out_features == num_outputs and not kept_by_peft:
                found = module
    return found


def rescale(layer: nn.Linear, shift: float, factor: float) -> None:
    """Have a layer give `factor` times what it gives, plus `shift`, which must be 0 where it has no bias."""
    import torch

    parameters = dict(layer.named_parameters())
    with torch.no_grad(), put_together(list(parameters.values())):
        for name, values in rescaled(parameters, shift, factor).items():
            parameters[name].copy_(values)


def rescaled(tensors: Mapping[str, torch.Tensor], shift: float, factor: float) -> dict[str, torch.Tensor]:
    """The same for a layer's `weight[outputs, inputs]` and `bias[outputs]`, in their types."""
    found = {}
    for name, values in tensors.items():
        found[name] = (values.double() * factor + (shift if name == "bias" else 0.0)).to(values.dtype)
    return found
