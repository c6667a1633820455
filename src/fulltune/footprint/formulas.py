"""From copies of a model with few layers, traced at a few micro batches, to formulas for the whole model at any."""

from __future__ import annotations

import itertools
import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from huggingface_hub.errors import StrictDataclassError

from fulltune.errors import RecipeError
from fulltune.footprint.records import BYTES, KINDS, Footprint, Moment, Variant, terms
from fulltune.footprint.watch import Case, Whole, depths_of, has_tokens, layer_kinds, of_tensors, run

_log = logging.getLogger(__name__)

ROWS = (2, 3)
"""One row would let a view stand where several rows need a copy."""
_LENGTHS = (16, 24, 40)
"""Multiples of eight: no block is rounded up."""

FAILURES = (
    *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError),
    StrictDataclassError,
    RecipeError,
)
"""What a model's class may raise at a config or at tensors without values: any of its own errors, torch's (kinds of
RuntimeError) when it asks for a value, and ours of a method that cannot work on a copy with few layers. Not: memory
that runs out, and an interruption."""


def points_of(case: Case) -> list[tuple[int, int]]:
    """Rows and lengths to trace; an image has one length: 1, so that a row counts as a token."""
    return list(itertools.product(ROWS, _LENGTHS if has_tokens(case) else (1,)))


def whole_of(case: Case, points: Sequence[tuple[int, int]], **way: Any) -> Whole:
    """From copies with few layers where they tell it, else the model as it is."""
    try:
        found = _from_cuts(case, points, **way)
    except FAILURES:
        # A config may refuse another number of layers, and a class may want one of its lists to be as long.
        _log.debug("no copies with fewer layers of %s", type(case.config).__name__, exc_info=True)
        found = None
    return found or run(case, depths_of(case), points, **way)


def _from_cuts(case: Case, points: Sequence[tuple[int, int]], **way: Any) -> Whole | None:
    """Trace a copy of two layers and copies with one more, and add the difference for every further layer; None where
    layers differ without the config saying so."""
    start, growths = _copies(case)
    base = run(case, start[0], points, kinds=start[1], **way)
    # Those that tell the terms apart, and one more that proves them.
    chosen = list(range(len(points) if len(points) <= len(ROWS) else len(_LENGTHS) + 2))
    matrix, wanted = (
        np.array([_layer_terms(*points[at]) for at in places], float) for places in (chosen, range(len(points)))
    )
    found = base
    for depths, kinds, further in growths:
        more = run(case, depths, [points[at] for at in chosen], kinds=kinds, **way)
        if more.keys != base.keys:
            return None
        alive = (more.alive - base.alive[chosen]).reshape(len(chosen), -1)
        layer, *_ = np.linalg.lstsq(matrix, np.column_stack((alive, more.flops - base.flops[chosen])), rcond=None)
        if not np.allclose(matrix @ layer[:, :-1], alive, atol=64):
            return None
        added = wanted @ layer
        found = replace(
            found,
            alive=found.alive + further * added[:, :-1].reshape(found.alive.shape),
            flops=found.flops + further * added[:, -1],
            shapes=found.shapes + _added(base.shapes, more.shapes) * further,
            trained=found.trained + _added(base.trained, more.trained) * further,
        )
    return found if sum(math.prod(shape) for shape in found.shapes) == case.num_parameters else None


_Copy = tuple[dict[str, int], tuple[str, ...]]
"""Attribute of the config to a number of layers, and what each layer is (empty when all are the same)."""


def _copies(case: Case) -> tuple[_Copy, list[tuple[dict[str, int], tuple[str, ...], int]]]:
    """The smallest copy, and for each way to grow a copy with one layer more and how many of them the model has."""
    depths, kinds = depths_of(case), layer_kinds(case)
    if kinds:
        (name,) = depths
        first, *between, last = kinds
        ends = Counter((first, last))
        # Two of each where there are two: what they share then lives as long as with more of them.
        inner = [[kind] * min(between.count(kind), max(0, 2 - ends[kind])) for kind in sorted(set(between))]
        few = (first, *itertools.chain(*inner), last)
        growths = [
            ({name: len(few) + 1}, (few[0], kind, *few[1:]), kinds.count(kind) - few.count(kind))
            for kind in sorted(set(kinds))
        ]
        return ({name: len(few)}, few), [growth for growth in growths if growth[2] > 0]
    least = {name: min(depth, 2) for name, depth in depths.items()}
    return (least, ()), [
        ({name: 3 if depths[name] == depth else number for name, number in least.items()}, (), depth - 2)
        for depth in sorted({depth for depth in depths.values() if depth > 2})
    ]


def _layer_terms(rows: int, length: int) -> tuple[int, ...]:
    """What a layer's memory is a sum of: its weights, its tokens, its pairs of tokens in each row and for all rows."""
    return (1, rows * length, rows * length * length, length * length)


def _added(few: tuple[tuple[int, ...], ...], more: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
    """Shapes of the tensors that a further layer brings."""
    return tuple((Counter(more) - Counter(few)).elements())


_MANY = (1, 2, 4, 8, 16, 32, 64, 256, 1024)
_FAR = (16, 64, 128, 256, 512, 1024, 2048, 4096, 16384)
"""Micro batches and lengths at which the highest moment is looked for."""


def traced(case: Case) -> Footprint:
    """Trace a model and put what was seen into formulas."""
    points = points_of(case)
    evaluated = whole_of(case, points, recomputed=False, training=False)
    variants, of_training = [], 0.0
    for recomputed in case.checkpointing:
        stepped = whole_of(case, points, recomputed=recomputed, training=True)
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
