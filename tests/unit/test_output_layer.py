"""The last layer of a head: found on every kind of model, given other units, computed in float32 for numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter

from fulltune import methods
from fulltune.inference.run import Batching, run_rows
from fulltune.methods.head import find_output_layer, rescale_outputs
from fulltune.models.base import Base
from fulltune.models.load import load_model
from fulltune.recipe.methods import Method
from fulltune.recipe.model import ModelBlock
from fulltune.tasks import Target, text_classification
from tests import tiny

NUMBER = Target("regression", {})
ROWS = [{"input_ids": list(range(5, 5 + length)), "labels": 0.0} for length in (3, 9, 6)]


def model_of(folder: Path, kind: str) -> Any:
    base = Base.from_block(ModelBlock(name=str(tiny.save_model(folder, kind))))
    return load_model(base, text_classification.config_changes(NUMBER, base.processor), head_is_new=True)


def numbers(model: Any, precision: str = "fp32") -> torch.Tensor:
    kept = run_rows(model, ROWS, text_classification, NUMBER, 0, Batching(2, precision))
    return torch.tensor(kept["logits"]).squeeze(-1)


@pytest.mark.parametrize("kind", [*tiny.ENCODERS, *tiny.DECODERS])
def test_layer_in_other_units_gives_the_models_numbers_in_them(kind: str, tmp_path: Path) -> None:
    model = model_of(tmp_path, kind)
    layer = find_output_layer(model, 1)
    assert layer is not None
    before = numbers(model)
    shift = 0.0 if layer.bias is None else 1e6

    rescale_outputs(layer, shift, 1e3)
    assert torch.allclose(numbers(model), 1e3 * before + shift, atol=0.2)
    rescale_outputs(layer, -shift / 1e3, 1e-3)
    assert torch.allclose(numbers(model), before, atol=1e-4)


@pytest.mark.parametrize("kind", ["head", "lora", "adapter", "prompt", {"kind": "peft", "type": "IA3"}])
@pytest.mark.parametrize("name", ["roberta", "llama"])
def test_layer_is_the_trained_one_of_each_method(name: str, kind: Any, tmp_path: Path) -> None:
    method: Any = TypeAdapter(Method).validate_python(kind if isinstance(kind, dict) else {"kind": kind})
    model = methods.apply_method(model_of(tmp_path, name), method, "text-classification").model
    layer = find_output_layer(model, 1)
    assert layer is not None
    before = numbers(model)
    rescale_outputs(layer, 0.0, 2.0)
    assert layer.weight.requires_grad
    assert torch.allclose(numbers(model), 2 * before, atol=1e-6) == (layer.bias is None or not layer.bias.any())


def test_layer_of_another_size_or_none_is_not_found(tmp_path: Path) -> None:
    model = model_of(tmp_path, "bert")
    assert find_output_layer(model, 7) is None
    model.base_model_prefix = ""
    assert find_output_layer(model, 1) is None


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_large_numbers_are_not_rounded_by_bf16(kind: str, tmp_path: Path) -> None:
    model = model_of(tmp_path, kind)
    layer = find_output_layer(model, 1)
    assert layer is not None
    rescale_outputs(layer, 0.0 if layer.bias is None else 5e5, 1e3)
    exact = numbers(model)
    assert torch.allclose(
        numbers(model, "bf16"), exact, atol=0.02 * float(exact.abs().max() if kind == "llama" else 1e3)
    )
    model.to(torch.bfloat16)
    assert numbers(model, "bf16").isfinite().all()
