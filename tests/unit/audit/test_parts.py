"""Tags and several labels that are probably wrong: planted errors are found, other rows left alone, estimates hold."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fulltune.audit.labels import MOST_OUTSIDE, out_of_fold, suspected_parts, word_shapes
from fulltune.probe.linear import Items, NoProbe

WIDTH, WORDS = 16, 8


def words(num_rows: int, spread: float = 0.5) -> Items:
    """Rows of eight words: two are an entity of one of two types, in half of the rows, the others are O."""
    drawn = np.random.default_rng(0)
    middles = 2 * drawn.normal(size=(5, WIDTH))
    labels = np.zeros((num_rows, WORDS), np.int64)
    for row in range(0, num_rows, 2):
        kind, start = drawn.integers(2), drawn.integers(WORDS - 1)
        labels[row, start : start + 2] = 1 + kind, 3 + kind  # B-a, B-b, I-a, I-b
    features = middles[labels.ravel()] + spread * drawn.normal(size=(labels.size, WIDTH))
    return Items("tags", features.astype(np.float32), labels.ravel(), np.repeat(np.arange(num_rows), WORDS), 5)


def missed(items: Items, every: int) -> tuple[Items, np.ndarray]:
    """The tags of every so many entities taken away, and which words had them."""
    labels = items.labels.copy()
    begins = np.flatnonzero((labels == 1) | (labels == 2))[::every]
    labels[begins] = labels[begins + 1] = 0
    return replace(items, labels=labels), labels != items.labels


def several(num_rows: int, kind: str) -> tuple[Items, np.ndarray]:
    """Rows with two of six labels each, of which every tenth row has one too many, or one too few; and which."""
    drawn = np.random.default_rng(0)
    middles = 2 * drawn.normal(size=(6, WIDTH))
    right = np.zeros((num_rows, 6), np.float32)
    for row in right:
        row[drawn.choice(6, 2, replace=False)] = 1
    features = right @ middles + drawn.normal(size=(num_rows, WIDTH))
    labels = right.copy()
    if kind != "clean":
        for row in labels[::10]:
            row[drawn.choice(np.flatnonzero(row == (0 if kind == "too many" else 1)))] = float(kind == "too many")
    return Items("multi_label", features.astype(np.float32), labels, np.arange(num_rows), 6), (labels != right).ravel()


def test_missed_entities_are_found_with_all_their_words() -> None:
    items, wrong = missed(words(400), 10)
    found = suspected_parts(items)
    assert wrong[found.suspects].mean() >= 0.6
    assert found.suspects[wrong].mean() >= 0.8
    assert found.recall >= 0.8
    assert 10 <= found.wrong <= 40  # there are 20
    both = found.suspects & wrong
    assert (found.other[both] == words(400).labels[both]).mean() > 0.9
    assert found.rows is not None
    assert found.places is not None
    assert (WORDS * found.rows + found.places == np.arange(len(wrong))).all()


def test_words_of_an_entity_are_never_listed_and_clean_rows_left_alone() -> None:
    items = words(400)
    found = suspected_parts(replace(items, labels=np.where(items.labels == 1, 2, items.labels)))
    listed = found.suspects | found.doubtful
    assert not listed[items.labels > 0].any()
    assert len(np.unique(found.row_of_each[listed])) <= 4


def test_labels_too_many_are_found_and_missing_ones_are_doubtful() -> None:
    items, wrong = several(600, "too many")
    found = suspected_parts(items)
    assert wrong[found.suspects].mean() >= 0.6
    assert found.suspects[wrong].mean() >= 0.5
    assert found.precision == pytest.approx(wrong[found.suspects].mean(), abs=0.3)
    assert (items.labels.ravel()[found.suspects] == 1).all()
    items, wrong = several(600, "too few")
    found = suspected_parts(items)
    assert not (found.suspects & wrong).any()
    assert wrong[found.doubtful].mean() >= 0.6


def test_clean_lists_of_labels_are_left_alone() -> None:
    found = suspected_parts(several(600, "clean")[0])
    assert len(np.unique(found.row_of_each[found.suspects])) <= 6


def test_what_cannot_be_judged_is_said() -> None:
    with pytest.raises(NoProbe, match="by 60 rows"):
        suspected_parts(words(60))
    rare = words(400)
    labels = rare.labels.copy()
    labels[rare.rows >= 80] = 0
    with pytest.raises(NoProbe, match="by 40 entities"):
        suspected_parts(replace(rare, labels=labels))
    drawn = np.random.default_rng(0)
    for items in (words(400), several(600, "clean")[0]):
        nothing = drawn.normal(size=items.features.shape).astype(np.float32)
        with pytest.raises(NoProbe, match="do not tell the classes apart"):
            suspected_parts(replace(items, features=nothing))


def test_words_of_a_row_are_judged_by_classifiers_that_saw_none_of_them() -> None:
    # Each row has a direction of its own, and a tag by chance: only another word of it could give that away.
    rows, drawn = np.repeat(np.arange(60), 4), np.random.default_rng(0)
    labels = drawn.integers(0, 2, 60)[rows]
    features = np.eye(60, dtype=np.float32)[rows]
    chances = out_of_fold(Items("tags", features, labels, rows, 2), np.ones(240, bool), 0)
    assert (chances.argmax(axis=1) == labels).mean() < 0.7


def test_leaving_out_most_words_without_a_tag_changes_no_probability_on_average() -> None:
    drawn = np.random.default_rng(0)
    count = 4 * MOST_OUTSIDE
    labels = (drawn.random(count) < 0.05).astype(np.int64)
    features = (labels[:, None] + drawn.normal(size=(count, 4))).astype(np.float32)
    chances = out_of_fold(Items("tags", features, labels, np.arange(count), 2), np.ones(count, bool), 0)
    assert chances[:, 1].mean() == pytest.approx(labels.mean(), rel=0.1)


def test_shapes_are_those_of_the_word_and_of_its_neighbours_in_the_row() -> None:
    found = word_shapes(["In", "Rome", "2024", "@you"], np.array([0, 0, 0, 1]))
    own, before, after = found[:, :7], found[:, 7:14], found[:, 14:]
    assert own.tolist() == [
        [1, 0, 0, 0, 0, 0, 1],
        [1, 0, 0, 0, 0, 0, 0],
        [0, 0, 0, 1, 0, 0, 0],
        [0, 0, 1, 0, 1, 0, 1],
    ]
    assert (before == [[0] * 7, own[0], own[1], [0] * 7]).all()
    assert (after == [own[1], own[2], [0] * 7, [0] * 7]).all()
