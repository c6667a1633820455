"""How much the target tells about a row's length: decides whether batches by length would be one-sided."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from statistics import correlation, fmean


def explained_by_class(lengths: Sequence[int], classes: Sequence[str]) -> float:
    """Share of the variance of length that lies between classes, corrected for chance (epsilon squared, Kelley 1935).

    Args:
        lengths: Tokens of each row.
        classes: Class of each row.

    Returns:
        0 (no relation; also below 0 by chance is given as 0) to 1 (the class tells the length).
    """
    groups: dict[str, list[int]] = defaultdict(list)
    for length, name in zip(lengths, classes, strict=True):
        groups[name].append(length)
    count, mean = len(lengths), fmean(lengths)
    total = sum((length - mean) ** 2 for length in lengths)
    if total == 0 or count <= len(groups):
        return 0.0
    within = 0.0
    for members in groups.values():
        centre = fmean(members)
        within += sum((length - centre) ** 2 for length in members)
    return max(0.0, 1 - (within / (count - len(groups))) / (total / (count - 1)))


def explained_by_value(lengths: Sequence[int], values: Sequence[float]) -> float:
    """Squared correlation of length and a numeric target; 0 when one of them is constant."""
    if len(set(lengths)) < 2 or len(set(values)) < 2:
        return 0.0
    return float(correlation(lengths, values)) ** 2
