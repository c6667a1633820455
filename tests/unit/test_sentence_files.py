"""A saved model that reads texts apart is also a folder of sentence-transformers, and a plain encoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import FunnelConfig

from fulltune.errors import SetupError
from fulltune.methods import apply_method
from fulltune.models.base import Base
from fulltune.models.encoders import TokenPooling, model_class
from fulltune.models.load import load_model
from fulltune.models.sentence_files import FILES, write_sentence_files
from fulltune.recipe.methods import PromptMethod
from fulltune.recipe.model import ModelBlock
from fulltune.recipe.tasks import FACTS
from fulltune.report.run.model_card import build_loading_code
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


def test_code_of_the_card_reads_the_head_of_one_file_and_of_several(tmp_path: Path) -> None:
    base = Base.from_block(ModelBlock(name=str(tiny.save_model(tmp_path / "base", "bert"))), "text-pairs")
    model: Any = load_model(base, {"num_labels": 2}, head_is_new=True)
    logits = []
    for name, size in (("whole", "1GB"), ("split", "20KB")):
        folder, values = tmp_path / name, dict[str, Any]()
        model.save_pretrained(folder, max_shard_size=size)
        base.processor.save_pretrained(folder)
        exec(build_loading_code(str(folder), "text-pairs", None), values)  # the card's own code
        logits.append(values["logits"])
    assert len(list((tmp_path / "split").glob("*.safetensors"))) > 1
    torch.testing.assert_close(*logits)


POOLINGS: list[tuple[object, str]] = [
    ({"pooling_mode": "cls"}, "cls"),
    ({"pooling_mode": "lasttoken", "include_prompt": True}, "last"),
    ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, "mean"),
    ({"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True}, "pools by .*mean_tokens, .*max_tokens"),
    ({"pooling_mode": ["mean", "max"]}, r"pools by \['mean', 'max'\], expected one of .*; set model.pooling"),
    ({}, "pools by nothing"),
    ("{", "config.json: is not valid JSON; copy it again"),
]


@pytest.mark.parametrize(("values", "expected"), POOLINGS)
def test_one_known_pooling_is_read_unless_the_recipe_names_it(tmp_path: Path, values: object, expected: str) -> None:
    folder = tiny.save_model(tmp_path / "base", "bert")
    modules = [{"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"}]
    (folder / "1_Pooling").mkdir()
    (folder / FILES[0]).write_text(json.dumps(modules), encoding="utf-8")
    (folder / FILES[1]).write_text(values if isinstance(values, str) else json.dumps(values), encoding="utf-8")
    block = ModelBlock(name=str(folder))
    assert Base.from_block(block.model_copy(update={"pooling": "mean"}), "text-pairs").config.pooling == "mean"
    if expected in ("mean", "cls", "last"):
        assert Base.from_block(block, "text-pairs").config.pooling == expected
        return
    with pytest.raises(SetupError, match=expected):
        Base.from_block(block, "text-pairs")


def test_only_tasks_that_read_texts_apart_keep_what_a_folder_says_of_its_vectors(tmp_path: Path) -> None:
    folder = tiny.save_model(tmp_path / "base", "bert")
    said = {"pooling": "cls", "normalize": False, "prompts": {"query": "ask: "}, "default_prompt_name": "query"}
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(config | said), encoding="utf-8")
    for task, names in {"embedding": {*said}, "text-pairs": {"pooling"}, "text-classification": set[str]()}.items():
        base = Base.from_block(ModelBlock(name=str(folder)), task)
        assert {name: vars(base.config)[name] for name in said if name in vars(base.config)} == {
            name: value for name, value in said.items() if name in names
        }
    file.write_text(json.dumps(config | {"pooling": "avg"}), encoding="utf-8")  # a model's own
    assert Base.from_block(ModelBlock(name=str(folder)), "text-classification").config.pooling == "avg"


def test_bodies_of_several_classes_are_read_as_the_first(tmp_path: Path) -> None:
    config = FunnelConfig(vocab_size=50, block_sizes=[1, 1], d_model=32, n_head=4, d_head=8, d_inner=32)
    config.pooling, config.normalize = "mean", False
    model: Any = model_class("TextEmbedding").from_config(config)
    assert type(model).__name__ == "FunnelModel"
    ids = torch.arange(24).view(2, 2, 6)
    assert model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.shape == (2, 2, 32)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_virtual_tokens_are_not_pooled(tmp_path: Path, pooling: TokenPooling) -> None:
    block = ModelBlock(name=str(tiny.save_model(tmp_path / "base", "bert")), pooling=pooling)
    model: Any = load_model(Base.from_block(block, "embedding"), {}, head_is_new=False).eval()
    model.config.normalize = False
    apply_method(model, PromptMethod(kind="prompt", num_virtual_tokens=3), "embedding")
    states: list[torch.Tensor] = []
    model.bert.encoder.register_forward_hook(lambda _, __, output: states.append(output.last_hidden_state))
    ids = torch.arange(5, 17).view(1, 2, 6)
    vectors = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
    real = torch.cat(states)[:, 3:]
    torch.testing.assert_close(vectors, real.mean(dim=1) if pooling == "mean" else real[:, 0])
