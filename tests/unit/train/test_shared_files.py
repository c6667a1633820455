"""Whole tensors in files of a given size, read as those of processes that shared them out are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fulltune.train import shared_state


def test_a_file_holds_no_more_bytes_unless_one_tensor_has() -> None:
    sizes = {"a": 4, "b": 6, "c": 30, "d": 10, "e": 1}
    assert shared_state.in_files(sizes, 10) == [["a", "b"], ["c"], ["d"], ["e"]]
    assert shared_state.in_files({}, 10) == [[]]


def test_whole_tensors_are_read_as_parts_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_state, "is_first", lambda: True)
    tensors = {f"weights.{name}": torch.randn(3, 5) for name in "abc"} | {"optimizer.a.step": torch.tensor([7.0])}
    sizes = {name: one.numel() * 4 for name, one in tensors.items()}
    (tmp_path / shared_state.FOLDER).mkdir()

    shared_state.write_by_file(sizes, tensors.__getitem__, tmp_path / shared_state.FOLDER, 130)

    assert len(list((tmp_path / shared_state.FOLDER).glob("*.safetensors"))) == 2
    assert {name: size for name, (size, _) in shared_state.kinds(tmp_path).items()} == {
        name: one.shape for name, one in tensors.items()
    }
    found = {name: torch.empty_like(one) for name, one in tensors.items()}
    shared_state.read(found, tmp_path)
    assert all(torch.equal(found[name], one) for name, one in tensors.items())
