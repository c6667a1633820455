"""The files of a sharded checkpoint: whole tensors in files of a given size, and parts spread over files."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from fulltune.models.save import FILE_BYTES, write_safetensors
from fulltune.plan import fsdp2 as planned
from fulltune.train.optim import fsdp2


@pytest.mark.parametrize(("most_bytes", "files"), [(130, 2), (10, 4), (2**28, 1)])
def test_whole_tensors_are_read_as_parts_are(most_bytes: int, files: int, tmp_path: Path) -> None:
    tensors = {f"weights.{name}": torch.randn(3, 5) for name in "ab"}
    tensors |= {"weights.transposed": torch.randn(4, 6).T, "optimizer.a.step": torch.tensor([7.0])}
    folder = tmp_path / fsdp2.FOLDER
    folder.mkdir()

    write_safetensors(folder, tensors, lambda name: tensors[name], most_bytes)

    written = list(folder.glob("*.safetensors"))
    assert len(written) == files
    with safe_open(written[0], framework="pt") as file:
        assert file.metadata() == {"format": "pt"}  # transformers reads no file without
    assert {name: size for name, (size, _) in fsdp2.tensor_types(tmp_path).items()} == {
        name: one.shape for name, one in tensors.items()
    }
    found = {name: torch.empty(one.shape) for name, one in tensors.items()}
    fsdp2.read_into_tensors(found, tmp_path)
    assert all(torch.equal(found[name], one) for name, one in tensors.items())


def test_tensors_of_one_file_are_released_before_those_of_the_next_are_read(tmp_path: Path) -> None:
    alive, most = weakref.WeakSet[torch.Tensor](), 0

    def read(name: str) -> torch.Tensor:
        nonlocal most
        alive.add(tensor := torch.ones(10))
        most = max(most, len(alive))
        return tensor

    write_safetensors(tmp_path, {str(number): torch.empty(10, device="meta") for number in range(8)}, read, 80)
    assert len(list(tmp_path.glob("*.safetensors"))) == 4
    assert most <= 3  # the two of a file, and perhaps the last one of the file before


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
    monkeypatch.setattr(fsdp2, "MIN_FILE_BYTES", most)
    state = {str(number): torch.zeros(size, dtype=torch.uint8) for number, size in enumerate(sizes)}
    assert list(fsdp2._assign_files(state).values()) == files


def test_large_states_have_no_more_files_than_can_be_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fsdp2, "MIN_FILE_BYTES", 1)
    state = {str(number): torch.zeros(10, dtype=torch.uint8) for number in range(1000)}
    assert max(fsdp2._assign_files(state).values()) <= 2 * fsdp2.MAX_FILES


def test_plan_knows_the_size_of_the_files() -> None:
    written = (fsdp2.MIN_FILE_BYTES, fsdp2.MAX_FILES, FILE_BYTES)
    assert written == (planned.FILE_BYTES, planned.MAX_FILES, planned.WHOLE_FILE_BYTES)
