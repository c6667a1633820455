"""When a comparison whose time was up goes on, and what it says where it does not."""

from __future__ import annotations

import pytest

from fulltune.compare.budget import why_not_resumable
from fulltune.records.comparison import Comparison
from fulltune.report.comparison import content
from tests import comparisons


def ended(left: float, budget_seconds: float = 360.0) -> Comparison:
    """Undecided because the time was up, with so much left of the chance of a wrong answer."""
    comparison = comparisons.undecided(time_was_up=True)
    openings = tuple(one.model_copy(update={"left": left}) for one in comparisons.openings(2))
    expected = comparison.expectation.model_copy(update={"budget_seconds": budget_seconds})
    return comparison.model_copy(update={"openings": openings, "expectation": expected})


@pytest.mark.parametrize(
    ("left", "budget", "reason"),
    [
        (0.01, 720.0, None),
        (0.01, None, None),
        (0.01, 360.0, "the budget of 6m is used up; to continue, raise the total, such as --budget 12m"),
        (0.0, 720.0, "finished, because the permitted error rate is used up"),
    ],
)
def test_goes_on_with_more_time_where_a_part_of_the_chance_of_a_wrong_answer_is_left(
    left: float, budget: float | None, reason: str | None
) -> None:
    refusal = why_not_resumable(ended(left), budget)
    assert refusal is None if reason is None else (refusal or "").startswith(reason)


@pytest.mark.parametrize(("left", "promised"), [(0.01, True), (0.0, False)])
def test_card_promises_more_time_only_where_it_would_go_on(left: float, promised: bool) -> None:
    comparison = ended(left)
    assert comparison.can_resume is promised
    assert ("larger --budget" in str(content.build_comparison_terminal_report(comparison))) is promised
