"""What runs a model computes in the plan's number format, whoever runs it; what must be exact leaves it."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from accelerate import Accelerator
from transformers import BertForSequenceClassification

from fulltune.footprint.allocations import _trace_micro_batch
from fulltune.inference.run import _recompute_in_float32, autocast
from fulltune.inference.selective_head import _cast_for_autocast, _rounding_tolerance, attention_precision
from fulltune.models import sharding
from fulltune.models.chunked_loss import ChunkedLogits
from fulltune.recipe.fields import Recipe
from fulltune.system import hardware
from fulltune.tasks import Target, text_classification
from fulltune.train.loop.guarded_step import first_non_finite_module
from fulltune.train.loop.trainer import FullTrainer
from tests import tiny
from tests.gpu_paths.cards import forget_what_was_found
from tests.gpu_paths.computed import formats
from tests.plans import plan
from tests.train import runs

TRAIN = {"precision": "bf16", "max_steps": 1, "global_batch_size": 8, "logging_steps": 1}
EXACT = "inference/selective_head.py"
"""Compares two ways to the same loss, before anything is trained."""
on_the_cpu = pytest.mark.stand_in("autocast on the CPU", card="the numbers of the card's kernels")


@pytest.fixture(autouse=True)
def _planned_by_rule_of_thumb() -> Any:
    with runs.without_tracing():
        yield


def weighted(**more: Any) -> Any:
    """Something with a device, as a model has it."""
    return SimpleNamespace(device=torch.device("cpu"), modules=lambda: iter(()), parameters=lambda: iter(()), **more)


@on_the_cpu
@pytest.mark.parametrize(
    ("precision", "found"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_products_have_the_precisions_type(precision: str, found: torch.dtype) -> None:
    with autocast(weighted(), precision):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == found


@on_the_cpu
@pytest.mark.parametrize("shared", [True, False])
def test_copies_of_weights_that_are_shared_out_are_not_kept(shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would be whole: neither by the Trainer's autocast nor by that of other passes."""
    monkeypatch.setattr(sharding, "is_fsdp2_sharded", lambda model: shared)
    forget_what_was_found()
    with autocast(weighted(), "bf16"):
        assert torch.is_autocast_cache_enabled() != shared

    def begin(trainer: Any, **keywords: Any) -> None:
        trainer.accelerator = Accelerator(cpu=True, mixed_precision="bf16")
        trainer.args = SimpleNamespace(per_device_train_batch_size=2, seed=1, world_size=1)
        trainer.model, trainer.add_callback = None, lambda callback: None

    monkeypatch.setattr(transformers.Trainer, "__init__", begin)
    inputs: Any = SimpleNamespace(
        plan=plan(precision="bf16"),
        recipe=Recipe.model_validate({"model": "m", "task": "text-classification", "data": {"train": "t.csv"}}),
        **dict.fromkeys(("journal", "recorder"), None),
        task=SimpleNamespace(count_items=None, FACTS=SimpleNamespace(contrasts=False)),
        has_own_loss=False,
    )
    trainer = FullTrainer(inputs, lengths=np.ones(8, np.int64))
    with trainer.accelerator.autocast():
        assert torch.is_autocast_cache_enabled() != shared
    forget_what_was_found()


@on_the_cpu
def test_run_of_a_regression_computes_every_pass_in_its_format(tmp_path: Path) -> None:
    """Also the drift and what is replayed, the probe that starts its head, the check of its scale."""
    rows = [{"text": row["text"], "score": 100.0 + number % 7} for number, row in enumerate(tiny.topic_rows(40))]
    model = tiny.save_model(tmp_path / "model", "bert")
    blocks: dict[str, Any] = {"data": {"label": "score", "problem_type": "regression"}, "preserve": {"budget": "5%"}}
    with formats() as found:
        runs.run(tmp_path, model, rows, until="evaluate", train=TRAIN, **blocks)
    assert set(found) == {
        "inference/run.py: mean_states",
        "inference/run.py: reduce_batch",
        "probe/layers.py: run_and_read_hidden",
        "train/loop/guarded_step.py: compute_loss",
        "train/worker/loading.py: _returns_layer_output",
    }
    assert {name for name, types in found.items() if types != {torch.bfloat16}} == set()


@on_the_cpu
def test_run_of_a_language_model_computes_every_pass_in_its_format(tmp_path: Path) -> None:
    """Also what is replayed, and its answers."""
    model = tiny.save_model(tmp_path / "model", "llama")
    blocks: dict[str, Any] = {
        "preserve": {"budget": "5%"},
        "evaluate": {"generate_rows": 2, "max_new_tokens": 2},
    }
    with formats() as found:
        runs.run(tmp_path, model, tiny.pair_rows(30), until="evaluate", task="causal-lm", train=TRAIN, **blocks)
    exact = {name for name in found if name.startswith(EXACT)}
    assert set(found) - exact == {
        "inference/run.py: generate_tokens",
        "inference/run.py: reduce_batch",
        "train/loop/guarded_step.py: compute_loss",
        "train/forgetting/generic.py: _next_token_logits",
    }
    assert {name for name, types in found.items() if types != {torch.bfloat16}} == exact


