"""How exactly a share of rows is known; plain arithmetic, without NumPy."""

from __future__ import annotations

import math


def error_of_share(share: float, count: int) -> float:
    """The standard error of a share of so many rows.

    A success and a failure are added (Laplace): where all rows are right, one row more says little as well.
    """
    more = (share * count + 1) / (count + 2)
    return math.sqrt(max(0.0, more * (1 - more)) / (count + 2))
