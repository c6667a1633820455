"""How many rows are looked at: bounded by rows and by the bytes of their features, and always the same ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fulltune.inference.run import RowSubset
from fulltune.probe.features import sample_rows
from fulltune.recipe.tasks import ProblemType
from fulltune.records.probe import MOST_FEATURE_BYTES, MOST_ROWS, OTHER_TOKENS


class Rows:
    """So many prepared rows of one length; each is its own number."""

    def __init__(self, count: int, length: int = 30) -> None:
        self.count, self.length = count, length

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, key: Any) -> Any:
        return np.full(self.count, self.length) if key == "length" else {"number": int(key)}


def numbers(rows: Any) -> list[int]:
    return [rows[i]["number"] for i in range(len(rows))]


@pytest.mark.parametrize(
    ("kind", "count", "hidden_size", "length", "expected"),
    [
        ("single_label", 500, 384, 30, 500),
        ("single_label", MOST_ROWS + 1, 384, 30, MOST_ROWS),
        ("regression", 1_000_000, 768, 2000, MOST_ROWS),  # one item a row, however long it is
        ("single_label", 100_000, 4096, 30, MOST_FEATURE_BYTES // (12 * 4096)),
        ("choice", 100_000, 768, 30, MOST_FEATURE_BYTES // (12 * 768 * 5)),
        ("span", 100_000, 768, 400, MOST_FEATURE_BYTES // (12 * 768 * (OTHER_TOKENS + 2))),
        ("tags", 100_000, 768, 30, MOST_FEATURE_BYTES // (8 * 768 * 30)),
        ("tags", 3, 10**9, 30, 1),
    ],
)
def test_rows_looked_at(kind: ProblemType, count: int, hidden_size: int, length: int, expected: int) -> None:
    rows = Rows(count, length)
    sample = sample_rows(rows, kind, 5, hidden_size)
    assert len(sample) == expected
    if expected == count:
        assert sample is rows
        return
    positions = numbers(sample)
    assert positions == sorted(set(positions))
    assert positions[0] >= 0
    assert positions[-1] < count
    assert positions == numbers(sample_rows(Rows(count, length), kind, 5, hidden_size))
    items = {"choice": 5, "span": OTHER_TOKENS + 2, "tags": length}.get(kind, 1)
    kinds = 2 if kind == "tags" else 3
    assert len(sample) == 1 or kinds * 4 * len(sample) * items * hidden_size <= MOST_FEATURE_BYTES


def test_fewer_rows_may_be_asked_for() -> None:
    sample = sample_rows(Rows(5000), "single_label", 0, 384, max_rows=2000)
    assert isinstance(sample, RowSubset)
    assert len(sample) == 2000
    assert np.std(numbers(sample)) > 1000  # from all over the file
