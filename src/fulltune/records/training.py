"""Sizes in these records are in bytes, times in seconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from fulltune.records.base import Record
from fulltune.records.plan import Phase, TimeNeed
from fulltune.text import first_few

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
    name: str
    result: str
    passed: bool


class ParameterChanges(Record):
    num_tensors_with_gradient: int
    num_tensors_changed: int
    num_values_with_gradient: int
    num_values_changed: int
    unchanged_tensors: tuple[str, ...] = ()
    """Up to 20 names of tensors that had a gradient but did not change."""

    @classmethod
    def from_counts(cls, counts: dict[str, tuple[int, int]]) -> ParameterChanges:
        """Sum up each tensor's number of values that received a gradient, and of those that changed."""
        unmoved = [name for name, (_, moved) in counts.items() if not moved]
        return cls(
            num_tensors_with_gradient=len(counts),
            num_tensors_changed=len(counts) - len(unmoved),
            num_values_with_gradient=sum(received for received, _ in counts.values()),
            num_values_changed=sum(moved for _, moved in counts.values()),
            unchanged_tensors=tuple(unmoved[:20]),
        )

    @property
    def share(self) -> float:
        """Of the values that received a gradient, the share (0 to 1) that changed."""
        return self.num_values_changed / max(1, self.num_values_with_gradient)


def expert_shares(tokens: Sequence[Sequence[int]]) -> dict[str, float]:
    """Return each expert's share (0 to 1) of its layer's `tokens[layer][expert]`, by name."""
    layers = [(number, of, max(1, sum(of))) for number, of in enumerate(tokens)]
    return {f"{one} of layer {layer}": count / total for layer, of, total in layers for one, count in enumerate(of)}


def describe_unreached(shares: Mapping[str, float]) -> str:
    """Say which experts have no token, or return an empty string if all have some."""
    names = [name for name, share in shares.items() if not share]
    return f"{len(names):,} of {len(shares):,} experts ({first_few(names)}) received no token" if names else ""


class LostMachine(Record):
    """A machine that failed before it could report how its attempt ended."""

    rank: int
    host: str
    reason: str
    kind: Literal["machine", "killed", "out_of_memory", "failed", "interrupted"] = "machine"
    """How the machine's processes ended, or `machine` if the whole machine disappeared."""


class Outcome(Record):
    status: OutcomeStatus
    reason: str
    trial: str
    attempt: int
    steps: int = 0
    best_step: int | None = None
    """Step of the saved weights."""
    best_metric: float | None = None
    """Eval metric of the saved weights."""
    weights_reason: str | None = None
    """Why the saved weights are not those of the best evaluation, or None if they are."""
    tokens_by_source: tuple[int, ...] = ()
    """Number of training tokens by source (task or mixed-in), or empty without mixed-in sources."""
    parameter_changes: ParameterChanges | None = None
    expert_tokens: tuple[tuple[int, ...], ...] = ()
    checks: tuple[Check, ...] = ()
    train_seconds: float = 0.0
    tokens_per_second: float = 0.0
    peak_memory_bytes: int = 0
    """Peak memory of the training process, or on a GPU its peak reserved memory."""
    memory_growth_bytes: int = 0
    """Peak memory above the memory in use before the model was loaded."""
    memory_growth_per_process: tuple[int, ...] = ()
    phase: Phase | None = None
    first_bad_step: int | None = None
    """First step whose weights cannot be trusted after a spike."""
    forecast: TimeNeed | None = None
    dry_run_growth_bytes: int = 0
    dry_run_loss: float | None = None
    disk_bytes: int = 0
    model_folder: str | None = None
    log_tail: tuple[str, ...] = ()


class MeasuredSetting(Record):
    """A setting that was measured for one step in its own process."""

    name: str
    kind: Literal["lever", "micro batch", "packing", "compile"]
    """Each `lever` row adds one setting. Each other row differs from the fastest in one setting."""
    changes: dict[str, Any]
    peak_memory_bytes: int = 0
    tokens_per_second: float = 0.0
    train_seconds: float = 0.0
    loss: float | None = None
    problem: str | None = None
    is_best: bool = False


class Measurements(Record):
    available_bytes: int
    rows: tuple[MeasuredSetting, ...]
