"""The files of a sharded checkpoint: whole tensors in files of a given size, and parts spread over files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from fulltune.plan import fsdp2 as planned
from fulltune.train.optim import fsdp2


def test_a_file_holds_no_more_bytes_unless_one_tensor_has() -> None:
    sizes = {"a": 4, "b": 6, "c": 30, "d": 10, "e": 1}
    assert fsdp2.in_files(sizes, 10) == [["a", "b"], ["c"], ["d"], ["e"]]
    assert fsdp2.in_files({}, 10) == [[]]


def test_whole_tensors_are_read_as_parts_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fsdp2, "is_first", lambda: True)
    tensors = {f"weights.{name}": torch.randn(3, 5) for name in "abc"} | {"optimizer.a.step": torch.tensor([7.0])}
    sizes = {name: one.numel() * 4 for name, one in tensors.items()}
    (tmp_path / fsdp2.FOLDER).mkdir()

    fsdp2.write_by_file(sizes, tensors.__getitem__, tmp_path / fsdp2.FOLDER, 130)

    assert len(list((tmp_path / fsdp2.FOLDER).glob("*.safetensors"))) == 2
    assert {name: size for name, (size, _) in fsdp2.kinds(tmp_path).items()} == {
        name: one.shape for name, one in tensors.items()
    }
    found = {name: torch.empty_like(one) for name, one in tensors.items()}
    fsdp2.read(found, tmp_path)
    assert all(torch.equal(found[name], one) for name, one in tensors.items())


def test_a_file_is_written_as_its_tensors_come_and_read_by_the_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fsdp2, "is_first", lambda: True)
    tensors = {
        "odd": torch.tensor([True, False, True]),
        "weight": torch.randn(3, 5),
        "transposed": torch.randn(4, 6).T,
        "narrow": torch.randn(7).to(torch.bfloat16),
        "positions \u00e9": torch.arange(9),
        "none": torch.empty(0, 4),
        "scalar": torch.tensor(2.5),
    }
    sizes = {name: one.numel() * one.element_size() for name, one in tensors.items()}

    fsdp2.write_by_file(sizes, tensors.__getitem__, tmp_path)

    found = load_file(tmp_path / fsdp2.WHOLE)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], one) and found[name].dtype == one.dtype for name, one in tensors.items())
    with safe_open(tmp_path / fsdp2.WHOLE, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}  # transformers reads no file without
    raw = (tmp_path / fsdp2.WHOLE).read_bytes()
    begin = 8 + int.from_bytes(raw[:8], "little")
    table = json.loads(raw[8:begin])
    for name, one in tensors.items():
        assert (begin + table[name]["data_offsets"][0]) % one.element_size() == 0


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
    monkeypatch.setattr(fsdp2, "FILE_BYTES", most)
    state = {str(number): torch.zeros(size, dtype=torch.uint8) for number, size in enumerate(sizes)}
    assert list(fsdp2._files(state).values()) == files


def test_large_states_have_no_more_files_than_can_be_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fsdp2, "FILE_BYTES", 1)
    state = {str(number): torch.zeros(10, dtype=torch.uint8) for number in range(1000)}
    assert max(fsdp2._files(state).values()) <= 2 * fsdp2.MOST_FILES


def test_plan_knows_the_size_of_the_files() -> None:
    assert (planned.FILE_BYTES, planned.MOST_FILES) == (fsdp2.FILE_BYTES, fsdp2.MOST_FILES)
