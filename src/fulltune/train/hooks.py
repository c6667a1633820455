from __future__ import annotations

import functools
import hashlib
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fulltune.errors import RecipeError
from fulltune.inference.own_metrics import own_metric_names
from fulltune.recipe.fields import Recipe
from fulltune.recipe.tasks import FACTS
from fulltune.records.data import DataSummary


def _stable_description(value: object) -> str:
    """Return a string that describes a value identically in every process; a function is described by its code,
    defaults and closure."""
    match value:
        case Mapping():
            return "{" + ",".join(f"{key}:{_stable_description(inner)}" for key, inner in value.items()) + "}"
        case tuple() | list():
            return "(" + ",".join(map(_stable_description, value)) + ")"
        case set() | frozenset():
            return "{" + ",".join(sorted(map(_stable_description, value))) + "}"
        case functools.partial():
            return f"partial{_stable_description((value.func, value.args, value.keywords))}"
        case types.CodeType():
            return f"{value.co_name}:{value.co_code.hex()}:{value.co_names}:{_stable_description(value.co_consts)}"
        case types.FunctionType():
            cells = tuple(cell.cell_contents for cell in value.__closure__ or ())
            parts = (value.__code__, value.__defaults__, value.__kwdefaults__, cells)
            return f"{value.__qualname__}{_stable_description(parts)}"
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

    def check_recipe(self, recipe: Recipe) -> None:
        """Raise `RecipeError` if a hook conflicts with a setting."""
        train, own = recipe.train, self.compute_loss is not None
        metrics = self.metrics is not None or own_metric_names(recipe)
        answers = not FACTS[recipe.task].writes or recipe.evaluate.generate_rows
        pairs = {
            "compute_loss and train.class_weights are both set; apply class weights in your own loss": (
                own and train.class_weights is not None
            ),
            "compute_loss and train.chunked_loss are both set; your own loss needs all logits at once": (
                own and train.chunked_loss
            ),
            "compute_loss and train.label_smoothing_factor are both set; smooth the labels in your own loss": (
                own and train.label_smoothing_factor
            ),
            "compute_loss runs in this process; set train.num_processes: 1": own and train.num_processes > 1,
            f"compute_loss runs in this process; remove {recipe.train.sharded_by}": own and recipe.train.sharded_by,
            "metrics need generated answers; set evaluate.generate_rows above 0": metrics and not answers,
            "compute_loss and train.loss are both set; remove one": own and train.loss is not None,
            "preprocess and data.preprocess are both set; remove one": self.preprocess and recipe.data.preprocess,
        }
        problems = [problem for problem, applies in pairs.items() if applies]
        if problems:
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
