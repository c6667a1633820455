"""Which held-out rows a train row is read against, by signatures alone."""

from __future__ import annotations

from array import array

import numpy as np

from fulltune.audit.rows import RowScan, _find_similar_held_out_rows
from fulltune.data.groups import NUM_HASHES


def test_the_nearest_of_thousands_of_one_template_is_among_those_that_are_read() -> None:
    held_out = 3000
    signed = np.zeros((2 + held_out, NUM_HASHES), np.uint16)
    signed[2:, : NUM_HASHES // 4] = np.arange(1, held_out + 1)[:, None]  # three quarters are the template's
    signed[-1, : NUM_HASHES // 4] = 0
    signed[-1, 0] = 7
    scan = RowScan(keys=array("Q", range(2 + held_out)), signatures=signed, counts={"train": 2})
    scan.keys[1] = scan.keys[500]
    train = np.arange(2 + held_out) < 2
    leaks, near = np.array([False, True] + [False] * held_out), np.zeros(2 + held_out, np.int64)
    twins = _find_similar_held_out_rows(scan, train, leaks, near)
    assert twins[0][0] == 1 + held_out
    assert len(twins[0]) == 10
    assert twins[1] == [500]
