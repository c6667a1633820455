"""Bytes of a training run, by arithmetic: see docs/concepts/memory.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fulltune.footprint.records import BYTES, Footprint
from fulltune.models.shapes import Shapes
from fulltune.records.plan import MemoryKind, MemoryNeed, MemorySettings, Phase

# ---- beyond live tensors: fitted on 19 trainings of random models on two CPU cores, 25 November 2026 ---------------

FIRST_CALLS_BYTES = 50 * 2**20
"""Code and tables that the first step loads: the model's module, kernels, the row files."""
HELD_SHARE = 0.24
"""Of the small blocks: gaps between living ones that the C library can neither give back nor use."""
STATE_SHARE = 0.08
"""The same of weights and optimizer state: their blocks come while activations and gradients lie between them."""
SMALL_BYTES = 32 * 2**20
"""Smaller blocks lie on the C library's heap, which does not shrink; larger ones are given back when they are freed."""
SMALL_OF_PARTS_BYTES = 4 * 2**20
"""The same with FSDP2: see `train.parent.spawn`."""

CUDA_CONTEXT_BYTES = 600 * 2**20
"""Context, cuBLAS workspaces and the allocator's rounding on a GPU. Taken from the literature; never measured here."""
CHUNK_TOKENS = {"cpu": 256, "cuda": 1024}
"""Tokens whose logits a chunked loss holds at a time: see `fulltune.models.chunked_loss`."""


def need(shapes: Shapes, footprint: Footprint, settings: MemorySettings) -> MemoryNeed:
    """What one process needs on its device, beyond what the libraries themselves take; the footprint holds the
    precision and checkpointing of the settings."""
    state, on_cpu = state_of(shapes.num_parameters, settings), settings.device == "cpu"
    moments = _moments(shapes, footprint, settings, state)
    kinds = max(moments, key=lambda one: sum(one.values())).copy()
    beyond, heap = _beyond_tensors(moments, shapes, footprint, settings)
    kept = state["weights"] + state["optimizer"]
    around = round(STATE_SHARE * kept) if on_cpu else 0
    kinds["buffers"] += beyond + around
    if settings.num_processes > 1:  # DistributedDataParallel sends gradients from buckets of its own
        kinds["buffers"] += state["gradients"]
    passing = scoring(shapes, footprint, settings)
    base = FIRST_CALLS_BYTES if on_cpu else CUDA_CONTEXT_BYTES
    # Weights of another type than the file's are made beside it; for a GPU both are in the host's memory.
    read = 4 * shapes.num_parameters if settings.weights_dtype == "bf16" and on_cpu else 0
    phases: dict[Phase, int] = {
        "loading": state["weights"] + read + base,
        "step": sum(kinds.values()),
        # The untouched model has no optimizer's state yet, and a linear probe of it holds its features.
        "evaluation": max(kept + around, state["weights"] + settings.probe_bytes) + sum(passing.values()) + base,
        # Tensors are written from where they lie (safetensors 0.8, torch.save); one is compared with what it was.
        "saving": kept + base + around + heap + (4 * footprint.largest_tensor if on_cpu else 0),
        # A second model reads the checkpoint's weights and is gone when the optimizer's state is read.
        "resuming": state["weights"] + max(state["weights"] + read if on_cpu else 0, state["optimizer"]) + base,
    }
    if settings.num_trainable is not None:  # a checkpoint holds only what is trained
        phases["resuming"] = state["weights"] + state["gradients"] + state["optimizer"] + base
    return MemoryNeed(kinds=kinds, phases=phases)


def scoring(shapes: Shapes, footprint: Footprint, settings: MemorySettings) -> dict[MemoryKind, int]:
    """What a forward pass of an eval batch holds at its highest."""
    rows, length = settings.eval_batch_size * footprint.sequences_per_row, settings.longest_tokens
    moments = footprint.evaluation[settings.precision]
    held = [in_pieces(one.bytes(rows, length), shapes, settings, rows * length, None) for one in moments]
    return max(held, key=lambda one: sum(one.values()))


def train_sequences(footprint: Footprint, settings: MemorySettings) -> int:
    """Texts of a micro batch that go through the model together."""
    return settings.micro_batch_size * footprint.sequences_per_row


def tokens_of_loss(footprint: Footprint, settings: MemorySettings) -> int:
    """Tokens of a micro batch whose logits exist at a time."""
    tokens = train_sequences(footprint, settings) * settings.longest_tokens
    return min(tokens, CHUNK_TOKENS[settings.device]) if settings.chunked_loss else tokens


def _beyond_tensors(
    moments: Sequence[Mapping[MemoryKind, int]], shapes: Shapes, footprint: Footprint, settings: MemorySettings
) -> tuple[int, int]:
    """What the process holds at its peak beyond the tensors of the highest moment, and what its heap keeps after that.

    On a CPU small blocks leave their room on the heap when they are freed, and the large ones of another moment come on
    top: the peak is the highest sum of small blocks and the highest sum of large ones, whenever they were.
    """
    if settings.device == "cuda":
        return CUDA_CONTEXT_BYTES, 0
    logits_are_large = 4 * tokens_of_loss(footprint, settings) * shapes.vocab_size >= SMALL_BYTES
    size, trained = BYTES[settings.weights_dtype], num_trainable(shapes.num_parameters, settings)
    sizes = footprint.tensors or {footprint.largest_tensor: 1}
    large = sum(values * count for values, count in sizes.items() if values * size >= SMALL_BYTES)
    small_share = 1 - large / max(1, trained)
    parts = []
    for kinds in moments:
        logits = kinds["logits"] if logits_are_large else 0
        gradients = kinds["gradients"] - round(small_share * min(kinds["gradients"], size * trained))
        small = sum(kinds.values()) - kinds["weights"] - kinds["optimizer"] - logits - gradients
        parts.append(((1 + HELD_SHARE) * small, logits, gradients))
    heap, held = resident(parts, footprint.largest_tensor * size)
    highest = max(sum(kinds.values()) for kinds in moments)
    state = moments[0]["weights"] + moments[0]["optimizer"]
    return FIRST_CALLS_BYTES + max(0, state + round(held) - highest), round(heap / (1 + HELD_SHARE))


