"""What a recipe alone shows to be impossible: settings that its task does not read, names that transformers does not
know, pairs that do not go together.

No torch, no transformers. Refused together with what does not fit the fields' types, before anything is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from fulltune.errors import RecipeError
from fulltune.recipe.elsewhere import answer, optimizers, pinned, trackers, training_arguments
from fulltune.recipe.fields import Recipe
from fulltune.recipe.methods import Arm
from fulltune.recipe.preserve import AUTO, PreserveBlock
from fulltune.recipe.tasks import FACTS, FORMS, READ_BY
from fulltune.recipe.training import OWN_OPTIMIZERS
from fulltune.text import did_you_mean

SMOOTHING = "train.label_smoothing_factor: has no effect for regression; remove it"


NO_PACKAGES = ("all", "none", "flyte")
"""Words of transformers, and the tracker that it cannot look for."""


OWN_GROUPS = ("galore", "apollo", "lomo", "adalomo")
"""Beginnings of optimizers that transformers gives tensors in groups of their own."""


def check(recipe: Recipe) -> None:
    """Refuse what the recipe alone shows to be impossible."""
    if problems := [*of_settings(recipe), *of_pairs(recipe)]:
        raise RecipeError(problems)


def of_settings(recipe: Recipe) -> list[str]:
    """Settings that are impossible by themselves, or for the task. One that is written out with its default value is
    let through."""
    fields = type(recipe.data).model_fields
    return [
        *(
            f"data.{name}: has no effect for {recipe.task}; remove it"
            for name, tasks in READ_BY.items()
            if recipe.task not in tasks and getattr(recipe.data, name) != fields[name].default
        ),
        *_mixed_images(recipe),
        *_compared_images(recipe),
        *_weights_without_classes(recipe),
        *_rate_without_head(recipe),
        *_init_without_head(recipe),
        *_impossible_metric(recipe),
        *_unknown_fields(recipe),
        *_unknown_optimizer(recipe),
        *_unknown_trackers(recipe),
    ]


def of_pairs(recipe: Recipe) -> list[str]:
    """Settings that do not go together."""
    problems = [*_without_workers(recipe), *_bf16_updates(recipe), *_rates_by_tensor(recipe)]
    problems += _preserved(recipe)
    if recipe.data.problem_type == "regression" and recipe.train.label_smoothing_factor:
        problems.append(SMOOTHING)
    if recipe.train.chunked_loss:
        problems += [f"train.chunked_loss: {reason}; remove it" for reason in _whole_logits(recipe)]
    return problems


def wrong_metric(wanted: str, kind: str, possible: Iterable[str]) -> str:
    """Why a metric is refused, of a task or of rows of one kind."""
    return f"evaluate.metric: '{wanted}' cannot choose a checkpoint for {kind}; expected one of {', '.join(possible)}"


def _weights_without_classes(recipe: Recipe) -> list[str]:
    if recipe.train.class_weights is None or FACTS[recipe.task].has_classes:
        return []
    return [f"train.class_weights: has no effect for {recipe.task}, which has no classes; remove it"]


def _mixed_images(recipe: Recipe) -> list[str]:
    if FACTS[recipe.task].reads == "text" or not recipe.data.mixed_files:
        return []
    return ["data.train: images cannot be mixed in by weight yet; name the folders without a weight"]


def _compared_images(recipe: Recipe) -> list[str]:
    if FACTS[recipe.task].reads == "text" or recipe.data.contamination is None:
        return []
    return ["data.contamination: only texts can be compared, not images; remove the setting"]


def _rate_without_head(recipe: Recipe) -> list[str]:
    """A rate of the head's own where there is no new head, or nothing but the head."""
    problems = []
    for place, method in methods_of(recipe):
        name = f"{place}.head_learning_rate"
        if getattr(method, "head_learning_rate", None) is None:
            continue
        if not FACTS[recipe.task].head_is_new:
            problems.append(f"{name}: has no effect for {recipe.task}, which has no new head; remove it")
        elif method.kind == "head":
            problems.append(f"{name}: method head trains nothing but the head; write learning_rate")
    return problems


def _init_without_head(recipe: Recipe) -> list[str]:
    """A start of a new head where there is none."""
    return [
        f"{place}.head_init: has no effect for {recipe.task}, which has no new head; remove it"
        for place, method in methods_of(recipe)
        if getattr(method, "head_init", None) is not None and not FACTS[recipe.task].head_is_new
    ]


