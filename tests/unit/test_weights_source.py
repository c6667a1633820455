"""Where pretrained weights come from: plain, or rounded ones of a GGUF file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fulltune import model


@pytest.mark.parametrize(("kind", "quantised"), [("F32", False), ("Q8_0", True)])
def test_gguf_file_is_quantised_where_its_tensors_are(kind: str, quantised: bool, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    of_kind = gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(tmp_path / "weights.gguf", "llama")
    values = np.ones((32, 32), np.float32)
    writer.add_tensor("one", gguf.quantize(values, of_kind) if quantised else values, raw_dtype=of_kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert model.is_quantised(model.Source(str(tmp_path), gguf_file="weights.gguf")) == quantised
    assert not model.is_quantised(model.Source(str(tmp_path)))
