"""How an attempt at training went, and what `fulltune plan --measure` tried. Bytes and seconds."""

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
    """One line of the table that is printed before step 1."""

    name: str
    result: str
    passed: bool


class Moved(Record):
    """Which parameters training changed, counted against the weights before step 1."""

    num_tensors_with_gradient: int
    num_tensors_moved: int
    num_values_with_gradient: int
    num_values_moved: int
    unmoved_tensors: tuple[str, ...] = ()
    """Names of tensors that received a gradient and did not change (at most 20)."""

    @property
    def share(self) -> float:
        """Share of the values that received a gradient and changed, 0 to 1."""
        return self.num_values_moved / max(1, self.num_values_with_gradient)


class LostPart(Record):
    """A machine's part of an attempt that could not say itself how it ended."""

    rank: int
    """Of the machine."""
    host: str
    reason: str
    kind: Literal["machine", "killed", "out_of_memory", "failed", "interrupted"] = "machine"
    """What was lost: the machine, or its processes; or that its command was told to stop."""


class Outcome(Record):
    """How an attempt ended."""

    status: OutcomeStatus
    reason: str
    trial: str
    attempt: int
    steps: int = 0
    best_step: int | None = None
    """Whose weights are kept."""
    best_metric: float | None = None
    """Theirs, on the eval rows."""
    kept_because: str = ""
    """Why they are not those of the best evaluation."""
    tokens_by_source: tuple[int, ...] = ()
    """Tokens of the rows of all steps: the task's, then of each mixed source; empty where nothing is mixed in."""
    moved: Moved | None = None
    checks: tuple[Check, ...] = ()
    train_seconds: float = 0.0
    tokens_per_second: float = 0.0
    peak_memory_bytes: int = 0
    """Most that the training process held: of the host, with a GPU reserved on it."""
    memory_growth_bytes: int = 0
    """The same beyond what it held before the model was loaded: what `Plan.memory` predicts."""
    growth_of_processes: tuple[int, ...] = ()
    """The same of each process, of the others up to the end of the training; empty: there is one, or it ended early."""
    phase: Phase | None = None
    trouble_since: int | None = None
    """Of one that spiked: the step from which on the weights are not trusted."""
    forecast: TimeNeed | None = None
    """Made after the dry-run step."""
    dry_run_growth_bytes: int = 0
    """Peak up to the end of the dry-run step, beyond what was held before the model was loaded."""
    dry_run_loss: float | None = None
    """Of the longest micro batch, before any update."""
    disk_bytes: int = 0
    """Most that checkpoints and weights took on the disk."""
    model_folder: str | None = None
    """Relative to the run folder."""
    log_tail: tuple[str, ...] = ()


class Measured(Record):
    """One setting, tried for a step in a process of its own (`fulltune plan --measure`)."""

    name: str
    kind: Literal["lever", "micro batch", "compile"]
    """Levers add up from row to row; the others each change one thing of the best so far."""
    changes: dict[str, Any]
    """Fields of the plan that differ from it."""
    peak_memory_bytes: int = 0
    """Most that the process held beyond what it held before the model was loaded."""
    tokens_per_second: float = 0.0
    """Tokens of the rows, without padding, over all processes."""
    train_seconds: float = 0.0
    """Of all steps of the run at this speed, without evaluation and checkpoints."""
    loss: float | None = None
    """Of the longest micro batch before any update, with the run's seed."""
    problem: str = ""
    """Why it cannot be had here; empty when it ran and fits."""
    taken: bool = False


class Measurements(Record):
    """What `fulltune plan --measure` tried, in this order."""

    available_bytes: int
    """What each process may take."""
    rows: tuple[Measured, ...]
