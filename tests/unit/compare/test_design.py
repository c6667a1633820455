"""Rates, seeds and budgets: tables of numbers."""

from __future__ import annotations

import math

import pytest

from fulltune.compare import design
from fulltune.compare.precision import planned_detectable
from fulltune.trials import Search, Tried


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
        ({1e-4: 0.5, 3e-4: 0.69, 1e-3: 0.7}, True, None),  # by a standard error, which is 0.014 here
        ({1e-4: 0.3, 3e-4: math.nan, 1e-3: math.nan}, True, 3.2e-05),
        ({1e-4: math.nan, 3e-4: math.nan}, True, 3.2e-05),
    ],
)
def test_beyond_best_at_the_edge_extends_the_grid(
    tried: dict[float, float], greater: bool, following: float | None
) -> None:
    assert design.beyond(tried, greater, 0, True, 1000, True) == following
    assert design.beyond(tried, greater, design.MOST_EXTENSIONS, True, 1000, True) is None
    assert design.beyond(tried, greater, 0, False, 1000, True) is None


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
    assert found.seconds == pytest.approx(180 * (3 + search) + 100 + 2 * 10 * (3 + 5) + 10)
    assert (found.num_seeds, found.num_search_trials, found.length_share, found.notes) == (3, 10, 1.0, ())
    assert found.detectable == planned_detectable(3080, 3, margin=0.01, num_arms=1)


def test_expected_methods_that_wait_get_one_seed() -> None:
    costs = {**COSTS, "prompt": design.Cost(120, 1)}
    found = design.expected(costs, 3, 0.15, 10, 3080, 0.01)
    search = 3 * 0.05 + 2 * 0.15
    # Which one leads is not known: the dearest is reckoned with.
    assert found.seconds == pytest.approx(100 * (4 + search) + 80 * (1 + search) + 120 * 3 + 10 * (4 + 1 + 3 + 10))
    assert found.most_seconds == pytest.approx(180 * (3 + search) + 100 + 120 * 3 + 10 * (10 + 10))
    assert design.expected(costs, 3, 0.15, 10, 3080, 0.01, sequential=False).seconds == found.most_seconds


@pytest.mark.parametrize(
    ("budget", "seeds", "share", "length"), [(910, 3, 0.15, 1.0), (710, 2, 0.15, 1.0), (670, 2, 0.075, 1.0)]
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


def test_after_divergence_a_lower_rate_is_taken_tried_or_not_unless_it_was_given() -> None:
    tried = tuple(Tried(learning_rate=rate, share=0.12, metric=0.9) for rate in (1e-3, 1e-2))
    found = Search(arm="lora", tried=tried, chosen=1e-2, reason="made up")
    taken = []
    while (lower := design.after_divergence(found)) is not None:
        found = design.replaced(found, lower, "it diverged")
        taken.append(lower)
    assert taken == [1e-3, 3.2e-4, 1e-4]
    assert found.on_edge
    assert design.after_divergence(design.without_search("lora", 1e-2)) is None


@pytest.mark.parametrize(
    ("last", "chosen", "lower"),
    [
        ({6.3e-4: 0.77, 2e-4: 0.61}, 6.3e-4, 2e-4),
        ({6.3e-4: 0.61, 2e-4: 0.77}, 2e-4, None),  # the lower one was chosen
        ({6.3e-4: 0.77}, 6.3e-4, None),
    ],
)
def test_to_check_is_the_lower_rate_of_the_last_round(
    last: dict[float, float], chosen: float, lower: float | None
) -> None:
    tried = [Tried(learning_rate=6.3e-5, share=0.04, metric=0.3)]
    tried += [Tried(learning_rate=rate, share=0.12, metric=metric) for rate, metric in last.items()]
    found = Search(arm="full", tried=tuple(tried), chosen=chosen, reason="made up")
    assert design.to_check(found) == lower
    assert design.to_check(design.without_search("full", 1e-3)) is None


@pytest.mark.parametrize(
    ("metrics", "greater", "chosen"),
    [
        ((0.919, 0.925), True, 2e-4),
        ((0.919, 0.915), True, 2e-4),  # as good by a standard error
        ((0.95, 0.90), True, 6.3e-4),
        ((2.0, 1.9), False, 2e-4),
        ((1.8, 1.9), False, 6.3e-4),
        ((0.95, math.nan), True, 6.3e-4),
    ],
)
def test_checked_takes_the_lower_rate_unless_the_higher_is_better(
    metrics: tuple[float, float], greater: bool, chosen: float
) -> None:
    tried = tuple(Tried(learning_rate=rate, share=0.12, metric=0.7) for rate in (6.3e-5, 2e-4, 6.3e-4))
    search = Search(arm="full", tried=tried, chosen=6.3e-4, reason="best of 3 rates", on_edge=True)
    found = design.checked(search, 2e-4, metrics, greater, 1003, greater)
    assert found.chosen == chosen
    assert found.on_edge == (chosen == 6.3e-4)
