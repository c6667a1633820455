"""Recipes of which several runs are made: what a search tries, and what arms of a comparison have of their own."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import product
from typing import Any

from pydantic import ValidationError

from fulltune.recipe.fields import Recipe
from fulltune.recipe.methods import SEARCH
from fulltune.recipe.model import SearchBlock
from fulltune.recipe.rules import methods_of
from fulltune.recipe.rules import problems_of as alone
from fulltune.recipe.training import TrainBlock
from fulltune.text import did_you_mean

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
"""Of the block `train`: what the runs of a search, or the arms of a comparison, have in common."""
HOW_SCORED = ("load_best_model_at_end", "eval_strategy", "eval_steps", "early_stopping_patience")
"""Settings that change how often the eval rows are asked: with them a run would not be better, but luckier."""
_MOST_CHECKED = 200
"""Combinations that are all checked beforehand; of more, each value alone, and each combination when it is drawn."""


def problems_of(recipe: Recipe) -> list[str]:
    """What keeps the runs from being made, each with the name of its setting first."""
    return [*_wrong_search(recipe), *_wrong_arms(recipe)]


def with_settings(recipe: Recipe, settings: Mapping[str, Any]) -> Recipe:
    """The recipe of one run with these settings, such as `{"train.num_train_epochs": 2}`, and nothing left to search.
    Raises `pydantic.ValidationError` when it is none."""
    values = recipe.model_dump(exclude_unset=True, exclude={"search"})
    # The method's folder is called the same in all runs, whatever differs.
    values["method"] = {**values.get("method", {"kind": "full"}), "name": recipe.method.arm}
    if "method.learning_rate" in settings:
        values["method"].pop("learning_rates", None)  # one of them is found
    for name, value in settings.items():
        block, field = name.split(".", 1)
        values[block] = {**values.get(block, {}), field: value}
    return Recipe.model_validate(values)


def combinations(values: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    """Each combination of the values, in their order."""
    for chosen in product(*values.values()):
        yield dict(zip(values, chosen, strict=True))


def num_combinations(values: Mapping[str, Sequence[Any]]) -> int:
    return math.prod(map(len, values.values()))


def why_impossible(recipe: Recipe, settings: Mapping[str, Any]) -> str:
    """Why there is no run with these settings; empty: there is one."""
    try:
        other = with_settings(recipe, settings)
    except ValidationError as error:
        return "; ".join(_in_words(one, settings) for one in error.errors())
    return "; ".join(_new_problems(recipe, other))


def _in_words(error: Any, settings: Mapping[str, Any]) -> str:
    said = error["msg"].removeprefix("Value error, ").replace("Input should be", "expected").split(", unable")[0]
    field = str(error["loc"][-1]) if error["loc"] else ""
    if "found" in said:
        return str(said)
    given = next((f"; found {value!r}" for name, value in settings.items() if name.endswith(f".{field}")), "")
    return f"{said}{given}"


def _new_problems(recipe: Recipe, other: Recipe) -> list[str]:
    """Those of a run that the recipe itself does not have."""
    before = alone(recipe)
    return [one for one in alone(other) if one not in before]


# ---- a search --------------------------------------------------------------------------------------------------


def _wrong_search(recipe: Recipe) -> Iterable[str]:
    """A search that searches nothing, or what is searched already, and values that a setting cannot have."""
    search, method = recipe.search, recipe.method
    if recipe.methods:
        for place, one in methods_of(recipe):
            if getattr(one, "is_searched", False):
                yield f"{place}.learning_rate: a comparison searches each method's rate anyway; remove it"
        if search != SearchBlock():
            yield "search: has no effect on a comparison; see 'compare' for its rates and its budget"
        return
    pairs = {
        "search: names settings to try, and the learning rate is to be searched as well (--search), which is another "
        "search; give rates among the settings, {method.learning_rate: [1e-4, 3e-4]}, or remove one of the two": (
            method.is_searched and search.settings
        ),
        "search.budget: nothing is searched; add 'learning_rate: search' to the block method (--search), or settings "
        "to the block search": not recipe.is_searched and search.budget is not None,
        "search.trials: is the number of runs with other settings, and names none; remove it, or name settings": (
            not search.settings and search.trials != SearchBlock().trials
        ),
        "method.learning_rates: rates to search among have no effect on a single rate; add 'learning_rate: search', or "
        "use 'fulltune compare'": not method.is_searched and method.learning_rates is not None,
        "train.load_best_model_at_end: a search goes by the eval metric of the weights that are kept, and false keeps "
        "the last ones whatever theirs is; remove it": recipe.is_searched and not recipe.train.load_best_model_at_end,
    }
    yield from (text for text, is_wrong in pairs.items() if is_wrong)
    wrong = [f"search.{name}: {problem}" for name in search.settings for problem in _wrong_setting(recipe, name)]
    yield from wrong
    if not wrong and num_combinations(search.settings) <= _MOST_CHECKED:
        for settings in combinations(search.settings) if search.settings else ():
            if problem := why_impossible(recipe, settings):
                said = ", ".join(f"{name} {value}" for name, value in settings.items())
                yield f"search: {said}: {problem}"
                return


def _wrong_setting(recipe: Recipe, name: str) -> Iterable[str]:
    block, field = name.split(".", 1)
    known, values = list(type(getattr(recipe, block)).model_fields), recipe.search.settings[name]
    whose, hint = f"method {recipe.method.kind}" if block == "method" else block, did_you_mean(field, known)
    reasons = {
        f"no setting of {whose}{'; ' * bool(hint)}{hint}": field not in known,
        "methods are compared, with 'fulltune compare', not searched": (
            name in ("method.kind", "method.name", "method.train")
        ),
        "give rates as values of method.learning_rate": name == "method.learning_rates" or SEARCH in values,
        f"cannot be searched, because all its runs have the same {field}; seeds are for 'fulltune compare'": (
            block == "train" and field in SHARED
        ),
        "how the eval rows are asked cannot be searched: the run that is asked most often looks best by luck": (
            block == "train" and field in HOW_SCORED
        ),
        "is given as method.learning_rate, too; remove one of them": (
            name == "method.learning_rate" and recipe.method.fixed_learning_rate is not None
        ),
    }
    if first := next((text for text, is_wrong in reasons.items() if is_wrong), None):
        yield first
        return
    for value in values:
        if problem := why_impossible(recipe, {name: value}):
            yield problem if "found" in problem and ": " not in problem else f"{value!r}: {problem}"


# ---- arms of a comparison --------------------------------------------------------------------------------------


def _wrong_arms(recipe: Recipe) -> Iterable[str]:
    """What an arm cannot have otherwise than the block `train`."""
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
            for one in error.errors():
                name = ".".join(map(str, one["loc"]))
                if one["type"] == "extra_forbidden":
                    hint = did_you_mean(name, list(TrainBlock.model_fields))
                    yield f"{place}.train.{name}: unknown setting{'; ' * bool(hint)}{hint}"
                else:
                    yield f"{place}.train{'.' * bool(name)}{name}: {_in_words(one, {f'.{name}': own.get(name)})}"
            continue
        if not shared:
            yield from (f"{place}.{problem}" for problem in _new_problems(recipe, arm))
