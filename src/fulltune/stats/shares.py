"""How exactly a share of rows is known; plain arithmetic, without NumPy."""

from __future__ import annotations

import math


def error_of_share(share: float, count: int) -> float:
    """The standard error of a share of so many rows, with one success and one failure more (Laplace)."""
    more = (share * count + 1) / (count + 2)
    return math.sqrt(max(0.0, more * (1 - more)) / (count + 2))
