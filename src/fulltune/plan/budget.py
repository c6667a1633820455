from __future__ import annotations

from collections.abc import Sequence

from fulltune.errors import DoesNotFitError, RecipeError
from fulltune.footprint.records import BYTES, Footprint, LiveMemory
from fulltune.models.shapes import Shapes
from fulltune.plan import fsdp2, memory, stream
from fulltune.recipe.fields import Recipe
from fulltune.records.plan import DiskNeed, MemoryKind, MemoryNeed, MemorySettings, Phase
from fulltune.system import parallel_layout
from fulltune.system.hardware import Machine
from fulltune.system.parallel_layout import BUCKET_VALUES, ParallelLayout
from fulltune.text import counted, format_bytes, parse_bytes

LIBRARIES_BYTES = 700 * 2**20


def usable_memory(recipe: Recipe, machine: Machine, device: str) -> tuple[int, str]:
    """Return the bytes that one process may use on its device, and a description such as `12 GiB of GPU memory`; raise
    `RecipeError` if `train.memory_limit` is too low."""
    processes = recipe.train.processes_per_machine
    libraries = 0 if device == "cuda" else LIBRARIES_BYTES
    if device == "cuda":
        used = machine.gpus[:processes]
        least = min(used, key=lambda gpu: gpu.available_bytes)
        free, where = least.available_bytes, "of GPU memory"
        if free < max(gpu.available_bytes for gpu in used):
            where += f" (GPU {used.index(least)}, {least.name}, has the least free memory of {len(used)} GPUs)"
    else:
        free = machine.memory_available_bytes // processes - libraries
        where = "of memory" if processes == 1 else f"of memory for each of {processes} processes"
        where += " on each machine" if recipe.train.num_machines > 1 else ""
    for name, limit in memory_limits(recipe, device).items():
        limited = parse_bytes(limit) - libraries
        if limited <= 0:
            raise RecipeError(
                f"{name}: {limit}, but Python and its libraries alone take about "
                f"{format_bytes(libraries)}; set a higher limit"
            )
        if limited < free:
            free, where = limited, f"of {name} ({limit})"
    return max(0, free), f"{format_bytes(max(0, free))} {where}"


def memory_limits(recipe: Recipe, device: str) -> dict[str, str]:
    """Return the recipe's limits of a process's memory on this device, by the setting's name."""
    limits = {"train.memory_limit": recipe.train.memory_limit}
    if recipe.train.placement == "stream" and (block := recipe.train.stream) is not None:
        where = "device_memory" if device == "cuda" else "host_memory"
        limits[f"train.stream.{where}"] = getattr(block, where)
    return {name: limit for name, limit in limits.items() if limit is not None}


def check_offload_fits(recipe: Recipe, shapes: Shapes, machine: Machine) -> None:
    """Raise `DoesNotFitError` if a machine has too little host memory for the state that ZeRO offloads."""
    layout = parallel_layout.layout_of(recipe)
    if layout is None or not machine.gpus:
        return
    processes, machines = recipe.train.num_processes, recipe.train.num_machines
    on_host = offloaded_bytes(layout, shapes, processes) // machines
    if on_host > machine.memory_available_bytes:
        each = f" on each of {machines} machines" if machines > 1 else ""
        raise DoesNotFitError(
            f"{recipe.train.zero_enabled_by}: offloading needs {format_bytes(on_host)} of host memory{each}, but "
            f"only {format_bytes(machine.memory_available_bytes)} is free; offload less, or use a smaller model"
        )


