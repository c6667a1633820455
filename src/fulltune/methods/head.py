from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from fulltune.errors import RecipeError
from fulltune.models.sharding import gathered_to_modify
from fulltune.recipe.methods import PROMPT_MODULE
from fulltune.recipe.tasks import FACTS, TaskName

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel


def head_paths(model: PreTrainedModel, task: TaskName, method_label: str) -> tuple[str, ...]:
    """Return the paths of the modules above the body and of the pooler; empty for tasks with a pretrained head. Raise
    `RecipeError` if the model has no separate body."""
    if not FACTS[task].head_is_new:
        return ()
    if _body_of(model) is None:
        raise RecipeError(
            f"method {method_label}: {type(model).__name__} has no separate body; use method full, "
            "without head_learning_rate"
        )
    return _modules_above_body(model)


def find_output_layer(model: PreTrainedModel, num_outputs: int) -> nn.Linear | None:
    """Return the head's last linear layer with this many outputs (PEFT's trained copy if there is one), or None."""
    from torch import nn

    layer = None
    for name in () if _body_of(model) is None else _modules_above_body(model):
        for path, module in model.get_submodule(name).named_modules():
            is_original = "original_module" in path.split(".")
            if isinstance(module, nn.Linear) and module.out_features == num_outputs and not is_original:
                layer = module
    return layer


def _body_of(model: PreTrainedModel) -> nn.Module | None:
    return getattr(model, model.base_model_prefix, None)


def _modules_above_body(model: PreTrainedModel) -> tuple[str, ...]:
    """Return the paths of the pooler and of modules outside of the body, if they have weights."""
    prefix = model.base_model_prefix
    pooler = [f"{prefix}.pooler"] if _has_weights(getattr(_body_of(model), "pooler", None)) else []
    others = (prefix, PROMPT_MODULE)
    return (*pooler, *(name for name, child in model.named_children() if name not in others and _has_weights(child)))


def _has_weights(module: nn.Module | None) -> bool:
    return module is not None and next(module.parameters(), None) is not None


def keep_frozen_batch_norms_in_eval(model: nn.Module) -> None:
    """Keep frozen batch norms in evaluation mode, because their running statistics are not saved."""
    from torch.nn.modules.batchnorm import _BatchNorm

    for module in model.modules():
        if isinstance(module, _BatchNorm) and not any(parameter.requires_grad for parameter in module.parameters()):
            module.eval()
            vars(module)["train"] = lambda mode=True, module=module: module


def rescale_outputs(layer: nn.Linear, shift: float, factor: float) -> None:
    """Change a layer so that its output is `output * factor + shift`; without a bias, `shift` is ignored."""
    import torch

    parameters = dict(layer.named_parameters())
    with torch.no_grad(), gathered_to_modify(list(parameters.values())):
        for name, values in rescaled_parameters(parameters, shift, factor).items():
            parameters[name].copy_(values)


def rescaled_parameters(tensors: Mapping[str, torch.Tensor], shift: float, factor: float) -> dict[str, torch.Tensor]:
    """Return new `weight` and `bias`, in their dtypes, with which a layer outputs `output * factor + shift`."""
    shifts = {"bias": shift}
    return {
        name: (values.double() * factor + shifts.get(name, 0.0)).to(values.dtype) for name, values in tensors.items()
    }
