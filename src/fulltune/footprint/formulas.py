"""From what was traced at a few micro batches to formulas in the number of rows and their length."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

from fulltune.footprint.case import BYTES, Case, has_tokens, of_tensors
from fulltune.footprint.records import KINDS, Footprint, Moment, Variant, terms
from fulltune.footprint.whole import Cuts, Whole, points_of, whole_of

_MANY = (1, 2, 4, 8, 16, 32, 64, 256, 1024)
_FAR = (16, 64, 128, 256, 512, 1024, 2048, 4096, 16384)
"""Micro batches and lengths at which the highest moment is looked for."""


def traced(case: Case) -> Footprint:
    """Trace a model and put what was seen into formulas.

    Raises:
        Exception: One of `whole.FAILURES`, when the model's class cannot be run without values.
    """
    points, cuts = points_of(case), Cuts()
    evaluated = whole_of(case, cuts, points, recomputed=False, training=False)
    variants, of_training = [], 0.0
    for recomputed in case.checkpointing:
        stepped = whole_of(case, cuts, points, recomputed=recomputed, training=True)
        first = _moments(stepped, points)
        later = _later(first, stepped.shapes if case.all_trained else stepped.trained, BYTES[case.weights_dtype])
        if not recomputed:
            of_training = _per_token(stepped, points, case)
        variants.append(
            Variant(precision=case.precision, activation_checkpointing=recomputed, first=first, later=later)
        )
    return Footprint(
        **of_tensors(case, evaluated.shapes if case.all_trained else evaluated.trained),
        variants=tuple(variants),
        evaluation={case.precision: _moments(evaluated, points)},
        flops_per_token=_per_token(evaluated, points, case),
        train_flops_per_token=of_training,
        attention_flops_per_pair=float(_solved(evaluated.flops[:, None], points)[3, 0]),
    )


def _per_token(whole: Whole, points: Sequence[tuple[int, int]], case: Case) -> float:
    """Floating-point operations that grow with the tokens; of an image with the rows."""
    return float(_solved(whole.flops[:, None], points)[2 if has_tokens(case) else 1, 0])


def _moments(whole: Whole, points: Sequence[tuple[int, int]]) -> tuple[Moment, ...]:
    """The moments that are the highest ones for some micro batch and length."""
    solved = _solved(whole.alive.reshape(len(points), -1), points)
    solved = np.round(solved.reshape(6, len(whole.keys), len(KINDS)), 6)
    highest = set()
    lengths = _FAR if _has_lengths(points) else (points[0][1],)
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
    known = 6 if _has_lengths(points) else 2
    found = np.zeros((6, values.shape[1]))
    found[:known] = np.linalg.lstsq(matrix[:, :known], values, rcond=None)[0]
    return found


def _has_lengths(points: Sequence[tuple[int, int]]) -> bool:
    """Whether rows differ in their length, as images do not."""
    return len({length for _, length in points}) > 1


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
