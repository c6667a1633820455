"""What is to be planned, as numbers that placements can be weighed with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from fulltune import methods
from fulltune.errors import RecipeError
from fulltune.footprint.records import Footprint
from fulltune.models.shapes import Shapes
from fulltune.plan import disk, memory, placement, sharded, time
from fulltune.plan import levers as choosing
from fulltune.plan import resolve as settle
from fulltune.plan.budget import LIBRARIES_BYTES
from fulltune.plan.gpus import Fleet
from fulltune.plan.reasons import Ledger
from fulltune.recipe.fields import Recipe
from fulltune.records.data import DataSummary
from fulltune.records.plan import MemoryKind, MemoryNeed, Phase, Plan
from fulltune.system import deepspeed
from fulltune.text import parse_bytes


@dataclass(frozen=True)
class Task:
    """What is to be planned."""

    recipe: Recipe
    shapes: Shapes
    footprint: Callable[[str], Footprint]
    """The model's memory for a type of weights; each type is traced once, in a few seconds."""
    summary: DataSummary
    spread: bool = False
    """The number of processes follows from the hardware."""


def spread_over(recipe: Recipe, fleet: Fleet) -> Recipe:
    """The recipe with a process for each device of hardware that is not here, unless it says how many.

    Raises:
        RecipeError: When the recipe's batches cannot be shared by so many.
    """
    train, devices = recipe.train, fleet.num_devices
    if not fleet.here and fleet.card is not None and train.device == "cpu":
        raise RecipeError("train.device: 'cpu' but --for names a GPU; add --set train.device=auto")
    if not fleet.here and fleet.card is None and train.device == "cuda":
        raise RecipeError("train.device: 'cuda' but --for names no GPU; add --set train.device=auto")
    if fleet.here or devices == 1 or "num_processes" in train.model_fields_set:
        return recipe
    each = (train.micro_batch_size or 1) * devices
    if train.global_batch_size and train.global_batch_size % each:
        micro = f" x micro batch {train.micro_batch_size}" if (train.micro_batch_size or 1) > 1 else ""
        raise RecipeError(
            f"train.global_batch_size: {train.global_batch_size} cannot be shared by {devices} devices{micro}; set a "
            f"multiple of {each}, or train.num_processes"
        )
    return recipe.model_copy(update={"train": train.model_copy(update={"num_processes": devices})})


def load_of(task: Task, fleet: Fleet, planned: Plan | None) -> placement.Load:
    recipe, shapes, summary = choosing.possible(task.recipe, task.shapes), task.shapes, task.summary
    ledger = Ledger()
    device = settle.device(recipe, fleet.machine, ledger)
    precision = settle.precision(recipe, fleet.machine, device, ledger)
    optim, rounding = settle.optimizer(recipe, ledger)
    train = recipe.train
    # Without DeepSpeed: ways that have it are given whole logits.
    pieces = choosing.chunked_loss(without_deepspeed(recipe), shapes)
    start = choosing.before_choosing(recipe, shapes, summary, precision, optim, rounding, pieces)
    given = {
        "train.num_processes": train.num_processes,
        "train.optim": train.optim,
        "train.bf16_rounding": train.bf16_rounding,
        "train.optimizer_in_backward": train.optimizer_in_backward,
        "train.chunked_loss": train.chunked_loss,
        "train.precision": train.precision,
        "train.extra.deepspeed": train.extra.get("deepspeed"),
        "model.weights_dtype": recipe.model.weights_dtype,
    }
    shared = deepspeed.zero_of(recipe)
    global_batch = settle.global_batch(recipe, summary, ledger)
    start = replace(start, num_saves=settle.steps(recipe, summary.splits["train"].rows, global_batch, ledger).num_saves)
    on_disk = disk.need(recipe, shapes.num_parameters, start)
    # A way that offloads to disk has DeepSpeed's checkpoints.
    checkpoints = on_disk.num_checkpoints * disk.DEEPSPEED_BYTES * shapes.num_parameters + 8 * shapes.num_parameters
    return placement.Load(
        shapes=shapes,
        global_batch_size=global_batch,
        levers=start,
        checkpointing=(False, True) if train.activation_checkpointing is None else (train.activation_checkpointing,),
        micro_batch_size=train.micro_batch_size,
        need=lambda levers: _need(task, start, levers, device),
        passing=lambda levers: _passing(task, start, levers),
        work=time.work_of(
            summary,
            task.footprint(recipe.model.weights_dtype),
            planned is None or planned.group_by_length,
            methods.virtual_tokens(recipe),
            time.backward_of(recipe.method.kind, shapes),
        ),
        available_bytes=_available_bytes(recipe, fleet),
        given=given,
        shared=shared,
        nvme_path=deepspeed.nvme_path(recipe),
        bf16_rounding=train.bf16_rounding or "stochastic",
        checkpoints_bytes=checkpoints,
    )


def without_deepspeed(recipe: Recipe) -> Recipe:
    extra = {name: value for name, value in recipe.train.extra.items() if name != "deepspeed"}
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"extra": extra})})


def _available_bytes(recipe: Recipe, fleet: Fleet) -> int:
    """What one process may take on its device, beyond the libraries' own."""
    machine, limit = fleet.machine, recipe.train.memory_limit
    libraries = 0 if machine.gpus else LIBRARIES_BYTES
    free = machine.gpus[0].available_bytes if machine.gpus else machine.memory_available_bytes
    available = free if machine.gpus else free // recipe.train.num_processes
    return max(0, (available if limit is None else min(available, parse_bytes(limit))) - libraries)


def _need(task: Task, start: memory.Levers, levers: memory.Levers, device: str) -> MemoryNeed:
    """What `memory.need` says; for weights or computations of another type than the traced one, a cautious sum."""
    footprint = task.footprint(start.weights_dtype)
    if levers.weights_dtype == start.weights_dtype and levers.precision == footprint.traced(levers.precision):
        return memory.need(task.shapes, footprint, levers, device)
    parameters = task.shapes.num_parameters
    state = memory.state_of(parameters, levers)
    kinds: dict[MemoryKind, int] = {
        "weights": state.weights,
        "gradients": state.gradients,
        "optimizer": state.optimizer,
        **_passing(task, start, levers),
    }
    if levers.optimizer_in_backward:  # each gradient goes as soon as it came
        largest = footprint.largest_tensor * memory.BYTES[levers.weights_dtype]
        kinds["gradients"] = min(kinds["gradients"], largest)
    # fp32 weights are cast for computations in 16 bits; bf16 weights are not.
    cast = levers.weights_dtype == "fp32" and levers.precision != "fp32"
    buckets = state.gradients if levers.num_processes > 1 else 0
    held = memory.FIRST_CALLS_BYTES + round(memory.HELD_SHARE * kinds["activations"])
    held += round(memory.STATE_SHARE * (state.weights + state.optimizer))
    beyond = memory.CUDA_CONTEXT_BYTES if device == "cuda" else held
    kinds["buffers"] = beyond + buckets + (2 * parameters if cast else 0)
    # Loading and going on from a checkpoint follow from the state alone.
    like = memory.need(task.shapes, footprint, replace(levers, precision=footprint.traced(start.precision)), device)
    phases: dict[Phase, int] = {"step": sum(kinds.values())}
    phases |= {phase: like.phases[phase] for phase in ("loading", "saving", "resuming")}
    return MemoryNeed(kinds=kinds, phases=phases)


def _passing(task: Task, start: memory.Levers, levers: memory.Levers) -> dict[MemoryKind, int]:
    footprint = task.footprint(start.weights_dtype)
    return sharded.passing(footprint, footprint.traced(start.precision), levers)
