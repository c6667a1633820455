"""Rows that a split must not separate because they are the same one's: a customer's, a document's (`data.group`)."""

from __future__ import annotations

import numpy as np

from fulltune.data.near import mixed_numbers


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
