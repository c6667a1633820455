"""Memory, disk and time of a run that reads one unit of the model after the other from disk."""

from __future__ import annotations

from fulltune.errors import SetupError
from fulltune.footprint.records import BYTES, Footprint
from fulltune.models.shapes import Shapes
from fulltune.plan import memory
from fulltune.plan.gpus import Fleet
from fulltune.plan.settings import PLACEMENT, with_settings
from fulltune.recipe.fields import Recipe
from fulltune.recipe.rules import problems_of
from fulltune.recipe.training import StreamBlock
from fulltune.records.plan import MemoryKind, MemoryNeed, MemorySettings, Phase, StreamPlan
from fulltune.text import parse_bytes

UPDATE_BYTES = 150 * 10**6
"""Buffers for slices of the state in the optimizer's update, unless they fit where a unit's gradients are."""
FILE_BYTES = 2**28
"""Maximum size of each file of the saved model, whose tensors are in memory together."""
ASSUMED_SPEED = 1e9
"""Bytes per second that a disk reads and writes, if not measured."""
CORE_SECONDS = {"adamw_8bit": 8.5e-9, "adamw_bf16": 4.4e-9}
"""Seconds of a core to update a parameter (two cores, 30 November 2026); other optimizers are bound by memory."""


def start_of(recipe: Recipe, shapes: Shapes, fleet: Fleet, optim: str) -> StreamPlan | None:
    """Return how a streamed run uses disk and memory, or None with another placement; raise `SetupError` if the model
    has no blocks."""
    if recipe.train.placement != "stream":
        return None
    if not (units := shapes.unit_sizes):
        raise SetupError(shapes.no_units)
    block, dtype, count = recipe.train.stream or StreamBlock(), recipe.model.weights_dtype, shapes.num_parameters
    gradients = dtype if block.gradients == "auto" else block.gradients
    # An update writes a record beside the old one, in the spare place that units of its size share.
    state = memory.trained_bytes(count + sum(set(units.values())), dtype, optim)
    read, written = fleet.disk_speed or (ASSUMED_SPEED, ASSUMED_SPEED)
    return StreamPlan(
        largest_unit=max(units, key=lambda name: units[name]),
        largest_size=max(units.values()),
        num_units=len(units),
        gradients=gradients,
        disk=block.disk or "",
        disk_free_bytes=fleet.state_disk_bytes,
        limits={"device_memory": block.device_memory, "host_memory": block.host_memory},
        rated_writes=parse_bytes(block.rated_writes),
        read_per_second=read,
        written_per_second=written,
        is_measured=fleet.disk_speed is not None,
        state_bytes=state["weights"] + state["optimizer"],
        gradient_bytes=BYTES[gradients] * count,
    )


def why_not_stream(shapes: Shapes, recipe: Recipe, may_stream: bool = True) -> str | None:
    """Return why the recipe's model cannot be streamed, or None; `may_stream` is False if trials share the disk."""
    if recipe.train.num_processes > 1 or not may_stream:
        return "it needs one process and one run"
    if not shapes.unit_sizes:
        return shapes.no_units.removeprefix("train.placement: stream: ")
    problems = problems_of(with_settings(recipe, {PLACEMENT: "stream"}))
    return next((problem for problem in problems if problem not in problems_of(recipe)), None)


