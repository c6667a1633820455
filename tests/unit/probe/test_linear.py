"""Linear classifiers on features: planted ones are found for each kind of label; what cannot be fitted says why."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fulltune.probe.linear import (
    FOLDS,
    MOST_COMPARED,
    Items,
    LinearClassifier,
    NoProbe,
    error_rate,
    fit_at_strengths,
    mean_loss,
    select_classifier,
    select_features,
)
from fulltune.recipe.tasks import ProblemType
from fulltune.records.probe import MOST_SOLVER_BYTES

HIDDEN = 16


def items(kind: ProblemType, features: np.ndarray, labels: Any, num_outputs: int, **others: Any) -> Items:
    others.setdefault("rows", np.arange(len(features)))
    return Items(kind, features.astype(np.float32), np.asarray(labels), num_outputs=num_outputs, **others)


def drawn(*shape: int, seed: int = 0) -> np.ndarray:
    """Features as models give them: each with a mean and a spread of its own."""
    random = np.random.default_rng(seed)
    scale, shift = np.random.default_rng(99).uniform(0.1, 5.0, (2, shape[-1]))
    return (random.normal(size=shape) * scale + shift).astype(np.float32)


def planted(num_outputs: int, has_bias: bool = True) -> LinearClassifier:
    random = np.random.default_rng(7)
    weight = random.normal(size=(num_outputs, HIDDEN)) / np.random.default_rng(99).uniform(0.1, 5.0, (2, HIDDEN))[0]
    centre = drawn(2000, HIDDEN).mean(axis=0)
    return LinearClassifier(weight, -weight @ centre if has_bias else np.zeros(num_outputs))


def splits(kind: ProblemType, num_outputs: int, label: Any, has_bias: bool = True) -> tuple[Items, Items]:
    """Rows of which a planted classifier gives the labels, and others."""
    classifier = planted(num_outputs, has_bias)
    parts = []
    for seed, count in ((1, 600), (2, 400)):
        features = drawn(count, HIDDEN, seed=seed)
        parts.append(items(kind, features, label(classifier(features)), num_outputs))
    return parts[0], parts[1]


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("num_outputs", [2, 3, 7])
@pytest.mark.parametrize("kind", ["single_label", "tags"])
def test_planted_classes_are_found(kind: ProblemType, num_outputs: int, has_bias: bool) -> None:
    train, others = splits(kind, num_outputs, lambda outputs: outputs.argmax(axis=1), has_bias)
    least, _, classifier = select_classifier(train, others, lambda items: fit_at_strengths(items, has_bias), mean_loss)
    assert error_rate(others, classifier) < 0.04 * num_outputs
    assert least == pytest.approx(mean_loss(others, classifier))
    assert classifier.weight.shape == (num_outputs, HIDDEN)
    assert classifier.weight.dtype == classifier.bias.dtype == np.float32
    if not has_bias:
        np.testing.assert_array_equal(classifier.bias, 0)


@pytest.mark.parametrize("has_bias", [True, False])
def test_each_label_of_several_is_found_and_a_constant_one_stays_constant(has_bias: bool) -> None:
    def label(outputs: np.ndarray) -> np.ndarray:
        labels = (outputs > 0).astype(np.float32)
        labels[:, 1], labels[:, 3] = 0, 1
        return labels

    train, others = splits("multi_label", 4, label, has_bias)
    _, _, classifier = select_classifier(train, others, lambda items: fit_at_strengths(items, has_bias), mean_loss)
    outputs = classifier(others.features)
    assert ((outputs[:, [0, 2]] > 0) == others.labels[:, [0, 2]]).mean() > 0.95
    np.testing.assert_array_equal(classifier.weight[[1, 3]], 0)
    if has_bias:
        assert (outputs[:, 1] < -1).all()
        assert (outputs[:, 3] > 1).all()
    else:
        np.testing.assert_array_equal(classifier.bias, 0)


@pytest.mark.parametrize("has_bias", [True, False])
def test_numbers_are_found_at_their_own_scale(has_bias: bool) -> None:
    train, others = splits("regression", 1, lambda outputs: (outputs[:, 0] * 1e4).astype(np.float32), has_bias)
    least, _, classifier = select_classifier(train, others, lambda items: fit_at_strengths(items, has_bias), mean_loss)
    assert least < 0.01  # of the variance
    assert np.corrcoef(classifier(others.features)[:, 0], others.labels)[0, 1] > 0.99


def choices(count: int, seed: int, choices_of_row: int = 4) -> Items:
    """The right choice is the highest by a planted direction; a row's choices share what says nothing."""
    features = drawn(count * choices_of_row, HIDDEN, seed=seed).reshape(count, choices_of_row, HIDDEN)
    features += 20 * np.random.default_rng(seed).normal(size=(count, 1, HIDDEN))
    scores = features @ planted(1).weight[0]
    right = np.eye(choices_of_row, dtype=np.int64)[scores.argmax(axis=1)]
    rows = np.repeat(np.arange(count), choices_of_row)
    return items("choice", features.reshape(-1, HIDDEN), right.ravel(), 1, rows=rows)


