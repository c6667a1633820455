"""Memory of a training run (docs/concepts/memory.md)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fulltune.footprint.records import BYTES, Footprint
from fulltune.models.shapes import Shapes
from fulltune.records.plan import MemoryKind, MemoryNeed, MemorySettings, Phase

# ---- beyond live tensors: fitted on 19 trainings of random models on two CPU cores, 25 November 2026 ---------------

FIRST_CALLS_BYTES = 50 * 2**20
"""Bytes of code and tables that the first step loads."""
GAP_SHARE = 0.24
"""Size of gaps that the C library cannot reuse, relative to the small blocks around them."""
STATE_SHARE = 0.08
"""Gaps around weights and optimizer state, relative to their size."""
SMALL_BYTES = 32 * 2**20
"""Size below which freed blocks stay on the C library's heap."""
SMALL_OF_PARTS_BYTES = 4 * 2**20
"""The same limit with FSDP2, set in `train.parent.spawn`."""

CUDA_CONTEXT_BYTES = 600 * 2**20
"""CUDA context, cuBLAS workspaces and the allocator's rounding (from the literature)."""
CHUNK_TOKENS = {"cpu": 256, "cuda": 1024}


def unsharded_need(shapes: Shapes, footprint: Footprint, settings: MemorySettings) -> MemoryNeed:
    """Compute the memory of one process that holds the whole training state. `footprint` must have a trace in the
    settings' precision."""
    state, on_cpu = state_bytes(shapes.num_parameters, settings), settings.device == "cpu"
    variant = footprint.variant(settings.precision, settings.activation_checkpointing)
    rows, length = train_sequences(footprint, settings), settings.longest_tokens
    points: list[dict[MemoryKind, int]] = []
    for traced, before in ((variant.first, 0), (variant.later, state["gradients"])):
        if not before or settings.gradient_accumulation_steps > 1 or settings.generic_first:
            alive = (one.bytes(rows, length) for one in traced)
            points += [state | with_chunked_loss(kinds, shapes, settings, rows * length, before) for kinds in alive]
    scratch = optimizer_scratch_bytes(footprint.largest_tensor, settings)
    points.append(state | {"activations": 0, "logits": 0, "buffers": scratch})  # the optimizer's update
    kinds = max(points, key=lambda alive: sum(alive.values())).copy()
    beyond, heap = _overhead_bytes(points, shapes, footprint, settings)
    lasting = state["weights"] + state["optimizer"]
    around = round(STATE_SHARE * lasting) if on_cpu else 0
    kinds["buffers"] += beyond + around
    if settings.num_processes > 1:  # DistributedDataParallel has its own gradient buckets
        kinds["buffers"] += state["gradients"]
    passing = eval_memory(shapes, footprint, settings)
    base = FIRST_CALLS_BYTES if on_cpu else CUDA_CONTEXT_BYTES
    # The file's weights and their converted copies exist together; for a GPU, in host memory.
    is_copied = settings.weights_dtype == "bf16" or settings.has_experts
    read = 4 * shapes.num_parameters if is_copied and on_cpu else 0
    phases: dict[Phase, int] = {
        "loading": state["weights"] + read + base,
        "step": sum(kinds.values()),
        # The pretrained model is scored without optimizer state, but with the features of a linear probe.
        "evaluation": max(lasting + around, state["weights"] + settings.probe_bytes) + sum(passing.values()) + base,
        # Tensors are written without a copy (safetensors 0.8, torch.save); one at a time is compared with its start.
        "saving": lasting + base + around + heap + (4 * footprint.largest_tensor if on_cpu else 0),
        # A second model reads the checkpoint's weights and is freed before the optimizer's state is read.
        "resuming": state["weights"] + max(state["weights"] + read if on_cpu else 0, state["optimizer"]) + base,
    }
    if settings.num_trainable is not None and not settings.saves_all:  # a checkpoint holds only trained weights
        phases["resuming"] = state["weights"] + state["gradients"] + state["optimizer"] + base
    return MemoryNeed(kinds=kinds, phases=phases)


