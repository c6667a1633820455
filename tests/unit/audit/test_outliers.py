"""Outliers: rows far from all others are found whatever hides them, and nothing where no row is far."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fulltune.audit.pretrained import (
    MAX_FAR,
    MIN_TEXTS,
    NEIGHBOURS,
    OUTLIER_IQRS,
    find_outliers,
    mark_outliers,
    mean_distance_to_nearest,
)
from fulltune.probe.linear import NoProbe

HIDDEN = 32


def unit(vectors: np.ndarray) -> np.ndarray:
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)


def usual(rows: int, seed: int = 0, kinds: range = range(10)) -> np.ndarray:
    """Rows of several kinds, all about one thing."""
    draw = np.random.default_rng(seed)
    centres = 4 * np.eye(HIDDEN)[0] + 0.5 * np.random.default_rng(99).normal(size=(20, HIDDEN))
    return unit(centres[draw.choice(kinds, rows)] + draw.uniform(-1.7, 1.7, size=(rows, HIDDEN)))


def odd(rows: int, seed: int = 1) -> np.ndarray:
    """Rows that are about anything else."""
    vectors = np.random.default_rng(seed).normal(size=(rows, HIDDEN))
    vectors[:, 0] = -2
    return unit(vectors)


def read(keys: np.ndarray | None = None, drawn: Any = None, **states: np.ndarray) -> Any:
    def items(split: str) -> Any:
        positions = np.array((drawn or {}).get(split, range(len(states[split]))))
        return SimpleNamespace(features=states[split][positions]), positions

    train_keys = np.arange(len(states["train"])) if keys is None else keys
    return find_outliers(SimpleNamespace(items=items), train_keys, {of: len(them) for of, them in states.items()})  # type: ignore[arg-type,misc]  # a fake


def places(outliers_by_split: Any) -> list[tuple[str, int]]:
    return [(split, position) for split, distances in outliers_by_split[0].items() for position in distances]


def test_nothing_is_listed_where_no_row_is_far() -> None:
    for seed in range(5):
        assert places(read(train=usual(400, seed))) == []


def test_planted_rows_are_found_and_no_others() -> None:
    train = usual(400)
    train[[7, 100, 399]] = odd(3)
    result = read(train=train)
    assert places(result) == [("train", 7), ("train", 100), ("train", 399)]
    assert min(result[0]["train"].values()) > 1.5 * result[1]


def test_copies_of_an_odd_row_do_not_hide_it() -> None:
    train, keys = usual(400), np.arange(400)
    train[:40], keys[:40] = odd(1), 0
    assert places(read(keys, train=train)) == [("train", at) for at in range(40)]


def test_odd_rows_of_one_kind_hide_each_other_only_when_they_are_many() -> None:
    few, many = 3, NEIGHBOURS + 5
    kind = odd(1)
    for count, expected in ((few, few), (many, 0)):
        train = usual(600)
        train[:count] = unit(kind + 0.05 * np.random.default_rng(2).normal(size=(count, HIDDEN)))
        assert len(places(read(train=train))) == expected


def test_odd_rows_that_raise_the_fence_are_found_in_rounds() -> None:
    states = np.concatenate([usual(400), odd(36)])
    once = mean_distance_to_nearest(states, states)
    lower, upper = np.quantile(once, [0.25, 0.75])
    distances, is_far, quartile, fence = mark_outliers(states)
    assert is_far[400:].all()
    assert not is_far[:400].any()
    assert fence < upper + OUTLIER_IQRS * (upper - lower)
    again = mean_distance_to_nearest(states, states[:400])
    np.testing.assert_allclose(distances, again, atol=1e-6)
    assert quartile == pytest.approx(np.quantile(again[:400], 0.75))


def test_row_of_a_rare_class_is_no_outlier_by_itself() -> None:
    train = np.concatenate([usual(400), usual(3, kinds=range(15, 16))])
    assert places(read(train=train)) == []


def test_held_out_rows_are_compared_with_train_rows_alone() -> None:
    held_out = np.concatenate([usual(30, 3), np.repeat(odd(1), 25, axis=0)])
    assert places(read(train=usual(400), test=held_out)) == [("test", at) for at in range(30, 55)]


def test_held_out_row_that_stands_in_train_is_not_its_own_neighbour() -> None:
    train = usual(400)
    train[5] = odd(1)
    assert places(read(train=train, test=train[5:6])) == [("train", 5), ("test", 0)]


def test_positions_are_those_of_the_rows_that_were_drawn() -> None:
    train = usual(500)
    train[[3, 450]] = odd(2)
    result = read(drawn={"train": list(range(100, 500))}, train=train)
    assert places(result) == [("train", 450)]
    assert result[2] == 100


def test_what_cannot_be_told_is_said() -> None:
    few = MIN_TEXTS - 1
    with pytest.raises(NoProbe, match="expected at least 200"):
        read(train=usual(few))
    with pytest.raises(NoProbe, match="expected at least 200"):
        read(np.arange(400) % few, train=usual(400))
    train = np.concatenate([usual(400), odd(60)])
    assert MAX_FAR * len(train) < 60
    with pytest.raises(NoProbe, match="several kinds"):
        read(train=train)
