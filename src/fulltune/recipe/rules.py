"""What a recipe alone shows to be impossible: settings that its task does not read, names that transformers does not
know, pairs that do not go together.

No torch, no transformers. Refused together with what does not fit the fields' types, before anything is read.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

from fulltune.errors import RecipeError
from fulltune.recipe.elsewhere import answer, optimizers, pinned, trackers, training_arguments
from fulltune.recipe.fields import Recipe
from fulltune.recipe.methods import Arm
from fulltune.recipe.preserve import PreserveBlock
from fulltune.recipe.tasks import FACTS, FORMS, READ_BY, Form
from fulltune.recipe.training import OWN_OPTIMIZERS
from fulltune.text import did_you_mean

_EXCLUDED = Path(__file__).with_name("excluded.toml")
NO_PACKAGES = ("all", "none", "flyte")
"""Words of transformers, and the tracker that it cannot look for."""


def check(recipe: Recipe) -> None:
    """Refuse what the recipe alone shows to be impossible."""
    if problems := problems_of(recipe):
        raise RecipeError(problems)


def problems_of(recipe: Recipe) -> list[str]:
    """Settings that are impossible by themselves, for the task or together, each with its name first. One that is
    written out with its default value is let through."""
    fields = type(recipe.data).model_fields
    return [
        *(
            f"data.{name}: has no effect for {recipe.task}; remove it"
            for name, tasks in READ_BY.items()
            if recipe.task not in tasks and getattr(recipe.data, name) != fields[name].default
        ),
        *conflicts(recipe, form_of(recipe)),
        *_impossible_metric(recipe),
        *_unknown_fields(recipe),
        *_unknown_optimizer(recipe),
        *_unknown_trackers(recipe),
        *_out_of_place(recipe),
        *_vanishing_updates(recipe),
        *_preserved(recipe),
    ]


@cache
def _table() -> list[list[Any]]:
    return list(tomllib.loads(_EXCLUDED.read_text(encoding="utf-8"))["excluded"])


def form_of(recipe: Recipe) -> Form | None:
    """What the recipe says that its rows are; None: it shows when they are read."""
    given = recipe.data.problem_type
    return FORMS[given] if given != "auto" and given in FACTS[recipe.task].types else None


def conflicts(recipe: Recipe, form: Form | None) -> list[str]:
    """What of the table of settings that exclude each other holds for a recipe, and for rows of such a form."""
    problems = []
    for setting, values, other, other_values, reason in _table():
        block, _, field = setting.partition(".")
        if block == "preserve" and FACTS[recipe.task].reads == "image":
            continue  # all of the block is refused
        for place, method in methods_of(recipe) if block == "method" else [(block, recipe.method)]:
            if block == "method" and field not in type(method).model_fields:
                continue
            found, beside = (_value(recipe, method, form, name) for name in (setting, other))
            if _is_meant(found, values) and _is_meant(beside, other_values):
                problems.append(f"{place}.{field}: {reason.format(task=recipe.task, value=found, other=beside)}")
    return problems


def _is_meant(value: Any, values: bool | str | list[str]) -> bool:
    """Whether a setting's value is one that the table means: see there."""
    if isinstance(values, bool):
        return (value not in (None, False, 0, ())) == values
    if isinstance(values, str):
        return str(value) != values.removeprefix("not ")
    return any(fnmatchcase(str(value), one) for one in values)


def _value(recipe: Recipe, method: Arm, form: Form | None, name: str) -> Any:
    """What the table's dotted name stands for in a recipe."""
    block, _, field = name.partition(".")
    if block == "method":
        return getattr(method, field)
    if block == "form":
        return getattr(form, field, None)
    if block == "task":
        return getattr(FACTS[recipe.task], field) if field else recipe.task
    if field.startswith("extra."):
        return recipe.train.extra.get(field.removeprefix("extra."))
    return getattr(getattr(recipe, block), field) if field else getattr(recipe, block)