def eval_memory(shapes: Shapes, footprint: Footprint, settings: MemorySettings) -> dict[MemoryKind, int]:
    """Return the bytes per `MemoryKind` at the peak of a forward pass over an eval batch."""
    rows, length = settings.eval_batch_size * footprint.sequences_per_row, settings.longest_tokens
    points = footprint.evaluation[settings.precision]
    alive = [with_chunked_loss(one.bytes(rows, length), shapes, settings, rows * length, None) for one in points]
    return max(alive, key=lambda kinds: sum(kinds.values()))


def train_sequences(footprint: Footprint, settings: MemorySettings) -> int:
    return settings.micro_batch_size * footprint.sequences_per_row


def num_logit_tokens(footprint: Footprint, settings: MemorySettings) -> int:
    """Return how many tokens have their logits in memory at the same time."""
    tokens = train_sequences(footprint, settings) * settings.longest_tokens
    return min(tokens, CHUNK_TOKENS[settings.device]) if settings.chunked_loss else tokens


def _overhead_bytes(
    points: Sequence[Mapping[MemoryKind, int]], shapes: Shapes, footprint: Footprint, settings: MemorySettings
) -> tuple[int, int]:
    """Return the peak bytes used in addition to live tensors, and the bytes of freed blocks that stay on the heap."""
    if settings.device == "cuda":
        return CUDA_CONTEXT_BYTES, 0
    logits_are_large = 4 * num_logit_tokens(footprint, settings) * shapes.vocab_size >= SMALL_BYTES
    size, trained = BYTES[settings.weights_dtype], num_trainable(shapes.num_parameters, settings)
    sizes = footprint.tensors or {footprint.largest_tensor: 1}
    large = sum(values * count for values, count in sizes.items() if values * size >= SMALL_BYTES)
    small_share = 1 - large / max(1, trained)
    parts = []
    for kinds in points:
        logits = kinds["logits"] if logits_are_large else 0
        gradients = kinds["gradients"] - round(small_share * min(kinds["gradients"], size * trained))
        small = sum(kinds.values()) - kinds["weights"] - kinds["optimizer"] - logits - gradients
        parts.append(((1 + GAP_SHARE) * small, logits, gradients))
    heap, peak = peak_heap_bytes(parts, footprint.largest_tensor * size)
    highest = max(sum(kinds.values()) for kinds in points)
    state = points[0]["weights"] + points[0]["optimizer"]
    return FIRST_CALLS_BYTES + max(0, state + round(peak) - highest), round(heap / (1 + GAP_SHARE))


