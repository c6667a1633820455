"""How much the target tells about the length."""

import random

import pytest

from fulltune.data.targets import explained_by_class, explained_by_value
from fulltune.plan.defaults import group_by_length


def test_explained_by_class_when_class_sets_the_length_is_one() -> None:
    assert explained_by_class([5, 5, 9, 9], [0, 0, 1, 1]) == pytest.approx(1.0)


def test_explained_by_class_with_random_classes_is_near_zero() -> None:
    draw = random.Random(0)
    lengths = [draw.randint(5, 60) for _ in range(2000)]
    assert explained_by_class(lengths, [draw.randrange(8) for _ in lengths]) < 0.02


def test_explained_by_class_with_one_class_per_row_or_one_length_is_zero() -> None:
    assert explained_by_class([1, 2, 3], [0, 1, 2]) == 0.0
    assert explained_by_class([4, 4, 4], [0, 1, 0]) == 0.0


def test_explained_by_value_follows_the_correlation() -> None:
    assert explained_by_value([1, 2, 3, 4], [2.0, 4.0, 6.0, 8.0]) == pytest.approx(1.0)
    assert explained_by_value([1, 2, 3, 4], [1.0, 1.0, 1.0, 1.0]) == 0.0


@pytest.mark.parametrize(("share", "grouped"), [(0.0, True), (0.13, True), (0.25, False), (0.9, False)])
def test_group_by_length_by_share_is_off_where_batches_would_be_one_sided(share: float, grouped: bool) -> None:
    chosen, reason = group_by_length(share)
    assert chosen is grouped
    assert "explains" in reason
