"""What FSDP2 puts together of a model, by transformers' own rules and its blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from fulltune.errors import SetupError
from fulltune.models import sharding
from tests import tiny

CLASSIFIER, WRITER = "AutoModelForSequenceClassification", "AutoModelForCausalLM"


def model_of(kind: str, auto: str, **changes: Any) -> Any:
    tokenizer = tiny.encoder_tokenizer() if kind in tiny.ENCODERS else tiny.decoder_tokenizer()
    config = tiny.config(kind, tokenizer, **changes)
    with torch.device("meta"):
        return getattr(transformers, auto).from_config(config)


def numel(module: Any) -> int:
    return sum(one.numel() for one in module.parameters())


def test_old_classes_are_shared_out_by_their_blocks() -> None:
    """transformers' own rules name `layers`, which BERT has not: the whole model would be one unit."""
    model = model_of("bert", CLASSIFIER)
    units = sharding.count_unit_parameters(model)
    layers = model.bert.encoder.layer
    assert units.block == numel(layers[0])
    assert units.freed == numel(layers)
    assert units.root == numel(model) - numel(layers)
    assert (units.persistent, units.apart) == (0, 0)
    _, given = sharding.sharded_model_class(transformers.AutoModelForSequenceClassification, model.config, 2)
    assert "bert.encoder.layer.*" in given.fsdp_plan


def test_embeddings_and_head_of_new_classes_are_units_of_their_own() -> None:
    model = model_of("llama", WRITER, tie_word_embeddings=False)
    units = sharding.count_unit_parameters(model)
    assert units.apart == numel(model.model.embed_tokens)
    assert units.persistent == numel(model.lm_head) + numel(model.model.norm)
    assert units.root == 0
    assert units.reduced == numel(model)
    assert units.gathered == 2 * numel(model) - units.persistent


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_tied_head_lies_in_the_root_with_the_embeddings_once(kind: str) -> None:
    model = model_of(kind, WRITER, tie_word_embeddings=True)
    units = sharding.count_unit_parameters(model)
    assert units.reduced == numel(model)
    assert units.root >= numel(model.get_input_embeddings())
    assert units.apart == 0


def test_model_without_blocks_has_no_units() -> None:
    class Flat(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.only = torch.nn.Linear(2, 2)

    with pytest.raises(SetupError, match="no repeated blocks"):
        sharding.count_unit_parameters(Flat())