def peak_heap_bytes(points: Sequence[tuple[float, int, int]], block_bytes: int) -> tuple[float, float]:
    """Return the peak heap bytes and the peak total bytes of temporary tensors on a CPU.

    Each point holds the bytes of small blocks with their gaps, of large blocks that need new memory, and of large
    blocks of up to `block_bytes` each that may reuse free heap.
    """
    heap = max(small for small, _, _ in points)

    def reused(free: float, large: int) -> int:
        """Return how many bytes of large blocks fit into free heap, assuming that each block needs twice its size."""
        return block_bytes * min(large // block_bytes, int(free / 2 / block_bytes))

    return heap, max(heap - reused(heap - small, fits) + large + fits for small, large, fits in points)


def with_chunked_loss(
    live: dict[MemoryKind, int], shapes: Shapes, settings: MemorySettings, tokens: int, earlier_gradients: int | None
) -> dict[MemoryKind, int]:
    """If the loss is chunked, return a copy of `live` with one chunk's logits and the head's whole gradient; else
    return `live`.

    `tokens` is the number of tokens with logits. `earlier_gradients` are the bytes of earlier micro batches' gradients,
    which stay in memory, or None without a backward pass.
    """
    if not settings.chunked_loss:
        return live
    halves = 2 if settings.precision != "fp32" else 0
    head = shapes.vocab_size * shapes.hidden_size
    has_gradient = earlier_gradients is not None and (settings.num_trainable is None or shapes.trains_head)
    logits, gradients = 0, live["gradients"]
    if live["logits"]:
        logits = min(tokens, CHUNK_TOKENS[settings.device]) * shapes.vocab_size * (4 + halves)
        if settings.weights_dtype == "fp32":  # the head's 16-bit copy, in addition to autocast's
            logits += halves * head
        if has_gradient and settings.device == "cuda":  # a chunk's part of the head's gradient; small on a CPU
            logits += halves * head
        gradients = max(gradients, (earlier_gradients or 0) + 4 * head * has_gradient)
    # Unlike with all logits, a tied embedding's gradient is added to the head's in place.
    most = BYTES[settings.weights_dtype] * num_trainable(shapes.num_parameters, settings) + 4 * head * has_gradient
    return {**live, "logits": logits, "gradients": min(gradients, most)}


def optimizer_scratch_bytes(values: int, settings: MemorySettings) -> int:
    """Return the temporary bytes that the optimizer needs to update a tensor of `values` elements."""
    match settings.optim:
        case "adamw_torch_fused" | "sgd":
            return 0
        case "adamw_8bit" | "adamw_bf16":
            return 20 * 2**20  # works in slices of a fixed size
        case "adafactor":
            return 3 * 4 * values
        case _:
            return 2 * BYTES[settings.weights_dtype] * values


# ---- state -----------------------------------------------------------------------------------------------------

_MOMENTS = {
    "adamw_8bit": 2 * (1 + 4 / 128),
    "adamw_bnb_8bit": 2 * (1 + 4 / 256),
    "adamw_torch_8bit": 2 * (1 + 4 / 256),
    "adamw_torch_4bit": 2 * (0.5 + 4 / 128),
    "adamw_bf16": 4.0,
    "adafactor": 0.02,
    "sgd": 0.0,
}
"""Bytes of optimizer state per parameter, whatever the weights' type."""
_AS_WEIGHTS = {
    "adamw_torch": 2,
    "adamw_torch_fused": 2,
    "adagrad": 1,
    "rmsprop": 2,
    "stable_adamw": 2,
    "ademamix": 3,
}
"""Number of optimizer values per parameter, stored in the weights' type."""
KNOWN_OPTIMIZERS = {*_MOMENTS, *_AS_WEIGHTS}


def num_trainable(num_parameters: int, settings: MemorySettings) -> int:
    return num_parameters if settings.num_trainable is None else settings.num_trainable


def trained_dtype(settings: MemorySettings) -> str:
    return settings.weights_dtype if settings.num_trainable is None or settings.saves_all else "fp32"


def state_bytes(num_parameters: int, settings: MemorySettings) -> dict[MemoryKind, int]:
    """Return the bytes of all weights, and of the trained weights' gradients and optimizer state, by `MemoryKind`."""
    total = num_parameters if settings.num_all_parameters is None else settings.num_all_parameters
    trained = num_trainable(num_parameters, settings)
    state = trained_bytes(trained, trained_dtype(settings), settings.optim, settings.bf16_rounding)
    return state | {"weights": state["weights"] + (total - trained) * BYTES[settings.weights_dtype]}


def trained_bytes(
    num_parameters: int, weights_dtype: str, optim: str = "adamw_torch_fused", bf16_rounding: str | None = None
) -> dict[MemoryKind, int]:
    """Return the bytes of trained weights, of gradients in the same type, and of optimizer state, by `MemoryKind`."""
    size = BYTES[weights_dtype]
    per_value = _MOMENTS.get(optim)
    if per_value is None:
        per_value = float(_AS_WEIGHTS.get(optim, 2) * size)
    if bf16_rounding == "kahan" and weights_dtype == "bf16":
        per_value += 2
    return {
        "weights": num_parameters * size,
        "gradients": num_parameters * size,
        "optimizer": round(num_parameters * per_value),
    }
