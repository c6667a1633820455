"""Rows that are unlike all others in the eyes of the untouched model: far from even the nearest train rows.

A row's distance is the mean of 1 - cosine to its nearest train rows (Kuan and Mueller 2022, arXiv 2207.03061), as the
mean hidden states have it. What lies beyond a fence far above the upper quartile is an outlier. It is then left out of
what others are compared with and of the fence, until nothing more is found: odd rows would hide each other otherwise.

Rows with the same text count once, and are no neighbours of each other: copies must not make an odd row usual. What was
measured, and what else was tried, stands in docs/data-evidence.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fulltune.data.judge import Reader
from fulltune.probe.layers import NoProbe
from fulltune.records.data import SplitName

NEIGHBOURS = 20
SPREADS = 2.5
"""Between the quartiles: so many of them the fence lies above the upper one (Tukey 1977: 1.5, and 3 for far out)."""
LEAST_TEXTS = 200
MOST_FAR = 0.1
"""Share of the texts that may be far from the others: where more are, the rows are of several kinds."""
_ROUNDS = 10
_ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class Outlier:
    """A row, and how far it is from the nearest train rows."""

    split: SplitName
    position: int
    """Of the row in its split."""
    distance: float


@dataclass(frozen=True)
class FarRows:
    """What a look for outliers found."""

    found: tuple[Outlier, ...]
    """By split, in the order of its rows."""
    usual: float
    """Distance that three texts in four do not exceed, outliers left out."""
    left_out: int
    """Rows that were not read: of each split some are drawn at random where they are many."""


def outliers(reader: Reader, keys: Mapping[SplitName, np.ndarray]) -> FarRows | str:
    """Rows that are far from all train rows.

    Args:
        reader: Of rows that the untouched model reads as a whole: texts, pairs of texts or images to classify.
        keys: Split to a number for each row's text or image, the same for equal ones: uint64 [rows].

    Returns:
        What was found; or why nothing can be said.
    """
    try:
        return _outliers(reader, keys)
    except NoProbe as no:
        return str(no)


def _outliers(reader: Reader, keys: Mapping[SplitName, np.ndarray]) -> FarRows:
    items, positions = reader.items("train")
    train_keys = keys["train"][positions]
    texts, first, inverse = np.unique(train_keys, return_index=True, return_inverse=True)
    if len(texts) < LEAST_TEXTS:
        raise NoProbe(f"{len(texts):,} different texts or images in train are too few: expected at least {LEAST_TEXTS}")
    states = items.features[first]
    distances, is_far, usual, fence = far_out(states, texts)
    if is_far.mean() > MOST_FAR:
        raise NoProbe(f"{is_far.mean():.0%} of the train rows are far from the others: these are of several kinds")
    left_out = len(keys["train"]) - len(positions)
    found = [
        Outlier("train", int(position), float(distances[at]))
        for position, at in zip(positions, inverse, strict=True)
        if is_far[at]
    ]
    for split in ("eval", "test"):
        if split not in keys or not len(keys[split]):
            continue
        held_out, places = reader.items(split)
        left_out += len(keys[split]) - len(places)
        theirs, _ = nearest(held_out.features, keys[split][places], states[~is_far], texts[~is_far])
        found += [Outlier(split, int(places[at]), float(theirs[at])) for at in np.flatnonzero(theirs > fence)]
    return FarRows(tuple(found), usual, left_out)


def far_out(states: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray, float, float]:
    """Which rows are far from the others.

    Args:
        states: float32 [rows, hidden], each of length 1.
        keys: A number for each, all different.

    Returns:
        The rows' distances to their nearest ones among those that are not far, whether each is far, the upper quartile
        of the distances of those that are not, and the fence.
    """
    distances, neighbours = nearest(states, keys, states, keys)
    is_far = np.zeros(len(states), bool)
    for _ in range(_ROUNDS):
        lower, upper = np.quantile(distances[~is_far], [0.25, 0.75])
        fence = float(upper + SPREADS * (upper - lower))
        further = (distances > fence) & ~is_far
        is_far |= further
        if not further.any() or is_far.mean() > MOST_FAR:
            break
        changed, kept = np.flatnonzero(further[neighbours].any(axis=1)), np.flatnonzero(~is_far)
        distances[changed], places = nearest(states[changed], keys[changed], states[kept], keys[kept])
        neighbours[changed] = kept[places]
    return distances, is_far, float(upper), fence


def nearest(
    states: np.ndarray,
    keys: np.ndarray,
    others: np.ndarray,
    other_keys: np.ndarray,
    count: int = NEIGHBOURS,
    rows_at_once: int = _ROWS_AT_ONCE,
) -> tuple[np.ndarray, np.ndarray]:
    """The nearest of other rows, but for those with the same key.

    In memory are the cosines of some rows with some others at a time.

    Args:
        states: float32 [rows, hidden], each of length 1.
        keys: uint64 [rows].
        others: The same of more rows than `count`.
        other_keys: All different.
        count: Neighbours of a row.
        rows_at_once: Of each side.

    Returns:
        Mean of 1 - cosine to them, float64 [rows], and their places among the others [rows, count], in no order.
    """
    distances, places = np.zeros(len(states)), np.zeros((len(states), count), np.int64)
    for start in range(0, len(states), rows_at_once):
        part = slice(start, start + rows_at_once)
        best = np.full((len(states[part]), count), -np.inf, np.float32)
        at = np.zeros(best.shape, np.int64)
        for first in range(0, len(others), rows_at_once):
            cosines = states[part] @ others[first : first + rows_at_once].T
            cosines[keys[part, None] == other_keys[None, first : first + rows_at_once]] = -np.inf
            both = np.concatenate([best, cosines], axis=1)
            of_both = np.concatenate([at, np.broadcast_to(first + np.arange(cosines.shape[1]), cosines.shape)], axis=1)
            chosen = np.argpartition(both, -count, axis=1)[:, -count:]
            best, at = np.take_along_axis(both, chosen, axis=1), np.take_along_axis(of_both, chosen, axis=1)
        distances[part], places[part] = 1.0 - best.mean(axis=1, dtype=np.float64), at
    return distances, places
