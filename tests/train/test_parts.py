"""Full fine-tuning with frozen parts leaves exactly these as they were."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from fulltune import methods, predict
from fulltune.errors import RecipeError
from fulltune.methods.freeze import matches
from fulltune.models import new_tokens
from fulltune.models.base import Base
from fulltune.models.load import load_model
from fulltune.recipe.fields import Recipe
from fulltune.recipe.methods import FullMethod
from fulltune.recipe.model import ModelBlock
from fulltune.report.run.model_card import build_model_card
from fulltune.report.run.read import read_run
from tests import tiny
from tests.cases import others_long
from tests.train import runs

STEPS: dict[str, Any] = {"max_steps": 4, "warmup_steps": 0, "lr_scheduler_type": "constant", "optim": "adamw_torch"}
LOWER = ["embeddings", "encoder.layer.0"]
SIX = {"max_steps": 6, "eval_strategy": "steps", "eval_steps": 3}


def frozen(patterns: Sequence[str], **more: Any) -> dict[str, Any]:
    return {"kind": "full", "freeze": patterns, "learning_rate": 1e-2, **more}


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("embeddings", "bert.embeddings.word_embeddings.weight", True),
        ("embeddings", "bert.word_embeddings.weight", False),
        ("encoder.layer.[0-3].*", "bert.encoder.layer.3.output.dense.bias", True),
        ("layer.1", "bert.encoder.layer.11.output.dense.bias", False),
        ("*.bias", "classifier.bias", True),
        ("*norm*", "model.layers.0.input_layernorm.weight", True),
        ("a.b.c", "b.c", False),
    ],
)
def test_pattern_matches_whole_parts_of_a_name(pattern: str, name: str, expected: bool) -> None:
    assert matches(pattern, name) is expected


@pytest.mark.parametrize("optim", others_long(("adamw_torch", "adamw_8bit"), "adamw_torch"))
def test_frozen_parameters_stay_and_the_others_move(optim: str, tmp_path: Path) -> None:
    model = tiny.save_model(tmp_path / "model", "bert")
    train = {**STEPS, "optim": optim}
    method = frozen(LOWER, layerwise_lr_decay=0.9)
    reached = runs.run(tmp_path, model, tiny.topic_rows(), method=method, train=train, until="report")
    plan, outcome = reached.plan, reached.outcome
    assert plan is not None
    assert outcome is not None
    assert plan.method == "full-freeze-embeddings-encoder_layer_0"
    folder = tmp_path / "run" / plan.model_folder
    before, after = load_file(model / "model.safetensors"), load_file(folder / "model.safetensors")
    lower = {name for name in before if any(matches(pattern, name) for pattern in LOWER)}
    assert len(lower) > 10
    unmoved = {name for name, value in before.items() if torch.equal(value, after[f"bert.{name}"])}
    assert unmoved == lower
    count = sum(before[name].numel() for name in lower)
    assert plan.num_frozen_parameters == count
    assert plan.state["gradients"] == 4 * (plan.num_parameters - count)
    assert plan.state["weights"] == 4 * plan.num_parameters
    assert plan.disk is not None
    assert plan.disk.checkpoint_bytes > plan.state["weights"] + plan.state["optimizer"]
    assert outcome.parameter_changes is not None
    assert outcome.parameter_changes.num_tensors_changed == outcome.parameter_changes.num_tensors_with_gradient
    AutoModelForSequenceClassification.from_pretrained(folder)
    card = build_model_card(read_run(tmp_path / "run"), folder)
    assert f"{plan.num_trainable_parameters:,} parameters trained (not full: all except embeddings" in card
    assert "not full: all except embeddings" in (tmp_path / "run" / "report.md").read_text()


@pytest.mark.long
def test_interrupted_run_with_frozen_parts_equals_an_unbroken_one(tmp_path: Path) -> None:
    model, rows = tiny.save_model(tmp_path / "model", "bert"), tiny.topic_rows()
    blocks: dict[str, Any] = {"method": frozen(LOWER), "train": {**STEPS, **SIX}}
    whole = runs.run(tmp_path / "whole", model, rows, **blocks)
    assert whole.plan is not None
    with pytest.raises(Exception, match="a fault"):
        runs.run(tmp_path / "broken", model, rows, options={"listener": runs.at_step(5, runs.fail)}, **blocks)
    runs.run(tmp_path / "broken", model, rows, **blocks)
    one, other = (
        load_file(tmp_path / side / "run" / whole.plan.model_folder / "model.safetensors")
        for side in ("whole", "broken")
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_tied_weights_are_frozen_together() -> None:
    config = tiny.config("gpt2", tiny.usual_tokenizer("gpt2"))
    model = AutoModelForCausalLM.from_config(config)
    methods.apply_method(model, FullMethod(kind="full", freeze=("lm_head",)), "causal-lm")
    assert not model.get_input_embeddings().weight.requires_grad
    assert model.get_parameter("transformer.h.0.attn.c_attn.weight").requires_grad


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["embedings"], "matches no parameter of BertForSequenceClassification; did you mean 'embeddings'?"),
        (["qqq.7"], "'qqq.7' matches no parameter of BertForSequenceClassification; its modules are bert"),
        (["bert", "classifier"], "all parameters of BertForSequenceClassification match, so nothing is left to train"),
    ],
)
def test_useless_patterns_are_refused_before_rows_are_read(patterns: list[str], message: str, tmp_path: Path) -> None:
    model = tiny.save_model(tmp_path / "model", "bert")
    with pytest.raises(RecipeError) as caught:
        runs.run(tmp_path, model, tiny.topic_rows(), method=frozen(patterns))
    assert message in str(caught.value)
    assert not (tmp_path / "run" / "data").exists()


def test_full_without_freeze_is_the_reference_of_a_comparison() -> None:
    values = {"model": "m", "task": "causal-lm", "data": {"train": "rows.csv"}}
    recipe = Recipe.model_validate({**values, "methods": [frozen(["lm_head"]), "full"]})
    assert [recipe.compared_kind(one) for one in recipe.methods] == ["variant", "full"]
    with pytest.raises(ValueError, match="'full' without freeze is missing"):
        Recipe.model_validate({**values, "methods": [frozen(["lm_head"]), "lora"]})


# ---- new tokens ----------------------------------------------------------------------------------------------------

ORDER, SPARE = "<order>", "<never>"


def order_rows() -> list[dict[str, str]]:
    return [{**row, "completion": f" {ORDER}{row['completion']}"} for row in tiny.pair_rows()]


@pytest.mark.parametrize(("kind", "tied"), [("llama", False), ("gpt2", True)])
def test_new_tokens_start_as_the_mean_of_their_pieces(kind: str, tied: bool, tmp_path: Path) -> None:
    folder = tiny.save_model(tmp_path / "model", kind)
    base = Base.from_block(ModelBlock(name=str(folder), new_tokens=(ORDER, SPARE)), "causal-lm")
    plain = AutoTokenizer.from_pretrained(folder)
    model = load_model(base, {}, head_is_new=False)
    assert base.processor.tokenize(f"an {ORDER}!")[-2:] == [ORDER, "!"]
    assert model.config.vocab_size == len(base.processor) == len(plain) + 2
    before = AutoModelForCausalLM.from_pretrained(folder)
    pieces = plain(ORDER)["input_ids"]
    assert len(pieces) > 1
    for layer in ("get_input_embeddings", "get_output_embeddings"):
        weight, old = getattr(model, layer)().weight, getattr(before, layer)().weight
        torch.testing.assert_close(weight[base.processor.convert_tokens_to_ids(ORDER)], old[pieces].mean(0))
        assert torch.equal(weight[: len(plain)], old[: len(plain)])
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied


def test_unused_rows_and_biases_of_the_head_are_used(tmp_path: Path) -> None:
    tokenizer = tiny.usual_tokenizer("llama")
    config = transformers.PhiConfig(
        vocab_size=len(tokenizer) + 9, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64
    )
    model = AutoModelForCausalLM.from_config(config)
    torch.nn.init.normal_(model.lm_head.bias)
    pieces = tokenizer(ORDER)["input_ids"]
    new_tokens.add_to_model(model, new_tokens.add_to_tokenizer(tokenizer, [ORDER]))
    assert model.config.vocab_size == len(tokenizer) - 1 + 9
    torch.testing.assert_close(model.lm_head.bias[len(tokenizer) - 1], model.lm_head.bias[pieces].mean())


def test_run_with_new_tokens_is_loaded_by_plain_transformers(tmp_path: Path) -> None:
    model = tiny.save_model(tmp_path / "model", "llama")
    (tmp_path / "tokens.txt").write_text(f"{ORDER}\n{SPARE}\n")
    train, given = {**STEPS, **SIX}, {"new_tokens": "tokens.txt"}
    blocks: dict[str, Any] = {"task": "causal-lm", "train": train, "model": given}
    with pytest.raises(Exception, match="a fault"):
        runs.run(tmp_path, model, order_rows(), options={"listener": runs.at_step(5, runs.fail)}, **blocks)
    reached = runs.run(tmp_path, model, order_rows(), until="report", **blocks)
    assert reached.outcome is not None
    (check,) = (one for one in reached.outcome.checks if one.name == "new tokens")
    assert "times in the train rows; 1 never" in check.result
    folder = tmp_path / "run" / "models" / "full"
    tokenizer, plain = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    token = tokenizer.convert_tokens_to_ids(ORDER)
    assert len(tokenizer) == plain.config.vocab_size == len(plain.lm_head.weight)
    base = Base.from_block(ModelBlock(name=str(model), new_tokens=(ORDER, SPARE)), "causal-lm")
    start = load_model(base, {}, head_is_new=False)
    assert not torch.equal(plain.lm_head.weight[token], start.lm_head.weight[token])
    assert predict.load_predictor(tmp_path / "run").predict([{"prompt": "town 0:"}], max_new_tokens=2)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([ORDER, ORDER], "model.new_tokens: '<order>' is listed twice"),
        ([" ", "a"], "model.new_tokens: token 1 is blank: ' '; remove it"),
        (["a"], "model.new_tokens: 'a' is already a single token of this model"),
        ("none.txt", "none.txt: cannot be read: No such file"),
    ],
)
def test_unusable_new_tokens_are_refused(tokens: Any, message: str, tmp_path: Path) -> None:
    model = tiny.save_model(tmp_path / "model", "llama")
    with pytest.raises(RecipeError) as caught:
        runs.run(tmp_path, model, order_rows(), task="causal-lm", model={"new_tokens": tokens})
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("block", "value", "message"),
    [
        ("method", {"kind": "lora"}, "lora does not train the embeddings of model.new_tokens"),
        ("method", {"freeze": ["lm_head", "embed_tokens"]}, "freeze: matches the embeddings"),
        ("train", {"placement": "fsdp2", "num_processes": 2}, "is not supported with train.placement: fsdp2 yet"),
    ],
)
def test_new_tokens_that_cannot_be_trained_are_refused(block: str, value: Any, message: str, tmp_path: Path) -> None:
    model, given = tiny.save_model(tmp_path / "model", "llama"), {"new_tokens": [ORDER]}
    with pytest.raises(RecipeError) as caught:
        runs.run(tmp_path, model, order_rows(), task="causal-lm", **{"model": given, block: value})
    assert message in str(caught.value)
