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

from fulltune.recipe.fields import Recipe
from fulltune.recipe.functions import is_own
from fulltune.recipe.methods import ComparedMethod
from fulltune.recipe.model import PreserveBlock
from fulltune.recipe.tasks import FACTS, FORMS, READ_BY, Form, compares_answers
from fulltune.recipe.training import OWN_OPTIMIZERS, STREAMABLE_OPTIMIZERS, TrainBlock
from fulltune.text import did_you_mean

NO_PACKAGES = ("all", "none", "flyte")


def problems_of(recipe: Recipe) -> list[str]:
    return [*_single_run_problems(recipe), *_search_problems(recipe), *_method_problems(recipe)]


def _single_run_problems(recipe: Recipe) -> list[str]:
    """List the error messages that a single run of the recipe would get."""
    fields = type(recipe.data).model_fields
    return [
        *(
            f"data.{name}: has no effect for {recipe.task}; remove it"
            for name, tasks in READ_BY.items()
            if recipe.task not in tasks and getattr(recipe.data, name) != fields[name].default
        ),
        *excluded_combinations(recipe, form_of(recipe)),
        *_extra_problems(recipe),
        *_unknown_optimizers_and_trackers(recipe),
        *_other_problems(recipe),
    ]


def form_of(recipe: Recipe) -> Form | None:
    """Return the `Form` (facts about the rows) of the recipe's `problem_type`, or None if the data decides the type."""
    kind = "relevance" if recipe.data.text and recipe.data.label else recipe.data.problem_type
    return FORMS[kind] if kind in FACTS[recipe.task].types else None


def excluded_combinations(recipe: Recipe, form: Form | None) -> list[str]:
    """List error messages for combinations of settings that `excluded.toml` forbids. `form` is None if the problem type
    is unknown."""
    problems = []
    for setting, values, other, other_values, reason in _load_table("excluded")["excluded"]:
        block, _, field = setting.partition(".")
        if block == "preserve" and FACTS[recipe.task].reads == "image":
            continue  # the whole block is refused below
        for prefix, method in named_methods(recipe) if block == "method" else [(block, recipe.method)]:
            if block == "method" and field not in type(method).model_fields:
                continue
            value, other_value = (_setting_value(recipe, method, form, name) for name in (setting, other))
            if _matches_condition(value, values) and _matches_condition(other_value, other_values):
                problems.append(f"{prefix}.{field}: {reason.format(task=recipe.task, value=value, other=other_value)}")
    return problems


def _matches_condition(value: object, condition: bool | str | list[str]) -> bool:
    """Return whether a value fits a condition of `excluded.toml`: set or unset (a bool), `not VALUE`, or a list of
    patterns."""
    if isinstance(condition, bool):
        return (value not in (None, False, 0, ())) == condition
    if isinstance(condition, str):
        return str(value) != condition.removeprefix("not ")
    return any(fnmatchcase(str(value), pattern) for pattern in condition)


def _setting_value(recipe: Recipe, method: ComparedMethod, form: Form | None, name: str) -> Any:
    """Return the recipe's value of a dotted name in `excluded.toml`, such as `train.optim` or `form.is_number`."""
    block, *fields = name.split(".")
    value: Any = getattr(recipe, block, None)
    if fields:
        value = {"method": method, "form": form, "task": FACTS[recipe.task]}.get(block, value)
    for field in fields:
        value = value.get(field) if isinstance(value, dict) else value and getattr(value, field)
    return value


def of_answers(recipe: Recipe) -> bool:
    """Return whether the recipe's metric compares generated answers."""
    return FACTS[recipe.task].writes and compares_answers(recipe.evaluate.metric or "")


