"""Settings that only some tasks read: given to another one they would be ignored in silence, so they are refused."""

from __future__ import annotations

from fulltune import zero
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
    if recipe.train.chunked_loss:
        problems += [f"train.chunked_loss: {reason}; remove it" for reason in _whole_logits(recipe)]
    if problems:
        raise RecipeError(problems)


def _whole_logits(recipe: Recipe) -> list[str]:
    """Why the loss of this recipe cannot be computed in pieces."""
    reasons = []
    if recipe.task not in ("causal-lm", "seq2seq"):
        reasons.append(f"has no effect for {recipe.task}, which has no logits of tokens")
    if zero.wanted(recipe):
        reasons.append("does not go with train.extra.deepspeed, which shares out the head's weights")
    if recipe.train.extra.get("torch_compile"):
        reasons.append("does not go with train.extra.torch_compile, which leaves out the hooks that it needs")
    return reasons


def check_settings_for(recipe: Recipe, summary: DataSummary) -> None:
    """The same for what only the data tell: that the label is a number.

    Raises:
        RecipeError: Naming the setting.
    """
    if summary.problem_type == "regression" and recipe.train.label_smoothing_factor:
        raise RecipeError(_SMOOTHING)
