"""The traced memory of a model against real runs of tiny models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from fulltune import footprint, traced_case, tracing
from fulltune.tasks import LossSettings, Target, task_named
from fulltune.train import dropout
from tests import tiny

TARGETS = {
    "text-classification": Target("single_label", {}, labels=("a", "b", "c")),
    "token-classification": Target("tags", {}, labels=("O", "B-x", "I-x")),
    "question-answering": Target("span", {}),
    "multiple-choice": Target("choice", {}, num_choices=3),
    "causal-lm": Target("prompt_completion", {}),
    "seq2seq": Target("source_target", {}),
    "image-classification": Target("single_label", {}, labels=("a", "b")),
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
    return found


def count(config: Any, task: str) -> int:
    with torch.device("meta"):
        model = getattr(transformers, task_named(task).AUTO_CLASS).from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())


def traced(config: Any, task: str, num_parameters: int | None = None, **options: Any) -> footprint.Footprint:
    return footprint.trace(
        config,
        task_named(task),
        TARGETS[task],
        num_parameters=count(config, task) if num_parameters is None else num_parameters,
        prepare=dropout.install,
        **options,
    )


def highest(moments: tuple[footprint.Moment, ...], rows: int, length: int) -> int:
    return max(sum(moment.bytes(rows, length).values()) for moment in moments)


@pytest.mark.parametrize("task", list(TARGETS))
def test_every_task_is_traced(task: str) -> None:
    found = traced(config_of(KINDS.get(task, "bert"), task), task, checkpointing=(False,))
    variant = found.variant("fp32", False)
    few, many = (highest(variant.first, rows, 64) for rows in (1, 8))
    assert many > few
    assert highest(variant.later, 8, 64) >= many
    assert highest(found.evaluation["fp32"], 8, 64) < many
    assert found.flops_per_token > 0
    assert found.sequences_per_row == (3 if task == "multiple-choice" else 1)


@pytest.mark.parametrize(("kind", "task"), [("llama", "causal-lm"), ("bert", "text-classification"), ("t5", "seq2seq")])
@pytest.mark.parametrize("recomputed", [False, True])
def test_further_layers_add_what_the_third_added(kind: str, task: str, recomputed: bool) -> None:
    deeper = {"num_layers": 5} if kind == "t5" else {"num_hidden_layers": 5}
    config = config_of(kind, task, **deeper)
    grown = traced(config, task, checkpointing=(recomputed,), precisions=("bf16",))
    # No number of parameters fits: the model is traced as it is.
    whole = traced(config, task, num_parameters=-1, checkpointing=(recomputed,), precisions=("bf16",))
    for rows, length in ((1, 16), (4, 64), (32, 512)):
        for part in ("first", "later"):
            found, true = (getattr(one.variant("bf16", recomputed), part) for one in (grown, whole))
            assert highest(found, rows, length) == pytest.approx(highest(true, rows, length), rel=1e-3)


@pytest.mark.parametrize(
    ("kind", "task"), [("llama", "causal-lm"), ("gpt2", "causal-lm"), ("bert", "text-classification")]
)
def test_what_the_forward_pass_keeps_is_what_a_real_one_saves(kind: str, task: str) -> None:
    config = config_of(kind, task)
    case = traced_case.Case(config, task_named(task), TARGETS[task], "fp32", None, False, dropout.install)
    (story,) = tracing.run(
        case, traced_case.depths_of(config), [(4, 32)], precision="fp32", recomputed=False, training=True
    )
    alive = 0
    for change in story.changes:
        if change.place == "backward head":
            break
        alive += change.bytes
    assert alive == pytest.approx(_saved_bytes(case), rel=0.03)


def _saved_bytes(case: traced_case.Case) -> int:
    """Bytes of all storages that autograd keeps of a real forward pass, without the weights."""
    torch.manual_seed(0)
    model = traced_case.build(case, traced_case.cut(case.config, {})).train()
    batch = traced_case.batch_of(case, 4, 32)
    labels = batch.pop("labels")
    batch["attention_mask"][0, -1] = 0  # with padding models make a mask
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    head = tracing._head(case.task, model)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        if head is None:
            loss = case.task.loss(model(**batch).logits, labels, case.target, LossSettings())
        else:
            with head.only(labels):
                logits = model(**batch).logits
            loss = case.task.loss(logits, labels, case.target, LossSettings())
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    assert loss.requires_grad
    return sum(size for pointer, size in saved.items() if pointer not in weights)


def test_autocast_keeps_a_copy_of_the_weights() -> None:
    config = config_of("llama", "causal-lm", tie_word_embeddings=False)
    found = traced(config, "causal-lm", precisions=("bf16",), checkpointing=(False,))
    copies = max(moment.coefficients["buffers"][0] for moment in found.variant("bf16", False).first)
    embedding = config.vocab_size * config.hidden_size
    # Two bytes for each weight but the embedding and the norms.
    assert copies == pytest.approx(2 * (count(config, "causal-lm") - embedding), rel=0.02)


def test_work_of_a_forward_pass() -> None:
    config = config_of("llama", "causal-lm", tie_word_embeddings=False)
    found = traced(config, "causal-lm", checkpointing=(False,))
    embedding = config.vocab_size * config.hidden_size
    assert found.flops_per_token == pytest.approx(2 * (count(config, "causal-lm") - embedding), rel=0.05)
    # Scores and sums over them: 2 x 2 x layers x hidden.
    assert found.attention_flops_per_pair == pytest.approx(2 * 2 * 2 * 32, rel=0.01)
