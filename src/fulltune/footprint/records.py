"""Memory and work as functions of the micro batch (docs/concepts/memory.md)."""

from __future__ import annotations

from pydantic import Field

from fulltune.records.base import Record
from fulltune.records.plan import MemoryKind

BYTES = {"fp32": 4, "bf16": 2}
"""Bytes of a weight."""
FOOTPRINT, SHAPES = "footprint.json", "shapes.json"
"""Files in a run's `plan` folder: the traced memory, and the model's sizes."""
KINDS: tuple[MemoryKind, ...] = ("gradients", "activations", "logits", "buffers")
Coefficients = tuple[float, float, float, float, float, float]


def terms(rows: int, length: int) -> tuple[int, ...]:
    """Return the terms that coefficients are multiplied with."""
    return (1, rows, rows * length, rows * length * length, length, length * length)


class LiveMemory(Record):
    """Memory at one moment of a step, without weights and optimizer state."""

    place: str
    """Where in the step: `backward head`, `forward 0:last` (last layer of the first stack) ..."""
    coefficients: dict[MemoryKind, Coefficients]
    """Bytes of each kind per 1, row, token, row x length^2, length and length^2."""

    def bytes(self, rows: int, length: int) -> dict[MemoryKind, int]:
        """Return bytes by kind for `rows` sequences (rows x choices) of `length` tokens."""
        factors = terms(rows, length)
        return {
            kind: max(0, round(sum(value * factor for value, factor in zip(values, factors, strict=True))))
            for kind, values in self.coefficients.items()
        }


class Variant(Record):
    """The moments of a precision, with or without checkpointing; the highest counts."""

    precision: str
    activation_checkpointing: bool
    first: tuple[LiveMemory, ...]
    """Moments of a step's first micro batch, which allocates gradients."""
    later: tuple[LiveMemory, ...]
    """Moments of its other micro batches, which add to gradients."""


class Footprint(Record):
    """Memory and work of a model as functions of the micro batch."""

    weights_dtype: str
    largest_tensor: int
    """Values of the largest trained parameter, for which optimizers need scratch space."""
    sequences_per_row: int
    """Choices of a row, else 1."""
    variants: tuple[Variant, ...]
    evaluation: dict[str, tuple[LiveMemory, ...]]
    """Moments of a forward pass without gradients, by precision."""
    flops_per_token: float
    """Operations of a forward pass per token, or per image, in matrix products."""
    attention_flops_per_pair: float
    """Operations of a forward pass for each pair of tokens in a row."""
    train_flops_per_token: float = 0.0
    """Operations of a forward and backward pass, without attention's backward; 0 if not traced."""
    tensors: dict[int, int] = Field(default_factory=dict)
    """Number of trained parameters by their number of values."""
    rough: str = ""
    """Why a rule of thumb replaces the trace."""
    assumed: str = ""
    """What was assumed about its inputs, and why."""

    def traced(self, precision: str) -> str:
        """Return the precision, or a traced one in its place."""
        precisions = [variant.precision for variant in self.variants]
        return precision if precision in precisions else precisions[0]

    def variant(self, precision: str, activation_checkpointing: bool) -> Variant:
        key = (precision, activation_checkpointing)
        return next(one for one in self.variants if (one.precision, one.activation_checkpointing) == key)
