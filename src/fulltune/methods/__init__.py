"""How the parameters of a model are trained: all of them, or few on a frozen body."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fulltune.errors import RecipeError
from fulltune.recipe.fields import Recipe
from fulltune.recipe.methods import PROMPT_MODULE, ComparedMethod, Method, PromptMethod
from fulltune.recipe.tasks import FACTS, TaskName
from fulltune.system import parallel_layout

if TYPE_CHECKING:
    from torch.nn import Parameter
    from transformers import PretrainedConfig


BY_HOOKS = ("adapter", "prompt")
"""Kinds of methods that work by hooks on the model's modules."""


@dataclass(frozen=True)
class Applied:
    """A model with a method."""

    model: Any
    """Of its plain Hugging Face class; `requires_grad` says what is trained."""
    method: Method
    outer: Any = None
    """PEFT's wrapper around the same modules, which knows PEFT's file format; None where none was made."""


def apply(model: Any, method: Method, task: TaskName) -> Applied:
    """Make the method's parameters, drawn from torch's random state, trainable and all others not; a new head always
    is."""
    from fulltune.methods import added, head

    if method.kind == "full":
        model.requires_grad_(True)
        for parameter in computed(model).values():
            parameter.requires_grad_(False)
        return Applied(model, method)
    heads = head.names_of(model, task, method.label)
    model.requires_grad_(False)
    outer = None
    match method.kind:
        case "lora" | "peft":
            outer = added.put_peft(model, method, task, heads)
        case "adapter":
            added.put_adapters(model, method, heads)
        case "prompt":
            added.put_prompt(model, method, task)
    if outer is None:  # PEFT trains a copy of the head
        for name in heads:
            model.get_submodule(name).requires_grad_(True)
    head.keep_statistics(model)
    return Applied(model, method, outer)


def without_casts(applied: Applied, autocast: bool) -> AbstractContextManager[None]:
    """Under autocast, keep LoRA's layers from a float32 copy of their input, which autocast turns back without loss."""
    if applied.method.kind != "lora" or not autocast:
        return nullcontext()
    from peft.helpers import disable_input_dtype_casting

    found: AbstractContextManager[None] = disable_input_dtype_casting(applied.outer)
    return found


def computed(model: Any) -> dict[str, Parameter]:
    """Tables of positions that a formula gives (Marian, Pegasus, RoFormer): no weights, and not always saved."""
    return {
        f"{path}.{name}": parameter
        for path, module in model.named_modules()
        if "Sinusoidal" in type(module).__name__
        for name, parameter in module.named_parameters()
    }


def trained(model: Any) -> dict[str, Parameter]:
    """Name to each parameter that is trained."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def virtual_tokens(recipe: Recipe) -> int:
    """Tokens that the methods put before each text, at most: rows are that much shorter, for all methods alike."""
    return max(
        (one.num_virtual_tokens for one in recipe.methods or (recipe.method,) if isinstance(one, PromptMethod)),
        default=0,
    )


def virtual_tokens_of(model: Any) -> int:
    """Tokens that stand before each of the model's texts."""
    prompt = getattr(model, PROMPT_MODULE, None)
    return 0 if prompt is None else len(prompt.weight)


def check(recipe: Recipe, config: PretrainedConfig) -> None:
    """Refuse methods that cannot do the task with this kind of model, before anything is read."""
    found = [line for one in recipe.methods or (recipe.method,) for line in problems(recipe, config, one)]
    if found:
        raise RecipeError(found)


def problems(recipe: Recipe, config: PretrainedConfig, method: ComparedMethod) -> list[str]:
    """Why a method cannot do the recipe's task, as far as the model's config tells; empty when it can."""
    from fulltune.models.shapes import position_limit

    found = []
    if method.kind == "head" and not FACTS[recipe.task].head_is_new:
        found.append(f"{recipe.task} has no new head to train; take lora, adapter or full")
    if method.kind == "prompt":
        limit = position_limit(config)
        if FACTS[recipe.task].reads == "image":
            found.append("an image has no tokens to put virtual ones before; take lora, adapter or head")
        elif limit is not None and method.num_virtual_tokens > limit // 2:
            found.append(
                f"num_virtual_tokens: {method.num_virtual_tokens} are more than half of the {limit} tokens that the "
                "model takes; take fewer"
            )
    if method.kind == "peft":
        from fulltune.methods.added import peft_problems

        found += peft_problems(method)
        layout = parallel_layout.of(recipe)
        if layout is not None and layout.engine == "zero" and layout.stage == 3:
            by = recipe.train.engine_by
            found.append(f"PEFT may read weights, which {by} shares out; take lora, or train.placement: zero2")
    return [f"method {method.label}: {line}" for line in found]