def wrong_metric(wanted: str, kind: str, possible: Iterable[str]) -> str:
    """Why a metric is refused, of a task or of rows of one kind."""
    return f"evaluate.metric: '{wanted}' cannot choose a checkpoint for {kind}; expected one of {', '.join(possible)}"


def methods_of(recipe: Recipe) -> list[tuple[str, Arm]]:
    """Each method, and where it stands."""
    if not recipe.methods:
        return [("method", recipe.method)]
    return [(f"methods.{place}", method) for place, method in enumerate(recipe.methods)]


def _impossible_metric(recipe: Recipe) -> list[str]:
    """One that no kind of rows of this task has; the rest is known when the rows are read."""
    wanted, form = recipe.evaluate.metric, form_of(recipe)
    possible = form.metrics if form else FACTS[recipe.task].choosing
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


def _unknown_optimizer(recipe: Recipe) -> list[str]:
    optim = recipe.train.optim
    if optim is None or optim in OWN_OPTIMIZERS:
        return []
    known = optimizers()
    if optim in known:
        return []
    hint = did_you_mean(optim, known) or f"it knows {', '.join(known)}"
    return [f"train.optim: transformers knows no optimizer '{optim}'; {hint}"]


SCALABLE = ("full", "lora")
"""Kinds of methods whose change of the model can be scaled."""


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


def _out_of_place(recipe: Recipe) -> list[str]:
    """Images that would be mixed in, workers that cannot be, and a rate of the head's own where nothing else learns."""
    problems = []
    if FACTS[recipe.task].reads == "image" and recipe.data.mixed_files:
        problems.append("data.train: images cannot be mixed in by weight yet; name the folders without a weight")
    workers = recipe.train.extra.get("dataloader_num_workers")
    if isinstance(workers, int) and workers < 0:
        problems.append(f"train.extra.dataloader_num_workers: expected 0 or more, found {workers}")
    problems += [
        f"{place}.head_learning_rate: method head trains nothing but the head; write learning_rate"
        for place, method in methods_of(recipe)
        if method.kind == "head" and method.head_learning_rate is not None and FACTS[recipe.task].head_is_new
    ]
    return problems


def _vanishing_updates(recipe: Recipe) -> list[str]:
    """An optimizer that rounds bf16 weights to nearest, where that was not asked for."""
    train = recipe.train
    is_own = train.optim is None or train.optim in OWN_OPTIMIZERS
    if recipe.model.weights_dtype != "bf16" or is_own or train.bf16_rounding == "nearest":
        return []
    return [
        f"train.optim: '{train.optim}' rounds bf16 weights (model.weights_dtype) to nearest: updates smaller than "
        "half of their spacing vanish, at usual learning rates most of them; set optim: adamw_bf16 or adamw_8bit, "
        "or weights_dtype: fp32, or bf16_rounding: nearest to have it so"
    ]


def _preserved(recipe: Recipe) -> list[str]:
    """What a budget for forgetting cannot go with, and what has no effect without one, beside the table."""
    block, name = recipe.preserve, "preserve.budget"
    if FACTS[recipe.task].reads == "image" and block != PreserveBlock(drift=block.drift):
        return [f"preserve: is for tasks with text, and {recipe.task} reads images; remove it"]
    if block.budget is None:
        unread = block.probe is not None and not block.drift and not recipe.methods
        return ["preserve.probe: has no effect with preserve.drift: false; remove one of them"] if unread else []
    # Beside others one may stand that moves nothing of what reads generic text: it keeps any budget.
    unmoved = ("base", "head") if recipe.methods else ()
    other = "compare full and lora" if recipe.methods else "take full or lora"
    return [
        f"{place}.kind: '{method.kind}' cannot be scaled back to the untouched model, which {name} does; {other}, "
        f"or remove {name}"
        for place, method in methods_of(recipe)
        if method.kind not in (*SCALABLE, *unmoved)
    ]
