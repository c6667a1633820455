"""How the parameters of a model are trained. Layer 1."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fulltune.recipe import FullMethod

if TYPE_CHECKING:
    from torch.nn import Parameter
    from transformers import PreTrainedModel


def apply(model: PreTrainedModel, method: FullMethod) -> PreTrainedModel:
    """Make the method's parameters trainable; for `full` that is every one that is learned."""
    match method.kind:
        case "full":
            model.requires_grad_(True)
            for parameter in computed(model).values():
                parameter.requires_grad_(False)
    return model


def computed(model: PreTrainedModel) -> dict[str, Parameter]:
    """Tables of positions that a formula gives (Marian, Pegasus, RoFormer): no weights, and not always saved."""
    return {
        f"{path}.{name}": parameter
        for path, module in model.named_modules()
        if "Sinusoidal" in type(module).__name__
        for name, parameter in module.named_parameters()
    }
