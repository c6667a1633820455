"""Pseudo-random numbers that depend on a seed and a key alone, so that adding rows moves few others."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence

import numpy as np


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
