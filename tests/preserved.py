"""Records of runs with a budget for forgetting, whose texts and time do not matter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fulltune.records.held import HeldRun, Point


def preserved_record(points: Sequence[Point], chosen: Point, **changes: Any) -> HeldRun:
    """A classifier's, with a budget of 2 % and without a certificate, unless `changes` say otherwise."""
    given: dict[str, Any] = {
        "trial": "full-seed1",
        "budget": 0.02,
        "limit": 0.02,
        "writes": False,
        "text": "generic.txt",
        "metric": "accuracy",
        "greater_is_better": True,
        "sealed": None,
        "trained": "0" * 16,
        "opened": () if changes.get("sealed") is None else ("2026-01-01T00:00:00+00:00",),
    }
    return HeldRun(points=tuple(points), chosen=chosen, **(given | changes))
