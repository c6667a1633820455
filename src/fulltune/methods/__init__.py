from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fulltune.errors import RecipeError
from fulltune.recipe.fields import Recipe
from fulltune.recipe.methods import PROMPT_MODULE, ComparedMethod, Method, PromptMethod
from fulltune.recipe.tasks import FACTS, TaskName
from fulltune.system import parallel_layout

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn
    from torch.nn import Parameter
    from transformers import PretrainedConfig, PreTrainedModel


BY_HOOKS = ("adapter", "prompt")
"""Methods that add hooks, which cannot be merged into the model's weights."""


@dataclass(frozen=True)
class AppliedMethod:
    """A model prepared for a method."""

    model: PreTrainedModel
    """Model of its plain Hugging Face class; trained parameters have `requires_grad`."""
    method: Method
    peft_model: PeftModel | None = None


def apply(model: PreTrainedModel, method: Method, task: TaskName) -> AppliedMethod:
    """Add the method's parameters, drawn from torch's random state, and make them and a new head trainable."""
    from fulltune.methods import added, head

    if method.kind == "full":
        model.requires_grad_(True)
        for parameter in sinusoidal_tables(model).values():
            parameter.requires_grad_(False)
        return AppliedMethod(model, method)
    heads = head.names_of(model, task, method.label)
    model.requires_grad_(False)
    peft_model = None
    match method.kind:
        case "lora" | "peft":
            peft_model = added.put_peft(model, method, task, heads)
        case "adapter":
            added.put_adapters(model, method, heads)
        case "prompt":
            added.put_prompt(model, method, task)
    if peft_model is None:  # PEFT trains a copy of the head
        for name in heads:
            model.get_submodule(name).requires_grad_(True)
    head.freeze_statistics(model)
    return AppliedMethod(model, method, peft_model)


def without_casts(applied: AppliedMethod, autocast: bool) -> AbstractContextManager[None]:
    """Stop LoRA's layers from casting their input to float32 under autocast, which would cast it back anyway."""
    if applied.method.kind != "lora" or applied.peft_model is None or not autocast:
        return nullcontext()
    from peft.helpers import disable_input_dtype_casting

    context: AbstractContextManager[None] = disable_input_dtype_casting(applied.peft_model)
    return context


def sinusoidal_tables(model: nn.Module) -> dict[str, Parameter]:
    """Return position tables computed by a formula (Marian, Pegasus, RoFormer), which are not always saved."""
    return {
        f"{path}.{name}": parameter
        for path, module in model.named_modules()
        if "Sinusoidal" in type(module).__name__
        for name, parameter in module.named_parameters()
    }


def trained(model: nn.Module) -> dict[str, Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def virtual_tokens(recipe: Recipe) -> int:
    """Return the largest `num_virtual_tokens` of any prompt method, or 0; rows of every method are shortened by this
    many tokens."""
    return max(
        (
            method.num_virtual_tokens
            for method in recipe.methods or (recipe.method,)
            if isinstance(method, PromptMethod)
        ),
        default=0,
    )


def virtual_tokens_of(model: nn.Module) -> int:
    prompt = getattr(model, PROMPT_MODULE, None)
    return 0 if prompt is None else len(prompt.weight)


def check(recipe: Recipe, config: PretrainedConfig) -> None:
    """Raise `RecipeError` if a method cannot do the recipe's task with this model."""
    lines = [line for method in recipe.methods or (recipe.method,) for line in problems(recipe, config, method)]
    if lines:
        raise RecipeError(lines)


def problems(recipe: Recipe, config: PretrainedConfig, method: ComparedMethod) -> list[str]:
    """Return why a method cannot do the recipe's task with a model of this config, one message per reason."""
    from fulltune.models.shapes import position_limit

    lines = []
    if method.kind == "head" and not FACTS[recipe.task].head_is_new:
        lines.append(f"{recipe.task} has no new head to train; use lora, adapter or full")
    if method.kind == "prompt":
        limit = position_limit(config)
        if FACTS[recipe.task].reads == "image":
            lines.append("an image has no tokens to put virtual ones before; use lora, adapter or head")
        elif limit is not None and method.num_virtual_tokens > limit // 2:
            lines.append(
                f"num_virtual_tokens: {method.num_virtual_tokens} are more than half of the {limit} tokens that the "
                "model takes; use fewer"
            )
    if method.kind == "peft":
        from fulltune.methods.added import peft_problems

        lines += peft_problems(method)
        layout = parallel_layout.layout_of(recipe)
        if layout is not None and layout.engine == "zero" and layout.stage == 3:
            by = recipe.train.engine_by
            lines.append(f"PEFT may read weights, which {by} shards; use lora, or train.placement: zero2")
    return [f"method {method.label}: {line}" for line in lines]
