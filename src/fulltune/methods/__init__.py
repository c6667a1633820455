from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from fulltune.errors import RecipeError
from fulltune.recipe.fields import Recipe
from fulltune.recipe.methods import PROMPT_MODULE, ComparedMethod, FullMethod, Method, PromptMethod
from fulltune.recipe.tasks import FACTS, TaskName
from fulltune.system import parallel_layout

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn
    from torch.nn import Parameter
    from transformers import PretrainedConfig, PreTrainedModel

    from fulltune.models.base import Base


BY_HOOKS = ("adapter", "prompt")
"""Methods that add hooks, which cannot be merged into the model's weights."""


@dataclass(frozen=True)
class AppliedMethod:
    """A model with a method applied; `peft_model` wraps `model` if the method uses PEFT."""

    model: PreTrainedModel
    """The unwrapped Hugging Face model, with `requires_grad=True` only for trained parameters."""
    method: Method
    peft_model: PeftModel | None = None


def apply_method(model: PreTrainedModel, method: Method, task: TaskName) -> AppliedMethod:
    """Add the method's parameters, initialised from torch's random state, and freeze what the method does not train."""
    from fulltune.methods import added, freeze, head

    if method.kind == "full":
        model.requires_grad_(True)
        for parameter in sinusoidal_tables(model).values():
            parameter.requires_grad_(False)
        if method.freeze:
            freeze.freeze_parameters(model, method.freeze, method.label)
            head.keep_frozen_batch_norms_in_eval(model)
        return AppliedMethod(model, method)
    heads = head.head_paths(model, task, method.label)
    model.requires_grad_(False)
    peft_model = None
    match method.kind:
        case "lora" | "peft":
            peft_model = added.add_peft_modules(model, method, task, heads)
        case "adapter":
            added.add_adapters(model, method, heads)
        case "prompt":
            added.add_virtual_tokens(model, method, task)
    if peft_model is None:  # PEFT trains a copy of the head
        for name in heads:
            model.get_submodule(name).requires_grad_(True)
    head.keep_frozen_batch_norms_in_eval(model)
    return AppliedMethod(model, method, peft_model)


def without_lora_input_casts(applied: AppliedMethod, autocast: bool) -> AbstractContextManager[None]:
    """Return a context in which LoRA layers under autocast do not cast inputs to float32."""
    if applied.method.kind != "lora" or applied.peft_model is None or not autocast:
        return nullcontext()
    from peft.helpers import disable_input_dtype_casting

    context: AbstractContextManager[None] = disable_input_dtype_casting(applied.peft_model)
    return context


def sinusoidal_tables(model: nn.Module) -> dict[str, Parameter]:
    """Return the fixed position embeddings of Marian, Pegasus or RoFormer by name. Checkpoints may lack them."""
    return {
        f"{path}.{name}": parameter
        for path, module in model.named_modules()
        if "Sinusoidal" in type(module).__name__
        for name, parameter in module.named_parameters()
    }


def trainable_parameters(model: nn.Module) -> dict[str, Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def max_virtual_tokens(recipe: Recipe) -> int:
    """Return the largest `num_virtual_tokens` of the recipe's prompt methods, or 0. For a fair comparison, all methods
    shorten rows by this number."""
    prompts = [method for method in recipe.methods or (recipe.method,) if isinstance(method, PromptMethod)]
    return max((method.num_virtual_tokens for method in prompts), default=0)


def virtual_tokens_of(model: nn.Module) -> int:
    prompt = getattr(model, PROMPT_MODULE, None)
    return 0 if prompt is None else len(prompt.weight)


def check_methods(recipe: Recipe, base: Base) -> None:
    """Raise `RecipeError` if one of the recipe's methods cannot do its task with this model."""
    from fulltune.models.shapes import measure_shapes

    methods = recipe.methods or (recipe.method,)
    if problems := [problem for method in methods for problem in method_problems(recipe, base.config, method)]:
        raise RecipeError(problems)
    for method in methods:
        if method.kind == "full" and method.freeze:
            measure_shapes(base, {}, partial(_raise_if_freeze_unfit, recipe, method))


def _raise_if_freeze_unfit(recipe: Recipe, method: FullMethod, model: PreTrainedModel) -> None:
    apply_method(model, method, recipe.task)
    if recipe.model.new_tokens and not model.get_input_embeddings().weight.requires_grad:
        raise RecipeError(
            f"method {method.label}: freeze: matches the embeddings, where model.new_tokens must be trained"
        )


def method_problems(recipe: Recipe, config: PretrainedConfig, method: ComparedMethod) -> list[str]:
    """List error messages about why a method cannot do the recipe's task with this model."""
    from fulltune.models.shapes import position_limit

    lines = []
    if method.kind == "head" and not FACTS[recipe.task].head_is_new:
        lines.append(f"{recipe.task} has no new head to train; use lora, adapter or full")
    if method.kind == "prompt":
        limit = position_limit(config)
        if FACTS[recipe.task].reads == "image":
            lines.append("images have no tokens, so they cannot have virtual tokens; use lora, adapter or head")
        elif limit is not None and method.num_virtual_tokens > limit // 2:
            lines.append(
                f"num_virtual_tokens: {method.num_virtual_tokens} is more than half of the model's "
                f"maximum length of {limit} tokens; use fewer"
            )
    if method.kind == "peft":
        from fulltune.methods.added import peft_problems

        lines += peft_problems(method)
        layout = parallel_layout.layout_of(recipe)
        if layout is not None and layout.engine == "zero" and layout.stage == 3:
            by = recipe.train.zero_enabled_by
            lines.append(f"PEFT may read whole weights, but {by} shards them; use lora, or train.placement: zero2")
    return [f"method {method.label}: {line}" for line in lines]
