"""After each seed: who goes on, who waits, and is it enough?"""

from __future__ import annotations

import numpy as np
import pytest

from fulltune.compare.sequential import TIME_UP_SHARE, WAITING_SHARE, alpha_left, alpha_spent, plan_next_seeds
from fulltune.compare.verdict import Terms
from fulltune.records.comparison import Look
from fulltune.stats.bootstrap import resample_trials
from tests.unit.compare.methods import ACCURACY, drawn_right, looks_of, method

MOST = range(2, 11)


def looked(
    accuracies: list[float],
    seeds: list[int],
    rows: int = 4000,
    spread: float = 0.001,
    most: int = 5,
    again: bool = False,
) -> Look:
    """`full`, `lora` and `prompt` after so many seeds each."""
    right = drawn_right(np.random.default_rng(1), rows, accuracies, spread, max(seeds))
    kinds = (("full", "full"), ("lora", "lora"), ("prompt", "prompt"))
    methods = [
        method(name, kind, outputs[:count])  # type: ignore[arg-type]  # of this type
        for (name, kind), outputs, count in zip(kinds, right, seeds, strict=False)
    ]
    drawn = resample_trials(ACCURACY, [outputs.trials for outputs in methods], None, 1000)
    return plan_next_seeds(methods, drawn, Terms(ACCURACY, 0.01), most, rows, again=again)


@pytest.mark.parametrize("most", [2, 3, 5])
def test_spent_parts_sum_up_to_alpha_and_grow(most: int) -> None:
    parts = [alpha_spent(number, most, 0.05) for number in range(1, most + 1)]
    assert sum(parts) == pytest.approx(0.05)
    assert parts == sorted(parts)
    assert parts[0] == 0.0  # nothing is decided after one seed


def test_spent_second_look_after_catching_up_is_paid_for_by_those_that_waited() -> None:
    firsts, seconds = ([alpha_spent(number, 3, 0.05, again=again) for number in (1, 2, 3)] for again in (False, True))
    assert sum(WAITING_SHARE * one for one in firsts) + sum(seconds) == pytest.approx(0.05)
    assert all(second <= first for first, second in zip(firsts, seconds, strict=True))  # of the leader: the same test


def test_look_one_seed_full_and_the_leader_go_on_and_the_rest_waits() -> None:
    result = looked([0.93, 0.85, 0.91], [1, 1, 1])
    assert result.wanted_seeds == {"full": 2, "prompt": 2}
    assert result.reason.endswith(
        "the best method other than full is prompt; one seed does not show the spread between seeds"
    )


def test_look_one_seed_planned_is_enough() -> None:
    assert not looked([0.93, 0.85], [1, 1], most=1).wanted_seeds


def test_look_unclear_leader_goes_on_while_the_rest_waits() -> None:
    result = looked([0.93, 0.915, 0.55], [2, 2, 1], spread=0.005)
    assert (result.wanted_seeds, result.waiting) == ({"full": 3, "lora": 3}, ("prompt",))


def test_look_equal_leader_ends_it_whatever_the_rest_does() -> None:
    result = looked([0.95, 0.9501, 0.9], [4, 4, 1], rows=20_000)
    assert (result.wanted_seeds, result.waiting) == ({}, ("prompt",))


def test_look_full_that_beats_the_leader_lets_close_ones_catch_up() -> None:
    result = looked([0.95, 0.90, 0.938], [3, 3, 1], spread=0.002, most=3)
    assert (result.wanted_seeds, result.waiting) == ({"prompt": 3}, ())
    assert result.reason == "full beats the best other method; train as many seeds of prompt"
    assert result.spent == alpha_spent(3, 3, 0.05)
    second = looked([0.95, 0.90, 0.90], [3, 3, 3], spread=0.002, most=3, again=True)
    assert not second.wanted_seeds
    assert second.spent == alpha_spent(3, 3, 0.05, again=True)


def test_look_after_the_last_seeds_the_others_catch_up_where_full_is_likely_to_be_better() -> None:
    result = looked([0.95, 0.935, 0.938], [3, 3, 1], spread=0.004, most=3)
    assert (result.wanted_seeds, result.waiting) == ({"prompt": 3}, ())
    assert result.reason == "full seems to beat the best other method; train as many seeds of prompt"
    assert looked([0.95, 0.949, 0.938], [3, 3, 1], spread=0.004, most=3).wanted_seeds == {}
    assert looked([0.95, 0.935, 0.938], [3, 3, 3], spread=0.004, most=3, again=True).wanted_seeds == {}


def test_look_one_that_did_not_catch_up_clearly_goes_on_with_the_others() -> None:
    # `prompt` was beaten clearly before, and is not at the smaller part of alpha of the second look.
    result = looked([0.95, 0.85, 0.938], [3, 3, 1], spread=0.002, again=True)
    assert result.wanted_seeds == {"full": 4, "lora": 4, "prompt": 4}
    assert result.reason == "no clear answer yet for prompt"


