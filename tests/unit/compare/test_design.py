"""Rates, seeds and budgets: tables of numbers."""

from __future__ import annotations

import math

import pytest

from fulltune.compare import design
from fulltune.compare.precision import planned_detectable
from fulltune.trials import Tried


@pytest.mark.parametrize(("given", "rows", "seeds"), [(None, 9_999, 5), (None, 10_000, 3), (2, 50, 2)])
def test_num_seeds_few_rows_need_more(given: int | None, rows: int, seeds: int) -> None:
    assert design.num_seeds(given, rows)[0] == seeds


def test_grid_is_logarithmic_around_the_usual_rate() -> None:
    assert design.grid(2e-4, None, None) == (6.3e-05, 0.0002, 0.00063)
    assert design.grid(2e-4, (1e-3, 1e-4), None) == (1e-4, 1e-3)
    assert design.grid(2e-4, None, 5e-5) == (5e-5,)


@pytest.mark.parametrize(
    ("tried", "greater", "following"),
    [
        ({1e-4: 0.5, 3e-4: 0.7, 1e-3: 0.6}, True, None),
        ({1e-4: 0.5, 3e-4: 0.6, 1e-3: 0.7}, True, 0.0032),
        ({1e-4: 0.7, 3e-4: 0.6, 1e-3: 0.5}, True, 3.2e-05),
        ({1e-4: 0.7, 3e-4: 0.6, 1e-3: 0.5}, False, 0.0032),
        ({1e-4: 0.7, 3e-4: 0.7, 1e-3: 0.5}, True, None),  # as good as its neighbour
        ({1e-4: 0.3, 3e-4: math.nan, 1e-3: math.nan}, True, 3.2e-05),
        ({1e-4: math.nan, 3e-4: math.nan}, True, 3.2e-05),
    ],
)
def test_beyond_best_at_the_edge_extends_the_grid(
    tried: dict[float, float], greater: bool, following: float | None
) -> None:
    assert design.beyond(tried, greater, 0, True) == following
    assert design.beyond(tried, greater, design.MOST_EXTENSIONS, True) is None
    assert design.beyond(tried, greater, 0, False) is None


def test_best_of_equal_rates_is_the_middle_one() -> None:
    assert design.best_of({1e-4: 0.5, 3e-4: 0.5, 1e-3: 0.5}, True) == 3e-4
    assert design.best_of({1e-4: math.nan, 3e-4: 0.1}, True) == 3e-4


def test_survivors_are_the_best_two() -> None:
    assert design.survivors({1e-4: 2.0, 3e-4: 1.0, 1e-3: 3.0}, False) == (3e-4, 1e-4)


def test_finished_takes_the_best_of_the_longest_round() -> None:
    tried = [
        Tried(learning_rate=1e-4, share=0.05, metric=0.9),
        Tried(learning_rate=3e-4, share=0.05, metric=0.8),
        Tried(learning_rate=1e-3, share=0.05, metric=0.7),
        Tried(learning_rate=1e-4, share=0.15, metric=0.91),
        Tried(learning_rate=3e-4, share=0.15, metric=0.93),
    ]
    found = design.finished("lora", tried, True, True, 1000, True)
    assert (found.chosen, found.on_edge) == (3e-4, False)
    assert found.reason == "best of 3 rates on the eval rows after 15% of the steps"
    edge = design.finished("lora", tried[:3], True, True, 1000, True)
    assert (edge.chosen, edge.on_edge) == (1e-4, True)


def test_finished_takes_the_lower_of_rates_that_are_as_good() -> None:
    """The eval rows of Banking77 and LoRA's rates as they were measured."""
    tried = [Tried(learning_rate=rate, share=0.15, metric=value) for rate, value in ((6.3e-3, 0.7527), (2e-3, 0.7498))]
    found = design.finished("lora", tried, True, True, 1003, True)
    assert found.chosen == 2e-3
    assert found.reason.startswith("lowest of the best ones of 2 rates")
    apart = [tried[0], tried[1].model_copy(update={"metric": 0.70})]
    assert design.finished("lora", apart, True, True, 1003, True).chosen == 6.3e-3
    losses = [Tried(learning_rate=rate, share=0.15, metric=value) for rate, value in ((1e-3, 2.0), (1e-4, 2.01))]
    assert design.finished("lora", losses, False, True, 1003, False).chosen == 1e-4


def test_slower_is_asked_for_when_a_whole_run_ends_below_its_short_trial() -> None:
    tried = [Tried(learning_rate=rate, share=0.15, metric=0.75) for rate in (6.3e-3, 2e-3)]
    search = design.finished("lora", tried, True, True, 1003, True).model_copy(update={"chosen": 6.3e-3})
    assert design.slower(search, 0.02, True, 1003, True) == 2e-3
    assert design.slower(search, 0.745, True, 1003, True) is None
    assert design.slower(search, 0.91, True, 1003, True) is None
    assert design.slower(search, math.nan, True, 1003, True) == 2e-3
    assert design.slower(search.model_copy(update={"chosen": 2e-3}), 0.02, True, 1003, True) is None
    assert design.slower(design.without_search("lora", 1e-3), 0.02, True, 1003, True) is None


COSTS = {"full": design.Cost(100, 3), "lora": design.Cost(80, 3)}


def test_expected_without_budget_is_the_whole_design() -> None:
    found = design.expected(COSTS, 3, 0.15, 10, 3080, 0.01)
    search = 3 * 0.05 + 2 * 0.15
    assert found.seconds == pytest.approx(180 * (3 + search) + 2 * 10 * (3 + 5))
    assert (found.num_seeds, found.num_search_trials, found.length_share, found.notes) == (3, 10, 1.0, ())
    assert found.detectable == planned_detectable(3080, 3, margin=0.01, num_arms=1)


@pytest.mark.parametrize(
    ("budget", "seeds", "share", "length"), [(800, 3, 0.15, 1.0), (600, 2, 0.15, 1.0), (560, 2, 0.075, 1.0)]
)
def test_expected_budget_takes_seeds_then_search(budget: float, seeds: int, share: float, length: float) -> None:
    found = design.expected(COSTS, 3, 0.15, 10, 1000, 0.01, budget)
    assert found.seconds <= budget
    assert (found.num_seeds, found.search_share, found.length_share) == (seeds, share, length)


def test_expected_small_budget_shortens_the_runs_and_says_so() -> None:
    found = design.expected(COSTS, 3, 0.15, 10, 1000, None, 300)
    assert found.seconds == pytest.approx(300, rel=0.01)
    assert found.length_share < 1
    assert "the verdict is about such runs" in found.notes[-1]
    assert found.detectable is None
    tiny = design.expected(COSTS, 3, 0.15, 10, 1000, None, 10)
    assert tiny.length_share == design.SHORTEST
    assert "stops when the time is up" in tiny.notes[-1]