def wrong_metric(recipe: Recipe, form: Form | None) -> str | None:
    """Return a message if `evaluate.metric` cannot choose a checkpoint for this form (None if unknown), else None."""
    wanted, forms = recipe.evaluate.metric, [form] if form else [FORMS[name] for name in FACTS[recipe.task].types]
    possible = [name for one in forms for name in one.metrics]
    of_one_class = [name for one in forms for name in one.of_one_class]
    possible += of_one_class if recipe.evaluate.positive_label is not None else []
    if wanted is None or wanted in possible or is_own(wanted):
        return None
    if wanted in of_one_class:
        return f"evaluate.metric: {wanted} is that of one class against the rest; also set evaluate.positive_label"
    kind, names = form.words if form else recipe.task, ", ".join(dict.fromkeys(possible))
    return f"evaluate.metric: '{wanted}' is not available for {kind}; expected one of {names}"


def named_methods(recipe: Recipe) -> list[tuple[str, ComparedMethod]]:
    """Return each method with its dotted name in the recipe, such as `methods.0`."""
    if not recipe.methods:
        return [("method", recipe.method)]
    return [(f"methods.{number}", method) for number, method in enumerate(recipe.methods)]


def _search_problems(recipe: Recipe) -> Iterable[str]:
    """Yield error messages about learning rate searches."""
    if recipe.methods:
        for prefix, method in named_methods(recipe):
            if getattr(method, "is_searched", False):
                yield f"{prefix}.learning_rate: a comparison always searches each method's rate; remove this setting"
        return
    is_searched = recipe.is_searched
    pairs = {
        "compare.budget: has no effect, because nothing is compared or searched; add 'methods', or 'learning_rate: "
        "search' in the block method (--search)": not is_searched and recipe.compare.budget is not None,
        "method.learning_rates: has no effect without a search; add 'learning_rate: search', or use 'fulltune "
        "compare'": not is_searched and recipe.method.learning_rates is not None,
        "train.load_best_model_at_end: must not be false in a search, which compares the best checkpoints; "
        "remove it": is_searched and not recipe.train.load_best_model_at_end,
    }
    yield from (text for text, is_wrong in pairs.items() if is_wrong)


SHARED = (
    "seed",
    "device",
    "num_processes",
    "num_machines",
    "placement",
    "offload",
    "stream",
    "oversubscribe",
    "precision",
    "memory_limit",
    "report_to",
)


def _method_problems(recipe: Recipe) -> Iterable[str]:
    """Yield error messages about the `train` settings of compared methods."""
    for prefix, method in named_methods(recipe):
        changes = getattr(method, "train", {})
        if not changes:
            continue
        if not recipe.methods:
            yield f"{prefix}.train: only methods of a comparison have train settings; move them to the block train"
            continue
        shared = [name for name in changes if name in SHARED]
        for name in shared:
            yield f"{prefix}.train.{name}: must be the same for all methods of a comparison; move it to the block train"
        try:
            variant = recipe.with_method(method)
        except ValidationError as error:
            yield from (f"{prefix}.train{_describe_variant_error(one, changes)}" for one in error.errors())
            continue
        if not shared:
            before = _single_run_problems(recipe)
            yield from (f"{prefix}.{problem}" for problem in _single_run_problems(variant) if problem not in before)


def _describe_variant_error(error: Mapping[str, Any], changes: Mapping[str, object]) -> str:
    """Return the message for a wrong `train` setting (in `changes`) of a compared method, starting with `.NAME`."""
    name = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        hint = did_you_mean(name, list(TrainBlock.model_fields))
        return f".{name}: unknown setting{f'; {hint}' if hint else ''}"
    text = error["msg"].removeprefix("Value error, ").replace("Input should be", "expected").split(", unable")[0]
    value = f"; found {changes[name]!r}" if name in changes and "found" not in text else ""
    return f"{f'.{name}' if name else ''}: {text}{value}"


