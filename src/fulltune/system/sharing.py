"""What of a training's state its processes share out, and where it lies between steps: by the recipe's placement."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fulltune.recipe.fields import Recipe
from fulltune.records.plan import MemoryKind, StateBytes
from fulltune.system import deepspeed

Place = Literal["device", "host", "disk"]


@dataclass(frozen=True)
class Sharing:
    """What is shared out, by ZeRO's stages, and what does not lie on the device."""

    stage: int
    """1: the optimizer's state; 2: also the gradients; 3: also the weights."""
    offload_optimizer: bool
    offload_weights: bool
    optimizer_on_disk: bool = False
    """What is offloaded goes to an NVMe disk, not to the host's memory."""
    weights_on_disk: bool = False
    engine: Literal["deepspeed", "fsdp2"] = "deepspeed"

    def place(self, kind: MemoryKind) -> Place:
        """Where a kind of tensors lies between steps; gradients lie with the optimizer."""
        offloaded, on_disk = self.offload_optimizer, self.optimizer_on_disk
        if kind == "weights":
            offloaded, on_disk = self.offload_weights, self.weights_on_disk
        return "disk" if on_disk else "host" if offloaded else "device"

    def parts_at(self, place: Place, state: StateBytes, num_processes: int) -> dict[MemoryKind, int]:
        """Bytes of each kind that one process keeps there between steps; 0 for what lies elsewhere."""
        parts = self.parts(state, num_processes)
        return {kind: size if self.place(kind) == place else 0 for kind, size in parts.items()}

    def parts(self, state: StateBytes, num_processes: int) -> dict[MemoryKind, int]:
        """Bytes of each kind that belong to one process, wherever they lie."""
        from_stage: dict[MemoryKind, int] = {"weights": 3, "gradients": 2, "optimizer": 1}
        return {
            name: -(-getattr(state, name) // num_processes) if self.stage >= stage else getattr(state, name)
            for name, stage in from_stage.items()
        }


def of(recipe: Recipe) -> Sharing | None:
    """What the recipe shards; None: each process holds everything."""
    if recipe.train.placement == "fsdp2":
        return Sharing(3, False, False, engine="fsdp2")
    if not deepspeed.wanted(recipe):
        return None
    block = deepspeed.settings(recipe)["zero_optimization"]
    optimizer, weights = (deepspeed.offload_device(block, what) for what in ("optimizer", "param"))
    return Sharing(block["stage"], optimizer != "none", weights != "none", optimizer == "nvme", weights == "nvme")
