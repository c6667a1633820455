"""What a recipe alone shows to be impossible: settings that its task does not read, names that transformers does not
know, pairs that do not go together.

No torch, no transformers. Refused together with what does not fit the fields' types, before anything is read.
"""

from __future__ import annotations

import ast
import importlib.util
import tomllib
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any, Union

from pydantic import ConfigDict, TypeAdapter, ValidationError

from fulltune.errors import RecipeError
from fulltune.recipe.fields import Recipe
from fulltune.recipe.methods import Arm
from fulltune.recipe.model import PreserveBlock
from fulltune.recipe.tasks import FACTS, FORMS, READ_BY, Form
from fulltune.recipe.training import OWN_OPTIMIZERS, TrainBlock
from fulltune.text import did_you_mean

_EXCLUDED, _ELSEWHERE = (Path(__file__).with_name(f"{name}.toml") for name in ("excluded", "elsewhere"))
NO_PACKAGES = ("all", "none", "flyte")
"""Words of transformers, and the tracker that it cannot look for."""


def check(recipe: Recipe) -> None:
    """Refuse what the recipe alone shows to be impossible."""
    if problems := problems_of(recipe):
        raise RecipeError(problems)


def problems_of(recipe: Recipe) -> list[str]:
    """Settings that are impossible by themselves, for the task or together, each with its name first. One that is
    written out with its default value is let through."""
    return [*_of_one_run(recipe), *_wrong_search(recipe), *_wrong_arms(recipe)]


def _of_one_run(recipe: Recipe) -> list[str]:
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
        *_unknown_names(recipe),
        *_out_of_place(recipe),
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


def _wrong_search(recipe: Recipe) -> Iterable[str]:
    """A search that searches nothing, or what is searched already."""
    if recipe.methods:
        for place, one in methods_of(recipe):
            if getattr(one, "is_searched", False):
                yield f"{place}.learning_rate: a comparison searches each method's rate anyway; remove it"
        return
    is_searched = recipe.is_searched
    pairs = {
        "compare.budget: nothing is compared or searched; name 'methods', or add 'learning_rate: search' to the block "
        "method (--search)": not is_searched and recipe.compare.budget is not None,
        "method.learning_rates: rates to search among have no effect on a single rate; add 'learning_rate: search', or "
        "use 'fulltune compare'": not is_searched and recipe.method.learning_rates is not None,
        "train.load_best_model_at_end: a search goes by the eval metric of the weights that are kept, and false keeps "
        "the last ones whatever theirs is; remove it": is_searched and not recipe.train.load_best_model_at_end,
    }
    yield from (text for text, is_wrong in pairs.items() if is_wrong)


SHARED = (
    "seed",
    "device",
    "num_processes",
    "num_machines",
    "placement",
    "offload",
    "oversubscribe",
    "precision",
    "memory_limit",
    "report_to",
)
"""Of the block `train`: what the arms of a comparison have in common."""


def _wrong_arms(recipe: Recipe) -> Iterable[str]:
    """What an arm of a comparison cannot have otherwise than the block `train`."""
    for place, method in methods_of(recipe):
        own = getattr(method, "train", {})
        if not own:
            continue
        if not recipe.methods:
            yield f"{place}.train: is for an arm of a comparison; write these settings into the block train"
            continue
        shared = [name for name in own if name in SHARED]
        for name in shared:
            yield f"{place}.train.{name}: all arms of a comparison have the same; write it into the block train"
        try:
            arm = recipe.with_method(method)
        except ValidationError as error:
            yield from (f"{place}.train{_wrong_setting(one, own)}" for one in error.errors())
            continue
        if not shared:
            before = _of_one_run(recipe)
            yield from (f"{place}.{problem}" for problem in _of_one_run(arm) if problem not in before)


def _wrong_setting(error: Any, own: Mapping[str, Any]) -> str:
    """What is wrong with a setting of an arm, after its name."""
    name = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        hint = did_you_mean(name, list(TrainBlock.model_fields))
        return f".{name}: unknown setting{'; ' * bool(hint)}{hint}"
    said = error["msg"].removeprefix("Value error, ").replace("Input should be", "expected").split(", unable")[0]
    given = f"; found {own[name]!r}" if name in own and "found" not in said else ""
    return f"{'.' * bool(name)}{name}: {said}{given}"


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
        elif value is not None:
            try:
                _as_field(known[name], value)
            except ValidationError:
                problems.append(f"train.extra.{name}: expected {_expected(known[name])}, found {value!r}")
    return problems


_TYPES = {"bool": "true or false", "int": "a whole number", "float": "a number", "str": "a text"}


@cache
def _plain_type(annotation: str) -> TypeAdapter[Any] | None:
    """Reads a field whose type is made of plain ones, numbers also from texts (YAML reads `1e-5` as one); else None."""
    names = annotation.replace(" ", "").split("|")
    if not set(names) <= {*_TYPES, "None"}:
        return None
    types = {"bool": bool, "int": int, "float": float, "str": str, "None": None}
    union: Any = Union[tuple(types[name] for name in names)]  # noqa: UP007  # of types that only the name tells
    return TypeAdapter(union, config=ConfigDict(coerce_numbers_to_str=True))


def _expected(annotation: str) -> str:
    return " or ".join(words for name, words in _TYPES.items() if name in annotation.replace(" ", "").split("|"))


def _as_field(annotation: str, value: Any) -> Any:
    """A value as a field takes it; raises `ValidationError` where that is impossible."""
    reader = _plain_type(annotation)
    return value if reader is None else reader.validate_python(value)


