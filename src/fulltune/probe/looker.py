"""How rows go through the untouched model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from fulltune.inference.run import Watch
from fulltune.models.sharding import runs_together
from fulltune.probe.features import Features, joined, passes
from fulltune.probe.layers import HeadLayers
from fulltune.probe.linear import Items
from fulltune.recipe.tasks import ProblemType, TaskName
from fulltune.system.out_of_memory import with_smaller_batches
from fulltune.tasks import Target, Task, task_named

T = TypeVar("T")


@dataclass(frozen=True)
class Looker:
    """How rows go through the untouched model."""

    model: Any
    """As it was loaded, on its device, before a method was applied."""
    task_name: TaskName
    target: Target
    pad_token_id: int
    batch_size: int
    precision: str
    class_weights: Sequence[float] | None = None
    separators: frozenset[int] = frozenset()
    """Around the texts of a pair; empty: rows are no pairs."""
    watch: Watch = lambda done, total, share: None
    middle: bool = False
    """Whether states are those of the layer in the middle, not of the last one."""

    @property
    def task(self) -> Task:
        return task_named(self.task_name)

    @property
    def kind(self) -> ProblemType:
        return self.target.problem_type

    @property
    def num_outputs(self) -> int:
        """Logits of an item."""
        return {"choice": 1, "regression": 1, "span": 2}.get(self.kind, len(self.target.labels))

    def passes(self, rows: Any, layers: HeadLayers | None, batch_size: int, apart: bool = True) -> Iterator[Features]:
        """The features of each batch, of pairs also those of their texts apart if `apart`."""
        return passes(
            self.model,
            layers,
            rows,
            self.task,
            self.kind,
            self.pad_token_id,
            self.separators if apart else frozenset(),
            batch_size=batch_size,
            precision=self.precision,
            watch=self.watch,
            middle=self.middle,
        )

    def features(self, rows: Any, layers: HeadLayers | None) -> Features:
        """Of all these rows, in smaller batches when memory runs out."""
        return self.within_memory(lambda size: joined(self.passes(rows, layers, size)))

    def within_memory(self, run: Callable[[int], T]) -> T:
        """Call `run` with a number of rows per batch, with fewer when memory runs out. Processes that share out the
        weights run the same batches: one of them cannot take fewer alone, and ends the others with it."""
        if runs_together(self.model):
            return run(self.batch_size)
        return with_smaller_batches("linear probe", self.batch_size, run)

    def items(self, features: np.ndarray, of: Features) -> Items:
        """What a classifier is fitted on."""
        return Items(self.kind, features, of.labels, of.rows, self.num_outputs, self.class_weights)
