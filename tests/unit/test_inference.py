"""Who watches a pass over rows is told how far it is, in rows and in work."""

from __future__ import annotations

import numpy as np
import pytest

from fulltune.inference.run import batches_with_progress


@pytest.mark.parametrize("work", [[8, 4, 2, 1, 1], [1, 1, 1, 1, 1]])
def test_watcher_is_told_before_the_first_batch_and_after_each(work: list[int]) -> None:
    told: list[tuple[int, int, float]] = []
    seen = []
    for batch in batches_with_progress([0, 1, 2, 3, 4], 2, np.array(work), lambda *said: told.append(said)):
        seen.append((list(batch), len(told)))
    assert seen == [([0, 1], 1), ([2, 3], 2), ([4], 3)]
    assert [(done, total) for done, total, _ in told] == [(0, 5), (2, 5), (4, 5), (5, 5)]
    whole = sum(work)
    assert [share for *_, share in told] == pytest.approx([0, sum(work[:2]) / whole, sum(work[:4]) / whole, 1])


def test_nothing_to_do_is_told_once() -> None:
    told = []
    assert list(batches_with_progress([], 2, np.array([]), lambda *said: told.append(said))) == []
    assert told == [(0, 0, 0.0)]
