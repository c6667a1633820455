"""The best simple classifier on pooled embeddings of the untouched model: a rival that trains nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from fulltune.probe.features import Features
from fulltune.probe.layers import HeadLayers
from fulltune.probe.linear import STRENGTHS, Items, Linear, best_space, centroids, fits, wrong
from fulltune.probe.looker import Looker
from fulltune.records.probe import MOST_SOLVER_BYTES, FrozenRival, Pooling, solver_bytes


def best_rival(looker: Looker, train: Features, held_out: Features | None) -> tuple[FrozenRival, Linear] | None:
    """The best simple classifier on pooled embeddings; None where items have none."""
    if train.mean is None:
        return None
    usual = "ridge regression" if looker.kind == "regression" else "logistic regression"

    def candidates(items: Items, strengths: Sequence[float] = STRENGTHS) -> Iterator[tuple[tuple[str, float], Linear]]:
        yield from (((usual, strength), one) for strength, one in fits(items, strengths=strengths))
        if looker.kind in ("single_label", "tags"):
            yield ("nearest centroid", 0.0), centroids(items)

    held = None if held_out is None else _pooled(held_out)
    spaces = {
        name: (
            looker.items(features, train),
            None if held is None or held_out is None else looker.items(held[name], held_out),
        )
        for name, features in _pooled(train).items()
        if name != "apart" or _fits_memory(looker, features)  # twice as wide as the others
    }
    pooling, least, (kind, _), classifier = best_space(spaces, candidates, wrong)
    return FrozenRival.model_validate({"pooling": pooling, "kind": kind, "loss": least}), classifier


def _fits_memory(looker: Looker, features: np.ndarray) -> bool:
    return solver_bytes(looker.kind, len(features), looker.num_outputs, features.shape[1]) <= MOST_SOLVER_BYTES


def _pooled(features: Features) -> dict[Pooling, np.ndarray]:
    """Embeddings of length 1, [items, hidden] each, and how those of a pair's texts differ."""
    found: dict[Pooling, np.ndarray] = {} if features.mean is None else {"mean": features.mean}
    position = features.last if features.dense is None else features.dense
    if position is not None:
        found["head"] = position / np.maximum(np.linalg.norm(position, axis=1, keepdims=True), 1e-12)
    if features.apart is not None:
        found["apart"] = features.apart
    return found


def predicted(looker: Looker, rows: Any, rival: FrozenRival, found: Linear) -> list[tuple[int, np.ndarray]]:
    """What the rival gives: for each row its number, and the outputs of its items, [items, outputs]."""
    layers = None if rival.pooling != "head" else HeadLayers.of(looker.model, looker.task_name, looker.num_outputs)

    def run(size: int) -> list[tuple[int, np.ndarray]]:
        answers: list[tuple[int, np.ndarray]] = []
        for part in looker.passes(rows, layers, size, apart=rival.pooling == "apart"):
            if not len(part.rows):  # no word of these rows has a token
                continue
            numbers, begins = np.unique(part.rows, return_index=True)
            order = np.argsort(begins)
            outputs = np.split(found(_pooled(part)[rival.pooling]), np.sort(begins)[1:])
            answers += zip(numbers[order].tolist(), outputs, strict=True)
        return answers

    return looker.within_memory(run)
