"""Bytes of one process when FSDP2 shards weights, gradients and AdamW's moments over N (docs/concepts/memory.md)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from fulltune.footprint.records import BYTES, Footprint
from fulltune.models.shapes import Shapes
from fulltune.models.sharding import Units
from fulltune.plan import memory
from fulltune.recipe.training import OWN_OPTIMIZERS
from fulltune.records.plan import MemoryKind, MemoryNeed, MemorySettings, Phase

FILE_BYTES, MOST_FILES = 2**24, 64
"""As `train.optim.fsdp2` writes a checkpoint: two copies of a file's tensors are in memory for a moment."""
WHOLE_FILE_BYTES = 2**28
"""The same of the finished model, in the first process's host."""
TENSORS_OF_BLOCK = 3
"""A block's largest tensor is at most about so much of it: of BERT's 7.1 M parameters 2.4 M."""
SENT = {"cpu": 2, "cuda": 1}
"""Buffers for gradients that are sent: FSDP2's own, with gloo the backend's copy as well (a reduce-scatter of 64 MiB
over two processes takes 66 MiB more)."""

AT_HEAD = ("backward head", "forward loss")
"""Moments when all blocks' activations are there."""
NORM_VALUES = 6
"""fp32 numbers of a token and hidden unit in the backward pass of a block's first norm, which comes last: as
transformers writes RMSNorm; a LayerNorm has fewer."""


def units_of(shapes: Shapes) -> Units:
    """The model's own units; by a rule, blocks of one size and a vocabulary outside of them, where none are known."""
    if shapes.units is not None:
        return shapes.units
    vocabulary = min(shapes.num_parameters, shapes.vocab_size * shapes.hidden_size)
    block = (shapes.num_parameters - vocabulary) // max(1, shapes.num_layers)
    return Units(root=vocabulary, kept=0, freed=shapes.num_parameters - vocabulary, block=block, apart=0)


@dataclass(frozen=True)
class _Held:
    """What one process holds at a moment, besides its parts of weights and moments."""

    passing: dict[MemoryKind, int]
    """As in one process; its gradients are left out."""
    reduced: float
    """Share of the gradients of which this process has its part."""
    tensors: tuple[int, ...] = ()
    """Bytes of units whose weights are whole."""
    gradients: tuple[int, ...] = ()
    """The same of gradients."""
    flat: tuple[int, ...] = ()
    """Bytes of each buffer that is sent or received."""


