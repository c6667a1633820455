"""The task's head: which modules it is made of, and training them on a frozen body."""

from __future__ import annotations

from functools import partial
from typing import Any

from fulltune.errors import RecipeError
from fulltune.methods import PROMPT_MODULE
from fulltune.recipe.tasks import FACTS, TaskName


def names_of(model: Any, task: TaskName, arm: str) -> tuple[str, ...]:
    """Paths of the modules above the body, in order, before a method is applied and after; empty for tasks that use the
    pretrained head.

    A pooler counts as part of the head: many checkpoints lack it, and then it is as new as the rest.

    Raises:
        RecipeError: When the model does not tell its body from its head.
    """
    if not FACTS[task].head_is_new:
        return ()
    prefix = model.base_model_prefix
    body = getattr(model, prefix, None)
    if body is None:
        raise RecipeError(
            f"method {arm}: {type(model).__name__} does not tell its body from its head; take full, without "
            "head_learning_rate"
        )
    pooler = [f"{prefix}.pooler"] if _has_weights(getattr(body, "pooler", None)) else []
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
