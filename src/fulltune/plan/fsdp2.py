from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from fulltune.footprint.records import BYTES, Footprint
from fulltune.models.shapes import Shapes
from fulltune.models.sharding import Units
from fulltune.plan import memory
from fulltune.recipe.training import OWN_OPTIMIZERS
from fulltune.records.plan import MemoryKind, MemoryNeed, MemorySettings, Phase

FILE_BYTES, MAX_FILES = 2**24, 64
"""Minimum size of a checkpoint's files, and their maximum number. While a file is written, memory holds it twice."""
WHOLE_FILE_BYTES = 2**28
"""Maximum size of each file of the finished model, whose tensors are gathered in host memory."""
TENSORS_OF_BLOCK = 3
"""Ratio of a block's size to the size of its largest tensor, as in BERT."""
NUM_SEND_BUFFERS = {"cpu": 2, "cuda": 1}
"""Number of buffers that hold gradients while they are sent; gloo needs a second copy."""

AT_HEAD = ("backward head", "forward loss")
"""Positions at which all blocks' activations are in memory."""
NORM_VALUES = 6
"""fp32 values per token and hidden unit that a block's first norm (RMSNorm) needs in the backward pass."""


def fsdp_units(shapes: Shapes) -> Units:
    """Return the parameter counts of the model's FSDP units. If they are unknown, assume equal blocks."""
    if shapes.units is not None:
        return shapes.units
    vocabulary = min(shapes.num_parameters, shapes.vocab_size * shapes.hidden_size)
    block = (shapes.num_parameters - vocabulary) // max(1, shapes.num_layers)
    return Units(root=vocabulary, persistent=0, freed=shapes.num_parameters - vocabulary, block=block, apart=0)


@dataclass(frozen=True)
class _Point:
    """Bytes of one process at a point in a step, excluding its shards of the training state. Tuples have one value per
    unit or buffer."""

    live: dict[MemoryKind, int]
    """Bytes per `MemoryKind` traced in a single process; gradients are 0."""
    reduced_share: float
    """Share of the gradients already reduced to shards."""
    gathered_weights: tuple[int, ...] = ()
    whole_gradients: tuple[int, ...] = ()
    buffers: tuple[int, ...] = ()


