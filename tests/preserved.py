"""Records of runs with a budget for forgetting, whose texts and time do not matter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fulltune.records.forgetting import BudgetResult, InterpolationPoint


def preserved_record(points: Sequence[InterpolationPoint], choice: InterpolationPoint, **changes: Any) -> BudgetResult:
    """A classifier's, with a budget of 2 % and without a certificate, unless `changes` say otherwise."""
    given: dict[str, Any] = {
        "trial": "full-seed1",
        "budget": 0.02,
        "limit": 0.02,
        "is_language_model": False,
        "metric": "accuracy",
        "greater_is_better": True,
        "sealed": None,
        "weights_digest": "0" * 16,
        "opening_times": () if changes.get("sealed") is None else ("2026-01-01T00:00:00+00:00",),
    }
    return BudgetResult(points=tuple(points), choice=choice, **(given | changes))
