"""A saved model that reads texts apart is also a folder of sentence-transformers, and a plain encoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fulltune.errors import SetupError
from fulltune.models.base import Base
from fulltune.models.encoders import TokenPooling
from fulltune.models.load import load_model
from fulltune.models.sentence_files import write_sentence_files
from fulltune.recipe.model import ModelBlock
from fulltune.recipe.tasks import FACTS
from fulltune.tasks import padding
from tests import tiny

TEXTS = ["the sun shines over the town", "we cook soup with bread and cheese " * 9]
MAX_LENGTH = 20


@pytest.mark.parametrize(("kind", "pooling"), [("bert", "mean"), ("roberta", "cls"), ("llama", "last")])
def test_sentence_transformers_reads_the_vectors_that_the_model_computes(
    tmp_path: Path, kind: str, pooling: TokenPooling
) -> None:
    from sentence_transformers import SentenceTransformer

    block = ModelBlock(name=str(tiny.save_model(tmp_path / "base", kind)), pooling=pooling)
    base = Base.from_block(block, "text-pairs")
    model: Any = load_model(base, {"num_labels": 2}, head_is_new=FACTS["text-pairs"].head_is_new)
    model.save_pretrained(tmp_path / "saved")
    base.processor.save_pretrained(tmp_path / "saved")
    write_sentence_files(tmp_path / "saved", model.config, MAX_LENGTH)

    tokens = [base.processor(text, truncation=True, max_length=MAX_LENGTH)["input_ids"] for text in TEXTS]
    row = {**padding.join_texts({"input_ids": tokens}), "labels": 0}
    batch = padding.pad_texts([row], base.processor.pad_token_id)
    joined: list[torch.Tensor] = []
    model.classifier.register_forward_hook(lambda _, inputs, __: joined.append(inputs[0]))
    model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    vectors = joined[0].unflatten(-1, (4, -1))[0, :2]

    encoder = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    encoded = encoder.encode(TEXTS, convert_to_tensor=True, normalize_embeddings=True)
    torch.testing.assert_close(encoded, vectors.detach(), rtol=1e-5, atol=1e-5)


def test_folder_that_pools_otherwise_is_refused_unless_the_recipe_says_how(tmp_path: Path) -> None:
    folder = tiny.save_model(tmp_path / "model", "bert")
    (folder / "1_Pooling").mkdir()
    modules = [{"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"}]
    (folder / "modules.json").write_text(json.dumps(modules), encoding="utf-8")
    modes = {"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True, "include_prompt": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(modes), encoding="utf-8")
    with pytest.raises(SetupError, match=r"pools by mean_tokens, max_tokens, expected one of .*; set model.pooling"):
        Base.from_block(ModelBlock(name=str(folder)), "embedding")
    assert Base.from_block(ModelBlock(name=str(folder), pooling="cls"), "embedding").config.pooling == "cls"
