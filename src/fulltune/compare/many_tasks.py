"""Several comparisons on one base, put together: what one full model for each task costs against parts side by side."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from fulltune.errors import RecipeError
from fulltune.records.comparison import ArmRow, Comparison, ManyTasks, TaskPart, Way
from fulltune.records.scores import Estimate
from fulltune.text import is_share


def many_tasks(comparisons: Mapping[str, Comparison], folders: Mapping[str, str]) -> ManyTasks:
    """Put finished comparisons of one pretrained model together, each by the name of its task."""
    rows = [{row.arm: row for row in one.rows} for one in comparisons.values()]
    full = next(row.arm for row in rows[0].values() if row.kind == "full")
    arms = [name for name, row in rows[0].items() if row.kind not in ("base", "full") and all(name in r for r in rows)]
    if not arms:
        raise RecipeError("--budget: too short to train one method beside full for every task; give more time")
    first = next(iter(comparisons.values()))
    # A full model's file is the base with a small head.
    base = min(one[full].saved_bytes for one in rows)
    return ManyTasks(
        model=first.model,
        base_bytes=base,
        confidence=first.decision.confidence,
        tasks=tuple(
            TaskPart(
                name=name,
                folder=folders[name],
                metric=one.metric,
                greater_is_better=one.greater_is_better,
                train_rows=one.train_rows,
                verdict=one.decision.verdict,
                recommended=one.decision.recommended,
            )
            for name, one in comparisons.items()
        ),
        ways=(
            _way(full, [one[full] for one in rows], 0, None),
            *(
                _way(name, [one[name] for one in rows], base, _behind(name, list(comparisons.values())))
                for name in arms
            ),
        ),
    )


def _way(name: str, rows: Sequence[ArmRow], base: int, behind: Estimate | None) -> Way:
    stored = sum(row.saved_bytes for row in rows)
    return Way(
        arm=name,
        kind=rows[0].kind,
        stored_bytes=stored + (0 if rows[0].kind == "variant" else base),  # a variant of full is a whole model, too
        bytes_per_task=round(stored / len(rows)),
        train_seconds=round(sum(row.train_seconds for row in rows), 1),
        scores=tuple(row.metric for row in rows),
        behind=behind,
    )


def _behind(arm: str, comparisons: Sequence[Comparison]) -> Estimate | None:
    """Mean over the tasks, where all metrics are shares; the squares of their independent half intervals add up."""
    found = [one.decision.difference(arm) for one in comparisons]
    if not all(is_share(one.metric) for one in comparisons) or not all(one.seeds_known for one in found):
        return None
    mean = statistics.mean(one.estimate for one in found)
    halves = (max(one.estimate - one.adjusted_low, one.adjusted_high - one.estimate) for one in found)
    half = math.hypot(*halves) / len(found)
    return Estimate(value=mean, low=mean - half, high=mean + half)
