"""DeepSpeed's compiled parts: what is said of a lock that torch waits for."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from torch.utils import cpp_extension

from fulltune.train.worker import distributed


@pytest.mark.parametrize("is_locked", [True, False])
def test_lock_is_named_with_what_to_do(is_locked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    builder = SimpleNamespace(
        name="cpu_adam", jit_load=None, is_compatible=lambda verbose: True, load=lambda verbose: said.append("loaded")
    )
    module: Any = ModuleType("deepspeed.accelerator")
    module.get_accelerator = lambda: SimpleNamespace(create_op_builder=lambda name: builder)
    monkeypatch.setitem(sys.modules, "deepspeed", ModuleType("deepspeed"))
    monkeypatch.setitem(sys.modules, "deepspeed.accelerator", module)
    monkeypatch.setattr(cpp_extension, "_get_build_directory", lambda name, verbose: str(tmp_path))
    (tmp_path / "cpu_adam.so").touch()
    if is_locked:
        (tmp_path / "lock").touch()

    distributed.build_extensions(False, True, said.append)

    waiting = f"waiting for {tmp_path / 'lock'}: cpu_adam is being compiled; if nothing compiles, delete this file"
    assert said == [*([waiting] if is_locked else []), "loaded"]
