"""Going on with a comparison whose time was up: when that adds something."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fulltune.compare.design import in_time, round_up
from fulltune.recipe.fields import Recipe
from fulltune.records.comparison import Comparison

_MOST_DIFFERENCES = 3


def refused(known: Comparison, budget_seconds: float | None) -> str | None:
    """Why a comparison that has a verdict does not go on with this budget; None: it does.

    Args:
        known: What it found.
        budget_seconds: In all; None: no limit.
    """
    verdict = known.decision.verdict
    if verdict != "UNDECIDED":
        return f"finished: the verdict is {verdict}; more time does not change it; --fresh begins another comparison"
    if any(one.left is None for one in known.openings):
        return (
            "finished by an older version of fulltune, whose verdict left nothing for another one on the same test "
            "rows; --fresh begins another comparison"
        )
    if not known.time_was_up:
        return (
            "finished: it ended undecided, but not because its time was up, so more time adds nothing; --fresh begins "
            "another comparison"
        )
    if not known.can_go_on:
        return (
            "finished: its time was up after the last seeds, whose verdict took all that was left of the chance of a "
            "wrong answer, so no other one can follow on the same test rows; --fresh begins another comparison"
        )
    had = known.expectation.budget_seconds or 0.0
    if budget_seconds is not None and budget_seconds <= had:
        return (
            f"its {in_time(had)} are used up; to go on, give more time in all, such as --budget "
            f"{in_time(round_up(2 * had))}; --fresh begins another comparison"
        )
    return None


def differences(before: Recipe, now: Recipe) -> str:
    """The settings in which a recipe differs from that of a comparison that is there, a few with both values."""
    found = list(_differences(before.shaping(), now.shaping()))
    more = f" and {len(found) - _MOST_DIFFERENCES} more" if len(found) > _MOST_DIFFERENCES else ""
    return ", ".join(found[:_MOST_DIFFERENCES]) + more


def _differences(before: Any, now: Any, where: str = "") -> Iterator[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        for name in before | now:
            yield from _differences(before.get(name), now.get(name), f"{where}.{name}" if where else name)
    elif before != now:
        plain = not isinstance(before, dict | list) and not isinstance(now, dict | list)
        yield f"{where}: {_in_words(before)} there, {_in_words(now)} here" if plain else where


def _in_words(value: Any) -> str:
    return "not set" if value is None else str(value)
