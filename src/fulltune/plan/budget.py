"""What one process may take of this machine's memory, and what settings need of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from fulltune.errors import DoesNotFitError, RecipeError
from fulltune.footprint.records import Footprint
from fulltune.models.shapes import Shapes
from fulltune.plan import memory, sharded
from fulltune.plan.memory import Levers
from fulltune.recipe.fields import Recipe
from fulltune.records.plan import MemoryKind, MemoryNeed, Phase, StateBytes
from fulltune.system import deepspeed
from fulltune.system.hardware import Machine
from fulltune.text import in_words, parse_bytes

LIBRARIES_BYTES = 700 * 2**20
"""What a training process on the CPU holds before the model is loaded: Python, torch and transformers."""


@dataclass(frozen=True)
class Room:
    """Memory that one process may take, and the arithmetic of what it needs."""

    available_bytes: int
    """Free on the device for this process, with its share of the libraries taken off."""
    where: str
    """In words, such as `12 GiB of GPU memory`."""
    need: Callable[[Levers], MemoryNeed]
    state: Callable[[Levers], StateBytes]

    def for_rows(self, rows: int) -> Room:
        """The same where there are only so many rows: a larger batch is never full."""

        def need(levers: Levers) -> MemoryNeed:
            return self.need(replace(levers, micro_batch_size=min(levers.micro_batch_size, max(1, rows))))

        return replace(self, need=need)


def of(recipe: Recipe, shapes: Shapes, footprint: Footprint, machine: Machine, device: str) -> Room:
    """The room on this machine.

    Raises:
        RecipeError: When `train.memory_limit` leaves nothing beside the libraries.
        DoesNotFitError: When the host is too small for what DeepSpeed offloads.
    """
    processes = recipe.train.num_processes
    shared = deepspeed.zero_of(recipe)

    def state(levers: Levers) -> StateBytes:
        return memory.state_of(shapes.num_parameters, levers)

    def need(levers: Levers) -> MemoryNeed:
        # A way out can compute in bf16 where the trace is in fp32, which needs more.
        levers = replace(levers, precision=footprint.traced(levers.precision))
        if shared is None:
            return memory.need(shapes, footprint, levers, device)
        if device == "cuda":
            return _on_devices(shared, shapes, footprint, levers, processes)
        found = memory.need(shapes, footprint, replace(levers, num_processes=1), device)
        return _shared_out(found, shared, state(levers), processes, device)

    if device == "cuda":
        available = machine.gpus[0].available_bytes
        where = "of GPU memory"
    else:
        available = machine.memory_available_bytes // processes - LIBRARIES_BYTES
        where = "of memory" if processes == 1 else f"of memory for each of {processes} processes"
    if recipe.train.memory_limit is not None:
        limit = parse_bytes(recipe.train.memory_limit) - (0 if device == "cuda" else LIBRARIES_BYTES)
        if limit <= 0:
            raise RecipeError(
                f"train.memory_limit: {recipe.train.memory_limit}, but Python and its libraries alone take about "
                f"{in_words(LIBRARIES_BYTES)}; set more"
            )
        if limit < available:
            available, where = limit, f"of train.memory_limit ({recipe.train.memory_limit})"
    room = Room(max(0, available), f"{in_words(max(0, available))} {where}", need, state)
    if shared is not None and device == "cuda":
        _refuse_offload(shared, shapes, recipe.train.num_processes, machine)
    return room


def _refuse_offload(shared: deepspeed.Zero, shapes: Shapes, processes: int, machine: Machine) -> None:
    on_host = sharded.host_bytes(shared, shapes.num_parameters, processes)
    if on_host > machine.memory_available_bytes:
        raise DoesNotFitError(
            f"{deepspeed.NAME}: what is offloaded needs {in_words(on_host)}, but "
            f"{in_words(machine.memory_available_bytes)} of the host's memory are free; "
            "offload less, or take a smaller model"
        )


def _on_devices(
    shared: deepspeed.Zero, shapes: Shapes, footprint: Footprint, levers: Levers, processes: int
) -> MemoryNeed:
    """With DeepSpeed on GPUs, whose weights are bf16 there, so that nothing holds a copy of them: see `placement`."""
    passing = sharded.passing(footprint, levers.precision, levers)
    kinds = sharded.kinds(shared, sharded.DEEPSPEED, shapes, processes, passing)
    kept = kinds["weights"] + kinds["optimizer"] + kinds["buffers"]
    scoring = sum(sharded.scoring(footprint, levers.precision, levers).values())
    phases: dict[Phase, int] = {"step": sum(kinds.values()), "evaluation": kept + scoring}
    host = sharded.host_bytes(shared, shapes.num_parameters, processes) // processes
    return MemoryNeed(kinds=kinds, phases=phases, host=host)


def _shared_out(need: MemoryNeed, shared: deepspeed.Zero, state: StateBytes, processes: int, device: str) -> MemoryNeed:
    """The same with DeepSpeed: parts of the state on this device, gradients whole because its buckets hold them."""
    parts = shared.parts(state, processes)
    # On a CPU the host's memory is the device's.
    kept = {name: size for name, size in parts.items() if device == "cpu" or name not in shared.offloaded}
    update: dict[MemoryKind, int] = {name: kept.get(name, 0) for name in ("weights", "gradients", "optimizer")}
    kinds = need.kinds | update
    spared = need.phases["step"] - sum(kinds.values())
    phases = {phase: max(0, size - spared) for phase, size in need.phases.items()}
    host = 0 if device == "cpu" else shared.host_bytes(state, processes) // processes
    return need.model_copy(update={"kinds": kinds, "phases": phases, "host": host})
