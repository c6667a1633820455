"""What a linear probe costs by the plan: no more than is looked at, and nothing for what is refused."""

from __future__ import annotations

import pytest

from fulltune.plan import probing
from fulltune.records.data import DataSummary
from fulltune.records.probe import MOST_FEATURE_BYTES, MOST_SOLVER_BYTES
from tests.unit.plan import sizes


def with_labels(count: int, rows: int) -> DataSummary:
    labels = tuple(f"label {number}" for number in range(count))
    return sizes.summary("text-classification", rows, 64).model_copy(update={"labels": labels})


def test_rows_are_those_that_are_looked_at() -> None:
    summary = with_labels(10, 100_000)
    assert probing.rows(summary, 384) == 20_000 + 1_000
    assert probing.rows(summary, 4096) == MOST_FEATURE_BYTES // (12 * 4096) + 1_000
    assert probing.num_bytes(summary, 4096) <= probing.PARTS * MOST_FEATURE_BYTES + MOST_SOLVER_BYTES


@pytest.mark.parametrize("count", [5_000, 30_000])
def test_classes_that_are_too_many_to_fit_cost_nothing(count: int) -> None:
    few, many = with_labels(100, 20_000), with_labels(count, 20_000)
    assert probing.seconds(few, 768) > probing.seconds(many, 768) == probing.SECONDS
    assert probing.num_bytes(many, 768) < probing.num_bytes(few, 768)
