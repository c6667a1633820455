"""The model of a recipe as a plan sees it: its sizes, and its memory however it is trained, without its weights.

The model's class is run forward and backward on tensors that have shapes but no values, as copies of two and three
layers and with a few small batches (`watch`, `whole`); `formulas` makes the whole model at any micro batch of it.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from fulltune import methods
from fulltune.footprint.case import Case
from fulltune.footprint.formulas import traced
from fulltune.footprint.records import FOOTPRINT, SHAPES, Footprint
from fulltune.footprint.rough import rough
from fulltune.footprint.whole import FAILURES, Changing
from fulltune.models import dropout
from fulltune.models.base import Base
from fulltune.models.shapes import Shapes, shapes_of
from fulltune.recipe.fields import Recipe
from fulltune.recipe.methods import Method
from fulltune.recipe.tasks import TaskName
from fulltune.records.data import DataSummary
from fulltune.tasks import Target, Task, task_named

_log = logging.getLogger(__name__)


def _traced(attention: str | None) -> str | None:
    """sdpa in the place of flash attention: the same tensors, and it needs no GPU and no package."""
    return "sdpa" if (attention or "").startswith("flash") else attention


@dataclass(frozen=True)
class PlannedModel:
    """A pretrained model with the head of a task and a method."""

    recipe: Recipe
    base: Base
    target: Target
    packed: bool

    @classmethod
    def of(cls, recipe: Recipe, base: Base, summary: DataSummary) -> PlannedModel:
        """The model that a recipe trains on these rows."""
        return cls(recipe, base, Target.of(summary), summary.packed)

    @property
    def task(self) -> Task:
        return task_named(self.recipe.task)

    @cached_property
    def changes(self) -> dict[str, Any]:
        """Of the model's config, by the task; none where a model is planned by its config alone."""
        return dict(self.task.config_changes(self.target, self.base.processor)) if self.base.has_processor else {}

    @cached_property
    def shapes(self) -> Shapes:
        """The model's sizes, with what the recipe's method adds to it and trains of it.

        Raises:
            RecipeError: When the method cannot work on this model.
        """
        apply = Preparing.of(self.recipe, on_cpu=False) if self.recipe.method.kind != "full" else None
        return shapes_of(self.base, self.changes, apply)

    def footprint(self, recipe: Recipe, device: str, precision: str) -> Footprint:
        """The model's memory and work as functions of the micro batch.

        Args:
            recipe: The model's, with another type of weights or attention where these are asked for.
            device: `cuda` or `cpu`.
            precision: Type of the computations.
        """
        pixels, assumed = self.base.image_shape
        found = trace(
            Case(
                self.base.configured(self.changes, recipe.model.dropout),
                self.task,
                self.target,
                Preparing.of(recipe, on_cpu=device == "cpu"),
                self.shapes.num_held or self.shapes.num_parameters,
                all_trained=self.shapes.num_trained is None,
                precision=precision,
                # Both, whatever the recipe says: the other one can be a way out.
                checkpointing=(False, True) if self.shapes.can_recompute else (False,),
                weights_dtype=recipe.model.weights_dtype,
                attn_implementation=_traced(recipe.model.attn_implementation),
                packed=self.packed,
                pixels=pixels,
            )
        )
        return found.model_copy(update={"assumed": assumed}) if assumed else found

    def save(self, footprint: Footprint, folder: Path) -> None:
        """Keep sizes and memory beside a run's plan."""
        footprint.save(folder / "plan" / FOOTPRINT)
        self.shapes.save(folder / "plan" / SHAPES)


@dataclass(frozen=True)
class Preparing:
    """What training does to a model before it starts; as a value, so that equal ones are traced once."""

    method: Method
    task: TaskName
    on_cpu: bool

    @classmethod
    def of(cls, recipe: Recipe, on_cpu: bool) -> Preparing:
        """Of a recipe's method, whatever its rates."""
        same = dict.fromkeys(("name", "learning_rate", "learning_rates", "head_learning_rate", "head_init"))
        if recipe.method.kind == "full":
            same["train"] = {}
        return cls(recipe.method.model_copy(update=same), recipe.task, on_cpu)

    def __call__(self, built: Any) -> None:
        if self.method.kind != "full":
            methods.apply(built, self.method, self.task)
        if self.on_cpu:
            dropout.install(built)


_FOUND: dict[str, Footprint] = {}
"""What this process has traced: a plan asks for the same model again and again."""


def trace(case: Case) -> Footprint:
    """Find a model's footprint; a rough one, which says so, for a model that cannot be traced."""
    config = {name: value for name, value in case.config.to_dict().items() if name != "_name_or_path"}
    key = repr((type(case.config).__name__, config, replace(case, config=None)))
    if key not in _FOUND:
        try:
            _FOUND[key] = traced(case)
        except FAILURES as error:
            # No reason to stop a run: the class works with values, and the dry-run step measures what this cannot.
            _log.debug("%s cannot be traced", type(case.config).__name__, exc_info=True)
            text = " ".join(str(error).split())[:120]
            _FOUND[key] = rough(case, text if isinstance(error, Changing) else f"{type(error).__name__}: {text}")
    return _FOUND[key]
