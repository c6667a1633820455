"""Seeds and budgets: tables of numbers."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from fulltune.compare import design
from fulltune.compare.design import Choice, Cost, Done, Fixed
from fulltune.compare.sequential import TIME_UP_SHARE, spent
from fulltune.errors import RecipeError
from fulltune.records.comparison import Expectation
from fulltune.stats.precision import planned_detectable
from fulltune.text import parse_seconds, typed_seconds


@pytest.mark.parametrize(("given", "rows", "seeds"), [(None, 9_999, 5), (None, 10_000, 3), (2, 50, 2)])
def test_num_seeds_few_rows_need_more(given: int | None, rows: int, seeds: int) -> None:
    assert design.num_seeds(given, rows) == seeds


COSTS = {"full": Cost(100, 3), "lora": Cost(80, 3)}
FIELD = {
    "full": Cost(100, 3, True, 8),
    "lora": Cost(90, 3, True, 8),
    "adapter": Cost(80, 3, True, 8),
    "head": Cost(30, 3, False, 8),
}
FIXED = Fixed(start=10)
MANY = (60, *range(400, 4000, 60))


def test_expected_without_budget_is_the_whole_design() -> None:
    found = design.expected(COSTS, 3, 0.1, FIXED, 3080, 0.01)
    assert found.seconds == pytest.approx(180 * (4 + 3 * 0.1) + 2 * 10 * (4 + 3))
    assert (found.num_seeds, found.recipe_seeds, found.num_search_trials, found.notes) == (3, 3, 6, ())
    assert found.detectable == planned_detectable(3080, 3, margin=0.01, alpha=spent(3, 3, 0.05))
    assert found.detectable_apart is not None
    assert found.detectable_apart > found.detectable


def test_expected_short_trials_take_what_they_take_without_a_budget_for_forgetting() -> None:
    costs = {arm: replace(cost, free_seconds=cost.run_seconds / 2) for arm, cost in COSTS.items()}
    apart = (
        design.expected(COSTS, 3, 0.1, FIXED, 300, 0.01).seconds
        - design.expected(costs, 3, 0.1, FIXED, 300, 0.01).seconds
    )
    assert apart == pytest.approx(180 * 3 * 0.1 / 2)


def test_expected_methods_that_wait_get_one_run() -> None:
    costs = {"full": Cost(100, 3), "prompt": Cost(120, 1), "lora": Cost(80, 3)}
    found = design.expected(costs, 3, 0.1, FIXED, 3080, 0.01)
    # Which one leads is not known: the dearest is reckoned with. It has but one rate here.
    assert found.seconds == pytest.approx(100 * (4 + 0.3) + 120 * 3 + 80 * (1 + 0.3) + 10 * (4 + 3 + 1 + 6))
    assert found.most_seconds == pytest.approx(180 * (4 + 0.3) + 120 * 3 + 10 * (4 + 3 + 4 + 6))
    assert design.expected(costs, 3, 0.1, FIXED, 3080, 0.01, sequential=False).seconds == found.most_seconds


def test_expected_head_never_leads() -> None:
    costs = {"full": Cost(100, 1), "lora": Cost(10, 1), "head": Cost(500, 1, decides=False)}
    assert design.runs_of(costs, Choice(("full", "lora", "head"), 3, 0.1), True) == {"full": 3, "lora": 3, "head": 1}


# ---- budgets ---------------------------------------------------------------------------------------------------


def fitted(budget: float, costs: dict[str, Cost] = FIELD, seeds: int = 5, **more: object) -> Expectation | None:
    """None where it is refused as too short."""
    try:
        return design.expected(costs, seeds, 0.1, Fixed(10, 5, 30), 300, 0.01, budget, **more)  # type: ignore[arg-type]
    except RecipeError:
        return None


@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize("costs", [COSTS, FIELD])
def test_budget_more_of_it_never_gives_fewer_seeds_or_methods_and_the_forecast_keeps_it(
    costs: dict[str, Cost], sequential: bool
) -> None:
    found = [(budget, fitted(budget, costs, sequential=sequential)) for budget in MANY]
    known = [(budget, one) for budget, one in found if one is not None]
    assert found[0][1] is None
    assert known[-1][1].num_seeds == (5 if sequential else known[-1][1].num_seeds)
    for budget, one in known:
        assert one.most_seconds == one.seconds <= (1 - design.RESERVE) * budget
        assert 2 <= one.num_seeds <= 5
        assert {"full", "lora"} <= set(one.arms)
        assert set(one.arms) | set(one.left_out) == set(costs)
    assert all(before.num_seeds <= after.num_seeds for (_, before), (_, after) in pairwise(known))


def test_budget_gives_up_breadth_before_the_third_and_the_search_after_it() -> None:
    known = [one for budget in MANY if (one := fitted(budget)) is not None]
    assert {one.num_seeds for one in known if one.left_out} == {2, 3}
    assert {one.num_seeds for one in known if not one.search_share} == {2}
    assert all(one.arms == ("full", "lora") for one in known if not one.search_share)
    # Five is nothing that a recipe says.
    assert {one.notes[0] for one in known if one.num_seeds == 2} == {
        "2 seeds are planned instead of up to 5; where time is left, more are run"
    }


def test_budget_that_is_too_short_is_refused_with_one_that_is_enough() -> None:
    with pytest.raises(RecipeError) as caught:
        design.expected(COSTS, 3, 0.1, FIXED, 300, 0.01, 120)
    (said,) = caught.value.problems
    assert said.startswith("--budget 2m is too short for a verdict: 2 runs each of full and lora")
    enough = parse_seconds(said.partition("give --budget ")[2].split()[0])
    slower = {arm: replace(cost, run_seconds=1.1 * cost.run_seconds) for arm, cost in COSTS.items()}  # next time
    assert all(design.expected(costs, 3, 0.1, FIXED, 300, 0.01, enough).num_seeds == 2 for costs in (COSTS, slower))


@pytest.mark.parametrize("margin", [0.01, None])
def test_detectable_of_two_seeds_is_not_promised(margin: float | None) -> None:
    found = design.expected(COSTS, 5, 0.1, FIXED, 300, margin, 700)
    assert (found.num_seeds, found.detectable, found.detectable_apart) == (2, None, None)


def test_detectable_of_a_budget_that_will_end_is_that_of_the_part_of_alpha_it_may_spend() -> None:
    found = design.expected(COSTS, 5, 0.1, FIXED, 300, 0.01, 1200)
    assert found.num_seeds == 3
    assert found.detectable == planned_detectable(300, 3, margin=0.01, alpha=TIME_UP_SHARE * 0.05)


def test_going_on_counts_what_is_there_and_what_was_spent() -> None:
    fresh = design.expected(COSTS, 3, 0.1, FIXED, 300, 0.01, 3000)
    done = Done({"full": 3, "lora": 2}, ("full", "lora"))
    going_on = design.expected(COSTS, 3, 0.1, FIXED, 300, 0.01, 3000, spent_seconds=600, done=done)
    assert going_on.seconds == pytest.approx(600 + 110 + 2 * 90)  # one run of full and two of lora, checks among them
    assert going_on.num_seeds == fresh.num_seeds
    # What is there need not fit again: one run of lora is missing.
    assert design.expected(COSTS, 2, 0.0, FIXED, 300, 0.01, 720, spent_seconds=600, done=done).num_seeds == 2


def test_going_on_reckons_with_another_rate_where_a_search_is_made_again() -> None:
    """Two runs of each at the usual rate: they count only in a design that searches no rates."""
    at_usual = Done({"full": 2, "lora": 2})
    searches, usual = Choice(("full", "lora"), 2, 0.1), Choice(("full", "lora"), 2, 0.0)
    assert design.seconds(COSTS, searches, FIXED, done=at_usual) == design.seconds(COSTS, searches, FIXED)
    assert design.seconds(COSTS, usual, FIXED, done=at_usual) == FIXED.verdict


def test_detectable_where_methods_are_left_out_is_that_of_the_part_of_alpha_it_may_spend() -> None:
    found = next(one for budget in MANY if (one := fitted(budget, seeds=3)) and one.left_out and one.num_seeds == 3)
    rivals = len([arm for arm in found.arms if FIELD[arm].decides]) - 1
    level = TIME_UP_SHARE * spent(3, 3, 0.05)
    assert found.detectable == planned_detectable(300, 3, margin=0.01, alpha=level, num_arms=rivals)


@pytest.mark.parametrize(
    ("time", "said", "up"), [(45, "45s", "50s"), (61, "1m1s", "1m10s"), (431, "7m11s", "7m30s"), (3601, "1h", "1h5m")]
)
def test_times_are_written_as_they_are_typed(time: float, said: str, up: str) -> None:
    assert (typed_seconds(time), typed_seconds(design.round_up(time))) == (said, up)
