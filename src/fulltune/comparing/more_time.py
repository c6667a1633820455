"""Going on with a comparison whose time was up: when that adds something."""

from __future__ import annotations

from fulltune.compare.design import in_time, round_up
from fulltune.trials import Comparison


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
