"""Seeds and budgets: tables of numbers."""

from __future__ import annotations

import pytest

from fulltune.compare import design
from fulltune.compare.precision import planned_detectable


@pytest.mark.parametrize(("given", "rows", "seeds"), [(None, 9_999, 5), (None, 10_000, 3), (2, 50, 2)])
def test_num_seeds_few_rows_need_more(given: int | None, rows: int, seeds: int) -> None:
    assert design.num_seeds(given, rows) == seeds


COSTS = {"full": design.Cost(100, 3), "lora": design.Cost(80, 3)}


def test_expected_without_budget_is_the_whole_design() -> None:
    found = design.expected(COSTS, 3, 0.1, 10, 3080, 0.01)
    assert found.seconds == pytest.approx(180 * (4 + 3 * 0.1) + 2 * 10 * (4 + 3))
    assert (found.num_seeds, found.num_search_trials, found.length_share, found.notes) == (3, 6, 1.0, ())
    assert found.detectable == planned_detectable(3080, 3, margin=0.01, num_arms=1)


def test_expected_methods_that_wait_get_one_run() -> None:
    costs = {"full": design.Cost(100, 3), "prompt": design.Cost(120, 1), "lora": design.Cost(80, 3)}
    found = design.expected(costs, 3, 0.1, 10, 3080, 0.01)
    # Which one leads is not known: the dearest is reckoned with. It has but one rate here.
    assert found.seconds == pytest.approx(100 * (4 + 0.3) + 120 * 3 + 80 * (1 + 0.3) + 10 * (4 + 3 + 1 + 6))
    assert found.most_seconds == pytest.approx(180 * (4 + 0.3) + 120 * 3 + 10 * (4 + 3 + 4 + 6))
    assert design.expected(costs, 3, 0.1, 10, 3080, 0.01, sequential=False).seconds == found.most_seconds


@pytest.mark.parametrize(
    ("budget", "seeds", "share", "length"), [(970, 3, 0.1, 1.0), (760, 2, 0.1, 1.0), (690, 2, 0.05, 1.0)]
)
def test_expected_budget_takes_seeds_then_search(budget: float, seeds: int, share: float, length: float) -> None:
    found = design.expected(COSTS, 3, 0.1, 10, 1000, 0.01, budget)
    assert found.seconds <= budget
    assert (found.num_seeds, found.search_share, found.length_share) == (seeds, share, length)


def test_expected_budget_leaves_the_search_its_least_length() -> None:
    found = design.expected(COSTS, 3, 0.1, 10, 1000, 0.01, 690, least_search_share=0.08)
    assert found.search_share == 0.08
    assert any("a shorter rate search (8% of the steps)" in note for note in found.notes)
    found = design.expected(COSTS, 3, 0.1, 10, 1000, 0.01, 690, least_search_share=0.1)
    assert found.search_share == 0.1
    assert not any("search" in note for note in found.notes)
    assert found.length_share < 1


def test_expected_small_budget_shortens_the_runs_and_says_so() -> None:
    found = design.expected(COSTS, 3, 0.1, 10, 1000, None, 300)
    assert found.seconds == pytest.approx(300, rel=0.01)
    assert found.length_share < 1
    assert "the verdict is about such runs" in found.notes[-1]
    assert found.detectable is None
    tiny = design.expected(COSTS, 3, 0.1, 10, 1000, None, 10)
    assert tiny.length_share == design.SHORTEST
    assert "each method gets one run, then it says what is known by then" in tiny.notes[-1]
