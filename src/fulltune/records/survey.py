"""What `fulltune plan` shows besides the plan: placements on the hardware, ways out, other plans, advice."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from fulltune.records.base import Record
from fulltune.records.plan import MemoryKind


class Placement(Record):
    """One way to place weights, gradients and optimizer state on devices, host and disk."""

    name: str
    kinds: dict[MemoryKind, int]
    """Bytes on each device, at the micro batch below."""
    device_bytes: int
    host_bytes: int
    """Of a machine's processes together."""
    disk_bytes: int
    """For offloading; checkpoints come on top."""
    micro_batch_size: int
    activation_checkpointing: bool
    short: str
    """What is too little, and by how much; empty when it fits."""
    tokens_per_second: float | None
    """Over all devices; None: the speed of this hardware is not known."""
    bound_by: str
    """The longest part of a step."""
    settings: dict[str, Any]
    """What to change in the recipe for it."""
    needs: str = ""
    """What only a person can say; without it the placement is not chosen."""

    @property
    def fits(self) -> bool:
        return not self.short


class WayOut(Record):
    """A change that frees memory or disk space."""

    change: str
    """The setting, or what to do."""
    frees_bytes: int
    where: Literal["device", "host", "disk"]
    enough: bool
    """With it alone the run fits."""
    costs: str
    """What is lost by it."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """What to change in the recipe for it, by dotted names."""
    hardware: str = ""
    """What to give to `--for`."""


class Advice(Record):
    """What the field's experience says about a method here."""

    method: Literal["full fine-tuning", "LoRA", "adapters", "prompt tuning"]
    verdict: Literal["take", "try", "leave"]
    rule: str


class Survey(Record):
    """What `fulltune plan` shows besides the plan itself."""

    hardware: str
    assumed: tuple[str, ...] = ()
    """What was not said about the hardware and is a usual value."""
    num_devices: int
    """Over all machines."""
    num_machines: int = 1
    num_parameters: int
    model_type: str
    train_rows: int
    """Of an epoch."""
    eval_rows: int
    length_percentiles: dict[str, int]
    """Tokens per train row: keys `p50`, `p95`, `max`."""
    max_length: int
    fits: bool
    """Some placement that fulltune can run fits."""
    full_fits: bool = True
    """Of full fine-tuning, whatever the recipe's method is."""
    placement: str = ""
    """Name of the one that the plan is for."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """What the plan has and the recipe has not, by dotted names."""
    placements: tuple[Placement, ...]
    disk_free_bytes: int | None = None
    host_free_bytes: int
    """Of one machine."""
    device_free_bytes: int
    """What one process may take."""
    price: float | None = None
    """Of the whole run."""
    currency: str = ""
    ways_out: tuple[WayOut, ...] = ()
    advice: tuple[Advice, ...] = ()
    command: str = ""
    """Runs what was planned; empty for a run folder, whose recipe lies elsewhere."""
    comparison: str = ""
    """What settles the advice by measurement; empty where something has to be changed in the recipe first."""
    notes: tuple[str, ...] = ()
    """What is short, when nothing fits."""
