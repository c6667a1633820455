"""A model that runs unit by unit computes what it computes in memory, to the last bit."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    BeitConfig,
    BeitForImageClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from fulltune.errors import SetupError
from fulltune.stream.executor import Executor, install
from fulltune.stream.randomness import derived_random_state, random_state
from fulltune.stream.units import find_units, placeholder, unit_sizes, use_placeholders
from tests.gpu_paths.computed import formats

SMALL: dict[str, Any] = {
    "num_hidden_layers": 3,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 50,
}
NO_DROPOUT: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


class InMemory:
    """Weights and gradients by unit; counts the weights that are in use at the same time."""

    def __init__(self, model: nn.Module) -> None:
        self.units = find_units(model)
        values = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        self.values = [{name: values[name] for name in unit.names} for unit in self.units]
        self.buffers: dict[str, Tensor] = {}
        self.parked: dict[str, Tensor] = {}
        self.in_use: set[int] = set()
        self.most_in_use = 0
        self.reads: list[int] = []

    def prefetch(self, unit: int) -> None:
        """Nothing to read."""

    def weights(self, unit: int) -> Mapping[str, Tensor]:
        self.in_use.add(unit)
        self.reads.append(unit)
        self.most_in_use = max(self.most_in_use, len(self.in_use))
        return self.values[unit]

    def release(self, unit: int) -> None:
        self.in_use.remove(unit)

    def gradients(self, unit: int) -> Mapping[str, Tensor]:
        self.buffers = {name: torch.full_like(values, 7.0) for name, values in self.values[unit].items()}
        return self.buffers

    def park(self, unit: int, names: Sequence[str]) -> None:
        assert not self.parked.keys() & set(names)
        self.parked |= {name: self.buffers[name] for name in names}


def streamed(model: Any) -> tuple[Any, Executor, InMemory]:
    source = InMemory(model)
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.data = placeholder(tuple(parameter.shape), parameter.dtype)
    executor = Executor(other, source.units, source, source)
    install(other, executor)
    return other, executor, source


def tokens(rows: int, length: int, seed: int) -> Tensor:
    return torch.randint(3, 50, (rows, length), generator=torch.Generator().manual_seed(seed))


def text_batch(seed: int) -> dict[str, Any]:
    ids = tokens(2, 5 + seed, seed)
    return {"input_ids": ids, "labels": ids, "use_cache": False}


def class_batch(seed: int) -> dict[str, Any]:
    return {"input_ids": tokens(2, 5 + seed, seed), "labels": torch.tensor([0, 1])}


def image_batch(seed: int) -> dict[str, Any]:
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    return {"pixel_values": pixels, "labels": torch.tensor([0, 1])}


DROPS = "encoder with dropout"
VIT: dict[str, Any] = {key: value for key, value in SMALL.items() if key != "vocab_size"} | {
    "image_size": 16,
    "patch_size": 8,
}
T5: dict[str, Any] = {
    "num_layers": 2,
    "num_decoder_layers": 3,
    "d_model": 32,
    "num_heads": 2,
    "d_kv": 16,
    "d_ff": 64,
    "vocab_size": 50,
}
T5 |= {"dropout_rate": 0.0, "decoder_start_token_id": 0}
FAMILIES: dict[str, tuple[Any, Any, Any]] = {
    "decoder": (LlamaForCausalLM, LlamaConfig(**SMALL), text_batch),
    "tied decoder": (LlamaForCausalLM, LlamaConfig(**SMALL, tie_word_embeddings=True), text_batch),
    "gpt2": (GPT2LMHeadModel, GPT2Config(**SMALL, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0), text_batch),
    "encoder": (BertForSequenceClassification, BertConfig(**SMALL, **NO_DROPOUT), class_batch),
    DROPS: (BertForSequenceClassification, BertConfig(**SMALL), class_batch),
    "tied encoder": (BertForMaskedLM, BertConfig(**SMALL, **NO_DROPOUT), text_batch),
    "shared blocks": (
        AlbertForSequenceClassification,
        AlbertConfig(**SMALL, **NO_DROPOUT, embedding_size=16, classifier_dropout_prob=0.0),
        class_batch,
    ),
    "encoder-decoder": (T5ForConditionalGeneration, T5Config(**T5), text_batch),
    "untied encoder-decoder": (T5ForConditionalGeneration, T5Config(**T5 | {"tie_word_embeddings": False}), text_batch),
    "images": (ViTForImageClassification, ViTConfig(**VIT, **NO_DROPOUT), image_batch),
    "unit that is called without tensors": (
        BeitForImageClassification,
        BeitConfig(**VIT, **NO_DROPOUT, drop_path_rate=0.0, use_shared_relative_position_bias=True),
        image_batch,
    ),
}


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize("micro_batches", [1, 4])
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != DROPS])
def test_losses_and_gradients_are_those_of_the_model_in_memory(family: str, micro_batches: int, autocast: bool) -> None:
    _compare(family, micro_batches, autocast)


def test_dropout_draws_the_same_numbers_without_accumulation() -> None:
    _compare(DROPS, 1, autocast=False)


def _compare(family: str, micro_batches: int, autocast: bool) -> None:
    kind, config, batch = FAMILIES[family]
    torch.manual_seed(0)
    model = kind(config)
    model.train()
    other, executor, source = streamed(model)
    batches = [batch(seed) for seed in range(micro_batches)]
    expected = []
    casting = torch.autocast("cpu", torch.bfloat16, enabled=autocast)
    torch.manual_seed(1)
    for one in batches:
        with casting:
            loss = model(**one).loss
        loss.backward()
        expected.append(loss.detach())
    after = torch.get_rng_state()
    torch.manual_seed(1)

    def forward(one: dict[str, Any]) -> Tensor:
        with casting:
            loss: Tensor = other(**one).loss
        return loss

    losses = executor.losses([partial(forward, one) for one in batches])
    executor.backward(losses)
    assert torch.equal(torch.stack(losses).detach(), torch.stack(expected))
    assert torch.equal(torch.get_rng_state(), after)
    gradients = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    assert source.parked.keys() == gradients.keys()
    # Autocast's cache sums a shared weight's gradients in bf16.
    is_exact = not (family == "shared blocks" and autocast)
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, source.parked[name], atol=0 if is_exact else 2e-2, rtol=0), name
        assert torch.allclose(executor.norms[name], source.parked[name].norm()), name
    assert not source.in_use
    assert all(bool(one.isnan().all()) and one.grad is None for one in other.parameters())


@pytest.mark.stand_in("autocast on the CPU", card="the numbers of the card's kernels")
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_units_compute_in_the_format_of_their_call_forward_and_again(dtype: torch.dtype | None) -> None:
    expected = {"stream/executor.py: run": {dtype or torch.float32}}
    with formats() as found:
        other, executor, _ = streamed(_Numbered())
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            losses = executor.losses([partial(other, torch.ones(2, 2)) for _ in range(2)])
        assert found == expected
        found.clear()
        executor.backward(losses)
    assert found == expected


def _loss(model: Any, seed: int) -> Tensor:
    loss: Tensor = model(**text_batch(seed)).loss
    return loss


def test_each_weight_is_read_twice_a_step_whatever_the_accumulation() -> None:
    reads = []
    for micro_batches in (1, 4):
        other, executor, source = streamed(LlamaForCausalLM(FAMILIES["decoder"][1]))
        losses = executor.losses([partial(_loss, other, seed) for seed in range(micro_batches)])
        executor.backward(losses)
        reads.append(source.reads)
        assert source.most_in_use == 1
    assert reads[0] == reads[1] == [*range(6), *reversed(range(6))]


def test_a_streamed_model_answers_as_the_model_in_memory() -> None:
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(FAMILIES["tied decoder"][1]).eval()
    other, _, source = streamed(model)
    other.eval()
    ids = tokens(2, 6, 0)
    assert torch.equal(other(input_ids=ids).logits, model(input_ids=ids).logits)
    answers = [one.generate(ids, max_new_tokens=5, do_sample=False) for one in (model, other)]
    assert torch.equal(*answers)
    assert not source.in_use


def test_models_without_blocks_or_with_weights_beside_them_are_refused() -> None:
    with pytest.raises(SetupError, match=r"Linear has no repeated blocks \(no torch.nn.ModuleList"):
        find_units(nn.Linear(2, 2))
    beside = nn.Module()
    beside.layers = nn.ModuleList([nn.Linear(2, 2)])
    beside.scale = nn.Parameter(torch.ones(2))
    with pytest.raises(SetupError, match=r"weights of its own beside its blocks \(scale\)"):
        find_units(beside)


def _sharing(parts: int) -> nn.Module:
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Linear(2, 2) for _ in range(parts)])
    for layer in model.layers:
        layer.weight = model.layers[0].weight
    return model


def test_models_that_only_training_unit_by_unit_would_change_are_refused_there() -> None:
    moving = nn.Module()
    moving.layers = nn.ModuleList([nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))])
    with pytest.raises(SetupError, match=r"has running statistics \(batch normalization\), which the backward"):
        unit_sizes(moving)
    assert unit_sizes(_sharing(2)) == {"layers.0": 6, "layers.1": 2}
    with pytest.raises(SetupError, match=r"3 parts of Module .* share weights \(layers.0, layers.1, layers.2\)"):
        unit_sizes(_sharing(3))
    assert len(find_units(_sharing(3))) == 3  # which can predict


def test_error_of_the_disk_is_not_hidden_by_weights_that_were_never_read() -> None:
    _, executor, source = streamed(_sharing(2))

    def fail(unit: int) -> Mapping[str, Tensor]:
        raise SetupError("the disk")

    source.weights = fail  # type: ignore[method-assign]  # a fault
    with pytest.raises(SetupError, match="the disk"), executor.weights_of({0, 1}):
        pass


def test_random_numbers_of_each_micro_batch_change_from_step_to_step() -> None:
    device, found = torch.device("cpu"), []
    torch.rand(1)  # or the first one computes the whole state anew
    for _ in range(2):
        found.append(tuple(derived_random_state(random_state(device), 1, device)[0].tolist()))
        torch.rand(100)
    assert len({*found}) == 2


def test_placeholders_take_no_memory_when_the_trainer_moves_the_model_to_their_device() -> None:
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(FAMILIES["decoder"][1])
    use_placeholders(model, "meta")
    executor = Executor(model, find_units(model), InMemory(nn.ModuleList([nn.ModuleList([nn.Linear(1, 1)])])))
    model.to(executor.device)
    assert executor.device.type == "meta"
    assert not any(any(parameter.stride()) for parameter in model.parameters())


class _Numbered(nn.Module):
    """Calls its second block only for long inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])

    def forward(self, values: Tensor) -> Tensor:
        for layer in self.layers[: len(values)]:
            values = layer(values)
        return values.sum()


class _Branched(nn.Module):
    """Computes something that is no part of the loss with weights that the loss uses too."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, 2)])
        self.unused: Tensor | None = None

    def forward(self, values: Tensor) -> Tensor:
        self.unused = self.layers[0](2 * values)
        self.layers[0](values[:0])
        loss: Tensor = self.layers[0](values).sum()
        return loss


def test_outputs_that_are_no_part_of_the_loss_do_not_matter() -> None:
    torch.manual_seed(0)
    model = _Branched()
    other, executor, source = streamed(model)
    values = torch.ones(3, 2)
    model(values).backward()
    executor.backward(executor.losses([partial(other, values)]))
    assert all(
        torch.equal(source.parked[name], one.grad) for name, one in model.named_parameters() if one.grad is not None
    )
    assert source.parked.keys() == dict(model.named_parameters()).keys()


def test_micro_batches_that_need_other_blocks_are_refused() -> None:
    other, executor, _ = streamed(_Numbered())
    with pytest.raises(SetupError, match=r"different orders; set train\.micro_batch_size"):
        executor.losses([partial(other, torch.ones(rows, 2)) for rows in (1, 2)])
