"""Outcome of an attempt, and measurements of `fulltune plan --measure`. Sizes are in bytes, times in seconds."""

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
    """A check before step 1."""

    name: str
    result: str
    passed: bool


class ParameterChanges(Record):
    """Parameters that training changed."""

    num_tensors_with_gradient: int
    num_tensors_changed: int
    num_values_with_gradient: int
    num_values_changed: int
    unchanged_tensors: tuple[str, ...] = ()
    """At most 20 tensors with a gradient that did not change."""

    @property
    def share(self) -> float:
        """Share of values with a gradient that changed, 0 to 1."""
        return self.num_values_changed / max(1, self.num_values_with_gradient)


class LostMachine(Record):
    """A machine that failed before it could report the end of its attempt."""

    rank: int
    host: str
    reason: str
    kind: Literal["machine", "killed", "out_of_memory", "failed", "interrupted"] = "machine"
    """How its processes ended; `machine` if it disappeared."""


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
    """Tokens trained on, of the task and each mixed-in source; empty without such sources."""
    parameter_changes: ParameterChanges | None = None
    checks: tuple[Check, ...] = ()
    train_seconds: float = 0.0
    tokens_per_second: float = 0.0
    peak_memory_bytes: int = 0
    """Peak memory of the training process (on a GPU: reserved there)."""
    memory_growth_bytes: int = 0
    """Peak above the memory used before the model was loaded."""
    memory_growth_per_process: tuple[int, ...] = ()
    """Growth of each of several processes."""
    phase: Phase | None = None
    first_bad_step: int | None = None
    """First step with untrusted weights after a spike."""
    forecast: TimeNeed | None = None
    """Duration predicted after the dry-run step."""
    dry_run_growth_bytes: int = 0
    """Growth up to the end of the dry run."""
    dry_run_loss: float | None = None
    """Loss of the longest micro batch before any update."""
    disk_bytes: int = 0
    """Peak disk space."""
    model_folder: str | None = None
    """Folder of the model, relative to the run folder."""
    log_tail: tuple[str, ...] = ()


class MeasuredSetting(Record):
    """A setting measured for a step in its own process."""

    name: str
    kind: Literal["lever", "micro batch", "compile"]
    """Levers add up; other rows change one thing of the best row."""
    changes: dict[str, Any]
    """Changed fields of the plan."""
    peak_memory_bytes: int = 0
    """Peak above the memory used before the model was loaded."""
    tokens_per_second: float = 0.0
    """Speed over all processes, without padding."""
    train_seconds: float = 0.0
    """Duration of all steps at this speed."""
    loss: float | None = None
    """Loss of the longest micro batch before any update."""
    problem: str | None = None
    """Why the setting cannot be used."""
    is_best: bool = False


class Measurements(Record):
    """Measurements of `fulltune plan --measure` in order."""

    available_bytes: int
    rows: tuple[MeasuredSetting, ...]
