"""A training step's memory and work as functions of the micro batch; docs/concepts/memory.md computes one."""

from __future__ import annotations

from pydantic import Field

from fulltune.records.base import Record
from fulltune.records.plan import MemoryKind

BYTES = {"fp32": 4, "bf16": 2}
"""Of a weight."""
FOOTPRINT, SHAPES = "footprint.json", "shapes.json"
"""In a run's `plan`: the model's memory as traced for this machine's plan, and its sizes."""
KINDS: tuple[MemoryKind, ...] = ("gradients", "activations", "logits", "buffers")
Coefficients = tuple[float, float, float, float, float, float]


def terms(rows: int, length: int) -> tuple[int, ...]:
    """What the coefficients are multiplied with."""
    return (1, rows, rows * length, rows * length * length, length, length * length)


class Moment(Record):
    """What is alive besides weights and optimizer state at one moment of a step."""

    place: str
    """Where in the step: `backward head`, `forward 0:last` (last layer of the first stack) ..."""
    coefficients: dict[MemoryKind, Coefficients]
    """Bytes of each kind per 1, row, token, row x length^2, length and length^2."""

    def bytes(self, rows: int, length: int) -> dict[MemoryKind, int]:
        """Bytes by kind, of so many sequences (rows x choices) of this length."""
        factors = terms(rows, length)
        return {
            kind: max(0, round(sum(one * factor for one, factor in zip(values, factors, strict=True))))
            for kind, values in self.coefficients.items()
        }


class Variant(Record):
    """The moments of one way to compute; the highest one counts."""

    precision: str
    activation_checkpointing: bool
    first: tuple[Moment, ...]
    """Of the first micro batch of a step: gradients come into being."""
    later: tuple[Moment, ...]
    """Of the others: all gradients are there and are added to."""


class Footprint(Record):
    """A model's memory and work as functions of the micro batch."""

    weights_dtype: str
    """Of the weights that were traced."""
    largest_tensor: int
    """Values of the largest trained parameter: optimizers that work tensor by tensor need scratch of its size."""
    sequences_per_row: int
    """Choices of a row, else 1."""
    variants: tuple[Variant, ...]
    evaluation: dict[str, tuple[Moment, ...]]
    """Precision to the moments of a forward pass without gradients."""
    flops_per_token: float
    """Floating-point operations of one forward pass, in matrices of weights; of an image for one row."""
    attention_flops_per_pair: float
    """Of one forward pass, for each token and each token of its row."""
    train_flops_per_token: float = 0.0
    """Of a forward and a backward pass without activation checkpointing, as the method does them; 0: not traced. What
    attention does in its backward pass is not counted."""
    tensors: dict[int, int] = Field(default_factory=dict)
    """Values of a trained parameter to the number of such parameters."""
    rough: str = ""
    """Why the model could not be traced and this is a rule of thumb; empty when it was traced."""
    assumed: str = ""
    """What had to be assumed of its inputs, and why."""

    def traced(self, precision: str) -> str:
        """The precision, or the one that was traced when this one was not: for what the trace was not made for."""
        known = [variant.precision for variant in self.variants]
        return precision if precision in known else known[0]

    def variant(self, precision: str, activation_checkpointing: bool) -> Variant:
        """A way to compute that was traced."""
        wanted = (precision, activation_checkpointing)
        return next(one for one in self.variants if (one.precision, one.activation_checkpointing) == wanted)
