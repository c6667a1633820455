"""Which models keep packed texts separate, and rows with answers packed within a micro batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers

from fulltune.models import packing
from fulltune.tasks import Target, causal_lm
from tests import tiny

KINDS = ("llama", "qwen3", "gemma3", "gpt2", "gpt_neox")
HYBRIDS: dict[str, tuple[str, dict[str, Any]]] = {
    "lfm2": ("Lfm2Config", {"layer_types": ["full_attention", "conv"]}),
    "qwen3_5": (
        "Qwen3_5TextConfig",
        {"head_dim": 8, "layer_types": ["full_attention", "linear_attention"]}
        | {f"linear_num_{name}_heads": 4 for name in ("key", "value")}
        | {f"linear_{name}_head_dim": 8 for name in ("key", "value")},
    ),
    "falcon_h1": (
        "FalconH1Config",
        {"head_dim": 8, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8},
    ),
    "mamba": ("MambaConfig", {"state_size": 8}),
}
_FULL, _HALF = torch.float32, torch.bfloat16
DEEP = [("qwen3", 0.15, 24, _FULL), ("qwen3", 0.15, 24, _HALF), ("lfm2", 0.02, 2, _FULL), ("lfm2", 0.15, 8, _HALF)]


def make_config(kind: str, tokenizer: Any) -> Any:
    """A tiny config without dropout; the hybrids begin with attention, which keeps texts apart."""
    if kind == "gpt2":
        return tiny.config(kind, tokenizer, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    llama = {
        name: value for name, value in tiny.config("llama", tokenizer).to_dict().items() if name in tiny_sizes(kind)
    }
    if kind == "qwen3":
        return transformers.Qwen3Config(**llama, head_dim=8)
    if kind == "gemma3":
        kinds = ["sliding_attention", "full_attention"]
        return transformers.Gemma3TextConfig(**llama, head_dim=8, sliding_window=8, layer_types=kinds)
    if kind in HYBRIDS:
        name, values = HYBRIDS[kind]
        return getattr(transformers, name)(**llama, **values)
    return tiny.config(kind, tokenizer)


def tiny_sizes(kind: str) -> set[str]:
    """Names of the sizes that a config shares with Llama's."""
    common = {"vocab_size", "pad_token_id", "bos_token_id", "eos_token_id", "hidden_size", "num_hidden_layers"}
    heads = {"num_attention_heads", "num_key_value_heads", "intermediate_size", "max_position_embeddings"}
    return common if kind == "mamba" else common | heads


def make_model(kind: str, tokenizer: Any) -> Any:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(make_config(kind, tokenizer), dtype=torch.float32)
    model.config.use_cache = False  # as the Trainer does
    return model


def pack(model: Any) -> dict[str, torch.Tensor]:
    """The check's rows as training packs them."""
    return causal_lm.collate_packed(packing.rows_for_check(model, joined=False), 0)


