"""The model as training starts with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fulltune import methods
from fulltune.models.checkpoint_head import Head
from fulltune.models.load import load
from fulltune.models.processors import load_processor
from fulltune.system import deepspeed
from fulltune.tasks import Target, Task
from fulltune.train.worker import weights


def load_for_training(
    recipe: Any,
    task: Task,
    target: Target,
    before_weights: Callable[[], None] = lambda: None,
    on_head: Callable[[Head], None] = lambda head: None,
) -> tuple[methods.Applied, Any]:
    """The pretrained model with the task's head and the recipe's method, and the tokenizer."""
    tokenizer = load_processor(recipe.model, recipe.task, chat_template=recipe.data.chat_template)
    model = load(
        recipe.model,
        task.FACTS.auto_class,
        task.config_changes(target, tokenizer),
        head_is_new=task.FACTS.head_is_new,
        before_weights=before_weights,
        on_head=on_head,
    )
    if deepspeed.wanted(recipe):
        weights.forget_unused_conversions(model)
    return methods.apply(model, recipe.method, recipe.task), tokenizer