def memory_need(
    shapes: Shapes, footprint: Footprint, settings: MemorySettings, layout: ParallelLayout | None
) -> MemoryNeed:
    """Compute the memory of one process on its device. If `layout` is None, each process holds the whole training
    state."""
    if settings.stream is not None:
        return stream.stream_memory_need(shapes, footprint, settings, settings.stream)
    if layout is not None and layout.engine == "fsdp2":
        return fsdp2.fsdp2_memory_need(shapes, footprint, settings)
    if layout is not None:
        of_engine = _zero_need_per_gpu_process if settings.device == "cuda" else _zero_need_per_cpu_process
        return of_engine(shapes, footprint, settings, layout)
    traced = (footprint.weights_dtype, footprint.traced_precision(settings.precision))
    if (settings.weights_dtype, settings.precision) == traced:
        return memory.unsharded_need(shapes, footprint, settings)
    # A weight type or precision that was not traced is estimated.
    state = memory.state_bytes(shapes.num_parameters, settings)
    kinds = state | peak_activation_bytes(footprint, settings)
    # Only fp32 weights are cast for 16-bit computations.
    cast = settings.weights_dtype == "fp32" and settings.precision != "fp32"
    kinds["buffers"] = memory.CUDA_CONTEXT_BYTES
    if settings.device == "cpu":
        kinds["buffers"] = memory.FIRST_CALLS_BYTES + round(memory.GAP_SHARE * kinds["activations"])
        kinds["buffers"] += round(memory.STATE_SHARE * (state["weights"] + state["optimizer"]))
    kinds["buffers"] += state["gradients"] if settings.num_processes > 1 else 0
    kinds["buffers"] += 2 * shapes.num_parameters if cast else 0
    # Loading, saving and resuming follow from the state alone.
    similar = memory.unsharded_need(
        shapes, footprint, settings.changed(precision=footprint.traced_precision(settings.precision))
    )
    phases: dict[Phase, int] = {"step": sum(kinds.values())}
    return MemoryNeed(
        kinds=kinds, phases=phases | {phase: similar.phases[phase] for phase in ("loading", "saving", "resuming")}
    )


def _zero_need_per_gpu_process(
    shapes: Shapes, footprint: Footprint, settings: MemorySettings, layout: ParallelLayout
) -> MemoryNeed:
    parameters, processes = shapes.num_parameters, settings.num_processes
    state = layout.bytes_on("device", zero_state_bytes(parameters, shapes.num_trainable), processes)
    buffers = 2 * 2 * min(parameters, BUCKET_VALUES) + memory.CUDA_CONTEXT_BYTES
    if layout.stage == 3:  # weights gathered at a time: at least a layer or the vocabulary
        vocabulary = shapes.vocab_size * shapes.hidden_size
        layer = (parameters - vocabulary) // max(1, shapes.num_layers)
        buffers += 2 * max(min(parameters, LIVE_VALUES), vocabulary, layer)
    kinds = {**state, **peak_activation_bytes(footprint, settings), "buffers": buffers}
    points = footprint.evaluation[footprint.traced_precision(settings.precision)]
    scoring = _peak_activations_and_logits(points, footprint, settings.eval_batch_size, settings)
    evaluation = state["weights"] + state["optimizer"] + buffers + sum(scoring.values())
    host = offloaded_bytes(layout, shapes, processes) // processes
    return MemoryNeed(kinds=kinds, phases={"step": sum(kinds.values()), "evaluation": evaluation}, host=host)


def _zero_need_per_cpu_process(
    shapes: Shapes, footprint: Footprint, settings: MemorySettings, layout: ParallelLayout
) -> MemoryNeed:
    alone = settings.changed(precision=footprint.traced_precision(settings.precision), num_processes=1)
    single = memory.unsharded_need(shapes, footprint, alone)
    kinds = single.kinds | layout.bytes_per_process(
        memory.state_bytes(shapes.num_parameters, settings), settings.num_processes
    )
    spared = single.phases["step"] - sum(kinds.values())
    return MemoryNeed(kinds=kinds, phases={phase: max(0, size - spared) for phase, size in single.phases.items()})


# ---- what ZeRO shards --------------------------------------------------------------------------------------------

IN_ENGINE = (2, 4, 12)
"""ZeRO's bytes per parameter: bf16 weights, fp32 gradients, and fp32 weights with both moments."""
LIVE_VALUES = 10**9
HOST_BUFFERS = 1.22
"""Overhead factor of pinned buffers (measured: 176 GB for 8.03 B parameters of 18 bytes each)."""


def zero_state_bytes(num_parameters: int, num_trainable: int | None = None) -> dict[MemoryKind, int]:
    """Return the bytes of weights, gradients and optimizer state, by `MemoryKind`, that ZeRO shards over all processes.
    `num_trainable` defaults to all."""
    weights, gradients, optimizer = IN_ENGINE
    trained = num_parameters if num_trainable is None else num_trainable
    return {"weights": weights * num_parameters, "gradients": gradients * trained, "optimizer": optimizer * trained}