def methods_of(recipe: Recipe) -> list[tuple[str, Arm]]:
    """Each method, and where it stands."""
    if not recipe.methods:
        return [("method", recipe.method)]
    return [(f"methods.{place}", method) for place, method in enumerate(recipe.methods)]


def _impossible_metric(recipe: Recipe) -> list[str]:
    """One that no kind of rows of this task has; the rest is known when the rows are read."""
    wanted, facts, given = recipe.evaluate.metric, FACTS[recipe.task], recipe.data.problem_type
    form = FORMS[given] if given != "auto" and given in facts.types else None
    possible = form.metrics if form else facts.choosing
    if wanted is None or wanted in possible:
        return []
    return [wrong_metric(wanted, form.words if form else recipe.task, possible)]


def _unknown_fields(recipe: Recipe) -> list[str]:
    if not recipe.train.extra:
        return []
    known, refused = training_arguments(), pinned()
    own = set(type(recipe.train).model_fields)
    problems = []
    for name, value in recipe.train.extra.items():
        if name in refused:
            problems.append(f"train.extra.{name}: cannot be set here; {refused[name]}")
        elif name in own:
            problems.append(f"train.extra.{name}: is a setting of its own; write it as train.{name}")
        elif name not in known:
            hint = answer(name) or did_you_mean(name, known)
            said = f"; {hint}" if hint else ""
            problems.append(f"train.extra.{name}: transformers.TrainingArguments has no such field{said}")
        elif (expected := _expected(known[name])) and not _is_a(value, known[name]):
            problems.append(f"train.extra.{name}: expected {expected}, found {value!r}{_as_number(value)}")
    return problems


_TYPES = {"bool": "true or false", "int": "a whole number", "float": "a number", "str": "a text"}


def _expected(annotation: str) -> str | None:
    """The values of a field in words; None where its type is none of the plain ones."""
    names = [name.strip() for name in annotation.split("|")]
    return " or ".join(_TYPES[name] for name in names if name != "None") if set(names) <= {*_TYPES, "None"} else None


def _as_number(value: Any) -> str:
    """YAML reads `1e-5` as a text."""
    try:
        return f"; write {float(value):.1e}" if isinstance(value, str) else ""
    except ValueError:
        return ""


def _is_a(value: Any, annotation: str) -> bool:
    names = _names(annotation)
    if value is None:
        return True
    if isinstance(value, bool):
        return "bool" in names
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        return bool(names & {"int", "float", "str"})
    return type(value).__name__ in names or (isinstance(value, float) and "str" in names)


def _names(annotation: str) -> set[str]:
    return {name.strip() for name in annotation.split("|")}


def as_arguments(extra: Mapping[str, Any]) -> dict[str, Any]:
    """`train.extra` as transformers takes it: `1800.0` as a whole number, `2024` as a text, where such is expected;
    null leaves a field as it is, where it cannot be empty."""
    known, values = training_arguments(), dict[str, Any]()
    for name, value in extra.items():
        names = _names(known[name])
        if value is None and names <= {"bool", "int", "float", "str"}:
            continue
        if isinstance(value, float) and value.is_integer() and "int" in names:
            value = int(value)
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and names <= {"str", "None"}:
            value = str(value)
        values[name] = value
    return values


def _without_workers(recipe: Recipe) -> list[str]:
    if workers := recipe.train.extra.get("dataloader_num_workers"):
        low = isinstance(workers, int) and workers < 0
        return [f"train.extra.dataloader_num_workers: expected 0 or more, found {workers}"] if low else []
    return [
        f"train.extra.{name}: needs train.extra.dataloader_num_workers above 0; set it as well"
        for name in ("dataloader_prefetch_factor", "dataloader_persistent_workers")
        if recipe.train.extra.get(name)
    ]


def _unknown_optimizer(recipe: Recipe) -> list[str]:
    optim = recipe.train.optim
    if optim is None or optim in OWN_OPTIMIZERS:
        return []
    known = optimizers()
    if optim in known:
        return []
    hint = did_you_mean(optim, known) or f"it knows {', '.join(known)}"
    return [f"train.optim: transformers knows no optimizer '{optim}'; {hint}"]