@on_the_cpu
@pytest.mark.parametrize(("weights", "found"), [("fp32", torch.bfloat16), ("bf16", torch.float32)])
def test_traced_pass_computes_as_the_trainer_does(weights: str, found: torch.dtype) -> None:
    """Weights in bf16 compute in their own type, here float32: without autocast."""
    model = BertForSequenceClassification(tiny.config("bert", tiny.encoder_tokenizer(), num_labels=2))
    case: Any = SimpleNamespace(
        task=text_classification,
        weights_dtype=weights,
        precision="bf16",
        target=Target("single_label", {"a": 0, "b": 1}),
    )
    watch: Any = SimpleNamespace(place="")
    with formats() as types:
        batch = {"input_ids": torch.ones(2, 3).long(), "labels": torch.ones(2).long()}
        _trace_micro_batch(case, model, batch, watch, False)
    assert types["footprint/allocations.py: _trace_micro_batch"] == {found}


@on_the_cpu
def test_numbers_of_a_regression_are_exact_in_half_precision() -> None:
    layer = torch.nn.Linear(1, 1)
    with torch.no_grad():
        layer.weight.fill_(526_580.0)
        layer.bias.zero_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = layer(torch.ones(1, 1))
            exact = _recompute_in_float32(layer, (torch.ones(1, 1),), rough)
    assert rough.item() == 528_384
    assert (exact.item(), exact.dtype) == (526_580, torch.float32)


@on_the_cpu
def test_picked_states_have_the_type_that_the_heads_product_would_have() -> None:
    hidden = torch.ones(2, 3)
    with torch.autocast("cpu", dtype=torch.float16):
        assert _cast_for_autocast(hidden).dtype == torch.float16
    assert _cast_for_autocast(hidden).dtype == torch.float32


@on_the_cpu
@pytest.mark.parametrize(
    ("attention", "computed"), [("flash_attention_2", torch.bfloat16), ("sdpa", torch.float32), (None, torch.float32)]
)
def test_head_is_tried_in_the_types_that_its_attention_knows(attention: str | None, computed: torch.dtype) -> None:
    model = weighted(config=SimpleNamespace(_attn_implementation=attention), dtype=torch.float32)
    with attention_precision(model, "cpu"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == computed
        assert _rounding_tolerance(model) == torch.finfo(computed).eps ** 0.5


@on_the_cpu
@pytest.mark.parametrize("trained", [True, False])
def test_chunked_loss_is_exact_inside_of_half_precision(trained: bool) -> None:
    """Its states have the type that they were given: autocast around it changes no digit, of the loss or a gradient."""
    draw = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(40, 16, generator=draw).half(), torch.randn(90, 16, generator=draw)
    targets = torch.randint(0, 90, (40,), generator=draw)

    def found(half: bool) -> list[torch.Tensor]:
        states, values = (one.clone().requires_grad_(trained) for one in (hidden, weight))
        pieces = ChunkedLogits(states, values, None, values[:0])
        with torch.autocast("cpu", dtype=torch.bfloat16) if half else contextlib.nullcontext():
            loss = pieces.loss(targets)
            scores = pieces.scores(targets)
        if trained:
            loss.backward()
        return [loss.detach(), *scores, *(one.grad for one in (states, values) if one.grad is not None)]

    for exact, inside in zip(found(False), found(True), strict=True):
        assert torch.equal(exact, inside)


@on_the_cpu
def test_loss_that_is_not_finite_is_explained_without_half_precision() -> None:
    """In fp16 a large product is infinite, which is no fault of the weights."""

    class Doubled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)
            torch.nn.init.constant_(self.layer.weight, 60_000.0)

        def forward(self, given: torch.Tensor) -> torch.Tensor:
            return self.layer(given) * 2

    model, batch = Doubled(), {"given": torch.full((1, 1), 30.0)}
    with torch.autocast("cpu", dtype=torch.float16):
        assert not bool(model(**batch).isfinite())
        assert first_non_finite_module(model, batch) is None


@on_the_cpu
def test_speed_of_bf16_is_that_of_products_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    types, theirs = list[torch.dtype](), torch.nn.functional.linear

    def linear(*given: Any) -> torch.Tensor:
        output = theirs(*given)
        types.append(output.dtype)
        return output

    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    assert hardware._measure_bf16_speedup(rows=2, width=4) > 0
    assert types[:4] == [torch.float32] * 2 + [torch.bfloat16] * 2
