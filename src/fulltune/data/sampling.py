"""Pseudo-random numbers that depend on a seed and a key alone, so that adding rows moves few others."""

from __future__ import annotations

import hashlib

import numpy as np


def draw(seed: int, key: str) -> int:
    """A pseudo-random number below 2^64."""
    return int.from_bytes(hashlib.sha256(f"{seed}\0{key}".encode()).digest()[:8], "big")


def sample(count: int, most: int, seed: int) -> np.ndarray:
    """`most` of `count` positions, at random, in their old order: int64."""
    drawn = np.fromiter((draw(seed, str(position)) for position in range(count)), np.uint64, count)
    return np.sort(np.argsort(drawn, kind="stable")[:most])