def offloaded_bytes(layout: ParallelLayout, shapes: Shapes, num_processes: int) -> int:
    """Return how much host memory all processes together need for the state that ZeRO offloads."""
    each = layout.bytes_on("host", zero_state_bytes(shapes.num_parameters, shapes.num_trainable), num_processes)
    return round(HOST_BUFFERS * num_processes * sum(each.values()))


def peak_activation_bytes(footprint: Footprint, settings: MemorySettings) -> dict[MemoryKind, int]:
    """Return the bytes of activations and logits at the point of a training micro batch where their sum is highest."""
    variant = footprint.variant(footprint.traced_precision(settings.precision), settings.activation_checkpointing)
    return _peak_activations_and_logits(variant.first, footprint, settings.micro_batch_size, settings)


def _peak_activations_and_logits(
    points: Sequence[LiveMemory], footprint: Footprint, batch_size: int, settings: MemorySettings
) -> dict[MemoryKind, int]:
    """Return the bytes of activations and logits at the point where their sum is highest."""
    rows = batch_size * footprint.sequences_per_row
    part = min(1.0, memory.CHUNK_TOKENS["cuda"] / (rows * settings.longest_tokens)) if settings.chunked_loss else 1.0
    alive = [point.bytes(rows, settings.longest_tokens) for point in points]
    passing: list[dict[MemoryKind, int]] = [
        {"activations": kinds.get("activations", 0), "logits": round(part * kinds.get("logits", 0))} for kinds in alive
    ]
    return max(passing, key=lambda kinds: sum(kinds.values()))


# ---- the disk ----------------------------------------------------------------------------------------------------

ENGINE_BYTES = 16
"""Bytes per parameter in ZeRO's checkpoints: 12 for fp32 weights and moments, 4 for the compute weights."""
MOMENTS_BYTES = 8
SMALL_FILES_BYTES = 16 * 2**20
"""Space for a checkpoint's other files; a tokenizer takes 1 MB to 17 MB."""


def disk_need(recipe: Recipe, num_parameters: int, settings: MemorySettings) -> DiskNeed:
    """Compute the run's peak disk usage for checkpoints, the finished model and the initial weights."""
    state = memory.state_bytes(num_parameters, settings)
    weights = memory.num_trainable(num_parameters, settings) * BYTES[memory.trained_dtype(settings)]
    weights = state["weights"] if settings.saves_all else weights
    checkpoint = weights + state["optimizer"]
    if recipe.train.placement == "fsdp2":  # checkpoints have fp32 moments with every optimizer
        checkpoint = weights + max(state["optimizer"], MOMENTS_BYTES * memory.num_trainable(num_parameters, settings))
    if recipe.train.zero_enabled_by:
        checkpoint = num_parameters * ENGINE_BYTES
    if (tiers := settings.stream) is not None:  # the state is the checkpoint; the best weights lie beside it
        copies = SMALL_FILES_BYTES + weights * (1 + recipe.train.load_best_model_at_end)
        state_here = 0 if tiers.disk else tiers.state_bytes + tiers.gradient_bytes
        return DiskNeed(checkpoint_bytes=state_here, num_checkpoints=1, model=copies)
    return DiskNeed(
        checkpoint_bytes=checkpoint + SMALL_FILES_BYTES,
        num_checkpoints=min(recipe.train.save_total_limit + 2, settings.num_saves or 10**9),
        model=2 * weights + SMALL_FILES_BYTES,
    )


def disk_full_message(recipe: Recipe, needed: DiskNeed, free_bytes: int, folder: str) -> str:
    """Return the error message for a disk that is too small. If `folder` is empty, the message names the recipe's
    output."""
    checkpoints = f"{counted(needed.num_checkpoints, 'checkpoint')} of {format_bytes(needed.checkpoint_bytes)}"
    parts = f"{checkpoints}, and {format_bytes(needed.model)} for the model"
    return (
        f"{folder or recipe.output}: checkpoints and the model need {format_bytes(needed.total)} on disk ({parts}), "
        f"but only {format_bytes(free_bytes)} is free"
    )
