from __future__ import annotations

import itertools
import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from huggingface_hub.errors import StrictDataclassError

from fulltune.errors import RecipeError
from fulltune.footprint.allocations import (
    ModelTrace,
    TraceCase,
    has_tokens,
    layer_counts,
    layer_types,
    tensor_fields,
    trace_copy,
)
from fulltune.footprint.records import BYTES, KINDS, Footprint, LiveMemory, Variant, terms
from fulltune.tasks.padding import texts_per_row

_log = logging.getLogger(__name__)

ROWS = (2, 3)
"""Numbers of rows to trace. Batches of several rows need copies where one row allows a view."""
_LENGTHS = (16, 24, 40)
"""Row lengths to trace: multiples of eight, so that no storage is rounded up."""

FAILURES = (
    *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError),
    StrictDataclassError,
    RecipeError,
)
"""Errors that model classes raise for unusual configs or fake tensors."""


def trace_model(case: TraceCase, points: Sequence[tuple[int, int]], *, recomputed: bool, training: bool) -> ModelTrace:
    """Trace a model at each (rows, length) point, if possible by extrapolating from copies with few layers."""
    try:
        traced = _extrapolate_from_copies(case, points, recomputed=recomputed, training=training)
    except FAILURES:
        # A config may refuse another number of layers, and a class may need a list of that length.
        _log.debug("no copies with fewer layers of %s", type(case.config).__name__, exc_info=True)
        traced = None
    return traced or trace_copy(case, layer_counts(case), points, recomputed=recomputed, training=training)


def _extrapolate_from_copies(
    case: TraceCase, points: Sequence[tuple[int, int]], *, recomputed: bool, training: bool
) -> ModelTrace | None:
    """Extrapolate the trace from copies with few layers, or return None if the result would be inexact."""
    start, growths = _reduced_copies(case)
    base = trace_copy(case, start[0], points, kinds=start[1], recomputed=recomputed, training=training)
    # As many points as terms, and one more as a check.
    checked = list(range(len(points) if len(points) <= len(ROWS) else len(_LENGTHS) + 2))
    wanted = np.array([(1, rows * length, rows * length**2, length**2) for rows, length in points], float)
    matrix, traced = wanted[checked], base
    for depths, kinds, further in growths:
        sample = [points[at] for at in checked]
        more = trace_copy(case, depths, sample, kinds=kinds, recomputed=recomputed, training=training)
        if more.keys != base.keys:
            return None
        alive = (more.alive - base.alive[checked]).reshape(len(checked), -1)
        layer, *_ = np.linalg.lstsq(matrix, np.column_stack((alive, more.flops - base.flops[checked])), rcond=None)
        if not np.allclose(matrix @ layer[:, :-1], alive, atol=64):
            return None
        added = wanted @ layer
        traced = replace(
            traced,
            alive=traced.alive + further * added[:, :-1].reshape(traced.alive.shape),
            flops=traced.flops + further * added[:, -1],
            shapes=traced.shapes + _added_shapes(base.shapes, more.shapes) * further,
            trained=traced.trained + _added_shapes(base.trained, more.trained) * further,
        )
    whole, trained = (sum(math.prod(shape) for shape in shapes) for shapes in (traced.shapes, traced.trained))
    return traced if whole == case.num_parameters and case.num_trainable in (None, trained) else None


_Copy = tuple[dict[str, int], tuple[str, ...]]


def _reduced_copies(case: TraceCase) -> tuple[_Copy, list[tuple[dict[str, int], tuple[str, ...], int]]]:
    """Return the smallest copy as (number of layers by config attribute, layer types), and one with an additional layer
    of each type, as (numbers, types, number of omitted layers)."""
    depths, kinds = layer_counts(case), layer_types(case)
    if kinds:
        (name,) = depths
        first, *between, last = kinds
        ends = Counter((first, last))
        # Two layers of each kind if possible, so that shared tensors live as long as in the whole model.
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


