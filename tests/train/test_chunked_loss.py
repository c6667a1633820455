"""Chunked loss: the numbers of whole logits, which never exist; where a model does not allow it, it says so."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from fulltune.inference import selective_head
from fulltune.inference.run import Batching, run_rows
from fulltune.models import chunked_loss
from fulltune.models.chunked_loss import ChunkedLogits
from fulltune.tasks import LossSettings, Target, causal_lm, seq2seq
from tests import tiny
from tests.train import runs
from tests.train.test_selective_head import NO_DROPOUT, batch, model_of
from tests.train.test_stream_executor import SMALL, streamed, tokens

TARGET = Target("prompt_completion", {"prompt": "prompt", "completion": "completion"})
VOCABULARY, HIDDEN = 50, 16


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """ChunkedLogits of 4 tokens; a warning would mean that some other way was taken."""
    monkeypatch.setattr(chunked_loss, "TOKENS_PER_CHUNK", {"cpu": 4})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("default", module=r"(?!fulltune|torch\.nn).*")
        yield


# ---- the loss itself -------------------------------------------------------------------------------------------


def drawn(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, weights, bias, targets."""
    generator = torch.Generator().manual_seed(tokens)
    hidden, weight, bias = (
        torch.randn(*size, generator=generator) for size in ((tokens, HIDDEN), (VOCABULARY, HIDDEN), (VOCABULARY,))
    )
    return hidden, weight, bias, torch.randint(0, VOCABULARY, (tokens,), generator=generator)


def with_gradients(
    loss: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, scale: float = 1 / 7
) -> list[torch.Tensor]:
    """The loss, and the gradients of hidden states, weights and bias, of the loss times `scale`."""
    leaves = [tensor.clone().requires_grad_() for tensor in (hidden, weight, bias) if tensor is not None]
    found = loss(leaves[0], leaves[1], leaves[2] if bias is not None else None)
    (found * scale).backward()
    gradients = [leaf.grad for leaf in leaves if leaf.grad is not None]
    assert len(gradients) == len(leaves)
    return [found.detach(), *gradients]


