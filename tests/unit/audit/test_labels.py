"""Rows whose label is probably wrong: known errors are found, clean rows left alone, and the estimates hold."""

from __future__ import annotations

import numpy as np
import pytest

from fulltune.audit.pretrained import DOUBT, choose_suspect_margin, judge_labels_of
from fulltune.probe.linear import Items, NoProbe

CLASSES, WIDTH = 6, 12


def items(count: int, rate: float, spread: float, seed: int = 0) -> tuple[Items, np.ndarray]:
    """Rows around the middle of their class, a share of them with another label; and which."""
    drawn = np.random.default_rng(seed)
    middles = drawn.normal(size=(CLASSES, WIDTH))
    right = drawn.integers(0, CLASSES, count)
    features = (middles[right] + spread * drawn.normal(size=(count, WIDTH))).astype(np.float32)
    given = right.copy()
    wrong = drawn.choice(count, round(rate * count), replace=False)
    given[wrong] = (right[wrong] + drawn.integers(1, CLASSES, len(wrong))) % CLASSES
    return Items("single_label", features, given, np.arange(count), CLASSES), given != right


@pytest.mark.parametrize(("rate", "spread"), [(0.1, 0.5), (0.2, 0.5), (0.1, 0.8)])
def test_most_wrong_labels_are_found_and_most_suspects_are_wrong(rate: float, spread: float) -> None:
    rows, wrong = items(800, rate, spread)
    judged = judge_labels_of(rows)
    assert wrong[judged.suspects].mean() >= 0.6
    assert judged.suspects[wrong].mean() >= 0.6
    assert judged.about.estimated_errors == pytest.approx(wrong.sum(), rel=0.35)
    assert judged.about.precision == pytest.approx(wrong[judged.suspects].mean(), abs=0.3)
    assert not (judged.suspects & judged.doubtful).any()
    assert (judged.margins[judged.doubtful] < DOUBT).all()
    # The likeliest other class is the right one.
    both = judged.suspects & wrong
    assert (judged.other[both] != rows.labels[both]).all()


@pytest.mark.parametrize("spread", [0.3, 0.8, 1.2])
def test_clean_rows_are_left_alone(spread: float) -> None:
    rows, _ = items(800, 0.0, spread)
    assert judge_labels_of(rows).suspects.mean() < 0.01


@pytest.mark.parametrize(
    ("count", "labels", "message"),
    [
        (60, lambda n: np.arange(n) % 3, "with 60 rows"),
        (200, lambda n: np.zeros(n, int), "two classes"),
        (200, lambda n: (np.arange(n) < 2).astype(int), "two classes"),
    ],
)
def test_what_cannot_be_judged_is_said(count: int, labels: object, message: str) -> None:
    features = np.random.default_rng(0).normal(size=(count, 4)).astype(np.float32)
    rows = Items("single_label", features, labels(count), np.arange(count), 3)  # type: ignore[operator]  # of this type
    with pytest.raises(NoProbe, match=message):
        judge_labels_of(rows)


def test_features_that_tell_nothing_are_refused() -> None:
    drawn = np.random.default_rng(0)
    rows = Items(
        "single_label", drawn.normal(size=(300, 4)).astype(np.float32), drawn.integers(0, 20, 300), np.arange(300), 20
    )
    with pytest.raises(NoProbe, match="do not distinguish the classes"):
        judge_labels_of(rows)


def test_classifiers_that_agree_by_chance_alone_judge_nothing() -> None:
    drawn = np.random.default_rng(1)
    features = drawn.normal(size=(300, 2)).astype(np.float32)
    rows = Items("single_label", features, drawn.integers(0, 3, 300), np.arange(300), 3)
    with pytest.raises(NoProbe, match="do not distinguish the classes"):
        judge_labels_of(rows)


def test_cut_is_where_the_planted_errors_say_that_enough_suspects_are_wrong() -> None:
    # 100 errors as the planted ones are, among 900 right labels of which some are doubtful.
    planted = np.linspace(-1, -0.2, 200)
    margins = np.concatenate([np.linspace(-1, -0.2, 100), np.linspace(-0.5, 1, 900)])
    cut, recall, precision, wrong = choose_suspect_margin(margins, planted)
    assert -0.5 < cut < -0.2
    assert 80 <= wrong <= 100
    assert precision >= 0.75
    assert recall == pytest.approx((planted < cut).mean(), abs=0.01)
    # Without errors nothing lies where the surest quarter of the planted ones does.
    assert choose_suspect_margin(np.linspace(-0.5, 1, 900), planted)[0] == -np.inf