def resident(moments: Sequence[tuple[float, int, int]], block_bytes: int) -> tuple[float, float]:
    """What a process on a CPU holds of tensors that come and go, at its highest: what its heap keeps, and all of it.

    Args:
        moments: Bytes of small blocks with their gaps, of large ones, and of large ones that find room on the heap.
        block_bytes: Of the largest block of the last kind.
    """
    heap = max(small for small, _, _ in moments)

    def reused(free: float, large: int) -> int:
        """Large blocks that find room on the heap: one for each stretch of twice its size that is free there."""
        return block_bytes * min(large // block_bytes, int(free / 2 / block_bytes))

    return heap, max(heap - reused(heap - small, fits) + large + fits for small, large, fits in moments)


def _moments(
    shapes: Shapes, footprint: Footprint, settings: MemorySettings, state: dict[MemoryKind, int]
) -> list[dict[MemoryKind, int]]:
    """Bytes by kind at each moment of a step that may be the highest."""
    variant = footprint.variant(settings.precision, settings.activation_checkpointing)
    rows, length = train_sequences(footprint, settings), settings.longest_tokens
    found = []
    for moments, already in ((variant.first, 0), (variant.later, state["gradients"])):
        if not already or settings.gradient_accumulation_steps > 1 or settings.generic_first:
            found += [
                state | in_pieces(one.bytes(rows, length), shapes, settings, rows * length, already) for one in moments
            ]
    return [
        *found,
        state | {"activations": 0, "logits": 0, "buffers": scratch(footprint.largest_tensor, settings)},
    ]  # the update


def in_pieces(
    kinds: dict[MemoryKind, int], shapes: Shapes, settings: MemorySettings, tokens: int, gradients_before: int | None
) -> dict[MemoryKind, int]:
    """With a chunked loss: the logits of a piece with what is made of them, and the head's whole gradient.

    Args:
        kinds: With whole logits.
        shapes: The model's sizes.
        settings: The settings.
        tokens: That have logits.
        gradients_before: Bytes of those that are there already; None: a forward pass alone, which makes none.
    """
    if not settings.chunked_loss:
        return kinds
    halves = 2 if settings.precision != "fp32" else 0
    head = shapes.vocab_size * shapes.hidden_size
    has_gradient = gradients_before is not None and settings.num_trainable is None  # else the head is frozen
    logits, gradients = 0, kinds["gradients"]
    if kinds["logits"]:
        logits = min(tokens, CHUNK_TOKENS[settings.device]) * shapes.vocab_size * (4 + halves)
        if settings.weights_dtype == "fp32":  # the head in the type of the computations, beside autocast's copy
            logits += halves * head
        if has_gradient and settings.device == "cuda":  # a piece's share of its gradient; on a CPU in small blocks
            logits += halves * head
        gradients = max(gradients, (gradients_before or 0) + 4 * head * has_gradient)
    # A tied embedding's gradient is added to the head's in place; that of whole logits is not.
    most = BYTES[settings.weights_dtype] * num_trainable(shapes.num_parameters, settings) + 4 * head * has_gradient
    return {**kinds, "logits": logits, "gradients": min(gradients, most)}


def scratch(values: int, settings: MemorySettings) -> int:
    """What the optimizer holds while it updates a tensor of so many values."""
    match settings.optim:
        case "adamw_torch_fused" | "sgd":
            return 0
        case "adamw_8bit" | "adamw_bf16":
            return 20 * 2**20  # slices of a fixed size
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
"""Optimizer to bytes per parameter, whatever the weights' type."""
_AS_WEIGHTS = {
    "adamw_torch": 2,
    "adamw_torch_fused": 2,
    "adagrad": 1,
    "rmsprop": 2,
    "stable_adamw": 2,
    "ademamix": 3,
}
"""Optimizer to values per parameter of the weights' own type."""


def has_known_state(optim: str) -> bool:
    """True if the size of the optimizer's state is known; others are planned as AdamW."""
    return optim in _MOMENTS or optim in _AS_WEIGHTS


def num_trainable(num_parameters: int, settings: MemorySettings) -> int:
    """Of a model with so many parameters, those that are trained."""
    return num_parameters if settings.num_trainable is None else settings.num_trainable


def trained_dtype(settings: MemorySettings) -> str:
    """Type of the trained weights: what a method adds is float32 whatever the model's weights are.

    A new head is of their type, as are the parts that a PEFT method trains in place; counted as float32 as well.
    """
    return settings.weights_dtype if settings.num_trainable is None else "fp32"


def state_of(num_parameters: int, settings: MemorySettings) -> dict[MemoryKind, int]:
    """What exists between steps of a model with so many parameters: gradients and optimizer state of trained ones."""
    held = num_parameters if settings.num_all_parameters is None else settings.num_all_parameters
    trained = num_trainable(num_parameters, settings)
    state = state_bytes(trained, trained_dtype(settings), settings.optim, settings.bf16_rounding)
    return state | {"weights": state["weights"] + (held - trained) * BYTES[settings.weights_dtype]}


def state_bytes(
    num_parameters: int, weights_dtype: str, optim: str = "adamw_torch_fused", bf16_rounding: str | None = None
) -> dict[MemoryKind, int]:
    """Bytes that exist between steps, gradients included; these have the weights' type."""
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
