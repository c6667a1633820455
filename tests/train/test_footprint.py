"""The traced memory of a model against real runs of tiny models."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import transformers

from fulltune.footprint import allocations as tracing
from fulltune.footprint import formulas as traced_whole
from fulltune.footprint.allocations import TraceCase
from fulltune.footprint.records import Footprint, LiveMemory
from fulltune.footprint.trace import trace_or_estimate
from fulltune.models import dropout, experts
from fulltune.models.base import Base
from fulltune.models.encoders import model_class
from fulltune.recipe.model import ModelBlock
from fulltune.tasks import Target, task_named
from tests import tiny

TARGETS = {
    "text-classification": Target("single_label", {}, labels=("a", "b", "c")),
    "text-pairs": Target("single_label", {}, labels=("a", "b", "c")),
    "token-classification": Target("tags", {}, labels=("O", "B-x", "I-x")),
    "question-answering": Target("span", {}),
    "multiple-choice": Target("choice", {}, num_choices=3),
    "causal-lm": Target("prompt_completion", {}),
    "seq2seq": Target("source_target", {}),
    "image-classification": Target("single_label", {}, labels=("a", "b")),
}
CONVOLUTIONS: dict[str, Any] = {
    "resnet": transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]),
    "convnext": transformers.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 2], num_stages=2, image_size=32),
}
KINDS = {"causal-lm": "llama", "seq2seq": "t5"}


def config_of(kind: str, task: str, **changes: Any) -> Any:
    if task == "image-classification":
        size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
        found: Any = transformers.ViTConfig(**{**size, "image_size": 16, "patch_size": 8, **changes})
        tokenizer = None
    else:
        tokenizer = tiny.usual_tokenizer(kind)
        found = tiny.config(kind, tokenizer, **changes)
    for name, value in task_named(task).config_changes(TARGETS[task], tokenizer).items():
        setattr(found, name, value)
    found.pooling = "mean"
    return found


def count(config: Any, task: str) -> int:
    with torch.device("meta"):
        model = model_class(task_named(task).FACTS.auto_class).from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())


def case_of(config: Any, task: str, **options: Any) -> TraceCase:
    """Of a model as a CPU trains it."""
    pixels = (3, 16, 16) if task == "image-classification" else None
    usual = {"prepare": dropout.replace_dropout, "num_parameters": count(config, task), "pixels": pixels}
    return TraceCase(config, task_named(task), TARGETS[task], **{**usual, **options})


def traced(config: Any, task: str, **options: Any) -> Footprint:
    return trace_or_estimate(case_of(config, task, **options))


def highest(moments: tuple[LiveMemory, ...], rows: int, length: int) -> int:
    return max(sum(moment.bytes(rows, length).values()) for moment in moments)


@pytest.mark.parametrize(
    "task",
    [pytest.param(one, marks=[pytest.mark.long] * (one in ("seq2seq", "multiple-choice"))) for one in TARGETS],
)
def test_every_task_is_traced(task: str) -> None:
    found = traced(config_of(KINDS.get(task, "bert"), task), task, checkpointing=(False,))
    variant = found.variant("fp32", False)
    few, many = (highest(variant.first, rows, 64) for rows in (1, 8))
    assert many > few
    assert highest(variant.later, 8, 64) >= many
    assert highest(found.evaluation["fp32"], 8, 64) < many
    assert found.flops_per_token > 0
    assert found.sequences_per_row == {"multiple-choice": 3, "text-pairs": 2}.get(task, 1)


def test_texts_read_apart_need_the_memory_and_work_of_as_many_rows() -> None:
    """The plan counts sequences: a pair is two of them."""
    rows, pairs = (traced(config_of("bert", task), task, checkpointing=(False,)) for task in list(TARGETS)[:2])
    for many in (8, 64):
        memory = [highest(one.variant("fp32", False).first, many, 64) for one in (rows, pairs)]
        assert memory[1] == pytest.approx(memory[0], rel=0.1)
    assert pairs.flops_per_token == pytest.approx(rows.flops_per_token, rel=0.01)


@pytest.mark.long
def test_further_layers_add_what_the_third_added() -> None:
    config = config_of("t5", "seq2seq", num_layers=4)
    grown = traced(config, "seq2seq", checkpointing=(True,), precision="bf16")
    # No number of parameters fits: the model is traced as it is.
    whole = traced(config, "seq2seq", num_parameters=-1, checkpointing=(True,), precision="bf16")
    for rows, length in ((1, 16), (4, 64), (32, 512)):
        for part in ("first", "later"):
            found, true = (getattr(one.variant("bf16", True), part) for one in (grown, whole))
            assert highest(found, rows, length) == pytest.approx(highest(true, rows, length), rel=1e-3)


@pytest.mark.parametrize(
    ("kind", "task"),
    [
        *(("llama", "causal-lm"), ("qwen3_moe", "causal-lm"), ("gpt2", "causal-lm")),
        *(("bert", "text-classification"), ("bert", "text-pairs")),
    ],
)
def test_what_the_forward_pass_keeps_is_what_a_real_one_saves(kind: str, task: str) -> None:
    config = config_of(kind, task)
    case = case_of(config, task)
    found = tracing.trace_copy(case, tracing.layer_counts(case), [(4, 32)], recomputed=False, training=True)
    alive = found.alive[0, found.keys.index(("backward head", 0))].sum()  # the loss's own gradient is a number
    assert alive == pytest.approx(_saved_bytes(case), rel=0.03)


def _saved_bytes(case: TraceCase) -> int:
    """Bytes of all storages that autograd keeps of a real forward pass, without the weights."""
    torch.manual_seed(0)
    model = tracing.build_model(case, tracing.config_with_layers(case, {})).train()
    batch = tracing.make_batch(case, 4, 32)
    labels = batch.pop("labels")
    if "attention_mask" in batch:
        batch["attention_mask"][0, -1] = 0  # with padding models make a mask
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    head = tracing._selective_head(case.task, model)
    experts.watch(model)
    router_loss = experts.find_router_loss(model)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        if head is None:
            loss = case.task.loss(model(**batch).logits, labels, case.target)
        else:
            with head.computing_only(labels), experts.recording() as routing:
                logits = model(**batch).logits
            loss = case.task.loss(logits, labels, case.target)
            if router_loss:
                loss = loss + router_loss(routing, batch["attention_mask"])
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    assert loss.requires_grad
    return sum(size for pointer, size in saved.items() if pointer not in weights)


def test_work_of_a_forward_pass() -> None:
    config = config_of("llama", "causal-lm", tie_word_embeddings=False)
    found = traced(config, "causal-lm", checkpointing=(False,))
    embedding = config.vocab_size * config.hidden_size
    assert found.flops_per_token == pytest.approx(2 * (count(config, "causal-lm") - embedding), rel=0.05)
    # Scores and sums over them: 2 x 2 x layers x hidden.
    assert found.attention_flops_per_pair == pytest.approx(2 * 2 * 2 * 32, rel=0.01)


@pytest.mark.parametrize("kind", list(CONVOLUTIONS))
def test_images_are_traced_at_their_own_size(kind: str) -> None:
    config = labelled(CONVOLUTIONS[kind], "image-classification")
    small, large = (
        traced(config, "image-classification", checkpointing=(False,), pixels=(3, side, side)) for side in (64, 128)
    )
    assert not small.rough
    kept = [highest(one.variant("fp32", False).first, 32, 1) for one in (small, large)]
    assert 3.5 < kept[1] / kept[0] < 4.1
    assert large.flops_per_token == pytest.approx(4 * small.flops_per_token, rel=0.01)
    saved = _saved_bytes(case_of(config, "image-classification", pixels=(3, 64, 64)))
    assert kept[0] == pytest.approx(8 * saved, rel=0.2)  # that is of 4 rows


def labelled(config: Any, task: str) -> Any:
    for name, value in task_named(task).config_changes(TARGETS[task], None).items():
        setattr(config, name, value)
    return config


SIZE: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 120}


def copies_of(config: Any, task: str, **options: Any) -> tuple[Footprint, list[int]]:
    """A footprint, and how many layers each copy had that was run for it."""
    with mock.patch.object(traced_whole, "trace_copy", wraps=tracing.trace_copy) as run:
        found = traced(config, task, **options)
    return found, [max(call.args[1].values(), default=0) for call in run.call_args_list]


@pytest.mark.long
def test_each_kind_of_layers_is_grown() -> None:
    kinds = ["sliding_attention"] * 2 + ["full_attention"]
    config = transformers.Gemma3TextConfig(
        **SIZE, num_hidden_layers=9, num_key_value_heads=2, head_dim=8, layer_types=kinds * 3
    )
    grown, copies = copies_of(config, "causal-lm", checkpointing=(False,))
    assert copies == [4, 5, 5] * 2
    whole = traced(config, "causal-lm", num_parameters=-1, checkpointing=(False,))
    for rows, length in ((1, 16), (4, 64), (32, 512)):
        found, true = (highest(one.variant("fp32", False).first, rows, length) for one in (grown, whole))
        assert found == pytest.approx(true, rel=1e-3)


def test_a_model_that_takes_no_other_number_of_layers_is_traced_whole() -> None:
    config = transformers.BertConfig(**SIZE, num_hidden_layers=4, num_labels=3)
    with mock.patch.object(tracing, "setattr", _refusing, create=True):
        found, copies = copies_of(config, "text-classification", checkpointing=(False,))
    assert not found.rough
    assert copies == [2, 4, 2, 4]


def _refusing(config: Any, name: str, value: Any) -> None:
    raise AttributeError(f"property '{name}' has no setter")


def asking(model: Any) -> None:
    """Have a model look at the values of its inputs."""
    model.register_forward_pre_hook(lambda _, args, kwargs: float(kwargs["input_ids"].sum().item()), with_kwargs=True)


@pytest.mark.long
def test_a_model_that_cannot_be_traced_gets_a_rough_footprint() -> None:
    config = config_of("llama", "causal-lm", num_hidden_layers=4)
    found = traced(config, "causal-lm", precision="bf16", prepare=asking)
    true = traced(config, "causal-lm", precision="bf16")
    assert found.rough == "DataDependentOutputException: aten._local_scalar_dense.default"
    assert not true.rough
    for recomputed, part in itertools.product((False, True), ("first", "later")):
        rough, exact = (getattr(one.variant("bf16", recomputed), part) for one in (found, true))
        assert 0.8 < highest(rough, 8, 64) / highest(exact, 8, 64) < 4
    assert found.tensors == true.tensors
    assert found.flops_per_token == pytest.approx(true.flops_per_token, rel=0.5)


def test_the_size_of_images_is_the_processors(tmp_path: Path) -> None:
    CONVOLUTIONS["resnet"].save_pretrained(tmp_path)
    processor = {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 96}, "crop_pct": 0.875}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor), encoding="utf-8")
    assert Base.from_block(ModelBlock(name=str(tmp_path)), "image-classification").image_shape == (3, 96, 96)
