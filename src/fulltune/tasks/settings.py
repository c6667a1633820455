"""Settings that only some tasks read: given to another one they would be ignored in silence, so they are refused."""

from __future__ import annotations

from fulltune.errors import RecipeError
from fulltune.recipe import Recipe
from fulltune.records import DataSummary

_READ_BY: dict[str, tuple[str, ...]] = {
    "text": ("text-classification", "causal-lm"),
    "text_pair": ("text-classification",),
    "label": ("text-classification", "multiple-choice", "image-classification"),
    "tokens": ("token-classification",),
    "tags": ("token-classification",),
    "source": ("seq2seq",),
    "target": ("seq2seq",),
    "source_prefix": ("seq2seq",),
    "question": ("question-answering", "multiple-choice"),
    "context": ("question-answering", "multiple-choice"),
    "answers": ("question-answering",),
    "choices": ("multiple-choice",),
    "image": ("image-classification",),
    "prompt": ("causal-lm",),
    "completion": ("causal-lm",),
    "messages": ("causal-lm",),
    "tools": ("causal-lm",),
    "chat_template": ("causal-lm",),
    # Images and choices have one type, and refuse the others in their own words.
    "problem_type": ("text-classification", "image-classification", "multiple-choice"),
    "stride": ("question-answering",),
    "undecodable_images": ("image-classification",),
}
"""Setting of `data` to the tasks that read it; every task reads all others."""
_SMOOTHING = "train.label_smoothing_factor: has no effect for regression; remove it"


def check_settings(recipe: Recipe) -> None:
    """Refuse settings that the task does not read. One that is written out with its default value is let through.

    Raises:
        RecipeError: Naming each such setting.
    """
    fields = type(recipe.data).model_fields
    problems = [
        f"data.{name}: has no effect for {recipe.task}; remove it"
        for name, tasks in _READ_BY.items()
        if recipe.task not in tasks and getattr(recipe.data, name) != fields[name].default
    ]
    if recipe.data.problem_type == "regression" and recipe.train.label_smoothing_factor:
        problems.append(_SMOOTHING)
    if problems:
        raise RecipeError(problems)


def check_settings_for(recipe: Recipe, summary: DataSummary) -> None:
    """The same for what only the data tell: that the label is a number.

    Raises:
        RecipeError: Naming the setting.
    """
    if summary.problem_type == "regression" and recipe.train.label_smoothing_factor:
        raise RecipeError(_SMOOTHING)
