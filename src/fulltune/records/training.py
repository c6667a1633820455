"""Outcome of an attempt at training, and measurements of `fulltune plan --measure`. Sizes are in bytes, times in
seconds."""

from __future__ import annotations

from typing import Any, Literal

from fulltune.records.base import Record
from fulltune.records.plan import Phase, TimeNeed

OutcomeStatus = Literal[
    "done",
    "interrupted",
    "stopped_by_guard",
    "diverged",
    "spiked",
    "out_of_memory",
    "does_not_fit",
    "disk_full",
    "refused",
    "error",
    "killed",
    "hung",
    "lost",
    "crashed",
]


class Check(Record):
    """One check before step 1."""

    name: str
    result: str
    passed: bool


class ParameterChanges(Record):
    """Parameters that training changed, compared with the weights before step 1."""

    num_tensors_with_gradient: int
    num_tensors_changed: int
    num_values_with_gradient: int
    num_values_changed: int
    unchanged_tensors: tuple[str, ...] = ()
    """Names of at most 20 tensors that received a gradient and did not change."""

    @property
    def share(self) -> float:
        """Share of the values with a gradient that changed, 0 to 1."""
        return self.num_values_changed / max(1, self.num_values_with_gradient)


class LostMachine(Record):
    """A machine of a run over several machines that failed before it could report how its attempt ended."""

    rank: int
    """Rank of the machine."""
    host: str
    reason: str
    kind: Literal["machine", "killed", "out_of_memory", "failed", "interrupted"] = "machine"
    """`machine` if it disappeared; otherwise how its processes ended, or `interrupted` if it was told to stop."""


class Outcome(Record):
    """How an attempt ended."""

    status: OutcomeStatus
    reason: str
    trial: str
    attempt: int
    steps: int = 0
    best_step: int | None = None
    """Step of the kept weights."""
    best_metric: float | None = None
    """Eval metric of the kept weights."""
    weights_reason: str | None = None
    """Why the kept weights are not those of the best evaluation."""
    tokens_by_source: tuple[int, ...] = ()
    """Tokens trained on from the task's rows, then from each mixed-in source; empty without mixed-in rows."""
    parameter_changes: ParameterChanges | None = None
    checks: tuple[Check, ...] = ()
    train_seconds: float = 0.0
    tokens_per_second: float = 0.0
    peak_memory_bytes: int = 0
    """Peak memory of the training process: on a CPU all of it, on a GPU what was reserved there."""
    memory_growth_bytes: int = 0
    """Peak above what was in use before the model was loaded; `Plan.memory` predicts it."""
    memory_growth_per_process: tuple[int, ...] = ()
    """Memory growth of each of several processes."""
    phase: Phase | None = None
    first_bad_step: int | None = None
    """First step whose weights are not trusted, after a spike of the loss."""
    forecast: TimeNeed | None = None
    """Duration predicted after the dry-run step."""
    dry_run_growth_bytes: int = 0
    """Memory growth up to the end of the dry-run step."""
    dry_run_loss: float | None = None
    """Loss of the longest micro batch before any update."""
    disk_bytes: int = 0
    """Peak disk space of checkpoints and weights."""
    model_folder: str | None = None
    """Folder of the finished model, relative to the run folder."""
    log_tail: tuple[str, ...] = ()


class MeasuredSetting(Record):
    """One setting, measured for a step in a process of its own (`fulltune plan --measure`)."""

    name: str
    kind: Literal["lever", "micro batch", "compile"]
    """Levers add up from row to row; each other row changes one thing of the best row before."""
    changes: dict[str, Any]
    """Changed fields of the plan."""
    peak_memory_bytes: int = 0
    """Peak above what was in use before the model was loaded."""
    tokens_per_second: float = 0.0
    """Speed over all processes, padding not counted."""
    train_seconds: float = 0.0
    """Duration of all steps at this speed, without evaluations and checkpoints."""
    loss: float | None = None
    """Loss of the longest micro batch before any update."""
    problem: str | None = None
    """Why the setting cannot be used here, if it cannot."""
    is_best: bool = False


class Measurements(Record):
    """Settings that `fulltune plan --measure` tried, in order."""

    available_bytes: int
    """Memory available to each process."""
    rows: tuple[MeasuredSetting, ...]
