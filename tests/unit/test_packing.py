"""Which models keep packed texts separate: tried on a one-layer copy."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fulltune.models import packing
from tests import tiny


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2", "gpt_neox", "mistral"])
def test_model_that_reads_position_ids_keeps_texts_apart(kind: str, decoder_tokenizer: Any) -> None:
    config = tiny.config(kind, decoder_tokenizer)
    state = torch.get_rng_state()
    assert packing.why_not_packable(config) is None
    assert torch.equal(torch.get_rng_state(), state)
    assert config.to_dict() == tiny.config(kind, decoder_tokenizer).to_dict()  # the copy is another one


@pytest.mark.parametrize("kind", ["opt", "bloom"])
def test_model_that_does_not_is_named_with_the_reason(kind: str, decoder_tokenizer: Any) -> None:
    reason = packing.why_not_packable(tiny.config(kind, decoder_tokenizer))
    assert reason is not None
    assert f"'{kind}' model" in reason
    assert "\n" not in reason


def test_model_that_cannot_be_made_is_an_obstacle(decoder_tokenizer: Any) -> None:
    reason = packing.why_not_packable(tiny.config("llama", decoder_tokenizer), "no_such_attention")
    assert reason is not None
    assert reason.startswith("a one-layer copy of the 'llama' model cannot be created (")


def test_leak_leaves_the_model_as_it_was(decoder_tokenizer: Any) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(tiny.config("llama", decoder_tokenizer)).train()
    assert packing.find_packing_leak(model, "llama") is None
    assert model.training