def _extra_problems(recipe: Recipe) -> list[str]:
    """List error messages for `train.extra`, which may only hold further fields of `TrainingArguments`."""
    train_fields, problems = set(type(recipe.train).model_fields), []
    for name, value in recipe.train.extra.items():
        arguments, dotted_name = training_arguments(), f"train.extra.{name}"
        if name in pinned():
            problems.append(f"{dotted_name}: cannot be set here; {pinned()[name]}")
        elif name in train_fields:
            problems.append(f"{dotted_name}: has its own setting; write train.{name}")
        elif name not in arguments:
            hint = replacement_hint(name) or did_you_mean(name, arguments)
            problems.append(
                f"{dotted_name}: transformers.TrainingArguments has no such field{f'; {hint}' if hint else ''}"
            )
        elif value is not None:
            try:
                _type_adapter(arguments[name]).validate_python(value)
            except ValidationError:
                problems.append(f"{dotted_name}: expected {_type_in_words(arguments[name])}, found {value!r}")
    return problems


_TYPE_WORDS = {"bool": "true or false", "int": "a whole number", "float": "a number", "str": "text"}


@cache
def _type_adapter(annotation: str) -> TypeAdapter[Any]:
    """Return a pydantic adapter for a type such as `float | None`. The adapter also parses text, because YAML reads
    `1e-5` as text."""
    types = {"bool": bool, "int": int, "float": float, "str": str, "None": None}
    names = annotation.replace(" ", "").split("|")
    union: Any = Union[tuple(types.get(name, Any) for name in names)]  # noqa: UP007  # of types that only the name tells
    return TypeAdapter(union, config=ConfigDict(coerce_numbers_to_str=True))


def _type_in_words(annotation: str) -> str:
    return " or ".join(words for name, words in _TYPE_WORDS.items() if name in annotation.replace(" ", "").split("|"))


def as_training_arguments(extra: Mapping[str, Any]) -> dict[str, Any]:
    """Convert `train.extra` to transformers' types, omitting nulls for fields that cannot be None."""
    types = training_arguments()
    return {
        name: _type_adapter(types[name]).validate_python(value)
        for name, value in extra.items()
        if value is not None or "None" in types[name]
    }


def _unknown_optimizers_and_trackers(recipe: Recipe) -> list[str]:
    """List error messages for optimizers and trackers that transformers lacks."""
    train = recipe.train
    named = [] if train.optim in (None, *OWN_OPTIMIZERS) else [("optim", "optimizer", train.optim, optimizers())]
    named += [("report_to", "tracker", name, trackers()) for name in train.report_to if name not in NO_PACKAGES]
    return [
        f"train.{setting}: transformers has no {what} '{name}'; "
        + (did_you_mean(name, possible) or f"expected one of {', '.join(possible)}")
        for setting, what, name, possible in named
        if name not in possible
    ]


SCALABLE = ("full", "lora")


