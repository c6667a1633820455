"""What training makes of rows: a batch, and its loss. Without a trainer: transformers' and Lightning's both use it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from fulltune.inference.run import logits_of, model_batch
from fulltune.recipe.fields import Recipe
from fulltune.records.data import DataSummary
from fulltune.records.plan import Plan
from fulltune.tasks import LossSettings, Target, Task
from fulltune.tasks.settings import class_weights


@dataclass(frozen=True)
class Learning:
    """Of one run."""

    recipe: Recipe
    plan: Plan
    summary: DataSummary
    task: Task
    model: Any
    pad_token_id: int
    target: Callable[[], Target]
    """What is learned, with the units of the logits as they are when it is asked."""

    @cached_property
    def _settings(self) -> LossSettings:
        weights = class_weights(self.recipe, self.summary)
        return LossSettings(self.recipe.train.label_smoothing_factor, weights)

    def collate(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """A batch of rows, as the model reads it: `input_ids[rows, tokens]`, `labels` and what else the task gives."""
        return model_batch(self.model, self.task, features, self.pad_token_id)

    def loss(self, outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        """labels[rows] or [rows, tokens]; the model's logits[rows, ..., classes or vocabulary]."""
        summed = self.task.loss(logits_of(outputs), labels, self.target(), self._settings)
        return summed / (num_items_in_batch if num_items_in_batch is not None else 1)
