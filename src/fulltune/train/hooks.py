from __future__ import annotations

import functools
import hashlib
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fulltune.errors import RecipeError, SetupError
from fulltune.inference.own_metrics import own_metric_names
from fulltune.recipe.fields import Recipe
from fulltune.recipe.functions import IMPORTED, import_functions
from fulltune.recipe.rules import excluded_combinations
from fulltune.recipe.tasks import FACTS
from fulltune.records.data import DataSummary
from fulltune.system.memory import call_own

_PARTS = {
    functools.partial: ("func", "args", "keywords"),
    types.FunctionType: ("__qualname__", "__code__", "__defaults__", "__kwdefaults__", "__closure__"),
    types.CodeType: ("co_name", "co_code", "co_names", "co_consts"),
    types.CellType: ("cell_contents",),
}
"""Attributes that describe a function, by type."""


def _stable_description(value: object) -> str:
    """Return a string that describes a value identically in every process."""
    match [getattr(value, name) for name in _PARTS[type(value)]] if type(value) in _PARTS else value:
        case Mapping() as items:
            return _stable_description(list(items.items()))
        case tuple() | list() as values:
            return f"({','.join(map(_stable_description, values))})"
        case set() | frozenset() as values:
            return f"{{{','.join(sorted(map(_stable_description, values)))}}}"
    text = repr(value)
    # A default representation contains an address, which changes: only the type is used.
    return f"{type(value).__module__}.{type(value).__qualname__}" if " at 0x" in text else text


@dataclass(frozen=True)
class Hooks:
    """The user's functions. With `compute_loss`, training runs in the user's process."""

    metrics: Callable[..., Mapping[str, float]] | None = None
    """`metrics(predictions, references)` returns further metrics for the test rows and each bootstrap sample. Both
    arguments are arrays of class ids, 0/1 rows or numbers for classifiers, arrays of choice numbers for multiple
    choice, and lists of tags per row for taggers. For question answering they are answers, which may be empty, and
    lists of accepted answers; for other text tasks, generated and expected answers."""
    preprocess: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    """`preprocess(row)` returns the changed row; called for each row read."""
    compute_loss: Callable[..., Any] | None = None
    """`compute_loss(outputs, labels, num_items_in_batch)` returns the training loss, as in `transformers.Trainer`,
    divided by `num_items_in_batch`, the rows (or trained tokens) of the global batch."""

    def digest(self) -> str:
        """Return a hash of the hooks that change rows or weights, or "" without such hooks."""
        relevant = {name: value for name, value in vars(self).items() if value is not None and name != "metrics"}
        return "" if not relevant else hashlib.sha256(_stable_description(relevant).encode()).hexdigest()[:16]

    def with_named(self, recipe: Recipe) -> Hooks:
        """Import the functions that a recipe names, and return the hooks with its loss and its function for rows."""
        import_functions(recipe.own_functions, recipe.functions)
        loss, preprocess = recipe.train.loss, recipe.data.preprocess
        return Hooks(
            self.metrics,
            self.preprocess if preprocess is None else IMPORTED[preprocess].call,
            self.compute_loss if loss is None else functools.partial(_checked_loss, loss),
        )

    def check_recipe(self, recipe: Recipe) -> None:
        """Raise `RecipeError` if a hook conflicts with a setting."""
        train, own = recipe.train, self.compute_loss is not None
        metrics = self.metrics is not None or own_metric_names(recipe)
        answers = not FACTS[recipe.task].writes or recipe.evaluate.generate_rows
        pairs = {
            "compute_loss runs in this process; set train.num_processes: 1": own and train.num_processes > 1,
            f"compute_loss runs in this process; remove {recipe.train.sharded_by}": own and recipe.train.sharded_by,
            "metrics need generated answers; set evaluate.generate_rows above 0": metrics and not answers,
            "compute_loss and train.loss are both set; remove one": own and train.loss is not None,
            "preprocess and data.preprocess are both set; remove one": self.preprocess and recipe.data.preprocess,
        }
        named = train.model_copy(update={"loss": "python:compute_loss"} if own else {})
        excluded = excluded_combinations(recipe.model_copy(update={"train": named}), None)
        problems = [problem for problem, applies in pairs.items() if applies]
        if problems := problems + [problem.replace("train.loss", "compute_loss", 1) for problem in excluded]:
            raise RecipeError(problems)

    def check_data(self, summary: DataSummary, own_metrics: Sequence[str] = ()) -> None:
        """Raise `RecipeError` if there are metrics of the user for raw text, which has no answers."""
        if (self.metrics is not None or own_metrics) and summary.form.is_raw_text:
            raise RecipeError(
                "metrics compare answers, but raw text has none; omit metrics, or use data with prompts and answers"
            )

    @property
    def needs_this_process(self) -> bool:
        return self.compute_loss is not None


def _checked_loss(name: str, *arguments: Any, **named: Any) -> Any:
    """Call the loss `name`; raise `SetupError` if it fails or returns anything but a scalar tensor with a gradient."""
    value = call_own(f"train.loss: '{name}'", IMPORTED[name].call, *arguments, **named)
    if getattr(value, "ndim", None) != 0 or getattr(value, "grad_fn", None) is None:
        shape = getattr(value, "shape", None)
        shown = f"{value!r:.80}" if shape is None else f"a tensor of shape {[*shape]}"
        raise SetupError(
            f"train.loss: '{name}' returned {shown}; expected a scalar tensor that is computed from the outputs"
        )
    return value
