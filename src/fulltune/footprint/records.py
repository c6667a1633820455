from __future__ import annotations

from pydantic import Field

from fulltune.records.base import Record
from fulltune.records.plan import MemoryKind

BYTES = {"fp32": 4, "bf16": 2}
FOOTPRINT, SHAPES = "footprint.json", "shapes.json"
KINDS: tuple[MemoryKind, ...] = ("gradients", "activations", "logits", "buffers")
Coefficients = tuple[float, float, float, float, float, float]


def terms(rows: int, length: int) -> tuple[int, ...]:
    """Return the six numbers by which `LiveMemory.coefficients` are multiplied."""
    return (1, rows, rows * length, rows * length * length, length, length * length)


class LiveMemory(Record):
    """Memory at one point in a step, without weights and optimizer state."""

    place: str
    """Position in the step: `backward head`, `forward 0:last` (last layer of the first stack) ..."""
    coefficients: dict[MemoryKind, Coefficients]
    """Bytes of each `MemoryKind`: a constant, then the bytes per row, token, row x length^2, length and length^2."""

    def bytes(self, rows: int, length: int) -> dict[MemoryKind, int]:
        """Return the bytes per `MemoryKind` for `rows` sequences (a row's choices are several) of `length` tokens."""
        factors = terms(rows, length)
        return {
            kind: max(0, round(sum(value * factor for value, factor in zip(values, factors, strict=True))))
            for kind, values in self.coefficients.items()
        }


class Variant(Record):
    """Memory during a step in one precision, with or without activation checkpointing."""

    precision: str
    activation_checkpointing: bool
    first: tuple[LiveMemory, ...]
    """Points in a step's first micro batch, which allocates gradients."""
    later: tuple[LiveMemory, ...]
    """Points in later micro batches, which add to the gradients."""


class Footprint(Record):
    """A model's memory and FLOPs as functions of the micro batch's shape."""

    weights_dtype: str
    largest_tensor: int
    """Number of values of the largest trained parameter."""
    sequences_per_row: int
    """Number of texts of a row that the model reads apart, such as choices; otherwise 1."""
    variants: tuple[Variant, ...]
    evaluation: dict[str, tuple[LiveMemory, ...]]
    """Points in a forward pass without gradients, by precision."""
    flops_per_token: float
    """Operations of a forward pass per token, or per image, in matrix products."""
    attention_flops_per_pair: float
    """Operations of a forward pass per pair of tokens in a row."""
    train_flops_per_token: float = 0.0
    """Operations of a forward and backward pass per token, excluding attention's backward pass; 0 if not traced."""
    tensors: dict[int, int] = Field(default_factory=dict)
    """Number of trained tensors, by their size in values."""
    rough: str = ""
    """Why the model could not be traced, or empty if it was."""

    def traced_precision(self, precision: str) -> str:
        """Return `precision` if it was traced, else the first traced precision."""
        precisions = [variant.precision for variant in self.variants]
        return precision if precision in precisions else precisions[0]

    def variant(self, precision: str, activation_checkpointing: bool) -> Variant:
        key = (precision, activation_checkpointing)
        return next(one for one in self.variants if (one.precision, one.activation_checkpointing) == key)