def _bf16_updates(recipe: Recipe) -> list[str]:
    """Settings that have no effect, updates that would vanish, and our optimizers under DeepSpeed."""
    train, problems = recipe.train, []
    own = train.optim is None or train.optim in OWN_OPTIMIZERS
    if recipe.model.weights_dtype == "fp32" and train.bf16_rounding is not None:
        problems.append(
            f"train.bf16_rounding: '{train.bf16_rounding}' has no effect, because the weights are fp32; remove it, or "
            "set model.weights_dtype: bf16"
        )
    if recipe.model.weights_dtype == "bf16" and not own and train.bf16_rounding != "nearest":
        problems.append(
            f"train.optim: '{train.optim}' rounds bf16 weights (model.weights_dtype) to nearest: updates smaller than "
            "half of their spacing vanish, at usual learning rates most of them; set optim: adamw_bf16 or adamw_8bit, "
            "or weights_dtype: fp32, or bf16_rounding: nearest to have it so"
        )
    if own and train.extra.get("optim_args"):
        named = f"'{train.optim}' takes none" if train.optim else "train.optim is left out"
        problems.append(f"train.extra.optim_args: has no effect, because {named}; remove it")
    if train.optim in OWN_OPTIMIZERS and recipe.train.deepspeed_by:
        problems.append(
            f"train.optim: '{train.optim}' cannot run inside DeepSpeed, which keeps fp32 weights and shares out an "
            f"optimizer's state itself; remove optim, or {recipe.train.deepspeed_by}"
        )
    return problems


def _preserved(recipe: Recipe) -> list[str]:
    """What a budget for forgetting cannot go with, and what has no effect without one."""
    block, name = recipe.preserve, "preserve.budget"
    if FACTS[recipe.task].reads == "image" and block != PreserveBlock(drift=block.drift):
        return [f"preserve: is for tasks with text, and {recipe.task} reads images; remove it"]
    if block.probe is not None and not block.drift and block.budget is None and not recipe.methods:
        return ["preserve.probe: has no effect with preserve.drift: false; remove one of them"]
    if block.budget is None:
        no_effect = f"preserve.replay: has no effect without {name}; give a budget such as 1%"
        return [no_effect] if block.replay != AUTO else []
    problems = []
    if not block.drift:
        problems.append(f"preserve.drift: false, but {name} needs it; remove one of them")
    if recipe.task == "seq2seq":
        problems.append(f"{name}: not yet for seq2seq, of which only the encoder is measured; remove it")
    if by := recipe.train.deepspeed_by:
        problems.append(f"{name}: not yet with {by}; remove one of them")
    # Beside others one may stand that moves nothing of what reads generic text: it keeps any budget.
    unmoved = ("base", "head") if recipe.methods else ()
    for place, method in methods_of(recipe):
        if method.kind in (*SCALABLE, *unmoved):
            continue
        other = "compare full and lora" if recipe.methods else "take full or lora"
        problems.append(
            f"{place}.kind: '{method.kind}' cannot be scaled back to the untouched model, which {name} does; {other}, "
            f"or remove {name}"
        )
    if recipe.is_searched:
        problems.append(f"{name}: not yet in a search; remove it there, and give it to a single run")
    return problems


SCALABLE = ("full", "lora")
"""Kinds of methods whose change of the model can be scaled."""


def _rates_by_tensor(recipe: Recipe) -> list[str]:
    """Rates that differ between tensors, with an optimizer that puts the tensors into groups of its own."""
    optim = recipe.train.optim or ""
    if not optim.startswith(OWN_GROUPS):
        return []
    return [
        f"{place}.{name}: cannot go with train.optim: '{optim}', which has one rate for all tensors; remove one of them"
        for place, method in methods_of(recipe)
        for name in ("head_learning_rate", "layerwise_lr_decay")
        if getattr(method, name, None) not in (None, 1.0)
    ]


def _unknown_trackers(recipe: Recipe) -> list[str]:
    if not recipe.train.report_to:
        return []
    known = trackers()
    return [
        f"train.report_to: transformers knows no tracker '{name}'; "
        + (did_you_mean(name, known) or f"it knows {', '.join(known)}")
        for name in recipe.train.report_to
        if name not in (*known, *NO_PACKAGES)
    ]


def _whole_logits(recipe: Recipe) -> list[str]:
    """Why the loss of this recipe cannot be computed in pieces."""
    reasons = []
    if not FACTS[recipe.task].writes:
        reasons.append(f"has no effect for {recipe.task}, which has no logits of tokens")
    if recipe.train.deepspeed_by:
        reasons.append(f"does not go with {recipe.train.deepspeed_by}, which shares out the head's weights")
    return reasons