def test_the_right_choice_is_found_among_those_of_its_row() -> None:
    train, others = choices(300, 1), choices(200, 2)
    least, _, classifier = select_classifier(train, others, fit_at_strengths, mean_loss)
    assert error_rate(others, classifier) < 0.1
    assert least < np.log(4) / 2
    assert classifier.weight.shape == (1, HIDDEN)
    assert classifier.bias.tolist() == [0]


def test_begin_and_end_of_a_span_are_found() -> None:
    def spans(seed: int) -> Items:
        count, tokens = 300, 9
        features = drawn(count * tokens, HIDDEN, seed=seed)
        scores = (features @ planted(2).weight.T).reshape(count, tokens, 2)
        labels = (scores == scores.max(axis=1, keepdims=True)).astype(np.int64)
        return items("span", features, labels.reshape(-1, 2), 2, rows=np.repeat(np.arange(count), tokens))

    train, others = spans(1), spans(2)
    least, _, classifier = select_classifier(train, others, fit_at_strengths, mean_loss)
    assert least < np.log(9) / 3
    outputs = classifier(others.features).reshape(-1, 9, 2)
    assert (outputs.argmax(axis=1) == others.labels.reshape(-1, 9, 2).argmax(axis=1)).mean() > 0.85


def test_class_weights_move_the_border_towards_the_others() -> None:
    """Overlapping classes, one of them rare: with its weight it is found more often."""
    random = np.random.default_rng(0)
    labels = (random.random(1000) < 0.1).astype(np.int64)
    features = random.normal(size=(1000, HIDDEN)) + labels[:, None] * 0.3
    rare = labels == 1

    def found(weights: list[float] | None) -> float:
        train = items("single_label", features, labels, 2, class_weights=weights)
        return float((next(one for _, one in fit_at_strengths(train))(train.features)[rare].argmax(axis=1) == 1).mean())

    assert found([1.0, 9.0]) > found(None) + 0.2
    assert found([1.0, 1.0]) == pytest.approx(found(None))

    def label_found(weights: list[float] | None) -> float:
        train = items("multi_label", features, np.stack([labels, 1 - labels], axis=1), 2, class_weights=weights)
        return float((next(one for _, one in fit_at_strengths(train))(train.features)[rare, 0] > 0).mean())

    assert label_found([9.0, 1.0]) > label_found(None) + 0.2


