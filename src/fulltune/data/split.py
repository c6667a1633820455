"""Split rows off train, without separating duplicates: pure functions of the rows and a seed."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence

MOST_HELD_OUT_ROWS = 2_000


def split_off(groups: Sequence[str], strata: Sequence[str], fraction: float, seed: int) -> list[bool]:
    """Choose rows to hold out.

    Whole groups are chosen, so that a text and its duplicates stay on one side. Within each stratum (class) about the
    same share is chosen, at least one group where the stratum has two or more, so that each class can be measured.

    Args:
        groups: For each row the key that its duplicates share.
        strata: For each row its class.
        fraction: Share of the rows to hold out; at most 2,000 rows in all.
        seed: The order is that of a hash of seed and key: adding rows moves few others.

    Returns:
        For each row whether it is held out.
    """
    fraction = min(fraction, MOST_HELD_OUT_ROWS / max(1, len(groups)))
    members: dict[str, list[int]] = defaultdict(list)
    for position, key in enumerate(groups):
        members[key].append(position)
    by_stratum: dict[str, list[str]] = defaultdict(list)
    for key, positions in members.items():
        by_stratum[strata[positions[0]]].append(key)
    held_out = [False] * len(groups)
    for stratum in sorted(by_stratum):
        keys = sorted(by_stratum[stratum], key=lambda key: order(seed, key))
        rows = sum(len(members[key]) for key in keys)
        wanted = round(rows * fraction)
        if len(keys) > 1:
            wanted = max(1, wanted)
        for key in _chosen(keys, {key: len(members[key]) for key in keys}, wanted):
            for position in members[key]:
                held_out[position] = True
    return held_out


def _chosen(keys: Sequence[str], sizes: Mapping[str, int], wanted: int) -> list[str]:
    """Groups of together about `wanted` rows, never all; one that is too large for the rest is passed over."""
    chosen: list[str] = []
    taken = 0
    for key in keys:
        if taken + sizes[key] <= wanted and len(chosen) < len(keys) - 1:
            chosen.append(key)
            taken += sizes[key]
    if not chosen and wanted and len(keys) > 1:
        chosen = [min(keys, key=lambda key: sizes[key])]
    return chosen


def order(seed: int, key: str) -> str:
    """A pseudo-random sort key that does not depend on the rows' order in the file."""
    return hashlib.sha256(f"{seed}\0{key}".encode()).hexdigest()


def sample(count: int, most: int, seed: int) -> list[int]:
    """`most` of `count` positions, at random, in their old order."""
    chosen = sorted(range(count), key=lambda position: order(seed, str(position)))[:most]
    return sorted(chosen)
