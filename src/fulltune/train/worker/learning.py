"""What training makes of rows: a batch, and its loss. Without a trainer: transformers' and Lightning's both use it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from fulltune.errors import SetupError
from fulltune.inference.run import logits_of, model_batch
from fulltune.recipe.fields import Recipe
from fulltune.records.data import DataSummary
from fulltune.records.plan import Plan
from fulltune.tasks import LossSettings, Target, Task
from fulltune.tasks.settings import class_weights
from fulltune.train.worker import mixup, r_drop


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

    def check(self) -> None:
        """Refuse what this model cannot do.

        Raises:
            SetupError: When R-Drop has no dropout.
        """
        if self.recipe.train.r_drop and not r_drop.has_dropout(self.model):
            raise SetupError(
                "train.r_drop: compares answers under dropout, and this model has none; set model.dropout, such as 0.1"
            )

    @cached_property
    def _settings(self) -> LossSettings:
        weights = class_weights(self.recipe, self.summary)
        return LossSettings(self.recipe.train.label_smoothing_factor, weights)

    def collate(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """A batch of rows, as the model reads it: `input_ids[rows, tokens]`, `labels` and what else the task gives."""
        batch = model_batch(self.model, self.task, features * self.plan.passes_per_row, self.pad_token_id)
        if blends := self.recipe.train.mixup:
            return mixup.mixed(batch, blends, len(self.target().labels), self.plan.seed)
        return batch

    def loss(self, outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        """labels[rows] or [rows, tokens]; the model's logits[rows, ..., classes or vocabulary]."""
        logits = logits_of(outputs)
        summed = self.task.loss(logits, labels, self.target(), self._settings)
        if alike := self.recipe.train.r_drop:
            summed = summed + alike * r_drop.disagreement(logits)
        return summed / (num_items_in_batch if num_items_in_batch is not None else 1)