def _other_problems(recipe: Recipe) -> list[str]:
    """List error messages for rules that neither `excluded.toml` nor a single block can express."""
    train, block, kind = recipe.train, recipe.preserve, recipe.method.kind
    workers, is_image = train.extra.get("dataloader_num_workers"), FACTS[recipe.task].reads == "image"
    metric, wrong = recipe.evaluate.metric, wrong_metric(recipe, form_of(recipe))  # again when the rows are read
    pairs = {
        str(wrong): wrong is not None,
        "evaluate.greater_is_better: has no effect, because the direction of the task's metrics is known; remove it": (
            not is_own(metric) and recipe.evaluate.greater_is_better is not None
        ),
        f"evaluate.metric: {metric} compares generated answers, which only a single run without a search, folds or "
        "preserve.budget can do yet; use loss": (
            of_answers(recipe)
            and (recipe.methods or recipe.is_searched or recipe.is_cross_validated or block.budget is not None)
        ),
        f"evaluate.generate_rows: 0, but evaluate.metric: {metric} compares answers; set a number above 0": (
            of_answers(recipe) and not recipe.evaluate.generate_rows
        ),
        f"data.train: {'images' if is_image else 'pairs'} cannot be mixed in by weight yet; list the "
        f"{'folders' if is_image else 'files'} without weights": (
            (is_image or FACTS[recipe.task].completes_rows) and recipe.data.mixed_files
        ),
        f"train.extra.dataloader_num_workers: expected 0 or more, found {workers}": (
            isinstance(workers, int) and workers < 0
        ),
        f"train.optim: '{train.optim}' rounds bf16 weights (model.weights_dtype) to nearest, which loses most updates "
        "at usual learning rates; set optim: adamw_bf16 or adamw_8bit, or weights_dtype: fp32, or bf16_rounding: "
        "nearest to accept it": (
            recipe.model.weights_dtype == "bf16"
            and train.optim not in (None, *OWN_OPTIMIZERS)
            and train.bf16_rounding != "nearest"
        ),
        f"train.optim: '{train.optim}' cannot update slices of a state on disk (placement: stream); expected one of "
        f"{', '.join(STREAMABLE_OPTIMIZERS)}": (
            train.placement == "stream" and train.optim not in (None, *STREAMABLE_OPTIMIZERS)
        ),
        f"preserve: this block needs text, but {recipe.task} reads images; remove the block": (
            is_image and block != PreserveBlock(drift=block.drift)
        ),
        "preserve.probe: has no effect with preserve.drift: false; remove one of them": (
            not is_image and block.budget is None and block.probe is not None and not block.drift and not recipe.methods
        ),
        f"method.kind: '{kind}' does not support preserve.budget, which interpolates towards the pretrained weights; "
        "use full or lora, or remove preserve.budget": (
            not is_image and block.budget is not None and not recipe.methods and kind not in SCALABLE
        ),
    }
    return [text for text, is_wrong in pairs.items() if is_wrong]


# ---- names that other tools and transformers know ----------------------------------------------------------------
# Reading names from transformers' source takes a tenth of the time of importing it.


@cache
def _load_table(name: str) -> dict[str, Any]:
    return tomllib.loads(Path(__file__).with_name(f"{name}.toml").read_text(encoding="utf-8"))


def pinned() -> Mapping[str, str]:
    """Map each `TrainingArguments` field forbidden in `train.extra` to advice on what to do instead."""
    return dict(_load_table("elsewhere")["pinned"])


@cache
def replacement_hints() -> Mapping[str, str]:
    """Map other tools' settings, in lower case, to hints on replacing them."""
    by_name = {name: hint for hint, names in _load_table("elsewhere")["answers"].items() for name in names.split()}
    return {**by_name, **pinned()}


def replacement_hint(name: object) -> str | None:
    return replacement_hints().get(str(name).lower().replace("-", "_"))


@cache
def training_arguments() -> Mapping[str, str]:
    """Map fields of `transformers.TrainingArguments` to their annotations as written."""
    body = _find_definition("training_args.py", "TrainingArguments").body
    fields = [line for line in body if isinstance(line, ast.AnnAssign)]
    return {ast.unparse(line.target): ast.unparse(line.annotation) for line in fields}


def optimizers() -> list[str]:
    body = _find_definition("training_args.py", "OptimizerNames").body
    return sorted(ast.literal_eval(line.value) for line in body if isinstance(line, ast.Assign))


def trackers() -> list[str]:
    table = _find_definition("integrations/integration_utils.py", "INTEGRATION_TO_CALLBACK").value
    return sorted(ast.literal_eval(key) for key in table.keys)


@cache
def _parse_transformers_file(file: str) -> list[ast.stmt]:
    spec: Any = importlib.util.find_spec("transformers")
    return ast.parse(Path(spec.origin).parent.joinpath(file).read_text(encoding="utf-8")).body


def _find_definition(file: str, name: str) -> Any:
    """Return the syntax tree of a class or constant in a transformers file. Raise `LookupError` if there is none."""
    for line in _parse_transformers_file(file):
        if name == getattr(line, "name", None) or (
            isinstance(line, ast.Assign) and name == ast.unparse(line.targets[0])
        ):
            return line
    raise LookupError(f"transformers no longer defines {name}")
