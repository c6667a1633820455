"""The task's head: which modules it is made of, training them on a frozen body, and the units that it answers in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fulltune.errors import RecipeError
from fulltune.models.sharding import gathered_to_modify
from fulltune.recipe.methods import PROMPT_MODULE
from fulltune.recipe.tasks import FACTS, TaskName

if TYPE_CHECKING:
    import torch
    from torch import nn


def names_of(model: Any, task: TaskName, method: str) -> tuple[str, ...]:
    """Paths of the modules above the body, in order, the pooler (which many checkpoints lack) among them; empty for
    tasks that use the pretrained head."""
    if not FACTS[task].head_is_new:
        return ()
    if _body_of(model) is None:
        raise RecipeError(
            f"method {method}: {type(model).__name__} does not tell its body from its head; take full, without "
            "head_learning_rate"
        )
    return _above_body(model)


def output_layer_of(model: Any, num_outputs: int) -> nn.Linear | None:
    """A new head's last linear layer of this size; of a head that PEFT trains a copy of, that of the copy."""
    from torch import nn

    layer = None
    for name in () if _body_of(model) is None else _above_body(model):
        for path, module in model.get_submodule(name).named_modules():
            kept_by_peft = "original_module" in path.split(".")
            if isinstance(module, nn.Linear) and module.out_features == num_outputs and not kept_by_peft:
                layer = module
    return layer


def _body_of(model: Any) -> Any:
    return getattr(model, model.base_model_prefix, None)


def _above_body(model: Any) -> tuple[str, ...]:
    prefix = model.base_model_prefix
    pooler = [f"{prefix}.pooler"] if _has_weights(getattr(_body_of(model), "pooler", None)) else []
    others = (prefix, PROMPT_MODULE)
    return (*pooler, *(name for name, child in model.named_children() if name not in others and _has_weights(child)))


def _has_weights(module: Any) -> bool:
    return module is not None and next(module.parameters(), None) is not None


def keep_statistics(model: Any) -> None:
    """Have frozen batch norms use the statistics they came with: training would change what is not saved."""
    from torch.nn.modules.batchnorm import _BatchNorm

    for module in model.modules():
        if isinstance(module, _BatchNorm) and not any(one.requires_grad for one in module.parameters()):
            module.eval()
            vars(module)["train"] = lambda mode=True, module=module: module


def rescale(layer: nn.Linear, shift: float, factor: float) -> None:
    """Have a layer give `factor` times what it gives, plus `shift`, which must be 0 where it has no bias."""
    import torch

    parameters = dict(layer.named_parameters())
    with torch.no_grad(), gathered_to_modify(list(parameters.values())):
        for name, values in rescaled(parameters, shift, factor).items():
            parameters[name].copy_(values)


def rescaled(tensors: Mapping[str, torch.Tensor], shift: float, factor: float) -> dict[str, torch.Tensor]:
    """The same for a layer's `weight[outputs, inputs]` and `bias[outputs]`, in their types."""
    shifts = {"bias": shift}
    return {
        name: (values.double() * factor + shifts.get(name, 0.0)).to(values.dtype) for name, values in tensors.items()
    }
