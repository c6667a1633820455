"""How much memory a model's training step holds, found without its weights. Layer 1.

The model's class is run forward and backward on tensors that have shapes but no values, as copies of two and three
layers and with a few small batches (`tracing.py`). What is alive at a moment is a sum of terms in the number of rows
and their length, and each further layer adds the same to it: so the moments of the whole model, at any micro batch and
length, follow by arithmetic. `docs/memory.md` shows one by hand.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from fulltune.records.base import Record

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from fulltune.footprint.case import Case
    from fulltune.footprint.whole import Whole
    from fulltune.tasks import Target, Task

_log = logging.getLogger(__name__)

Kind = Literal["gradients", "activations", "logits", "buffers"]
KINDS: tuple[Kind, ...] = ("gradients", "activations", "logits", "buffers")
Coefficients = tuple[float, float, float, float, float, float]


def terms(rows: int, length: int) -> tuple[int, ...]:
    """What the coefficients are multiplied with."""
    return (1, rows, rows * length, rows * length * length, length, length * length)


class Moment(Record):
    """What is alive besides weights and optimizer state at one moment of a step."""

    place: str
    """Where in the step: `backward head`, `forward 0:last` (last layer of the first stack) ..."""
    coefficients: dict[Kind, Coefficients]
    """Bytes of each kind per 1, row, token, row x length^2, length and length^2."""

    def bytes(self, rows: int, length: int, trained_share: float = 1.0) -> dict[Kind, int]:
        """Bytes by kind.

        Args:
            rows: Sequences in the micro batch (rows x choices with several choices).
            length: Tokens of the longest one.
            trained_share: Share of the tokens that have logits.
        """
        factors = terms(rows, length)
        found = {
            kind: sum(one * factor for one, factor in zip(values, factors, strict=True))
            for kind, values in self.coefficients.items()
        }
        found["logits"] *= trained_share
        return {kind: max(0, round(value)) for kind, value in found.items()}


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

    largest_tensor: int
    """Values of the largest trained parameter: optimizers that work tensor by tensor need scratch of its size."""
    factored_values: int
    """Rows and columns of all matrices and the values of all vectors: what Adafactor keeps."""
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
        """A traced way to compute; `KeyError` when it was not traced."""
        for one in self.variants:
            if (one.precision, one.activation_checkpointing) == (precision, activation_checkpointing):
                return one
        recomputed = "with" if activation_checkpointing else "without"
        raise KeyError(f"not traced: {precision} {recomputed} activation checkpointing")


# ---- finding it ------------------------------------------------------------------------------------------------

_MANY = (1, 2, 4, 8, 16, 32, 64, 256, 1024)
_FAR = (16, 64, 128, 256, 512, 1024, 2048, 4096, 16384)
"""Micro batches and lengths at which the highest moment is looked for."""

_FOUND: dict[str, Footprint] = {}
"""What this process has traced: a plan asks for the same model again and again."""


def trace(
    config: PretrainedConfig,
    task: Task,
    target: Target,
    *,
    weights_dtype: str = "fp32",
    precisions: Sequence[str] = ("fp32",),
    checkpointing: Sequence[bool] = (False, True),
    attn_implementation: str | None = None,
    packed: bool = False,
    num_parameters: int,
    all_trained: bool = True,
    prepare: Callable[[Any], Any] = lambda model: None,
    pixels: tuple[int, int, int] | None = None,
) -> Footprint:
    """Find a model's footprint; a rough one, which says so, for a model that cannot be traced.

    Args:
        config: With the task's changes and the wanted dropout; it is not changed.
        task: Makes batches and the loss.
        target: What the task learns.
        weights_dtype: `fp32` or `bf16`.
        precisions: Types of the computations that are of interest.
        checkpointing: Whether activations are kept, recomputed, or both ways.
        attn_implementation: As the recipe has it.
        packed: Several texts share a row.
        num_parameters: Of the whole model, each shared tensor once: see `fulltune.models.load.shapes`.
        all_trained: All of them are; else those that `prepare` leaves with `requires_grad`.
        prepare: What training does to a model before it starts, such as replacing its dropout. Two that do the same
            have the same `repr`.
        pixels: Channels, height and width of an image; None for texts.
    """
    from fulltune.footprint.case import Case
    from fulltune.footprint.rough import rough
    from fulltune.footprint.whole import FAILURES, Changing

    options = (weights_dtype, *precisions, *checkpointing, attn_implementation, packed, num_parameters, prepare, pixels)
    options = (*options, all_trained)
    same = {name: value for name, value in config.to_dict().items() if name != "_name_or_path"}
    key = repr((type(config).__name__, same, task.FACTS.auto_class, target, options))
    if key in _FOUND:
        return _FOUND[key]
    case = Case(config, task, target, weights_dtype, attn_implementation, packed, prepare, pixels)
    try:
        found = _traced(case, num_parameters, precisions, checkpointing, all_trained)
    except FAILURES as error:
        # No reason to stop a run: the class works with values, and the dry-run step measures what this cannot.
        _log.debug("%s cannot be traced", type(config).__name__, exc_info=True)
        text = " ".join(str(error).split())[:120]
        why = text if isinstance(error, Changing) else f"{type(error).__name__}: {text}"
        found = rough(case, num_parameters, precisions, checkpointing, why, all_trained)
    _FOUND[key] = found
    return found


def _traced(
    case: Case, num_parameters: int, precisions: Sequence[str], checkpointing: Sequence[bool], all_trained: bool
) -> Footprint:
    from fulltune.footprint.whole import Cuts, points_of, whole_of

    points, cuts = points_of(case), Cuts()
    variants, evaluation, of_training = [], {}, 0.0
    for precision in precisions:
        evaluated = whole_of(case, cuts, points, num_parameters, precision=precision, recomputed=False, training=False)
        evaluation[precision] = _moments(evaluated, points)
        for recomputed in checkpointing:
            traced = whole_of(
                case, cuts, points, num_parameters, precision=precision, recomputed=recomputed, training=True
            )
            first = _moments(traced, points)
            shapes = traced.shapes if all_trained else traced.trained
            later = _later(first, shapes, {"fp32": 4, "bf16": 2}[case.weights_dtype])
            if not recomputed:
                of_training = _per_token(traced, points, case)
            variants.append(Variant(precision=precision, activation_checkpointing=recomputed, first=first, later=later))
    flops = _solved(evaluated.flops[:, None], points)[:, 0]
    shapes = evaluated.shapes if all_trained else evaluated.trained
    return Footprint(
        largest_tensor=max(math.prod(shape) for shape in shapes),
        factored_values=sum(map(factored, shapes)),
        sequences_per_row=case.target.num_choices or 1,
        variants=tuple(variants),
        evaluation=evaluation,
        flops_per_token=_per_token(evaluated, points, case),
        train_flops_per_token=of_training,
        attention_flops_per_pair=float(flops[3]),
        tensors=dict(Counter(math.prod(shape) for shape in shapes)),
    )


def _per_token(whole: Whole, points: Sequence[tuple[int, int]], case: Case) -> float:
    """Floating-point operations that grow with the tokens; of an image with the rows."""
    from fulltune.footprint.case import has_tokens

    flops = _solved(whole.flops[:, None], points)[:, 0]
    return float(flops[2] if has_tokens(case) else flops[1])


def factored(shape: tuple[int, ...]) -> int:
    """Values that Adafactor keeps of a parameter."""
    if len(shape) < 2:
        return math.prod(shape)
    return math.prod(shape[:-2]) * (shape[-1] + shape[-2])


def _moments(whole: Whole, points: Sequence[tuple[int, int]]) -> tuple[Moment, ...]:
    """The moments that are the highest ones for some micro batch and length."""
    solved = _solved(whole.alive.reshape(len(points), -1), points)
    solved = np.round(solved.reshape(6, len(whole.keys), len(KINDS)), 6)
    highest = set()
    lengths = sorted({length for _, length in points}) if len({length for _, length in points}) == 1 else _FAR
    for rows, length, share in itertools.product(_MANY, lengths, (0.05, 0.3, 1.0)):
        held = np.tensordot(np.array(terms(rows, length), float), solved, 1)
        held[:, KINDS.index("logits")] *= share
        highest.add(int(held.sum(axis=1).argmax()))
    return tuple(
        Moment(
            place=whole.keys[position][0],
            coefficients={kind: tuple(solved[:, position, at].tolist()) for at, kind in enumerate(KINDS)},
        )
        for position in sorted(highest)
    )


def _solved(values: np.ndarray, points: Sequence[tuple[int, int]]) -> np.ndarray:
    """Coefficients [6, n] of values [points, n]; an image, which has one size, only has the first two."""
    matrix = np.array([terms(*point) for point in points], float)
    known = 6 if len({length for _, length in points}) > 1 else 2
    found = np.zeros((6, values.shape[1]))
    found[:known] = np.linalg.lstsq(matrix[:, :known], values, rcond=None)[0]
    return found


def _later(first: Sequence[Moment], shapes: Sequence[tuple[int, ...]], size: int) -> tuple[Moment, ...]:
    """The same moments when all gradients are there already and are added to.

    What comes on top of them is on its way to be added: one tensor's gradient, and of a tied embedding those parts that
    wait to be summed.
    """
    whole = size * sum(map(math.prod, shapes))
    made = max(moment.coefficients["gradients"][0] for moment in first)
    waiting = max(0.0, made - whole) + size * max(map(math.prod, shapes))

    def adding(moment: Moment) -> Moment:
        constant, *rest = moment.coefficients["gradients"]
        gradients = (whole + min(constant, waiting), *rest)
        return moment.model_copy(update={"coefficients": {**moment.coefficients, "gradients": gradients}})

    return tuple(map(adding, first))
