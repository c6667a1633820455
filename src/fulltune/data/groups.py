"""Which rows stay on one side of a split, by numbers drawn from a seed and a key, so that new rows move few others."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from fulltune.data.near import mixed_numbers
from fulltune.records.data import SplitName


def joined_by_value(groups: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Group numbers that rows share when a chain of equal groups and equal values leads from one to the other.

    The number of rows of a single value is what was drawn for that value, whatever their texts: rows that are added to
    it, or to others, move none of them.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    if not len(groups):
        return groups
    numbers, of_value = np.unique(values, return_inverse=True)
    names, of_group = np.unique(groups, return_inverse=True)
    size = len(numbers) + len(names)
    edges = (np.ones(len(groups), bool), (of_value, len(numbers) + of_group))
    labels = connected_components(coo_array(edges, shape=(size, size)), directed=False)[1][: len(numbers)]
    # Values are sorted by their number, so that the first one of a component is its smallest.
    _, first, component, sizes = np.unique(labels, return_index=True, return_inverse=True, return_counts=True)
    # Drawn anew from it: the smallest of several numbers would put large components first.
    drawn = np.where(sizes > 1, mixed_numbers(numbers[first]), numbers[first])
    return np.asarray(drawn[component][of_value], np.uint64)


def rarest_of_group(strata: np.ndarray, names: dict[str, int], sides: np.ndarray) -> np.ndarray:
    """Of each row the rarest class in its group, so that a group counts for what is hardest to share out: int64 [rows].

    Which of a group's rows stands first says nothing, and of equally rare classes the name decides.
    """
    ranks = np.zeros(len(names) + 1, np.int64)
    counts = np.bincount(strata + 1, minlength=len(names) + 1)
    alphabetical = {name: place for place, name in enumerate(sorted(names))}
    for name, number in names.items():
        ranks[number + 1] = alphabetical[name]
    order = np.lexsort((ranks, counts))
    place_of = np.argsort(order)[strata + 1]
    _, group = np.unique(sides, return_inverse=True)
    smallest = np.full(int(group.max(initial=-1)) + 1, len(order))
    np.minimum.at(smallest, group, place_of)
    return np.asarray(order[smallest[group]] - 1, np.int64)


def split_by_time(times: np.ndarray, sides: np.ndarray, wanted: Mapping[SplitName, int]) -> dict[SplitName, np.ndarray]:
    """The rows of each split, bool [rows], the newest of `wanted` first; no time and no group is on two sides."""
    oldest = _oldest_of_group(times, sides)
    chosen: dict[SplitName, np.ndarray] = {}
    before = np.ones(len(times), bool)
    for name, count in wanted.items():
        start = _boundary(oldest[before], count)
        chosen[name] = before & (oldest >= start)
        before &= times < start
    return {**chosen, "train": before}


def _oldest_of_group(times: np.ndarray, sides: np.ndarray) -> np.ndarray:
    """The time of the oldest row in each row's group: float64 [rows]."""
    numbers, group = np.unique(sides, return_inverse=True)
    oldest = np.full(len(numbers), np.inf)
    np.minimum.at(oldest, group, times)
    return oldest[group]


def _boundary(oldest: np.ndarray, wanted: int) -> float:
    """The time from which on about `wanted` rows are in groups that begin then; infinity: there is none."""
    starts, counts = np.unique(oldest, return_counts=True)
    if len(starts) < 2:
        return np.inf
    since = np.cumsum(counts[:0:-1])  # rows of groups that begin at the newest time, at the two newest ones ...
    place = max(1, int(np.searchsorted(since, wanted, side="right")))
    return float(starts[-place])


def draw(seed: int, key: str) -> int:
    """A pseudo-random number below 2^64."""
    return int.from_bytes(hashlib.sha256(f"{seed}\0{key}".encode()).digest()[:8], "big")


def sample(labels: Sequence[Sequence[str]], most: int, seed: int) -> list[int]:
    """`most` rows, at random, by their positions in the old order; of each label three at least, or two or one where
    that is too many, so that it can be trained on and scored. `labels` has those of each row."""
    drawn = np.fromiter((draw(seed, str(position)) for position in range(len(labels))), np.uint64, len(labels))
    of_each = min(3, most // max(1, len({label for of_row in labels for label in of_row})))
    counts, wanted, others = Counter[str](), list[int](), list[int]()
    for position in np.argsort(drawn, kind="stable").tolist():
        is_wanted = any(counts[label] < of_each for label in labels[position])
        (wanted if is_wanted else others).append(position)
        counts.update(labels[position])
    return sorted([*wanted, *others][:most])
