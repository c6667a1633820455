from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from fulltune.recipe.fields import Recipe, with_placement
from fulltune.records.data import DataSummary
from fulltune.records.plan import Plan
from fulltune.system import parallel_layout
from fulltune.system.parallel_layout import ParallelLayout
from fulltune.tasks import Task, task_named
from fulltune.train.hooks import Hooks
from fulltune.train.journal import Journal
from fulltune.train.loop.callbacks import Recorder, StopOnRequest
from fulltune.train.loop.step_guard import learning_rate_factor
from fulltune.train.request import Request
from fulltune.train.usage import ResourceUsage


@dataclass(frozen=True)
class AttemptInputs:
    """Everything an attempt needs that does not change while it runs: request, data summary and listeners."""

    request: Request
    hooks: Hooks
    journal: Journal
    recorder: Recorder
    stop: StopOnRequest
    usage: ResourceUsage
    summary: DataSummary
    cleanup: ExitStack = field(default_factory=ExitStack)
    """Closes what the attempt has opened."""

    @property
    def plan(self) -> Plan:
        return self.request.plan

    @cached_property
    def recipe(self) -> Recipe:
        return with_placement(self.request.recipe, self.request.plan.placement)

    @cached_property
    def task(self) -> Task:
        return task_named(self.recipe.task)

    @property
    def data(self) -> Path:
        return Path(self.request.run_folder) / "data"

    @property
    def is_main(self) -> bool:
        """True on rank 0, which writes files."""
        return self.journal.path is not None

    @property
    def has_own_loss(self) -> bool:
        return self.hooks.compute_loss is not None

    @property
    def highest_learning_rate(self) -> float:
        """The higher of the body's and the head's learning rate, as lowered by past rollbacks."""
        highest = max(self.plan.learning_rate, self.plan.head_learning_rate or 0.0)
        return highest * learning_rate_factor(self.plan.rollbacks)

    @cached_property
    def layout(self) -> ParallelLayout | None:
        """How training state is sharded, or None if every rank has a full copy."""
        return parallel_layout.layout_of(self.recipe)

    @property
    def in_engine(self) -> bool:
        """True if the model is trained by ZeRO's engine, which training creates."""
        return self.layout is not None and self.layout.engine == "zero"

    @property
    def is_streamed(self) -> bool:
        """True if weights and optimizer state lie on a disk."""
        return self.plan.placement == "stream"

    def warn(self, text: str) -> None:
        self.journal.write("warning", text)
        self.recorder.warn(text)