@pytest.mark.parametrize(
    ("train", "reason"),
    [
        (items("single_label", drawn(9, HIDDEN), np.ones(9, np.int64), 3), "all train rows have the same class"),
        (items("tags", drawn(9, HIDDEN), np.zeros(9, np.int64), 3), "all train rows have the same class"),
        (
            items("single_label", drawn(40, HIDDEN), np.arange(40) % 2, 3, class_weights=(0.0, 0.0, 1.0)),
            "all train rows have a class whose weight in train.class_weights is 0",
        ),
        (
            items("multi_label", drawn(9, HIDDEN), np.tile([0, 1], (9, 1)), 2),
            "each label is the same in all train rows",
        ),
        (
            items("choice", drawn(4, HIDDEN), np.zeros(4, np.int64), 1),
            "no train row has both a right and a wrong choice",
        ),
        (
            items("single_label", drawn(20_000, HIDDEN), np.arange(20_000) % 5_000, 5_000),
            "5,000 classes with 16 features each are too many to fit",
        ),
        (
            items("single_label", drawn(9, HIDDEN), np.arange(9), MOST_SOLVER_BYTES // 25 // 8 // HIDDEN + 1),
            "classes with 16 features each are too many to fit",
        ),
    ],
)
@pytest.mark.parametrize("held_out", [True, False])
def test_what_cannot_be_fitted_says_why(train: Items, reason: str, held_out: bool) -> None:
    with pytest.raises(NoProbe, match=reason):
        select_classifier(train, train if held_out else None, fit_at_strengths, mean_loss)


def test_one_row_is_not_enough_to_hold_rows_out() -> None:
    tokens = items("tags", drawn(6, HIDDEN), [0, 1, 0, 1, 0, 1], 2, rows=np.zeros(6, np.int64))
    with pytest.raises(NoProbe, match="one train row"):
        select_classifier(tokens, None, fit_at_strengths, mean_loss)


def test_a_class_without_a_row_is_never_the_best() -> None:
    features = drawn(200, HIDDEN, seed=1)
    labels = np.where(features[:, 0] > features[:, 0].mean(), 4, 1)
    for _, classifier in fit_at_strengths(items("single_label", features, labels, 6)):
        assert set(classifier(features).argmax(axis=1)) == {1, 4}
        np.testing.assert_array_equal(classifier.weight[[0, 2, 3, 5]], 0)


@pytest.mark.parametrize("count", [2, 3, 4, 5, 9, 40])
@pytest.mark.parametrize("kind", ["single_label", "multi_label", "regression"])
def test_few_rows_are_held_out_in_turn(count: int, kind: ProblemType) -> None:
    """Also where a part lacks a class: rows of a rare class lie in one part."""
    labels: np.ndarray = np.arange(count) % 2
    features = drawn(count, HIDDEN) + 50 * labels[:, None]
    if kind == "multi_label":
        labels = np.stack([labels, 1 - labels], axis=1)
    train = items(kind, features, labels.astype(np.float32) if kind == "regression" else labels, 2)
    train = items(kind, features, train.labels, 1) if kind == "regression" else train
    _, _, classifier = select_classifier(train, None, fit_at_strengths, mean_loss)
    assert np.isfinite(classifier.weight).all()
    outputs = classifier(train.features)
    right = {
        "single_label": lambda: outputs.argmax(axis=1) == labels,
        "multi_label": lambda: (outputs > 0) == (labels == 1),
        "regression": lambda: (outputs[:, 0] > 0.5) == (labels == 1),
    }[kind]()
    assert right.all()


def test_items_of_a_row_are_held_out_together() -> None:
    """Each row has a mark that tells its class: only a row in both parts could use it."""
    rows = np.repeat(np.arange(20), 5)
    fitted: list[tuple[set[int], int]] = []

    def candidates(of: Items) -> Any:
        fitted.append((set(of.rows.tolist()), len(of.rows)))
        yield 1.0, LinearClassifier(np.zeros((2, HIDDEN)), np.zeros(2))

    select_classifier(items("tags", drawn(100, HIDDEN), rows % 2, 2, rows=rows), None, candidates, mean_loss)
    *parts, whole = fitted
    assert len(parts) == FOLDS
    assert all(count == 5 * len(part) for part, count in parts)
    assert set.union(*(set(range(20)) - part for part, _ in parts)) == set(range(20))
    assert whole == (set(range(20)), 100)


def test_noise_asks_for_the_strongest_hold_and_a_clear_signal_for_a_weaker_one() -> None:
    random = np.random.default_rng(3)
    features = random.normal(size=(300, HIDDEN))
    noise, signal = random.integers(0, 2, 300), (features @ random.normal(size=HIDDEN) > 0).astype(np.int64)
    strengths = [
        select_classifier(items("single_label", features, labels, 2), None, fit_at_strengths, mean_loss)[1]
        for labels in (noise, signal)
    ]
    assert strengths[0] < strengths[1]


@pytest.mark.parametrize(
    ("kind", "features", "labels", "rows", "expected_loss", "expected_wrong"),
    [
        ("single_label", [[2.0, 0.0], [0.0, 0.0]], [0, 1], [0, 1], (np.log1p(np.exp(-2)) + np.log(2)) / 2, 0.5),
        ("multi_label", [[0.0, 3.0]], [[1.0, 0.0]], [0], (np.log(2) + np.log1p(np.exp(3))) / 2, None),
        ("choice", [[1.0, 0.0], [0.0, 0.0]], [1, 0], [5, 5], np.log1p(np.exp(-1)), 0.0),
        ("choice", [[1.0, 0.0], [0.0, 0.0]], [0, 1], [5, 5], np.log1p(np.exp(1)), 1.0),
        ("span", [[1.0, 0.0], [0.0, 0.0]], [[1, 0], [0, 1]], [5, 5], (np.log1p(np.exp(-1)) + np.log(2)) / 2, None),
        ("regression", [[1.0, 0.0], [3.0, 0.0]], [1.0, 5.0], [0, 1], 0.5, 0.5),
    ],
)
def test_losses_by_hand(
    kind: ProblemType,
    features: list[list[float]],
    labels: Any,
    rows: list[int],
    expected_loss: float,
    expected_wrong: float | None,
) -> None:
    """The outputs are the features themselves."""
    outputs = 1 if kind in ("choice", "regression") else 2
    planted_items = items(kind, np.array(features), labels, outputs, rows=np.array(rows))
    classifier = LinearClassifier(np.eye(2)[:outputs], np.zeros(outputs))
    assert mean_loss(planted_items, classifier) == pytest.approx(expected_loss)
    if expected_wrong is not None:
        assert error_rate(planted_items, classifier) == pytest.approx(expected_wrong)


def test_numbers_that_differ_little_beside_their_size_are_found() -> None:
    features = drawn(600, HIDDEN, seed=1)
    numbers = 1e9 + 100 * (features[:, 0] - features[:, 0].mean()).astype(np.float64) / features[:, 0].std()
    train = items("regression", features, numbers, 1)
    assert (
        min(mean_loss(train, classifier) for _, classifier in fit_at_strengths(train)) < 0.2
    )  # 32 bits lie 64 apart there


def test_loss_is_weighted_as_the_training_is() -> None:
    features, labels = np.eye(2, dtype=np.float32), np.array([0, 1])
    classifier = LinearClassifier(np.eye(2, dtype=np.float32), np.array([1.0, 0.0], np.float32))
    plain = items("single_label", features, labels, 2)
    weighted = replace(plain, class_weights=[3.0, 0.5])
    losses = np.log1p(np.exp([-2.0, 0.0]))
    assert mean_loss(plain, classifier) == pytest.approx(losses.mean(), rel=1e-5)
    assert mean_loss(weighted, classifier) == pytest.approx((losses * [3.0, 0.5]).mean(), rel=1e-5)
    several = replace(plain, kind="multi_label", labels=np.eye(2, dtype=np.float32))
    outputs = np.array([[2.0, 0.0], [1.0, 1.0]])
    each = np.logaddexp(0, np.where(np.eye(2) > 0, -outputs, outputs)) * np.where(np.eye(2) > 0, [3.0, 0.5], 1.0)
    assert mean_loss(replace(several, class_weights=[3.0, 0.5]), classifier) == pytest.approx(each.mean(), rel=1e-5)


def test_a_class_that_no_sample_has_is_learned_all_the_same() -> None:
    count = 5 * MOST_COMPARED
    labels = np.zeros(count, np.int64)
    labels[7] = 1
    features = drawn(count, HIDDEN)
    features[7] += 30
    whole = items("single_label", features, labels, 2)
    assert len(np.unique(whole.sample(MOST_COMPARED).labels)) == 1
    name, _, _, classifier = select_features({"a": (whole, whole), "b": (whole, whole)}, fit_at_strengths, mean_loss)
    assert name in ("a", "b")
    assert error_rate(whole, classifier) == 0
