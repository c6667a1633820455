"""After each seed: drop, enough or more."""

from __future__ import annotations

import numpy as np
import pytest

from fulltune.compare.sequential import look, spent
from fulltune.compare_records import Look
from tests.unit.compare.arms import ACCURACY, arm, drawn_right


def looked(accuracies: list[float], seeds: list[int], rows: int = 4000, spread: float = 0.001, most: int = 5) -> Look:
    """`full`, `lora` and `prompt` after so many seeds each."""
    right = drawn_right(np.random.default_rng(1), rows, accuracies, spread, max(seeds))
    kinds = (("full", "full"), ("lora", "lora"), ("prompt", "prompt"))
    arms = [
        arm(name, kind, one[:count])  # type: ignore[arg-type]
        for (name, kind), one, count in zip(kinds, right, seeds, strict=False)
    ]
    return look(arms, ACCURACY, margin=0.01, max_seeds=most, samples=1000)


@pytest.mark.parametrize("most", [2, 3, 5])
def test_spent_parts_sum_up_to_alpha_and_grow(most: int) -> None:
    parts = [spent(number, most, 0.05) for number in range(1, most + 1)]
    assert sum(parts) == pytest.approx(0.05)
    assert parts == sorted(parts)
    with pytest.raises(ValueError, match="look"):
        spent(most + 1, most, 0.05)


def test_look_one_seed_drops_only_what_is_hopeless() -> None:
    found = looked([0.93, 0.90, 0.55], [1, 1, 1])
    assert [step.decision for step in found.arms] == ["more", "more", "drop"]
    assert not found.enough
    # Eight points behind could be the luck of one seed.
    assert looked([0.93, 0.85], [1, 1]).step("lora").decision == "more"


def test_look_dropped_arm_stays_dropped_and_full_goes_on() -> None:
    found = looked([0.93, 0.92, 0.55], [2, 2, 1])
    assert found.step("prompt").decision == "drop"
    assert found.step("full").decision == "more"


def test_look_clear_difference_is_enough() -> None:
    found = looked([0.95, 0.85], [3, 3])
    assert found.enough
    assert {step.decision for step in found.arms} == {"enough"}
    assert found.spent == spent(3, 5, 0.05)


def test_look_clear_equivalence_is_enough() -> None:
    assert looked([0.95, 0.9501], [4, 4], rows=20_000).enough


def test_look_unclear_goes_on_until_all_seeds() -> None:
    assert not looked([0.93, 0.915], [3, 3], spread=0.005).enough
    found = looked([0.93, 0.915], [5, 5], spread=0.005)
    assert found.enough
    assert found.reason == "all seeds that were planned"


def test_look_too_few_rows_stops_because_seeds_would_not_help() -> None:
    # Row noise that both arms' seeds share: what differs is which rows they can do.
    chance = np.random.default_rng(0)
    full, lora = (np.repeat(chance.permutation(np.arange(150) < 127)[None], 3, axis=0) for _ in range(2))
    found = look([arm("full", "full", full), arm("lora", "lora", lora)], ACCURACY, margin=0.01, max_seeds=5)
    assert found.enough
    assert "more seeds would hardly decide" in found.reason


def test_look_full_is_never_dropped() -> None:
    assert looked([0.55, 0.93], [1, 1]).step("full").decision == "more"