def answered_rows() -> list[dict[str, np.ndarray]]:
    """Rows whose first third is a prompt."""
    draw, rows = np.random.default_rng(0), []
    for length in (31, 5, 12, 9, 28, 17, 3, 14):
        ids = draw.integers(3, 250, length)
        rows.append({"input_ids": ids, "labels": np.where(np.arange(length) < 1 + length // 3, -100, ids)})
    return rows


def loss_and_gradients(model: Any, batch: dict[str, torch.Tensor]) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    loss = causal_lm.loss(model(**inputs).logits, batch["labels"], Target("chat", {}))
    loss.backward()
    return float(loss.detach()), {name: weight.grad.clone() for name, weight in model.named_parameters()}


@pytest.mark.parametrize("kind", KINDS)
def test_packed_rows_have_the_loss_and_gradients_of_single_rows(kind: str, decoder_tokenizer: Any) -> None:
    model, rows = make_model(kind, decoder_tokenizer), answered_rows()
    packed, single = causal_lm.collate_packed(rows, 0), causal_lm.collate(rows, 0)
    assert len(packed["input_ids"]) < len(rows)
    assert "attention_mask" not in packed
    assert bool((packed["labels"][packed["position_ids"] == 0] == -100).all())
    assert causal_lm.count_items(packed["labels"]) == causal_lm.count_items(single["labels"])
    (loss, gradients), (expected, others) = (loss_and_gradients(model, batch) for batch in (packed, single))
    assert loss == pytest.approx(expected, rel=1e-6)
    for name, gradient in others.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-5, atol=1e-5 * float(gradient.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
def test_leak_is_found_if_the_cache_is_on_or_a_mask_is_passed(kind: str, decoder_tokenizer: Any) -> None:
    model = make_model(kind, decoder_tokenizer).train()
    assert packing.find_packing_leak(model, pack(model)) is None
    assert model.training
    masked = pack(model) | {"attention_mask": torch.ones_like(pack(model)["input_ids"])}
    assert "does not keep" in (packing.find_packing_leak(model, masked) or "")
    model.config.use_cache = True
    assert "does not keep" in (packing.find_packing_leak(model, pack(model)) or "")


@pytest.mark.parametrize(("kind", "std", "layers", "dtype"), DEEP)
def test_leak_is_told_from_rounding_whatever_the_size_of_weights_and_their_type(
    kind: str, std: float, layers: int, dtype: torch.dtype, decoder_tokenizer: Any
) -> None:
    config = make_config(kind, decoder_tokenizer)
    config.initializer_range, config.num_hidden_layers = std, layers
    config.layer_types = ["full_attention", "conv" if kind == "lfm2" else "full_attention"] * (layers // 2)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(dtype)
    model.config.use_cache = False
    assert (packing.find_packing_leak(model, pack(model)) is None) == (kind == "qwen3")


@pytest.mark.parametrize(
    "lengths", [[7, 10, 3, 2, 5, 1, 10, 4], [9], [5, 5, 5], [100, *[3] * 15], *[[1 + n * n % 37 for n in range(32)]]]
)
def test_blocks_hold_each_row_once_and_need_no_more_than_single_rows(lengths: list[int]) -> None:
    blocks = packing.fill_blocks(lengths)
    assert sorted(row for block in blocks for row in block) == list(range(len(lengths)))
    width = max(sum(lengths[row] for row in block) for block in blocks)
    assert len(blocks) * width**2 <= len(lengths) * max(lengths) ** 2
    if len(set(lengths)) > 1:
        assert len(blocks) * width < 1.1 * max(sum(lengths), max(lengths) * 2)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2", "gpt_neox", "mistral"])
def test_model_that_reads_position_ids_keeps_texts_apart(kind: str, decoder_tokenizer: Any) -> None:
    config = tiny.config(kind, decoder_tokenizer)
    state = torch.get_rng_state()
    assert packing.why_not_packable(config) is None
    assert torch.equal(torch.get_rng_state(), state)
    assert config.to_dict() == tiny.config(kind, decoder_tokenizer).to_dict()  # the copy is another one


@pytest.mark.parametrize("kind", ["opt", "bloom", *HYBRIDS])
def test_model_that_does_not_is_named_with_the_reason(kind: str, decoder_tokenizer: Any) -> None:
    reason = packing.why_not_packable(make_config(kind, decoder_tokenizer))
    assert reason is not None
    assert f"a '{kind}" in reason
    assert "does not keep packed texts separate" in reason
    assert "\n" not in reason


def test_model_that_cannot_be_made_is_an_obstacle(decoder_tokenizer: Any) -> None:
    reason = packing.why_not_packable(tiny.config("llama", decoder_tokenizer), "no_such_attention")
    assert reason is not None
    assert reason.startswith("a small copy of the 'llama' model cannot be created (")


@pytest.mark.parametrize(
    ("kind", "values", "error"),
    [
        ("rwkv", {"attention_hidden_size": 32, "num_hidden_layers": 2}, "ZeroDivisionError: "),
        ("zamba2", {"num_hidden_layers": 3, "layers_block_type": ["mamba", "mamba", "hybrid"]}, "KeyError: "),
    ],
)
def test_model_whose_copy_fails_in_its_own_way_is_an_obstacle(kind: str, values: dict[str, Any], error: str) -> None:
    config = transformers.AutoConfig.for_model(kind, hidden_size=32, vocab_size=200, **values)
    assert error in (packing.why_not_packable(config) or "")
