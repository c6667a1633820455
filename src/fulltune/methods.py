"""How the parameters of a model are trained. Layer 1."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fulltune.recipe import FullMethod

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def apply(model: PreTrainedModel, method: FullMethod) -> PreTrainedModel:
    """Make the method's parameters trainable; for `full` that is every one."""
    match method.kind:
        case "full":
            model.requires_grad_(True)
    return model