def stream_memory_need(shapes: Shapes, footprint: Footprint, settings: MemorySettings, tiers: StreamPlan) -> MemoryNeed:
    """Compute the memory of a process that holds two units' weights, and the inputs of all units for a global batch."""
    settings = settings.changed(precision=footprint.traced_precision(settings.precision))
    on_cpu, value = settings.device == "cpu", BYTES[settings.weights_dtype]
    rows, length = memory.train_sequences(footprint, settings), settings.longest_tokens
    base = memory.FIRST_CALLS_BYTES if on_cpu else memory.CUDA_CONTEXT_BYTES
    gradients = BYTES[tiers.gradients] * tiers.largest_size
    fixed: dict[MemoryKind, int] = {
        "weights": 2 * value * tiers.largest_size + tiers.cache_bytes * on_cpu,
        "gradients": gradients,
        "optimizer": min(UPDATE_BYTES, 4 * tiers.state_bytes) * (gradients < UPDATE_BYTES) * on_cpu,
    }
    copies, each = 2 * tiers.largest_size, value * shapes.hidden_size * rows * length
    points: list[dict[MemoryKind, int]] = []
    for point in footprint.variant(settings.precision, settings.can_recompute).first:
        alive = point.bytes(rows, length) | {"gradients": 0}
        alive = memory.with_chunked_loss(alive, shapes, settings, rows * length, 0)
        if alive["gradients"] and value < 4 and rows * length < 2 * shapes.hidden_size:  # see `models.chunked_loss`
            alive["gradients"] -= (4 - value) * shapes.vocab_size * shapes.hidden_size
            alive["logits"] += value * rows * length * shapes.vocab_size
        # With checkpointing, the trace has a block's activations and the inputs of all; else all layers' activations.
        block, inputs = alive["activations"] // shapes.num_layers, (tiers.num_units + 1) * each
        if settings.can_recompute:
            inputs = max(inputs, alive["activations"] - block) if length == 1 else inputs  # an image counts as a token
            block = max(block, alive["activations"] - (inputs if length == 1 else shapes.num_layers * each))
        alive["activations"] = block + settings.gradient_accumulation_steps * inputs
        alive["buffers"] = base + min(alive["buffers"], copies) + round(memory.GAP_SHARE * block * on_cpu)
        points.append(alive | fixed | {"gradients": fixed["gradients"] + alive["gradients"]})
    kinds = max(points, key=lambda alive: sum(alive.values()))
    file = min(value * shapes.num_parameters, max(FILE_BYTES, value * footprint.largest_tensor))
    passing, lasting = memory.eval_memory(shapes, footprint, settings), sum(fixed.values()) + base
    phases: dict[Phase, int] = {
        "loading": lasting,
        "step": sum(kinds.values()),
        "evaluation": lasting + sum(passing.values()) - max(0, passing["buffers"] - copies),
        "saving": lasting + file * on_cpu,
        "resuming": lasting,
    }
    host = 0 if on_cpu else fixed["weights"] + fixed["gradients"] + UPDATE_BYTES + tiers.cache_bytes
    return MemoryNeed(kinds=kinds, phases=phases, host=host)


def add_disk_seconds(parts: dict[str, float], count: int, fleet: Fleet, settings: MemorySettings) -> dict[str, float]:
    """Return a step's seconds with those of the disk, which overlap with the computing: the update of `count`
    parameters with the next forward pass."""
    tiers, state = settings.stream, memory.state_bytes(count, settings)
    assert tiers is not None, "streamed"
    whole = state["weights"] + state["optimizer"]
    cores = CORE_SECONDS.get(settings.optim, 0.0) * count / fleet.machine.num_cores
    moving = (2 * whole + tiers.gradient_bytes) / (fleet.host_memory_gb_per_second * 1e9)
    updating = (whole + tiers.gradient_bytes) / tiers.read_per_second + whole / tiers.written_per_second
    forward = parts["computing"] / 4  # recomputed in the backward pass, which takes twice as long itself
    link = fleet.gpu_model.link_gb_per_second * 1e9 if fleet.gpu_model else float("inf")
    return parts | {
        "host link": (2 * state["weights"] + tiers.gradient_bytes) / link,
        "disk": pass_seconds(settings, state["weights"]) + tiers.gradient_bytes / tiers.written_per_second,
        "optimizer": max(cores, moving, updating - forward),
    }


def pass_seconds(settings: MemorySettings, weights: int) -> float:
    """Return the time to read the weights for a forward pass, which is 0 if they stay in memory."""
    tiers = settings.stream
    return 0.0 if tiers is None else max(0, weights - tiers.cache_bytes) / tiers.read_per_second
