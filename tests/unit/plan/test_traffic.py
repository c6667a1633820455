"""Bytes that a process sends in a step, by hand."""

from __future__ import annotations

from typing import Any

import pytest

from fulltune.plan import time
from fulltune.records.plan import MemorySettings
from fulltune.system.sharing import Sharing
from tests.unit.plan.sizes import BERT, LLAMA

P = LLAMA.num_parameters
UNITS = LLAMA.units
assert UNITS is not None
FSDP2 = Sharing(3, False, False, engine="fsdp2")
SETTINGS = MemorySettings(micro_batch_size=1, longest_tokens=8, num_processes=8, precision="bf16")


@pytest.mark.parametrize(
    ("shared", "changes", "each_pass", "each_step"),
    [
        (None, {}, 0, 2 * 4 * P),
        (None, {"weights_dtype": "bf16"}, 0, 2 * 2 * P),
        (None, {"num_trained": 10**6, "num_held": P}, 0, 2 * 4 * 10**6),
        # The head is put together once, everything else twice.
        (FSDP2, {}, 4 * (3 * P - UNITS.kept), 0),
        (Sharing(2, False, False), {}, 2 * P, 2 * P),
        (Sharing(3, False, False), {}, 3 * 2 * P, 0),
        (Sharing(3, True, True), {}, 3 * 2 * P, 0),
        (Sharing(3, False, False), {"precision": "fp32"}, 3 * 4 * P, 0),
        # What stays as it was has no gradients.
        (Sharing(3, False, False), {"num_trained": 10**6, "num_held": P}, 2 * 2 * P + 2 * 10**6, 0),
        (Sharing(1, False, False), {}, 0, 2 * 2 * P),
    ],
)
@pytest.mark.parametrize("processes", [2, 8])
def test_bytes(shared: Sharing | None, changes: dict[str, Any], each_pass: int, each_step: int, processes: int) -> None:
    found = time.traffic(LLAMA, SETTINGS.changed(num_processes=processes, **changes), shared)
    share = (processes - 1) / processes
    assert found.each_pass == pytest.approx(share * each_pass)
    assert found.each_step == pytest.approx(share * each_step)
    assert found.of_step(4) == 4 * found.each_pass + found.each_step


def test_root_is_put_together_once() -> None:
    assert BERT.units is not None
    found = time.traffic(BERT, SETTINGS.changed(num_processes=2), FSDP2)
    assert found.each_pass == pytest.approx(4 * (3 * BERT.num_parameters - BERT.units.root) / 2)
