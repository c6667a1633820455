"""Cases of one behaviour: some in each run of the tests, the others where there is more time."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def others_long(values: Iterable[Any], *always: Any) -> list[Any]:
    """The values, or tuples of them, for `pytest.mark.parametrize`; all but those of `always` are marked as long."""
    found = list(values)
    assert all(value in found for value in always), f"{always} are not all in {found}"
    several = [value if isinstance(value, tuple) else (value,) for value in found]
    marks = [() if value in always else pytest.mark.long for value in found]
    return [pytest.param(*value, marks=mark) for value, mark in zip(several, marks, strict=True)]