def as_arguments(extra: Mapping[str, Any]) -> dict[str, Any]:
    """`train.extra` as transformers takes it: `1800.0` as a whole number, `2024` as a text, where such is expected;
    null leaves a field as it is, where it cannot be empty."""
    known = training_arguments()
    return {
        name: _as_field(known[name], value)
        for name, value in extra.items()
        if value is not None or _plain_type(known[name]) is None or "None" in known[name]
    }


def _unknown_names(recipe: Recipe) -> list[str]:
    """Optimizers and trackers that transformers does not have."""
    train = recipe.train
    given = {
        ("optim", "optimizer"): [] if train.optim in (None, *OWN_OPTIMIZERS) else [train.optim],
        ("report_to", "tracker"): [name for name in train.report_to if name not in NO_PACKAGES],
    }
    return [
        f"train.{setting}: transformers knows no {what} '{name}'; "
        + (did_you_mean(name, known) or f"it knows {', '.join(known)}")
        for (setting, what), names in given.items()
        if names and (known := optimizers() if what == "optimizer" else trackers())
        for name in names
        if name not in known
    ]


SCALABLE = ("full", "lora")
"""Kinds of methods whose change of the model can be scaled."""


def _out_of_place(recipe: Recipe) -> list[str]:
    """What neither the table nor one block can say."""
    train, block, kind = recipe.train, recipe.preserve, recipe.method.kind
    workers, is_image = train.extra.get("dataloader_num_workers"), FACTS[recipe.task].reads == "image"
    pairs = {
        "data.train: images cannot be mixed in by weight yet; name the folders without a weight": (
            is_image and recipe.data.mixed_files
        ),
        f"train.extra.dataloader_num_workers: expected 0 or more, found {workers}": (
            isinstance(workers, int) and workers < 0
        ),
        f"train.optim: '{train.optim}' rounds bf16 weights (model.weights_dtype) to nearest: updates smaller than "
        "half of their spacing vanish, at usual learning rates most of them; set optim: adamw_bf16 or adamw_8bit, "
        "or weights_dtype: fp32, or bf16_rounding: nearest to have it so": (
            recipe.model.weights_dtype == "bf16"
            and train.optim not in (None, *OWN_OPTIMIZERS)
            and train.bf16_rounding != "nearest"
        ),
        f"preserve: is for tasks with text, and {recipe.task} reads images; remove it": (
            is_image and block != PreserveBlock(drift=block.drift)
        ),
        "preserve.probe: has no effect with preserve.drift: false; remove one of them": (
            not is_image and block.budget is None and block.probe is not None and not block.drift and not recipe.methods
        ),
        f"method.kind: '{kind}' cannot be scaled back to the untouched model, which preserve.budget does; take full or "
        "lora, or remove preserve.budget": (
            not is_image and block.budget is not None and not recipe.methods and kind not in SCALABLE
        ),
    }
    return [text for text, is_wrong in pairs.items() if is_wrong]


# ---- names that other tools and transformers know ----------------------------------------------------------------
# transformers is not imported: its names are read from its source, which takes a tenth of the time.


@cache
def _elsewhere() -> Mapping[str, Any]:
    return tomllib.loads(_ELSEWHERE.read_text(encoding="utf-8"))


def pinned() -> Mapping[str, str]:
    """Fields of `transformers.TrainingArguments` that `train.extra` may not set, and what to do instead."""
    return dict(_elsewhere()["pinned"])


@cache
def answers() -> Mapping[str, str]:
    """Names of settings in other tools, and what to write here."""
    by_name = {name: answer for answer, names in _elsewhere()["answers"].items() for name in names.split()}
    return by_name | _elsewhere()["pinned"]


def answer(name: object) -> str | None:
    """What to write in place of another tool's setting, or None where it is not known."""
    return answers().get(str(name).lower().replace("-", "_"))


@cache
def training_arguments() -> Mapping[str, str]:
    """Fields of `transformers.TrainingArguments`, and their types as they are written there."""
    body = _class("training_args.py", "TrainingArguments").body
    fields = [line for line in body if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)]
    return {line.target.id: ast.unparse(line.annotation) for line in fields if isinstance(line.target, ast.Name)}


@cache
def optimizers() -> list[str]:
    """Names of the optimizers of transformers."""
    body = _class("training_args.py", "OptimizerNames").body
    values = [line.value for line in body if isinstance(line, ast.Assign)]
    return sorted(value.value for value in values if isinstance(value, ast.Constant) and isinstance(value.value, str))


@cache
def trackers() -> list[str]:
    """Names of the trackers of transformers."""
    for line in _parsed("integrations/integration_utils.py").body:
        if isinstance(line, ast.Assign) and ast.unparse(line.targets[0]) == "INTEGRATION_TO_CALLBACK":
            keys = line.value.keys if isinstance(line.value, ast.Dict) else []
            return sorted(key.value for key in keys if isinstance(key, ast.Constant) and isinstance(key.value, str))
    raise LookupError("transformers has no INTEGRATION_TO_CALLBACK any more")


@cache
def _parsed(file: str) -> ast.Module:
    spec = importlib.util.find_spec("transformers")
    assert spec is not None, "it is installed with fulltune"
    assert spec.submodule_search_locations is not None, "it is a package"
    return ast.parse((Path(next(iter(spec.submodule_search_locations))) / file).read_text(encoding="utf-8"))


def _class(file: str, name: str) -> ast.ClassDef:
    return next(line for line in _parsed(file).body if isinstance(line, ast.ClassDef) and line.name == name)
