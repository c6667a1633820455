"""A recipe in its run folder: what all stages of a run, or of a comparison, share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fulltune import plan
from fulltune.models.base import Base
from fulltune.recipe.fields import Recipe
from fulltune.records.data import DataSummary
from fulltune.records.events import Listener, PhaseBegan
from fulltune.records.plan import MemoryNeed, Plan
from fulltune.system import hardware
from fulltune.system.hardware import Machine
from fulltune.tasks import Task, task_named
from fulltune.train.hooks import Hooks
from fulltune.train.parent.machines import Lead, MachineGroup
from fulltune.train.parent.spawn import Starter, in_new_process

if TYPE_CHECKING:
    from fulltune.footprint.trace import PlannedModel

Until = Literal["data", "plan", "train", "evaluate", "report"]
"""The last stage to do."""


@dataclass(frozen=True)
class Run:
    """A recipe in its folder, with the user's own functions and who listens to progress."""

    recipe: Recipe
    folder: Path
    hooks: Hooks = field(default_factory=Hooks)
    listener: Listener = lambda event: None
    began: float | None = None
    """When the command or call that does the whole line began: seconds since 1970; None: single stages are called."""

    lead: Lead | None = None
    """As the first of several machines: what the others follow; None: there is only one."""
    group: MachineGroup | None = None
    """All of them, while the line runs."""
    is_trial: bool = False
    """Of a search, whose choice the test rows play no part in: that they are scored is not noted."""

    @property
    def task(self) -> Task:
        return task_named(self.recipe.task)

    @property
    def plan_path(self) -> Path:
        """Where the plan of the recipe's method lies."""
        return self.folder / "plan" / f"{self.recipe.method.arm}.json"

    @cached_property
    def base(self) -> Base:
        """The pretrained model: found, its config and its processor read, once for all stages."""
        return Base.of(self.recipe.model, self.recipe.task, self.recipe.data.chat_template)

    def model(self, summary: DataSummary) -> PlannedModel:
        """The model as it is trained on these rows."""
        from fulltune.footprint.trace import PlannedModel  # imports torch

        return PlannedModel.of(self.recipe, self.base, summary)

    def need(self, summary: DataSummary) -> Callable[[Plan], MemoryNeed]:
        """The memory of a plan that is changed after it was made; the model is looked at when that is asked."""
        model = cache(lambda: self.model(summary))
        return lambda changed: plan.need_of(changed, self.recipe, model(), self.machine)

    @property
    def machine(self) -> Machine:
        """What training can count on: this machine, or the least of several."""
        return hardware.here() if self.group is None else self.group.weakest

    def phase(self, name: str) -> None:
        """Tell the listener what begins."""
        self.listener(PhaseBegan(name=name))

    @property
    def start(self) -> Starter:
        """How training processes are started."""
        return in_new_process if self.group is None else self.group.start
