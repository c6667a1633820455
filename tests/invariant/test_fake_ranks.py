"""The plan of a process of N against torch's tracker on a group that does not exist; `bench/fake_ranks.py` has more."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, replace

import pytest

from tests.invariant.fake_ranks import Cell, planned, sizes_of

pytestmark = pytest.mark.slow
MOST_OFF, MOST_BELOW = 0.05, 0.02
SMALL = Cell(
    "llama",
    {
        **{"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2},
        **{"intermediate_size": 704, "vocab_size": 4000},
    },
    rows=2,
    length=128,
)
CELLS = {
    "one device": replace(SMALL, shared=False),
    "1": SMALL,
    "8": replace(SMALL, ranks=8),
    "8, recomputed": replace(SMALL, ranks=8, recomputed=True),
    "8, whole logits": replace(SMALL, ranks=8, in_pieces=False),
}


@pytest.fixture(scope="module")
def totals() -> dict[str, int]:
    """Bytes at the highest moment of each cell."""
    cells = json.dumps([asdict(one) for one in CELLS.values()])
    command = [sys.executable, "-m", "tests.invariant.fake_ranks", cells]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    return {name: one["Total"] for name, one in zip(CELLS, found, strict=True)}


@pytest.fixture(scope="module")
def sizes() -> dict[str, object]:
    return sizes_of(SMALL)


@pytest.mark.parametrize("name", CELLS)
def test_plan_is_within_the_bar(name: str, totals: dict[str, int], sizes: dict[str, object]) -> None:
    ratio = planned(CELLS[name], sizes).phases["step"] / totals[name]
    assert 1 - MOST_BELOW <= ratio <= 1 + MOST_OFF


def test_more_ranks_and_recomputing_hold_less(totals: dict[str, int]) -> None:
    assert totals["8, recomputed"] < totals["8"] < totals["1"]