def pieces(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> ChunkedLogits:
    return ChunkedLogits(hidden, weight, bias, hidden[:0])


@pytest.mark.parametrize("tokens", [0, 1, 11])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("with_bias", [False, True])
def test_loss_and_gradients_are_those_of_whole_logits(tokens: int, smoothing: float, with_bias: bool) -> None:
    hidden, weight, bias, targets = drawn(tokens)
    given = (hidden, weight, bias if with_bias else None)

    whole = with_gradients(
        lambda h, w, b: F.cross_entropy(F.linear(h, w, b), targets, label_smoothing=smoothing, reduction="sum"), *given
    )
    found = with_gradients(lambda h, w, b: pieces(h, w, b).loss(targets, smoothing), *given)

    for one, other in zip(found, whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_in_bf16_the_error_is_that_of_whole_logits(weights: torch.dtype) -> None:
    hidden, weight, bias, targets = drawn(203)
    hidden, weight = hidden.bfloat16(), weight.to(weights)

    def whole(h: torch.Tensor, w: torch.Tensor, b: Any) -> torch.Tensor:
        return F.cross_entropy(F.linear(h.bfloat16(), w.bfloat16(), b.bfloat16()).float(), targets, reduction="sum")

    exact = with_gradients(
        lambda h, w, b: F.cross_entropy(F.linear(h, w, b), targets, reduction="sum"),
        *(hidden.double(), weight.double(), bias.double()),
    )
    rounded = with_gradients(whole, hidden, weight, bias)
    found = with_gradients(lambda h, w, b: pieces(h, w, b).loss(targets), hidden, weight, bias)

    assert [tensor.dtype for tensor in found] == [torch.float32, torch.bfloat16, weights, torch.float32]
    for one, other, true in zip(found, rounded, exact, strict=True):
        error, theirs = ((tensor.double() - true).norm() / true.norm() for tensor in (one, other))
        assert error <= 1.3 * theirs + 1e-6


class Largest(TorchDispatchMode):
    """The most tokens for which logits existed at once."""

    tokens = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (list, tuple)) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.dim() > 1 and tensor.shape[-1] == VOCABULARY:
                self.tokens = max(self.tokens, tensor.numel() // VOCABULARY)
        return out


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_whole_logits_never_exist(kind: torch.dtype) -> None:
    hidden, weight, _, targets = drawn(41)
    weight, hidden = weight.t().contiguous().t().requires_grad_(), hidden.to(kind).requires_grad_()

    with Largest() as whole:
        F.linear(hidden, weight.to(kind))
    with Largest() as loss:
        pieces(hidden, weight, None).loss(targets).backward()
    with Largest() as scores, torch.no_grad():
        pieces(hidden, weight, None).scores(targets)

    # Transposed weights have the vocabulary last as well, with a row for each hidden value.
    assert whole.tokens == 41
    assert max(loss.tokens, scores.tokens) <= HIDDEN


# ---- real models -----------------------------------------------------------------------------------------------


def writer_of(kind: str) -> Any:
    from transformers import AutoModelForSeq2SeqLM

    torch.manual_seed(0)
    dropout = {"t5": {"dropout_rate": 0.0}}.get(kind, {"dropout": 0.0})
    return AutoModelForSeq2SeqLM.from_config(tiny.config(kind, tiny.writer_tokenizer(kind), **dropout))


def writer_batch(model: Any) -> dict[str, torch.Tensor]:
    rows = [{"input_ids": [5, 6, 7], "labels": [8, 1]}, {"input_ids": [9, 1], "labels": [5, 6, 7, 9, 10, 1]}]
    inputs = seq2seq.collate(rows, 0)
    return {**inputs, "decoder_input_ids": seq2seq.decoder_input_ids(model, inputs["labels"])}


def gradients(model: Any, inputs: dict[str, torch.Tensor], head: Any, task: Any, chunked: bool, bf16: bool) -> Any:
    """Loss and gradients by all logits (no head), by picked ones, or in pieces."""
    model.zero_grad()
    given = {name: tensor for name, tensor in inputs.items() if name != "labels"}
    selecting = nullcontext() if head is None else head.computing_only(inputs["labels"], chunked=chunked)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16), selecting:
        logits = model(**given).logits
    assert isinstance(logits, ChunkedLogits) == chunked
    if head is not None and not chunked:
        assert logits.shape[:-1] == (task.count_items(inputs["labels"]),)
    loss = task.loss(logits, inputs["labels"], TARGET, LossSettings(0.1)) / 3
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(model: Any, inputs: dict[str, torch.Tensor], task: Any, *, bf16: bool = False) -> None:
    """Picked logits, and a chunked loss if it is possible, give what all logits give."""
    head, found = selective_head.verify_selective_head(model, task, inputs)
    assert head is not None, found
    model.train()
    whole, expected = gradients(model, inputs, None, task, False, bf16)
    close = 2e-2 if bf16 else 1e-5
    # The gradient of a key's bias is 0 but for rounding.
    noise = close / 20 * max(float(gradient.norm()) for gradient in expected.values())
    for chunked in (False, True)[: 1 + head.can_chunk]:
        loss, got = gradients(model, inputs, head, task, chunked, bf16)
        torch.testing.assert_close(loss, whole, rtol=close, atol=0.0)
        assert got.keys() == expected.keys()
        for name, gradient in expected.items():
            assert (got[name] - gradient).norm() <= close * gradient.norm() + noise, name
    assert not head.head._forward_pre_hooks
    assert not model._forward_hooks


def assert_in_pieces(model: Any, inputs: dict[str, torch.Tensor], task: Any, *, bf16: bool = False) -> None:
    head, _ = selective_head.verify_selective_head(model, task, inputs)
    assert head is not None
    assert head.can_chunk
    assert head.chunking_note.startswith("yes; ")
    assert_same(model, inputs, task, bf16=bf16)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("kind", tiny.DECODERS)
def test_decoders_have_the_same_loss_and_gradients(kind: str, bf16: bool) -> None:
    assert_in_pieces(model_of(kind), batch(), causal_lm, bf16=bf16)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("kind", tiny.WRITERS)
def test_encoder_decoders_have_the_same_loss_and_gradients(kind: str, bf16: bool) -> None:
    """A T5 scales hidden states before its head."""
    model = writer_of(kind)
    assert_in_pieces(model, writer_batch(model), seq2seq, bf16=bf16)


def test_a_bias_that_follows_the_head_is_added_to_the_pieces() -> None:
    model = writer_of("marian")
    model.final_logits_bias.normal_()
    inputs = writer_batch(model)
    head, _ = selective_head.verify_selective_head(model, seq2seq, inputs)
    assert head is not None

    loss, _ = gradients(model, inputs, head, seq2seq, chunked=True, bf16=False)
    model.final_logits_bias.zero_()
    without, _ = gradients(model, inputs, head, seq2seq, chunked=True, bf16=False)

    assert abs(float(loss - without)) > 0.1
    model.final_logits_bias.normal_()
    assert_in_pieces(model, inputs, seq2seq)


def strange(name: str, **changes: Any) -> Any:
    """A model that changes logits after its head."""
    import transformers

    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = getattr(transformers, f"{name}Config")(
        **size, vocab_size=len(tiny.decoder_tokenizer()), intermediate_size=64, **changes
    )
    return getattr(transformers, f"{name}ForCausalLM")(config)


@pytest.mark.parametrize(
    ("name", "changes"),
    [("Gemma2", {"head_dim": 8}), ("Cohere", {"logit_scale": 0.25}), ("Granite", {"logits_scaling": 8.0})],
)
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_models_that_change_logits_later_keep_whole_ones(name: str, changes: Any, kind: torch.dtype) -> None:
    model = strange(name, **changes).to(kind)

    head, found = selective_head.verify_selective_head(model, causal_lm, batch())

    assert head is not None, found
    assert not head.can_chunk
    assert head.chunking_note.startswith("off: the model changes logits after its head, by up to ")
    assert_same(model, batch(), causal_lm, bf16=kind == torch.bfloat16)


class Scaled(torch.nn.Linear):
    """A head that is no plain product."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(hidden)


def test_a_head_that_is_no_plain_product_keeps_whole_logits() -> None:
    model = model_of("llama")
    model.lm_head = Scaled(model.lm_head.in_features, model.lm_head.out_features, bias=False)
    head, _ = selective_head.verify_selective_head(model, causal_lm, batch())
    assert head is not None
    assert head.chunking_note == "off: the model's head is a Scaled, not a linear layer"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_evaluation_in_pieces_keeps_the_same_numbers(precision: str) -> None:
    model = model_of("gpt2")
    rows = [{"input_ids": list(range(5, 9 + n)), "labels": [-100, 6, *range(7, 9 + n)]} for n in range(9)]
    head, _ = selective_head.verify_selective_head(model, causal_lm, batch())
    assert head is not None

    def kept(head: Any) -> Any:
        return run_rows(model, rows, causal_lm, TARGET, 0, Batching(4, precision, head))

    whole, found = kept(None), kept(head)
    assert head.can_chunk
    close = 1e-5 if precision == "fp32" else 1e-2  # a CPU's bf16 kernels round by the shape of the product
    for name, values in whole.items():
        assert found[name] == pytest.approx(values, rel=close)


# ---- runs ------------------------------------------------------------------------------------------------------


def check_of(outcome: Any) -> str:
    return next(check.result for check in outcome.checks if check.name == "chunked loss")


def test_a_run_in_pieces_is_the_run_with_whole_logits(tmp_path: Path) -> None:
    model = tiny.save_model(tmp_path / "model", "gpt2", **NO_DROPOUT["gpt2"])
    losses = []
    for pieces_wanted in (True, False):
        folder = tmp_path / str(pieces_wanted)
        train = {"max_steps": 3, "logging_steps": 1, "chunked_loss": pieces_wanted, "micro_batch_size": 4}
        reached = runs.run(
            folder, model, tiny.pair_rows(), task="causal-lm", train=train | {"activation_checkpointing": True}
        )
        assert reached.outcome is not None
        names = [check.name for check in reached.outcome.checks]
        assert ("chunked loss" in names) == pieces_wanted
        losses.append([event["loss"] for event in runs.events(folder, "train")])
        if pieces_wanted:
            assert check_of(reached.outcome).startswith("yes; ")

    assert len(losses[0]) == 3
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_streamed_head_gives_the_same_gradients(tied: bool, micro_batches: int) -> None:
    """The head is called for no token, and then for all in pieces."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=tied))
    other, executor, source = streamed(model)

    def target_ids(labels: Tensor) -> Tensor:
        return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], dim=1)

    def forward(streams: Any, ids: Tensor) -> Tensor:
        head = selective_head.SelectiveHead(streams.get_output_embeddings(), target_ids, streams)
        with head.computing_only(ids, chunked=True):
            logits = streams(input_ids=ids, use_cache=False).logits
        loss: Tensor = logits.loss(ids[:, 1:].flatten())
        return loss

    batches = [tokens(2, 5 + seed, seed) for seed in range(micro_batches)]
    expected = [forward(model, ids) for ids in batches]
    for loss in expected:
        loss.backward()  # type: ignore[no-untyped-call]  # torch's
    losses = executor.losses([partial(forward, other, ids) for ids in batches])
    torch.autograd.backward(losses)
    assert all(torch.equal(*pair) for pair in zip(losses, expected, strict=True))
    gradients = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    assert gradients.keys() == source.parked.keys()
    assert all(torch.equal(source.parked[name], gradient) for name, gradient in gradients.items())
