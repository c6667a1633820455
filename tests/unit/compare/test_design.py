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
    ("metrics", "greater", "following"),
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
    metrics: dict[float, float], greater: bool, following: float | None
) -> None:
    assert design.beyond(metrics, greater, True, 1000, True) == following
    assert design.beyond(metrics, greater, False, 1000, True) is None


def test_best_of_equal_rates_is_the_middle_one() -> None:
    assert design.best_of({1e-4: 0.5, 3e-4: 0.5, 1e-3: 0.5}, True) == 3e-4
    assert design.best_of({1e-4: math.nan, 3e-4: 0.1}, True) == 3e-4


@pytest.mark.parametrize(("steps", "share"), [(1000, 0.06), (100, 0.1), (20, 0.5), (4, 1.0)])
def test_short_trials_have_ten_steps_at_least(steps: int, share: float) -> None:
    assert design.share_of_steps(0.06, steps) == pytest.approx(share)


def tried(**metrics: float) -> list[Tried]:
    """Rates of one search, as in `r2e_4=0.7`."""
    return [
        Tried(learning_rate=float(name[1:].replace("_", "-")), share=0.06, metric=metrics[name]) for name in metrics
    ]


def test_finished_takes_the_best_rate() -> None:
    found = design.finished("lora", tried(r1e_4=0.91, r3e_4=0.93, r1e_3=0.7), True, True, 1000, True)
    assert (found.chosen, found.on_edge) == (3e-4, False)
    assert found.reason == "best of 3 rates on the eval rows after 6% of the steps"
    edge = design.finished("lora", tried(r1e_4=2.0, r3e_4=2.1, r1e_3=math.nan), False, True, 1000, False)
    assert (edge.chosen, edge.on_edge) == (1e-4, True)
    assert edge.reason.endswith("of the steps, at the edge of those tried")
    near = design.finished("lora", tried(r1e_4=2.0, r3e_4=2.01, r1e_3=math.nan), False, True, 1000, False)
    assert (near.chosen, near.on_edge) == (1e-4, False)  # as good as its neighbour: nothing says that it gets better


def test_slower_is_asked_for_when_a_whole_run_ends_below_its_short_trial() -> None:
    search = design.finished("lora", tried(r2e_3=0.74, r6e_3=0.75), True, True, 1003, True)
    assert design.slower(search, 0.02, True, 1003, True) == 2e-3
    assert design.slower(search, 0.745, True, 1003, True) is None
    assert design.slower(search, 0.91, True, 1003, True) is None
    assert design.slower(search, math.nan, True, 1003, True) == 2e-3
    assert design.slower(search.model_copy(update={"chosen": 2e-3}), 0.02, True, 1003, True) is None
    assert design.slower(design.without_search("lora", 1e-3), 0.02, True, 1003, True) is None


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


def test_expected_small_budget_shortens_the_runs_and_says_so() -> None:
    found = design.expected(COSTS, 3, 0.1, 10, 1000, None, 300)
    assert found.seconds == pytest.approx(300, rel=0.01)
    assert found.length_share < 1
    assert "the verdict is about such runs" in found.notes[-1]
    assert found.detectable is None
    tiny = design.expected(COSTS, 3, 0.1, 10, 1000, None, 10)
    assert tiny.length_share == design.SHORTEST
    assert "stops when the time is up" in tiny.notes[-1]


def test_after_divergence_a_lower_rate_is_taken_tried_or_not_unless_it_was_given() -> None:
    found = Search(arm="lora", tried=tuple(tried(r1e_3=0.9, r1e_2=0.9)), chosen=1e-2, reason="made up")
    taken = []
    while (lower := design.after_divergence(found)) is not None:
        found = design.replaced(found, lower, "it diverged")
        taken.append(lower)
    assert taken == [1e-3, 3.2e-4, 1e-4]
    assert found.on_edge
    assert design.after_divergence(design.without_search("lora", 1e-2)) is None


@pytest.mark.parametrize(
    ("metrics", "second"),
    [
        ({"r6e_5": 0.3, "r2e_4": 0.613, "r6e_4": 0.766}, 2e-4),  # short trials flatter high rates
        ({"r6e_5": 0.03, "r2e_4": 0.194, "r6e_4": 0.185}, 6e-4),  # as good, with few steps
        ({"r6e_5": 0.3, "r2e_4": 0.766, "r6e_4": 0.613}, 6e-4),  # it may only have been slower to begin
        ({"r6e_5": 0.3, "r2e_4": 0.3, "r6e_4": math.nan}, 6e-5),
        ({"r2e_4": 0.3, "r6e_4": math.nan}, None),
    ],
)
def test_to_check_is_the_second_best_rate(metrics: dict[str, float], second: float | None) -> None:
    found = design.finished("full", tried(**metrics), True, True, 1003, True)
    assert design.to_check(found, True) == second
    assert design.to_check(design.replaced(found, 2e-5, "it diverged"), True) is None
    assert design.to_check(design.without_search("full", 1e-3), True) is None


def test_to_check_nothing_where_trials_were_whole_runs() -> None:
    whole = [one.model_copy(update={"share": 1.0}) for one in tried(r2e_4=0.3, r6e_4=0.7)]
    assert design.to_check(design.finished("full", whole, True, True, 1003, True), True) is None


@pytest.mark.parametrize(
    ("metrics", "greater", "chosen", "on_edge"),
    [
        ((0.919, 0.925), True, 2e-4, False),
        ((0.919, 0.919), True, 6e-4, False),  # equal: as the short trials said
        ((0.925, 0.919), True, 6e-4, False),  # ahead by less than a standard error
        ((0.925, 0.87), True, 6e-4, True),
        ((2.0, 1.9), False, 2e-4, False),
        ((1.8, 1.9), False, 6e-4, True),
        ((0.95, math.nan), True, 6e-4, True),
    ],
)
def test_checked_takes_the_better_whole_run(
    metrics: tuple[float, float], greater: bool, chosen: float, on_edge: bool
) -> None:
    search = design.finished("full", tried(r6e_5=0.5, r2e_4=0.6, r6e_4=0.7), True, True, 1003, True)
    found = design.checked(search, 2e-4, metrics, greater, 1003, greater)
    assert (found.chosen, found.on_edge) == (chosen, on_edge)
    assert [one.learning_rate for one in found.whole] == [6e-4, 2e-4]
    equal = metrics[0] == metrics[1]
    assert found.reason == (f"{search.reason}; two whole runs were equal" if equal else "the better of two whole runs")
