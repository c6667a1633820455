"""Seeds and budgets: tables of numbers."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from fulltune.compare import budget
from fulltune.compare.budget import MethodCost, fit_design_to_budget, forecast_seconds, with_detectable_differences
from fulltune.compare.context import Context
from fulltune.compare.sequential import TIME_UP_SHARE, alpha_spent
from fulltune.errors import RecipeError
from fulltune.recipe.fields import Recipe
from fulltune.records.comparison import Expectation
from fulltune.records.plan import TimeNeed
from fulltune.stats.precision import planned_detectable_difference
from fulltune.text import parse_seconds, typed_seconds


@pytest.mark.parametrize(("setting", "rows", "seeds"), [(None, 9_999, 5), (None, 10_000, 3), (2, 50, 2)])
def test_num_seeds_few_rows_need_more(setting: int | None, rows: int, seeds: int) -> None:
    assert budget.num_seeds(setting, rows) == seeds


COSTS = {"full": MethodCost(100, 3, start=10), "lora": MethodCost(80, 3, start=10)}
FIELD = {
    "full": MethodCost(100, 3, start=10, scoring=8),
    "lora": MethodCost(90, 3, start=10, scoring=8),
    "adapter": MethodCost(80, 3, start=10, scoring=8),
    "head": MethodCost(30, 3, decides=False, start=10, scoring=8),
}
MANY = (60, *range(400, 4000, 60))


def whole(costs: dict[str, MethodCost], seeds: int, **changes: Any) -> Expectation:
    fields = {"num_seeds": seeds, "most_seeds": seeds, "search_share": 0.1, **changes}
    return Expectation(methods=tuple(costs), **fields)


def design_of(
    costs: dict[str, MethodCost],
    seeds: int = 3,
    test_rows: int = 300,
    budget: float | None = None,
    end: float = 0.0,
    spent: float = 0.0,
    **changes: Any,
) -> Expectation:
    """With what it can find by a margin of a point."""
    design = fit_design_to_budget(costs, whole(costs, seeds, budget_seconds=budget, **changes), end, spent)
    return with_detectable_differences(design, costs, 0.01, 0.05, test_rows)


@pytest.mark.parametrize(("seconds", "is_hopeless"), [(None, False), (90.0, True), (190.0, False)])
def test_hopeless_budget_is_refused_by_arithmetic_alone(seconds: float | None, is_hopeless: bool) -> None:
    """Two runs of 100 s and of 90 s could take half as long, but no less."""
    refusal = pytest.raises(RecipeError, match="is too short for a verdict: 2 runs each of full and lora")
    with refusal if is_hopeless else nullcontext():
        budget.refuse_hopeless_budget(FIELD, whole(FIELD, 3, budget_seconds=seconds), 0.0, 0.0)


def test_without_budget_it_is_the_whole_design() -> None:
    design = design_of(COSTS, test_rows=3080)
    assert design.seconds == pytest.approx(180 * (4 + 3 * 0.1) + 2 * 10 * (4 + 3))
    assert (design.num_seeds, design.most_seeds, design.num_search_trials, design.notes) == (3, 3, 6, ())
    assert design.detectable is not None
    alike, apart = design.detectable
    assert alike == planned_detectable_difference(3080, 3, 0.005, 0.01, alpha_spent(3, 3, 0.05)) < apart


def test_methods_that_wait_get_one_run_and_head_never_leads() -> None:
    costs = {
        "full": MethodCost(100, 3),
        "prompt": MethodCost(120, 1),
        "lora": MethodCost(80, 3),
        "head": MethodCost(500, decides=False),
    }
    # Which one leads is not known: the dearest is reckoned with. It has but one rate here.
    assert design_of(costs).seconds == pytest.approx(100 * (4 + 0.3) + 120 * 3 + 80 * (1 + 0.3) + 500)
    all_seeds = 180 * (4 + 0.3) + 120 * 3 + 500 * 3
    assert design_of(costs, sequential=False).seconds == pytest.approx(all_seeds)


# ---- budgets ---------------------------------------------------------------------------------------------------


def fitted(limit: float, costs: dict[str, MethodCost] = FIELD, seeds: int = 5, **limits: Any) -> Expectation | None:
    """None where it is refused as too short."""
    try:
        return design_of(costs, seeds, budget=limit, end=30, **limits)
    except RecipeError:
        return None


@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize("costs", [COSTS, FIELD])
def test_budget_more_of_it_never_gives_fewer_seeds_or_methods_and_the_forecast_keeps_it(
    costs: dict[str, MethodCost], sequential: bool
) -> None:
    every = [(limit, fitted(limit, costs, sequential=sequential)) for limit in MANY]
    fitting = [(limit, design) for limit, design in every if design is not None]
    assert every[0][1] is None
    assert fitting[-1][1].num_seeds == (5 if sequential else fitting[-1][1].num_seeds)
    for limit, design in fitting:
        assert design.seconds <= (1 - budget.RESERVE) * limit
        assert 2 <= design.num_seeds <= 5
        assert {"full", "lora"} <= set(design.methods) <= set(costs)
    assert all(before.num_seeds <= after.num_seeds for (_, before), (_, after) in pairwise(fitting))


def test_budget_gives_up_breadth_before_the_third_and_the_search_after_it() -> None:
    fitting = [design for limit in MANY if (design := fitted(limit)) is not None]
    assert {design.num_seeds for design in fitting if len(design.methods) < len(FIELD)} == {2, 3}
    assert {design.num_seeds for design in fitting if not design.search_share} == {2}
    assert all(design.methods == ("full", "lora") for design in fitting if not design.search_share)
    # Five is nothing that a recipe says.
    assert {design.notes[0] for design in fitting if design.num_seeds == 2} == {
        "2 seeds are planned instead of 5; more seeds run if time remains"
    }


def test_budget_that_is_too_short_is_refused_with_one_that_is_enough() -> None:
    with pytest.raises(RecipeError) as caught:
        design_of(COSTS, budget=120)
    (problem,) = caught.value.problems
    assert problem.startswith("--budget 2m is too short for a verdict: 2 runs each of full and lora")
    enough = parse_seconds(problem.partition("set --budget ")[2].split()[0])
    slower = {method: replace(cost, run=1.1 * cost.run) for method, cost in COSTS.items()}  # next time
    assert all(design_of(costs, budget=enough).num_seeds == 2 for costs in (COSTS, slower))


def test_detectable_of_two_seeds_is_not_promised() -> None:
    design = design_of(COSTS, 5, budget=700)
    assert (design.num_seeds, design.detectable) == (2, None)


def test_detectable_of_a_budget_that_will_end_is_that_of_the_part_of_alpha_it_may_spend() -> None:
    design = design_of(COSTS, 5, budget=1200)
    assert design.num_seeds == 3
    assert design.detectable is not None
    assert design.detectable[0] == planned_detectable_difference(300, 3, 0.005, 0.01, TIME_UP_SHARE * 0.05)
    some = next(
        design
        for time in MANY
        if (design := fitted(time, seeds=3)) and len(design.methods) < 4 and design.num_seeds == 3
    )
    rivals = len([method for method in some.methods if FIELD[method].decides]) - 1
    level = TIME_UP_SHARE * alpha_spent(3, 3, 0.05) / rivals
    assert some.detectable is not None
    assert some.detectable[0] == planned_detectable_difference(300, 3, 0.005, 0.01, level)


def test_going_on_counts_what_is_there_and_what_was_spent() -> None:
    done = {method: replace(COSTS[method], done=runs, searched=True) for method, runs in (("full", 3), ("lora", 2))}
    going_on = design_of(done, budget=3000, spent=600)
    assert going_on.seconds == pytest.approx(600 + 110 + 2 * 90)  # one run of full and two of lora, checks among them
    assert going_on.num_seeds == design_of(COSTS, budget=3000).num_seeds
    # What is there need not fit again: one run of lora is missing.
    assert design_of(done, 2, search_share=0.0, budget=720, spent=600).num_seeds == 2


def test_going_on_reckons_with_another_rate_where_a_search_is_made_again() -> None:
    """Two runs of each at the usual rate: they count only in a design that searches no rates."""
    at_usual = {method: replace(cost, done=2) for method, cost in COSTS.items()}
    assert forecast_seconds(at_usual, whole(COSTS, 2)) == forecast_seconds(COSTS, whole(COSTS, 2))
    assert forecast_seconds(at_usual, whole(COSTS, 2, search_share=0.0)) == 0


def test_search_alone_pays_for_no_scoring_and_no_verdict(tmp_path: Path) -> None:
    time = TimeNeed(
        train_seconds=60.0, eval_seconds=6.0, save_seconds=4.0, tokens=1, tokens_per_second=1.0, source="arithmetic"
    )
    planned = mock.Mock(time=time, total_steps=10, global_batch_size=10, learning_rate=1e-4)
    job = mock.Mock(folder=tmp_path)
    line = Context(job, mock.Mock(splits={name: mock.Mock(rows=100) for name in ("train", "eval", "test")}), "")
    seconds_of = {}
    for methods in (("full", "lora"), ()):
        job.recipe = Recipe.model_validate(
            {"model": "m", "task": "causal-lm", "data": {"train": "a"}, "methods": list(methods)}
        )
        with mock.patch.object(Context, "method_setup", return_value=mock.Mock(plan=planned)):
            costs, end = budget.forecast_costs(line)
        seconds_of[methods] = costs["full"].scoring, end
        assert (costs["full"].run, costs["full"].start) == (70.0, budget.START_SECONDS)
    assert min(seconds_of["full", "lora"]) > budget.SCORING_SECONDS
    assert seconds_of[()] == (0.0, 0.0)


@pytest.mark.parametrize(
    ("time", "text", "up"), [(45, "45s", "50s"), (61, "1m1s", "1m10s"), (431, "7m11s", "7m30s"), (3601, "1h", "1h5m")]
)
def test_times_are_written_as_they_are_typed(time: float, text: str, up: str) -> None:
    assert (typed_seconds(time), typed_seconds(budget.round_up_seconds(time))) == (text, up)