def _added_shapes(few: tuple[tuple[int, ...], ...], more: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
    return tuple((Counter(more) - Counter(few)).elements())


_MANY = (1, 2, 4, 8, 16, 32, 64, 256, 1024)
_FAR = (16, 64, 128, 256, 512, 1024, 2048, 4096, 16384)


def trace_footprint(case: TraceCase) -> Footprint:
    """Trace a model's evaluation and training steps, and fit its footprint to the traces."""
    # An image has length 1.
    points = list(itertools.product(ROWS, _LENGTHS if has_tokens(case) else (1,)))
    each = texts_per_row(case.task, case.target)
    sequences = [(rows * each, length) for rows, length in points]  # what formulas and plans count
    evaluated = trace_model(case, points, recomputed=False, training=False)
    variants, of_training = [], 0.0
    for recomputed in case.checkpointing:
        stepped = trace_model(case, points, recomputed=recomputed, training=True)
        first = _candidate_peaks(stepped, sequences)
        later = _memory_of_later_micro_batches(
            first, stepped.shapes if case.num_trainable is None else stepped.trained, BYTES[case.weights_dtype]
        )
        if not recomputed:
            of_training = _flops_per_token(stepped, sequences, case)
        variants.append(
            Variant(precision=case.precision, activation_checkpointing=recomputed, first=first, later=later)
        )
    return Footprint(
        **tensor_fields(case, evaluated.shapes if case.num_trainable is None else evaluated.trained),
        variants=tuple(variants),
        evaluation={case.precision: _candidate_peaks(evaluated, sequences)},
        flops_per_token=_flops_per_token(evaluated, sequences, case),
        train_flops_per_token=of_training,
        attention_flops_per_pair=float(_fit_coefficients(evaluated.flops[:, None], sequences)[3, 0]),
    )


def _flops_per_token(trace: ModelTrace, points: Sequence[tuple[int, int]], case: TraceCase) -> float:
    return float(_fit_coefficients(trace.flops[:, None], points)[2 if has_tokens(case) else 1, 0])


def _candidate_peaks(trace: ModelTrace, points: Sequence[tuple[int, int]]) -> tuple[LiveMemory, ...]:
    """Return the memory at each point in a step that is the peak for some micro batch and length."""
    solved = _fit_coefficients(trace.alive.reshape(len(points), -1), points)
    solved = np.round(solved.reshape(6, len(trace.keys), len(KINDS)), 6)
    highest = set()
    lengths = _FAR if _has_lengths(points) else (points[0][1],)
    for rows, length, share in itertools.product(_MANY, lengths, (0.05, 0.3, 1.0)):
        alive = np.tensordot(np.array(terms(rows, length), float), solved, 1)
        alive[:, KINDS.index("logits")] *= share
        highest.add(int(alive.sum(axis=1).argmax()))
    return tuple(
        LiveMemory(
            place=trace.keys[position][0],
            coefficients={kind: tuple(solved[:, position, at].tolist()) for at, kind in enumerate(KINDS)},
        )
        for position in sorted(highest)
    )


def _fit_coefficients(values: np.ndarray, points: Sequence[tuple[int, int]]) -> np.ndarray:
    """Fit the coefficients of `terms`: [6, n] from [points, n]. Images have one size, so only the first two."""
    matrix = np.array([terms(*point) for point in points], float)
    used = 6 if _has_lengths(points) else 2
    coefficients = np.zeros((6, values.shape[1]))
    coefficients[:used] = np.linalg.lstsq(matrix[:, :used], values, rcond=None)[0]
    return coefficients


def _has_lengths(points: Sequence[tuple[int, int]]) -> bool:
    return len({length for _, length in points}) > 1


def _memory_of_later_micro_batches(
    first_points: Sequence[LiveMemory], shapes: Sequence[tuple[int, ...]], value_bytes: int
) -> tuple[LiveMemory, ...]:
    """Return the memory in later micro batches, which add to gradients of `value_bytes` per value."""
    total = value_bytes * sum(map(math.prod, shapes))
    highest = max(point.coefficients["gradients"][0] for point in first_points)
    waiting = max(0.0, highest - total) + value_bytes * max(map(math.prod, shapes))

    def with_earlier_gradients(point: LiveMemory) -> LiveMemory:
        constant, *rest = point.coefficients["gradients"]
        gradients = (total + min(constant, waiting), *rest)
        return point.model_copy(update={"coefficients": {**point.coefficients, "gradients": gradients}})

    return tuple(map(with_earlier_gradients, first_points))