def need(shapes: Shapes, footprint: Footprint, settings: MemorySettings) -> MemoryNeed:
    """What one of `num_processes` processes needs on its device, beyond what the libraries themselves take."""
    on_cpu = settings.device == "cpu"
    settings = settings.changed(precision=footprint.traced(settings.precision))
    state = memory.state_of(shapes.num_parameters, settings)
    parts = [-(-size // settings.num_processes) for size in (state["weights"], state["optimizer"], state["gradients"])]
    value = BYTES[settings.weights_dtype]
    units = Units(**{kind: value * count for kind, count in units_of(shapes).model_dump().items()})  # in bytes
    largest = value * footprint.largest_tensor
    moments = _moments(shapes, footprint, settings, units)
    kinds = max((_kinds(one, *parts) for one in moments), key=lambda one: sum(one.values()))
    kept, heap = parts[0] + parts[1], 0.0
    around = round(memory.STATE_SHARE * kept) if on_cpu else 0
    base = memory.FIRST_CALLS_BYTES if on_cpu else memory.CUDA_CONTEXT_BYTES
    # Weights lie in the mapped file until they are written. Measured in two processes: of a 39 M Llama 30 MiB stay
    # mapped after that, of 1.1 B parameters 6 %, each time what embeddings and head have in a process.
    base += 2 * largest // settings.num_processes if on_cpu and settings.weights_dtype == "fp32" else 0
    beyond = base + around
    if on_cpu:
        split = [_small_and_large(one, parts[2], units, footprint, shapes, settings) for one in moments]
        heap, held = memory.resident(split, largest)
        beyond += max(0, kept + round(held) - sum(kinds.values()))
    kinds["buffers"] += beyond
    scoring = memory.scoring(shapes, footprint, settings)
    # Copies in 16 bits are of the unit that is whole.
    scoring["buffers"] = min(scoring["buffers"], max(units.block, units.kept, units.root) // 2)
    # A model without a gradient keeps its last units whole until they are freed.
    whole = units.root + units.kept + (2 + on_cpu) * max(units.block, units.apart)
    file = max(min(kept, FILE_BYTES), kept // MOST_FILES)
    # A tensor of the finished model is put together: whole, with gloo also as received, and its part as sent.
    together = (1 + on_cpu) * largest + largest // settings.num_processes
    together += min(value * shapes.num_parameters, WHOLE_FILE_BYTES) if on_cpu else 0  # those before it in its file
    # Checkpoints have fp32 moments, whatever the optimizer keeps: all of the part's at once (`train.optim.fsdp2`).
    widened = 2 * 4 * (-(-shapes.num_parameters // settings.num_processes)) if settings.optim in OWN_OPTIMIZERS else 0
    phases: dict[Phase, int] = {
        "loading": parts[0] + base,
        "step": sum(kinds.values()),
        # The untouched model has no optimizer's state yet, and a linear probe of it holds its features in each process.
        "evaluation": max(kept + around, parts[0] + settings.probe_bytes) + sum(scoring.values()) + whole + base,
        # Checkpoints are written file by file, and so is the finished model, by the first process.
        "saving": kept + base + around + round(heap / (1 + memory.HELD_SHARE)) + max(2 * file + widened, together),
        "resuming": kept + base + widened,
    }
    return MemoryNeed(kinds=kinds, phases=phases)


# ---- the moments of a step ---------------------------------------------------------------------------------------


def _moments(shapes: Shapes, footprint: Footprint, settings: MemorySettings, units: Units) -> list[_Held]:
    """What is held at each traced moment that may be the highest, and when gradients are sent between them."""
    rows, value = memory.train_sequences(footprint, settings), BYTES[settings.weights_dtype]
    before = float(settings.gradient_accumulation_steps > 1)  # parts that earlier micro batches left
    copies, length = SENT[settings.device], settings.longest_tokens
    everything, again = value * shapes.num_parameters, settings.activation_checkpointing
    traced = [
        (one.place, memory.in_pieces(one.bytes(rows, length), shapes, settings, rows * length, 0))
        for one in footprint.variant(settings.precision, again).first
    ]
    # What the head leaves in the root: that of a vocabulary, where there are logits.
    head = max((one["gradients"] for place, one in traced if place == "backward head"), default=0)
    head = value * shapes.vocab_size * shapes.hidden_size if any(one["logits"] for _, one in traced) else head
    left = 0 if units.kept > head else min(units.root, head)  # beside a tied head its norm alone is kept
    # Embeddings that are tied to it have a gradient of their own, until both are summed.
    tied = left if any(one["logits"] for _, one in traced) else 0
    # A loss in pieces adds the head's gradient up in fp32, in the forward pass; in the backward pass it is that of the
    # head, or a copy of it in the weights' type is.
    summed = 4 * shapes.vocab_size * shapes.hidden_size if settings.chunked_loss else 0
    own, gone = _of_a_block(traced, units, shapes.num_layers, units.kept + left, again)
    found: list[_Held] = []
    for place, passing in traced:
        # Autocast keeps no copies beside those that autograd saves.
        if again and not place.endswith("below"):
            saved = units.kept + left if place in AT_HEAD else units.block
            passing = passing | {"buffers": min(passing["buffers"], saved // 2)}
        now = own(passing)
        reduced = max(before, min(1.0, max(0, passing["gradients"] - left - now) / everything))
        without, no_logits = passing | {"gradients": 0}, passing | {"gradients": 0, "logits": 0}
        # A block's gradients are all there when its activations and copies are gone.
        ended = no_logits | {name: max(0, no_logits[name] - size) for name, size in gone(place).items()}
        ended["activations"] += NORM_VALUES * 4 * rows * length * shapes.hidden_size
        if place.startswith("forward"):
            found.append(_Held(no_logits if summed else without, before, *_forward(units, place)))
        elif place.endswith("below"):
            whole, share = (units.root, units.apart), 1 - (units.root + units.apart) / everything
            found.append(_Held(without, max(before, share), whole, (*whole, tied), (units.block,)))
        elif place == "backward head":
            made: tuple[int, ...] = (passing["gradients"],)
            if summed:
                made = (units.kept + left, summed if value < 4 else 0)
            elif settings.device == "cpu":  # as measured: both at once
                made = (max(passing["gradients"], units.kept),)
            # The next unit is put together when the head's own backward pass begins, after that of the loss.
            following = (units.block,) if any(made) else ()
            found.append(_Held(no_logits if summed else without, before, (units.root, units.kept), made, following))
        else:
            flat = (units.block, max(units.block, units.apart) if place.endswith(":first") else units.block)
            found += _block((without, ended), reduced, units, (left, now), copies, flat)
        if place in AT_HEAD:
            if summed:
                found.append(_Held(without, before, (units.root, units.kept), (summed,)))
            # Then the last block, whose activations all are there still, with the gradient of its first tensor.
            first = (left, units.block // TENSORS_OF_BLOCK)
            flat = (units.kept or units.block, units.block)
            found += _block((no_logits, ended), before, units, first, copies, flat)
            sent = (*(units.kept,) * copies, units.block)
            found.append(_Held(no_logits, before, (units.root,), (units.kept,), sent))
    nothing: dict[MemoryKind, int] = {"gradients": 0, "activations": 0, "logits": 0, "buffers": 0}
    # The first block ends with nearly all gradients reduced, and the embeddings are put together already.
    lowest = max(before, 1 - (units.root + units.apart + units.block) / everything)
    flat = (units.block, max(units.block, units.apart))
    found += _block((nothing, nothing), lowest, units, (left, units.block), copies, flat)
    # Embeddings, which have no input with a gradient, are reduced at the very end: the root first, then unit by unit.
    last = [units.root, units.apart]
    while last:
        found.append(_Held(nothing, 1.0, tuple(last[1:]), tuple(last), (last.pop(0),) * copies))
    part = -(-footprint.largest_tensor // settings.num_processes)
    return [*found, _Held(nothing | {"buffers": memory.scratch(part, settings)}, 1.0)]  # the update


def _forward(units: Units, place: str) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Whole weights, gradients and buffers."""
    root, kept, block, apart = (units.root,), units.kept, units.block, units.apart
    if "before" in place:
        return (*root, apart), (), (*root, apart)
    if place.endswith("loss"):
        return (*root, kept), (), ()
    return ((*root, kept), (), (kept,)) if kept > block and "after" in place else ((*root, block), (), (block, block))


def _of_a_block(
    traced: Sequence[tuple[str, dict[MemoryKind, int]]], units: Units, num_layers: int, head: int, recomputed: bool
) -> tuple[Callable[[dict[MemoryKind, int]], int], Callable[[str], dict[MemoryKind, int]]]:
    """How many of a block's gradients are there at a moment in its backward pass, and what is gone at its end.

    Args:
        traced: Place and bytes of each moment.
        units: In bytes.
        num_layers: Blocks may be used several times.
        head: Gradients that are there before the first block's.
        recomputed: Its activations are made for its backward pass.
    """
    waiting = max((one["activations"] for place, one in traced if place in AT_HEAD), default=0)
    most = max((one["activations"] for place, one in traced if place.startswith("backward ")), default=0)
    of_blocks = units.freed - units.apart
    blocks = max(1, num_layers, of_blocks // max(1, units.block))
    if recomputed and not waiting:  # no head to tell: from the last block to the first all the others' inputs go
        first = max((one["activations"] for place, one in traced if place.endswith(":first")), default=most)
        waiting = min(most, (most - first) * blocks // max(1, blocks - 1))
    share = (waiting or most) // blocks
    passes = max(0, most - waiting) if waiting else 0  # what is recomputed, and what comes and goes

    def own(passing: dict[MemoryKind, int]) -> int:
        # Only where all blocks are alike, what is there tells how far the last one is.
        alike = units.block and of_blocks % units.block == 0
        return (passing["gradients"] - head) % units.block if alike else units.block

    def gone(place: str) -> dict[MemoryKind, int]:
        return {"activations": share + (0 if place in AT_HEAD else passes), "buffers": units.block // 2}

    return own, gone


def _block(
    held: tuple[dict[MemoryKind, int], dict[MemoryKind, int]],
    reduced: float,
    units: Units,
    gradients: tuple[int, int],
    copies: int,
    flat: tuple[int, int],
) -> Iterator[_Held]:
    """A block's backward pass, its end, and its gradients on their way.

    Args:
        held: What is held in it, and at its end.
        reduced: Share of the gradients that were sent.
        units: In bytes.
        gradients: Of the root, and of the block while it passes.
        copies: Of gradients that are sent.
        flat: What the unit before was sent in, which stays until the block ends, and the next unit as received.
    """
    (passing, ended), root, block = held, (units.root,), units.block
    whole = (gradients[0], block)
    yield _Held(passing, reduced, (*root, block), gradients, flat)
    yield _Held(ended, reduced, (*root, block), whole, flat)
    yield _Held(ended, reduced, root, whole, (*(block,) * copies, flat[1]))


def _kinds(held: _Held, weights: int, optimizer: int, gradients: int) -> dict[MemoryKind, int]:
    """By kind, with this process's parts."""
    around = held.passing["buffers"] + sum(held.tensors) + sum(held.flat)
    return {
        "weights": weights,
        "gradients": round(held.reduced * gradients) + sum(held.gradients),
        "optimizer": optimizer,
        "activations": held.passing["activations"],
        "logits": held.passing["logits"],
        "buffers": around,
    }


def _small_and_large(
    held: _Held, part: int, units: Units, footprint: Footprint, shapes: Shapes, settings: MemorySettings
) -> tuple[float, int, int]:
    """Bytes in small blocks, with the gaps between them, and in large ones: see `memory.resident`."""
    logits, most = held.passing["logits"], BYTES[settings.weights_dtype] * footprint.largest_tensor
    logits_are_large = 4 * memory.tokens_of_loss(footprint, settings) * shapes.vocab_size >= memory.SMALL_OF_PARTS_BYTES
    pieces = [(round(held.reduced * part), units.block // settings.num_processes), *((one, one) for one in held.flat)]
    for one in (*held.tensors, *held.gradients):
        pieces.append((one, one // TENSORS_OF_BLOCK if one == units.block else min(one, most)))
    large = sum(size for size, block in pieces if block >= memory.SMALL_OF_PARTS_BYTES)
    small = sum(size for size, block in pieces if block < memory.SMALL_OF_PARTS_BYTES)
    small += held.passing["activations"] + held.passing["buffers"] + (0 if logits_are_large else logits)
    return (1 + memory.HELD_SHARE) * small, logits if logits_are_large else 0, large
