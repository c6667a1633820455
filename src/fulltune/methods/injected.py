"""LoRA and the other methods of PEFT that put modules into a model's layers."""

from __future__ import annotations

import warnings
from typing import Any

from fulltune.errors import RecipeError
from fulltune.recipe.methods import LoraMethod, PeftMethod
from fulltune.recipe.tasks import FACTS, TaskName
from fulltune.system.out_of_memory import is_out_of_memory
from fulltune.text import did_you_mean

_FROM_VALUES = "what it trains follows from the weights' values, which the plan does not read"
UNUSABLE = {
    **dict.fromkeys(("ADAMSS", "BOFT", "FROD", "UNILORA"), _FROM_VALUES),
    "ADALORA": "it needs a call after each step",
    "ADAPTION_PROMPT": "it replaces the attention of a few kinds of models",
    "OSF": "it takes matrices apart, and trains most of them",
    "POLY": "it needs a task's number with each row",
    "SHADOW": "it runs a second model beside the first",
    "SUPERTUNING": "it needs more than the model",
    "XLORA": "it mixes adapters that are trained already",
}
"""Methods that are more than modules in layers."""
_OURS = ("peft_type", "task_type", "inference_mode", "modules_to_save", "base_model_name_or_path", "revision")
"""Fields of PEFT's configs that follow from the recipe."""


def problems(method: PeftMethod) -> list[str]:
    """What is wrong with a method's type and config, as far as PEFT tells without a model."""
    from peft import PromptLearningConfig
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    known = {kind.value: config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    name = method.type.upper()
    in_layers = {one for one, config in known.items() if not issubclass(config, PromptLearningConfig)}
    usable = sorted(in_layers - UNUSABLE.keys())
    if name not in known:
        hint = did_you_mean(name, usable) or f"known here: {', '.join(usable)}"
        return [f"type: PEFT has no '{method.type}'; {hint}"]
    if name not in in_layers:
        return [f"type: {name} puts tokens before the text instead of modules into layers; take 'kind: prompt'"]
    if name in UNUSABLE:
        return [f"type: {name} cannot be used here: {UNUSABLE[name]}; take another one"]
    fields = set(known[name].__dataclass_fields__)
    found = []
    for field in method.config:
        if field in _OURS:
            found.append(f"config.{field}: follows from the recipe; remove it")
        elif field not in fields:
            hint = did_you_mean(field, sorted(fields)) or f"it has {', '.join(sorted(fields - set(_OURS)))}"
            found.append(f"config.{field}: {name} has no such field; {hint}")
    return found


def put_into(model: Any, method: LoraMethod | PeftMethod, task: TaskName, heads: tuple[str, ...]) -> Any:
    """Put the method's modules into the model, and return PEFT's wrapper around it.

    Raises:
        RecipeError: When PEFT cannot do it with this model.
    """
    from peft import LoraConfig, get_peft_model
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    # PEFT takes every module whose path ends with one of these names.
    given: dict[str, Any] = {
        "task_type": FACTS[task].peft,
        "modules_to_save": [name.rpartition(".")[2] for name in heads] or None,
    }
    try:
        if method.kind == "lora":
            targets = method.target_modules
            config: Any = LoraConfig(
                r=method.rank,
                # PEFT says `int`, and only divides it by the rank.
                lora_alpha=2 * method.rank if method.alpha is None else method.alpha,  # type: ignore[arg-type]
                lora_dropout=method.dropout,
                use_rslora=method.rslora,
                target_modules=targets if isinstance(targets, str) else list(targets),
                **given,
            )
        else:
            kinds = {kind.value: kind for kind in PEFT_TYPE_TO_CONFIG_MAPPING}
            config = PEFT_TYPE_TO_CONFIG_MAPPING[kinds[method.type.upper()]](**given, **method.config)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about transposed matrices and the like, which it sets right itself
            return get_peft_model(model, config)
    # PEFT has no error of its own: a config or a model that it cannot take ends in any of these; all are passed on.
    except (ValueError, TypeError, KeyError, AttributeError, NotImplementedError, RuntimeError) as error:
        if is_out_of_memory(error):  # a RuntimeError as well, and no fault of the recipe
            raise
        text = " ".join(str(error).split())[:300]
        raise RecipeError(f"method {method.arm}: PEFT cannot do it with {type(model).__name__}: {text}") from error
