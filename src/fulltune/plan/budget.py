"""What one process may take of a machine's memory, and what settings need of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from fulltune.errors import DoesNotFitError, RecipeError
from fulltune.footprint.records import Footprint
from fulltune.models.shapes import Shapes
from fulltune.plan import fsdp2, memory, sharded
from fulltune.recipe.fields import Recipe
from fulltune.records.plan import MemoryKind, MemoryNeed, MemorySettings, Phase
from fulltune.system import sharing
from fulltune.system.hardware import Machine
from fulltune.text import format_bytes, parse_bytes

LIBRARIES_BYTES = 700 * 2**20
"""What a training process on the CPU holds before the model is loaded: Python, torch and transformers."""


@dataclass(frozen=True)
class MemoryBudget:
    """Memory that one process may take, and the arithmetic of what settings need of it."""

    available_bytes: int
    """Free on the device for this process, with its share of the libraries taken off."""
    where: str
    """In words, such as `12 GiB of GPU memory`."""
    need: Callable[[MemorySettings], MemoryNeed]

    def for_rows(self, rows: int) -> MemoryBudget:
        """The same where there are only so many rows: a larger batch is never full."""

        def need(settings: MemorySettings) -> MemoryNeed:
            return self.need(settings.changed(micro_batch_size=min(settings.micro_batch_size, max(1, rows))))

        return replace(self, need=need)


def of(recipe: Recipe, shapes: Shapes, footprint: Footprint, machine: Machine, device: str) -> MemoryBudget:
    """The budget on this machine, for the recipe's own placement.

    Raises:
        RecipeError: When `train.memory_limit` leaves nothing beside the libraries.
    """
    processes, limit = recipe.train.processes_per_machine, recipe.train.memory_limit
    libraries = 0 if device == "cuda" else LIBRARIES_BYTES
    if device == "cuda":
        used = machine.gpus[:processes]
        least = min(used, key=lambda gpu: gpu.available_bytes)
        available, where = least.available_bytes, "of GPU memory"
        if least.available_bytes < max(gpu.available_bytes for gpu in used):
            where += f" (GPU {used.index(least)}, {least.name}, has the least of {len(used)})"
    else:
        available = machine.memory_available_bytes // processes - libraries
        where = "of memory" if processes == 1 else f"of memory for each of {processes} processes"
        where += " of a machine" if recipe.train.num_machines > 1 else ""
    if limit is not None:
        limited = parse_bytes(limit) - libraries
        if limited <= 0:
            raise RecipeError(
                f"train.memory_limit: {limit}, but Python and its libraries alone take about "
                f"{format_bytes(libraries)}; set more"
            )
        if limited < available:
            available, where = limited, f"of train.memory_limit ({limit})"
    available, needs = max(0, available), Needs(shapes, footprint, recipe.model.weights_dtype, device)
    shared = sharing.of(recipe)
    return MemoryBudget(available, f"{format_bytes(available)} {where}", lambda settings: needs.of(settings, shared))


def refuse_offload(recipe: Recipe, shapes: Shapes, machine: Machine) -> None:
    """Refuse what ZeRO is to keep in the memory of a host that is too small for it.

    Raises:
        DoesNotFitError: Naming both sizes.
    """
    shared = sharing.of(recipe)
    if shared is None or not machine.gpus:
        return
    processes, machines = recipe.train.num_processes, recipe.train.num_machines
    on_host = sharded.host_bytes(shared, shapes.num_parameters, processes, num_trained=shapes.num_trained) // machines
    if on_host > machine.memory_available_bytes:
        each = f" on each of {machines} machines" if machines > 1 else ""
        raise DoesNotFitError(
            f"{recipe.train.engine_by}: what is offloaded needs {format_bytes(on_host)}{each}, but "
            f"{format_bytes(machine.memory_available_bytes)} of the host's memory are free; "
            "offload less, or take a smaller model"
        )


@dataclass(frozen=True)
class Needs:
    """What a process needs on its device, whatever its settings and wherever its state lies."""

    shapes: Shapes
    footprint: Footprint
    weights_dtype: str
    """Type of the weights that were traced."""
    device: str

    def of(self, settings: MemorySettings, shared: sharing.Sharing | None) -> MemoryNeed:
        """The need of settings; `shared` None: each process holds everything."""
        if shared is not None and shared.engine == "fsdp2":
            return fsdp2.need(self.shapes, self.footprint, settings, self.device)
        if shared is not None:
            on_gpus = self.device == "cuda"
            return self._on_gpus(settings, shared) if on_gpus else self._on_cpu(settings, shared)
        precision = self.footprint.traced(settings.precision)
        if settings.weights_dtype == self.weights_dtype and settings.precision == precision:
            return memory.need(self.shapes, self.footprint, settings, self.device)
        return self._of_another_type(settings, precision)

    def _on_gpus(self, settings: MemorySettings, shared: sharing.Sharing) -> MemoryNeed:
        """The weights there are bf16, so that nothing holds a copy of them."""
        precision, processes = self.footprint.traced(settings.precision), settings.num_processes
        passing = sharded.passing(self.footprint, precision, settings)
        kinds = sharded.kinds(shared, self.shapes, processes, passing)
        kept = kinds["weights"] + kinds["optimizer"] + kinds["buffers"]
        scoring = sum(sharded.scoring(self.footprint, precision, settings).values())
        phases: dict[Phase, int] = {"step": sum(kinds.values()), "evaluation": kept + scoring}
        parameters, trained = self.shapes.num_parameters, self.shapes.num_trained
        host = sharded.host_bytes(shared, parameters, processes, trained)
        return MemoryNeed(kinds=kinds, phases=phases, host=host // processes)

    def _on_cpu(self, settings: MemorySettings, shared: sharing.Sharing) -> MemoryNeed:
        """What is offloaded stays in the same memory; gradients are whole in ZeRO's buckets."""
        precision = self.footprint.traced(settings.precision)
        alone = settings.changed(precision=precision, num_processes=1)
        whole = memory.need(self.shapes, self.footprint, alone, self.device)
        state = memory.state_of(self.shapes.num_parameters, settings)
        kinds = whole.kinds | shared.parts(state, settings.num_processes)
        spared = whole.phases["step"] - sum(kinds.values())
        phases = {phase: max(0, size - spared) for phase, size in whole.phases.items()}
        return MemoryNeed(kinds=kinds, phases=phases)

    def _of_another_type(self, settings: MemorySettings, precision: str) -> MemoryNeed:
        """A cautious sum for weights or computations of another type than the traced one."""
        shapes, footprint = self.shapes, self.footprint
        state = memory.state_of(shapes.num_parameters, settings)
        kinds: dict[MemoryKind, int] = {
            "weights": state.weights,
            "gradients": state.gradients,
            "optimizer": state.optimizer,
            **sharded.passing(footprint, precision, settings),
        }
        # fp32 weights are cast for computations in 16 bits; bf16 weights are not.
        cast = settings.weights_dtype == "fp32" and settings.precision != "fp32"
        buckets = state.gradients if settings.num_processes > 1 else 0
        held = memory.FIRST_CALLS_BYTES + round(memory.HELD_SHARE * kinds["activations"])
        held += round(memory.STATE_SHARE * (state.weights + state.optimizer))
        beyond = memory.CUDA_CONTEXT_BYTES if self.device == "cuda" else held
        kinds["buffers"] = beyond + buckets + (2 * shapes.num_parameters if cast else 0)
        # Loading and going on from a checkpoint follow from the state alone.
        like = memory.need(shapes, footprint, settings.changed(precision=precision), self.device)
        phases: dict[Phase, int] = {"step": sum(kinds.values())}
        phases |= {phase: like.phases[phase] for phase in ("loading", "saving", "resuming")}
        return MemoryNeed(kinds=kinds, phases=phases)
