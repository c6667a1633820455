"""Split rows off train, without separating duplicates: pure functions of the rows and a seed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

MOST_HELD_OUT_ROWS = 2_000


def split_off(groups: np.ndarray, strata: np.ndarray, fraction: float) -> np.ndarray:
    """Choose rows to hold out.

    Whole groups are chosen, so that a text and its duplicates stay on one side. Within each stratum (class) about the
    same share is chosen, at least one group where the stratum has two or more, so that each class can be measured.

    Args:
        groups: `draw` of the key that a row shares with its duplicates: uint64 [rows]. Groups are taken in the order
            of these numbers.
        strata: Number of each row's class [rows].
        fraction: Share of the rows to hold out; at most 2,000 rows in all.

    Returns:
        Whether a row is held out: bool [rows].
    """
    fraction = min(fraction, MOST_HELD_OUT_ROWS / max(1, len(groups)))
    if not len(groups):
        return np.zeros(0, bool)
    # Sorted by the drawn number, which is the pseudo-random order in which groups are taken.
    _, first, member_of, sizes = np.unique(groups, return_index=True, return_inverse=True, return_counts=True)
    stratum_of = strata[first]
    chosen = np.zeros(len(first), bool)
    by_stratum = np.argsort(stratum_of, kind="stable")
    for members in np.split(by_stratum, np.flatnonzero(np.diff(stratum_of[by_stratum])) + 1):
        wanted = round(int(sizes[members].sum()) * fraction)
        if len(members) > 1:
            wanted = max(1, wanted)
        chosen[members[_chosen(sizes[members].tolist(), wanted)]] = True
    return chosen[member_of]


def _chosen(sizes: Sequence[int], wanted: int) -> list[int]:
    """Groups of together about `wanted` rows, never all; one that is too large for the rest is passed over."""
    chosen: list[int] = []
    taken = 0
    for position, size in enumerate(sizes):
        if taken == wanted:
            break
        if taken + size <= wanted and len(chosen) < len(sizes) - 1:
            chosen.append(position)
            taken += size
    if not chosen and wanted and len(sizes) > 1:
        chosen = [min(range(len(sizes)), key=lambda position: sizes[position])]
    return chosen
