"""What a user can give from Python and no recipe can hold."""

from __future__ import annotations

import functools
import hashlib
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fulltune.errors import RecipeError
from fulltune.recipe.fields import Recipe
from fulltune.recipe.tasks import FACTS
from fulltune.records.data import DataSummary


def _described(value: Any) -> str:
    """A value as text that is the same in another process; a function by its code, defaults and closure."""
    match value:
        case Mapping():
            return "{" + ",".join(f"{key}:{_described(inner)}" for key, inner in value.items()) + "}"
        case tuple() | list():
            return "(" + ",".join(map(_described, value)) + ")"
        case set() | frozenset():
            return "{" + ",".join(sorted(map(_described, value))) + "}"
        case functools.partial():
            return f"partial{_described((value.func, value.args, value.keywords))}"
        case types.CodeType():
            return f"{value.co_name}:{value.co_code.hex()}:{value.co_names}:{_described(value.co_consts)}"
        case types.FunctionType():
            cells = tuple(cell.cell_contents for cell in value.__closure__ or ())
            parts = (value.__code__, value.__defaults__, value.__kwdefaults__, cells)
            return f"{value.__qualname__}{_described(parts)}"
    text = repr(value)
    # A default representation holds an address, which is another one each time: the type has to do.
    return f"{type(value).__module__}.{type(value).__qualname__}" if " at 0x" in text else text


@dataclass(frozen=True)
class Hooks:
    """Functions of the user's own. With `compute_loss` training runs in this process."""

    metrics: Callable[[Any, Any], Mapping[str, float]] | None = None
    """`metrics(predictions, references)`: further metrics of the test rows. Classifiers: arrays of class ids, 0/1 rows
    or numbers; multiple choice: of places of choices; taggers: for each row its tags (lists of lists of str); question
    answering: answers (list of str, empty where there is none) and for each question all accepted ones (lists of str);
    language models and encoder-decoders: generated and expected answers (lists of str). Called on all rows once, and
    once for each resample that the interval rests on (`evaluate.bootstrap_samples`)."""
    preprocess: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    """`preprocess(row)`: changes each row after reading."""
    compute_loss: Callable[..., Any] | None = None
    """`compute_loss(outputs, labels, num_items_in_batch)`: the loss to train with, as in `transformers.Trainer`. It
    must be divided by `num_items_in_batch`, the number of rows (or trained tokens) of the whole global batch."""

    def marks(self) -> str:
        """Tells two sets of hooks apart that give other rows or weights; empty without such hooks."""
        given = {name: value for name, value in vars(self).items() if value is not None and name != "metrics"}
        return "" if not given else hashlib.sha256(_described(given).encode()).hexdigest()[:16]

    def check(self, recipe: Recipe) -> None:
        """Refuse pairs of the user's functions and settings of which one would be ignored."""
        train, own = recipe.train, self.compute_loss is not None
        answers = not FACTS[recipe.task].writes or recipe.evaluate.generate_rows
        pairs = {
            "compute_loss and train.class_weights are both given; weigh the classes in your loss": (
                own and train.class_weights is not None
            ),
            "compute_loss and train.chunked_loss are both given; your loss is given whole logits": (
                own and train.chunked_loss
            ),
            "compute_loss and train.label_smoothing_factor are both given; smooth in your loss": (
                own and train.label_smoothing_factor
            ),
            "compute_loss trains in this process; set train.num_processes: 1": own and train.num_processes > 1,
            f"compute_loss trains in this process; remove {recipe.train.shared_by}": own and recipe.train.shared_by,
            "metrics needs generated answers; set evaluate.generate_rows above 0": self.metrics and not answers,
        }
        problems = [problem for problem, is_so in pairs.items() if is_so]
        if problems:
            raise RecipeError(problems)

    def check_data(self, summary: DataSummary) -> None:
        """Refuse `metrics` where the data turn out to be raw text, which has no answers."""
        if self.metrics is not None and summary.form.is_raw_text:
            raise RecipeError("metrics compares answers, and raw text has none; remove it, or give prompts and answers")

    @property
    def needs_this_process(self) -> bool:
        return self.compute_loss is not None
