"""How the tensors of a checkpoint that is shared out are spread over files."""

from __future__ import annotations

import pytest
import torch

from fulltune.plan import fsdp2
from fulltune.train import shared_state


@pytest.mark.parametrize(
    ("sizes", "most", "files"),
    [
        ([4, 4, 4], 100, [1, 1, 1]),
        ([4, 4, 4], 8, [1, 1, 2]),
        ([20, 4, 4, 4], 8, [1, 2, 2, 3]),
        ([4, 20, 4], 8, [1, 2, 3]),
    ],
)
def test_files_stay_small(sizes: list[int], most: int, files: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_state, "FILE_BYTES", most)
    state = {str(number): torch.zeros(size, dtype=torch.uint8) for number, size in enumerate(sizes)}
    assert list(shared_state._files(state).values()) == files


def test_large_states_have_no_more_files_than_can_be_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_state, "FILE_BYTES", 1)
    state = {str(number): torch.zeros(10, dtype=torch.uint8) for number in range(1000)}
    assert max(shared_state._files(state).values()) <= 2 * shared_state.MOST_FILES


def test_plan_knows_the_size_of_the_files() -> None:
    assert (fsdp2.FILE_BYTES, fsdp2.MOST_FILES) == (shared_state.FILE_BYTES, shared_state.MOST_FILES)