def fsdp2_memory_need(shapes: Shapes, footprint: Footprint, settings: MemorySettings) -> MemoryNeed:
    """Compute the memory of one FSDP2 process for each `MemoryKind` and phase."""
    on_cpu = settings.device == "cpu"
    settings = settings.changed(precision=footprint.traced_precision(settings.precision))
    state = memory.state_bytes(shapes.num_parameters, settings)
    parts = [-(-size // settings.num_processes) for size in (state["weights"], state["optimizer"], state["gradients"])]
    value = BYTES[settings.weights_dtype]
    units = Units(**{kind: value * count for kind, count in fsdp_units(shapes).model_dump().items()})  # in bytes
    largest = value * footprint.largest_tensor
    points = _possible_peak_points(shapes, footprint, settings, units)
    kinds = max((_bytes_with_shards(one, *parts) for one in points), key=lambda bytes_of: sum(bytes_of.values()))
    lasting, heap = parts[0] + parts[1], 0.0
    around = round(memory.STATE_SHARE * lasting) if on_cpu else 0
    base = memory.FIRST_CALLS_BYTES if on_cpu else memory.CUDA_CONTEXT_BYTES
    # Part of the weights' file stays mapped: the size of a process's embeddings and head (measured in two processes:
    # 30 MiB of a 39 M Llama, 6 % of 1.1 B parameters).
    base += 2 * largest // settings.num_processes if on_cpu and settings.weights_dtype == "fp32" else 0
    beyond = base + around
    if on_cpu:
        split = [_split_for_heap(one, parts[2], units, footprint, shapes, settings) for one in points]
        heap, peak = memory.peak_heap_bytes(split, largest)
        beyond += max(0, lasting + round(peak) - sum(kinds.values()))
    kinds["buffers"] += beyond
    scoring = memory.eval_memory(shapes, footprint, settings)
    # Only the gathered unit has 16-bit copies.
    scoring["buffers"] = min(scoring["buffers"], max(units.block, units.persistent, units.root) // 2)
    # Without gradients the last units stay gathered until they are freed.
    last_units = units.root + units.persistent + (2 + on_cpu) * max(units.block, units.apart)
    file = max(min(lasting, FILE_BYTES), lasting // MAX_FILES)
    # To gather a tensor of the finished model takes the result, with gloo a received copy, and the sent shard.
    gathered = (1 + on_cpu) * largest + largest // settings.num_processes
    gathered += min(value * shapes.num_parameters, WHOLE_FILE_BYTES) if on_cpu else 0  # earlier tensors of the file
    # Checkpoints convert the moments of the whole shard to fp32 at once (`train.optim.fsdp2`).
    widened = 2 * 4 * (-(-shapes.num_parameters // settings.num_processes)) if settings.optim in OWN_OPTIMIZERS else 0
    phases: dict[Phase, int] = {
        "loading": parts[0] + base,
        "step": sum(kinds.values()),
        # The pretrained model is scored without optimizer state, but with a linear probe's features in each process.
        "evaluation": max(lasting + around, parts[0] + settings.probe_bytes)
        + sum(scoring.values())
        + last_units
        + base,
        # Checkpoints and the finished model (by the first process) are written file by file.
        "saving": lasting + base + around + round(heap / (1 + memory.GAP_SHARE)) + max(2 * file + widened, gathered),
        "resuming": lasting + base + widened,
    }
    return MemoryNeed(kinds=kinds, phases=phases)


# ---- the points of a step ---------------------------------------------------------------------------------------


def _possible_peak_points(shapes: Shapes, footprint: Footprint, settings: MemorySettings, units: Units) -> list[_Point]:
    """Return the points of a step where memory may peak."""
    rows, value = memory.train_sequences(footprint, settings), BYTES[settings.weights_dtype]
    before = float(settings.gradient_accumulation_steps > 1)  # gradient shards of earlier micro batches
    copies, length = NUM_SEND_BUFFERS[settings.device], settings.longest_tokens
    everything, recomputed = value * shapes.num_parameters, settings.activation_checkpointing
    traced = [
        (point.place, memory.with_chunked_loss(point.bytes(rows, length), shapes, settings, rows * length, 0))
        for point in footprint.variant(settings.precision, recomputed).first
    ]
    # The head's gradient stays in the root unit; with logits, it has the vocabulary's size.
    head = max((one["gradients"] for place, one in traced if place == "backward head"), default=0)
    head = value * shapes.vocab_size * shapes.hidden_size if any(one["logits"] for _, one in traced) else head
    left = 0 if units.persistent > head else min(units.root, head)  # tied: the persistent unit is only the norm
    # Tied embeddings have a separate gradient until both are summed.
    tied = left if any(one["logits"] for _, one in traced) else 0
    # A chunked loss sums the head's gradient in fp32 in the forward pass; the backward pass uses it, or a copy in the
    # weights' type.
    summed = 4 * shapes.vocab_size * shapes.hidden_size if settings.chunked_loss else 0
    block_gradients, freed = _block_estimators(traced, units, shapes.num_layers, units.persistent + left, recomputed)
    points: list[_Point] = []
    for place, passing in traced:
        # With checkpointing, only the copies that autograd saves stay alive.
        if recomputed and not place.endswith("below"):
            saved = units.persistent + left if place in AT_HEAD else units.block
            passing = passing | {"buffers": min(passing["buffers"], saved // 2)}
        now = block_gradients(passing)
        reduced = max(before, min(1.0, max(0, passing["gradients"] - left - now) / everything))
        without, no_logits = passing | {"gradients": 0}, passing | {"gradients": 0, "logits": 0}
        # At a block's end all its gradients exist, and its activations and copies are freed.
        ended = no_logits | {name: max(0, no_logits[name] - size) for name, size in freed(place).items()}
        ended["activations"] += NORM_VALUES * 4 * rows * length * shapes.hidden_size
        if place.startswith("forward"):
            points.append(_Point(no_logits if summed else without, before, *_forward_tensor_bytes(units, place)))
        elif place.endswith("below"):
            embeddings, share = (units.root, units.apart), 1 - (units.root + units.apart) / everything
            points.append(_Point(without, max(before, share), embeddings, (*embeddings, tied), (units.block,)))
        elif place == "backward head":
            gradients: tuple[int, ...] = (passing["gradients"],)
            if summed:
                gradients = (units.persistent + left, summed if value < 4 else 0)
            elif settings.device == "cpu":  # both exist at the same time (measured)
                gradients = (max(passing["gradients"], units.persistent),)
            # The next unit is gathered when the head's backward pass begins, after that of the loss.
            gathered = (units.block,) if any(gradients) else ()
            alive = no_logits if summed else without
            points.append(_Point(alive, before, (units.root, units.persistent), gradients, gathered))
        else:
            flat = (units.block, max(units.block, units.apart) if place.endswith(":first") else units.block)
            points += _points_of_block((without, ended), reduced, units, (left, now), copies, flat)
        if place in AT_HEAD:
            if summed:
                points.append(_Point(without, before, (units.root, units.persistent), (summed,)))
            # Next comes the last block, with all its activations and the gradient of its first tensor.
            first = (left, units.block // TENSORS_OF_BLOCK)
            flat = (units.persistent or units.block, units.block)
            points += _points_of_block((no_logits, ended), before, units, first, copies, flat)
            sent = (*(units.persistent,) * copies, units.block)
            points.append(_Point(no_logits, before, (units.root,), (units.persistent,), sent))
    nothing: dict[MemoryKind, int] = {"gradients": 0, "activations": 0, "logits": 0, "buffers": 0}
    # The first block ends with nearly all gradients reduced and the embeddings already gathered.
    lowest = max(before, 1 - (units.root + units.apart + units.block) / everything)
    flat = (units.block, max(units.block, units.apart))
    points += _points_of_block((nothing, nothing), lowest, units, (left, units.block), copies, flat)
    # Embeddings, whose input has no gradient, are reduced at the very end: the root first, then unit by unit.
    last = [units.root, units.apart]
    while last:
        points.append(_Point(nothing, 1.0, tuple(last[1:]), tuple(last), (last.pop(0),) * copies))
    part = -(-footprint.largest_tensor // settings.num_processes)
    return [*points, _Point(nothing | {"buffers": memory.optimizer_scratch_bytes(part, settings)}, 1.0)]  # the update


def _forward_tensor_bytes(units: Units, position: str) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Return the bytes of gathered weights, of whole gradients and of communication buffers at a position in the
    forward pass, each as a tuple."""
    root, last, block, apart = (units.root,), units.persistent, units.block, units.apart
    if "before" in position:
        return (*root, apart), (), (*root, apart)
    if position.endswith("loss"):
        return (*root, last), (), ()
    return (
        ((*root, last), (), (last,)) if last > block and "after" in position else ((*root, block), (), (block, block))
    )


def _block_estimators(
    traced: Sequence[tuple[str, dict[MemoryKind, int]]], units: Units, num_layers: int, head: int, recomputed: bool
) -> tuple[Callable[[dict[MemoryKind, int]], int], Callable[[str], dict[MemoryKind, int]]]:
    """Return two functions. The first estimates the current block's gradient bytes from a traced point's bytes; the
    second, the bytes freed when a block ends at a position."""
    waiting = max((one["activations"] for place, one in traced if place in AT_HEAD), default=0)
    most = max((one["activations"] for place, one in traced if place.startswith("backward ")), default=0)
    of_blocks = units.freed - units.apart
    blocks = max(1, num_layers, of_blocks // max(1, units.block))
    if recomputed and not waiting:  # without a head, all other blocks' inputs are freed before the first block
        first = max((one["activations"] for place, one in traced if place.endswith(":first")), default=most)
        waiting = min(most, (most - first) * blocks // max(1, blocks - 1))
    share = (waiting or most) // blocks
    passes = max(0, most - waiting) if waiting else 0  # recomputed and temporary activations

    def current_block_gradients(bytes_at_point: dict[MemoryKind, int]) -> int:
        """Return the current block's part of the gradient bytes, or a whole block's if blocks differ in size."""
        are_equal = units.block and of_blocks % units.block == 0
        return (bytes_at_point["gradients"] - head) % units.block if are_equal else units.block

    def freed(place: str) -> dict[MemoryKind, int]:
        return {"activations": share + (0 if place in AT_HEAD else passes), "buffers": units.block // 2}

    return current_block_gradients, freed


def _points_of_block(
    alive_during_and_after: tuple[dict[MemoryKind, int], dict[MemoryKind, int]],
    reduced_share: float,
    units: Units,
    root_and_block_gradients: tuple[int, int],
    num_send_buffers: int,
    neighbour_buffers: tuple[int, int],
) -> Iterator[_Point]:
    """Yield three points of a block's backward pass: during the pass, at its end, and while its gradients are sent."""
    (passing, ended), root, block = alive_during_and_after, (units.root,), units.block
    all_gradients = (root_and_block_gradients[0], block)
    yield _Point(passing, reduced_share, (*root, block), root_and_block_gradients, neighbour_buffers)
    yield _Point(ended, reduced_share, (*root, block), all_gradients, neighbour_buffers)
    yield _Point(ended, reduced_share, root, all_gradients, (*(block,) * num_send_buffers, neighbour_buffers[1]))


def _bytes_with_shards(point: _Point, weights: int, optimizer: int, gradients: int) -> dict[MemoryKind, int]:
    """Return a point's bytes per `MemoryKind`, including this process's shards of weights, optimizer state and
    gradients."""
    return {
        "weights": weights,
        "gradients": round(point.reduced_share * gradients) + sum(point.whole_gradients),
        "optimizer": optimizer,
        "activations": point.live["activations"],
        "logits": point.live["logits"],
        "buffers": point.live["buffers"] + sum(point.gathered_weights) + sum(point.buffers),
    }


def _split_for_heap(
    point: _Point, gradient_shard: int, units: Units, footprint: Footprint, shapes: Shapes, settings: MemorySettings
) -> tuple[float, int, int]:
    """Return the bytes of a point for `memory.peak_heap_bytes`: small blocks with gaps, large logits, and other large
    blocks."""
    logits, most = point.live["logits"], BYTES[settings.weights_dtype] * footprint.largest_tensor
    logits_are_large = (
        4 * memory.num_logit_tokens(footprint, settings) * shapes.vocab_size >= memory.SMALL_OF_PARTS_BYTES
    )
    pieces = [(round(point.reduced_share * gradient_shard), units.block // settings.num_processes)]
    pieces += [(size, size) for size in point.buffers]
    for size in (*point.gathered_weights, *point.whole_gradients):
        pieces.append((size, size // TENSORS_OF_BLOCK if size == units.block else min(size, most)))
    large = sum(size for size, block in pieces if block >= memory.SMALL_OF_PARTS_BYTES)
    small = sum(size for size, block in pieces if block < memory.SMALL_OF_PARTS_BYTES)
    small += point.live["activations"] + point.live["buffers"] + (0 if logits_are_large else logits)
    return (1 + memory.GAP_SHARE) * small, logits if logits_are_large else 0, large