def test_look_full_that_beats_all_is_enough_though_some_waited() -> None:
    assert looked([0.95, 0.85, 0.4], [4, 4, 1]).wanted_seeds == {}


def test_look_clear_difference_is_enough() -> None:
    result = looked([0.95, 0.85], [3, 3])
    assert not result.wanted_seeds
    assert result.spent == alpha_spent(3, 5, 0.05)


def test_look_unclear_goes_on_until_all_seeds() -> None:
    assert looked([0.93, 0.915], [3, 3], spread=0.005).wanted_seeds
    result = looked([0.93, 0.915], [5, 5], spread=0.005)
    assert not result.wanted_seeds
    assert result.reason == "all planned seeds are finished"


def test_look_too_few_rows_stops_because_seeds_would_not_help() -> None:
    # Row noise that both methods' seeds share: what differs is which rows they can do.
    chance = np.random.default_rng(0)
    full, lora = (np.repeat(chance.permutation(np.arange(150) < 127)[None], 3, axis=0) for _ in range(2))
    methods = [method("full", "full", full), method("lora", "lora", lora)]
    drawn = resample_trials(ACCURACY, [one.trials for one in methods], None, 2000)
    result = plan_next_seeds(methods, drawn, Terms(ACCURACY, 0.01), 5, 150)
    assert not result.wanted_seeds
    assert "more seeds are unlikely to decide" in result.reason


def test_left_is_the_part_of_the_look_that_ended_it_else_what_was_not_spent() -> None:
    first, second = looked([0.93, 0.915], [1, 1], most=3), looked([0.93, 0.915], [2, 2], spread=0.005, most=3)
    assert second.wanted_seeds
    assert alpha_left([first, second], 0.05)[0] == pytest.approx(alpha_spent(3, 3, 0.05))
    assert alpha_left([first, second.model_copy(update={"wanted_seeds": {}})], 0.05)[0] == second.spent
    assert alpha_left([], 0.05) == (0.05, 0.0)
    assert alpha_left([], 0.05, time_was_up=True) == (TIME_UP_SHARE * 0.05, (1 - TIME_UP_SHARE) * 0.05)


@pytest.mark.parametrize("most", [1, *MOST])
def test_left_something_where_all_seeds_were_run_but_a_method_was_left_out(most: int) -> None:
    now, later = alpha_left(looks_of(most, ends=True), 0.05, time_was_up=True)
    assert now == pytest.approx(TIME_UP_SHARE * alpha_spent(most, most, 0.05))
    assert later == pytest.approx(now)


@pytest.mark.parametrize("most", MOST)
@pytest.mark.parametrize("enough", [False, True])
def test_looks_and_verdicts_of_all_commands_keep_alpha_together(most: int, enough: bool) -> None:
    """The time was up after each number of seeds in turn (or a method was left out); then all seeds were run."""
    total, alpha = 0.0, 0.05
    for count in range(2 if enough else 1, most):  # nothing is enough after one seed
        looks = looks_of(count, most, alpha, ends=enough)
        now, later = alpha_left(looks, alpha, time_was_up=True)
        assert 0 < later < alpha
        total += passed(looks) + now
        alpha = later
    looks = looks_of(most, most, alpha, ends=True)
    now, later = alpha_left(looks, alpha)
    assert now > 0
    assert total + passed(looks) + now == pytest.approx(0.05)


def passed(looks: list[Look]) -> float:
    """What could have been tested after these looks, had they ended it; the one that did has its verdict."""
    return sum(one.spent for one in looks if one.wanted_seeds)


def test_left_where_time_is_up_while_others_catch_up_after_the_last_seeds_is_that_of_the_second_look() -> None:
    two, three = (looked([0.93, 0.915], [count] * 2, spread=0.005, most=3) for count in (2, 3))
    looks = [one.model_copy(update={"wanted_seeds": {"prompt": 3}}) for one in (two, three)]
    for now, later in (alpha_left(looks, 0.05), alpha_left(looks, 0.05, time_was_up=True)):
        assert now == pytest.approx(alpha_spent(3, 3, 0.05, again=True))
        assert later == 0.0  # full and the leader could have been tested at all that was left


def test_left_second_look_takes_no_more_than_the_first_after_the_same_seeds() -> None:
    first, second = looks_of(2, 3)
    again = second.model_copy(update={"spent": alpha_spent(2, 3, 0.05, again=True), "wanted_seeds": {}})
    now, later = alpha_left([first, second, again], 0.05, time_was_up=True)
    assert now == again.spent
    assert later == pytest.approx(alpha_spent(3, 3, 0.05))
