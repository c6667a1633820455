"""A split by time: the newest rows are scored on, the oldest are trained on.

A group (equal texts, near ones, `data.group`) that reaches over a boundary stays where its oldest row is, and its later
rows are left out. They cannot stay: what is trained on, or chooses the checkpoint, would be scored on. They cannot move
to the earlier side either: train would know of times that it is tested on. Nor are the earlier rows moved or left out
instead: then what is trained on would depend on what comes later, and a text that is often said, which comes up again
in every test, would be missing in train altogether. So train is what was known at the boundary, and test is what was
new after it.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fulltune.records.data import SplitName


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
