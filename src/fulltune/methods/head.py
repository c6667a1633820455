"""The task's head: which modules it is made of, and training them on a frozen body."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from fulltune.errors import RecipeError
from fulltune.methods import PROMPT_MODULE
from fulltune.models import output_layer
from fulltune.recipe.tasks import FACTS, TaskName

if TYPE_CHECKING:
    from torch import nn


def names_of(model: Any, task: TaskName, arm: str) -> tuple[str, ...]:
    """Paths of the modules above the body, in order, before a method is applied and after; empty for tasks that use the
    pretrained head.

    A pooler counts as part of the head: many checkpoints lack it, and then it is as new as the rest.

    Raises:
        RecipeError: When the model does not tell its body from its head.
    """
    if not FACTS[task].head_is_new:
        return ()
    if _body_of(model) is None:
        raise RecipeError(
            f"method {arm}: {type(model).__name__} does not tell its body from its head; take full, without "
            "head_learning_rate"
        )
    return _above_body(model)


def output_layer_of(model: Any, num_outputs: int) -> nn.Linear | None:
    """A new head's last linear layer of this size, before a method is applied and after; None where there is none, or
    where the model does not tell its body from its head."""
    return None if _body_of(model) is None else output_layer.linear_of(model, _above_body(model), num_outputs)


def _body_of(model: Any) -> Any:
    return getattr(model, model.base_model_prefix, None)


def _above_body(model: Any) -> tuple[str, ...]:
    prefix = model.base_model_prefix
    pooler = [f"{prefix}.pooler"] if _has_weights(getattr(_body_of(model), "pooler", None)) else []
    others = (prefix, PROMPT_MODULE)
    return (*pooler, *(name for name, child in model.named_children() if name not in others and _has_weights(child)))


def _has_weights(module: Any) -> bool:
    return module is not None and next(module.parameters(), None) is not None


def train(model: Any, names: tuple[str, ...]) -> None:
    for name in names:
        model.get_submodule(name).requires_grad_(True)


def keep_statistics(model: Any) -> None:
    """Have frozen batch norms use the statistics they came with: training would change what is not saved."""
    from torch.nn.modules.batchnorm import _BatchNorm

    for module in model.modules():
        if isinstance(module, _BatchNorm) and not any(one.requires_grad for one in module.parameters()):
            module.eval()
            vars(module)["train"] = partial(_stay, module)


def _stay(module: Any, mode: bool = True) -> Any:
    """In place of `train`."""
    return module
