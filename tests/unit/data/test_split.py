"""Splitting rows off: duplicates together, every class on both sides, the same rows every time."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest

from fulltune.data import split
from fulltune.data.groups import hash_to_number, sample_by_label
from fulltune.data.split import MAX_HELD_OUT_ROWS


def split_off(groups: list[str], strata: list[str], fraction: float, seed: int) -> list[bool]:
    """By names instead of numbers."""
    drawn = np.array([hash_to_number(seed, group) for group in groups], np.uint64)
    numbers = np.unique(strata, return_inverse=True)[1]
    return split.hold_out_groups(drawn, numbers, fraction).tolist()


def drawn(seed: int) -> tuple[list[str], list[str]]:
    """Groups of one to five rows in three classes of different sizes."""
    chance = random.Random(seed)
    groups, strata = [], []
    for number in range(300):
        label = chance.choices("abc", weights=(6, 3, 1))[0]
        size = chance.choice((1, 1, 1, 2, 5))
        groups += [f"group {number}"] * size
        strata += [label] * size
    order = list(range(len(groups)))
    chance.shuffle(order)
    return [groups[i] for i in order], [strata[i] for i in order]


@pytest.mark.parametrize("seed", range(5))
def test_split_groups_are_never_separated(seed: int) -> None:
    groups, strata = drawn(seed)
    sides: dict[str, set[bool]] = {}
    for group, out in zip(groups, split_off(groups, strata, 0.2, seed), strict=True):
        sides.setdefault(group, set()).add(out)
    assert all(len(side) == 1 for side in sides.values())


@pytest.mark.parametrize("seed", range(5))
def test_split_strata_keep_their_shares(seed: int) -> None:
    groups, strata = drawn(seed)
    held_out = split_off(groups, strata, 0.2, seed)
    whole, taken = Counter(strata), Counter(label for label, out in zip(strata, held_out, strict=True) if out)
    for label, count in whole.items():
        assert 0.2 * count - 5 <= taken[label] <= 0.2 * count + 1


def test_split_order_of_rows_does_not_matter() -> None:
    groups = [f"g{number}" for number in range(50)]
    strata = ["a"] * 50
    forward = {group for group, out in zip(groups, split_off(groups, strata, 0.2, 3), strict=True) if out}
    groups.reverse()
    backward = {group for group, out in zip(groups, split_off(groups, strata, 0.2, 3), strict=True) if out}
    assert forward == backward


@pytest.mark.parametrize(
    ("groups", "strata", "fraction", "count"),
    [
        (["a", "b"], ["x", "x"], 0.1, 1),
        (["a"], ["x"], 0.1, 0),
        (["a"] * 40, [""] * 40, 0.1, 0),
        (["a"] * 30 + [f"s{n}" for n in range(10)], [""] * 40, 0.1, 4),
        (["a"] * 30 + ["b"] * 10, ["x"] * 40, 0.1, 10),
        ([], [], 0.1, 0),
    ],
    ids=["two", "one", "all the same", "one large group", "two large groups", "none"],
)
def test_split_small_or_repeated_rows(groups: list[str], strata: list[str], fraction: float, count: int) -> None:
    for seed in range(10):
        assert sum(split_off(groups, strata, fraction, seed)) == count


def test_split_large_data_holds_out_at_most_the_cap() -> None:
    groups = [f"g{number}" for number in range(60_000)]
    assert sum(split_off(groups, ["a"] * 60_000, 0.1, 0)) == MAX_HELD_OUT_ROWS


def test_sample_keeps_order_and_is_repeatable() -> None:
    rows = [list[str]()] * 1000
    chosen = sample_by_label(rows, 50, 7)
    assert chosen == sorted(set(chosen)) == sample_by_label(rows, 50, 7)
    assert len(chosen) == 50
    assert chosen != sample_by_label(rows, 50, 8)


@pytest.mark.parametrize(("most", "least"), [(20, 1), (45, 2), (60, 3), (200, 3)])
def test_sample_keeps_every_label(most: int, least: int) -> None:
    labels = [[f"l{number}"] for number in range(20) for _ in range(3 + 40 * (number < 5))]
    chosen = sample_by_label(labels, most, 7)
    counts = Counter(labels[position][0] for position in chosen)
    assert (len(chosen), len(counts), min(counts.values()) >= least) == (most, 20, True)
    more = sample_by_label([*labels, ["l0"], ["l7"]], most, 7)
    assert len(set(chosen) & set(more)) >= most - 4


@pytest.mark.parametrize("seed", range(5))
def test_folds_keep_groups_whole_and_share_every_class(seed: int) -> None:
    groups, strata = drawn(seed)
    numbers = np.array([hash_to_number(seed, group) for group in groups], np.uint64)
    folds = split.assign_folds(numbers, np.unique(strata, return_inverse=True)[1], 5)
    of_group = {(group, fold) for group, fold in zip(groups, folds.tolist(), strict=True)}
    assert len(of_group) == len(set(groups))
    for label in "abc":
        counts = np.bincount(folds[np.array(strata) == label], minlength=6)
        assert counts[0] == 0
        assert counts[1:].max() - counts[1:].min() <= 5, "by the size of a group at most"
    other = np.array([hash_to_number(seed + 1, group) for group in groups], np.uint64)
    assert (split.assign_folds(other, np.unique(strata, return_inverse=True)[1], 5) != folds).any()
