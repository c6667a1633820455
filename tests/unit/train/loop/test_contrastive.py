"""A contrastive loss has the gradients of the whole global batch at any micro batch size."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from fulltune.models.base import Base
from fulltune.models.load import load_model
from fulltune.models.sentence_files import write_sentence_files
from fulltune.recipe.model import ModelBlock
from fulltune.tasks import Row, Target, embedding
from fulltune.train.loop import contrastive
from fulltune.train.loop.contrastive import ContrastiveLoss
from fulltune.train.loop.trainer import ITEMS, FullTrainer
from tests import tiny

Gradients = Mapping[str, torch.Tensor]
TARGET = Target("query_and_positive", {"query": "query", "positive": "positive", "negative": "negative"})
ROWS = [
    {"query": f"where is the {food}?", "positive": f"{food} in the {place}", "negative": f"no {place} {number}"}
    for number, (food, place) in enumerate(zip(tiny.FOOD[:7], tiny.PLACES[:7], strict=True))
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("model") / "bert", "bert")


def micro_batches(base: Base, size: int, rows: Sequence[Row] = ROWS) -> list[dict[str, torch.Tensor]]:
    features = [example.features for [example] in embedding.encode(rows, TARGET, base.processor, 32)]
    parts = [features[start : start + size] for start in range(0, len(features), size)]
    return [embedding.collate(part, base.processor.pad_token_id) for part in parts]


def gradients(model: Any) -> Gradients:
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    return found


def one_step(model: Any, batches: Sequence[dict[str, torch.Tensor]]) -> tuple[float, Gradients]:
    """What the Trainer does in a step of these micro batches."""
    counted = [batch | {ITEMS: embedding.count_items(batch["labels"])} for batch in batches]
    trainer: Any = SimpleNamespace(args=SimpleNamespace(world_size=1))
    items = FullTrainer._get_num_items_in_batch(trainer, counted, torch.device("cpu"))
    contrast, total = ContrastiveLoss(embedding.row_losses, Accelerator(cpu=True)), 0.0
    contrast.begin_step(model, batches)
    for batch in batches:
        contrast.restore_random_state()
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        loss = contrast(model(**inputs), batch["labels"], items)
        loss.backward()
        total += float(loss.detach())
    return total, gradients(model)


def whole_graph(model: Any, batches: Sequence[dict[str, torch.Tensor]]) -> tuple[float, Gradients]:
    model.train()
    vectors = [model(**{name: one for name, one in batch.items() if name != "labels"}).logits for batch in batches]
    labels = torch.cat([batch["labels"] for batch in batches])
    loss = embedding.row_losses(torch.cat(vectors), labels).sum() / (labels[:, 1] != labels[:, 2]).sum()
    loss.backward()
    return float(loss.detach()), gradients(model)


def largest_difference(one: Gradients, other: Gradients) -> float:
    assert one.keys() == other.keys()
    assert 0.1 < max(float(tensor.abs().max()) for tensor in other.values()) < 10
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def test_gradients_do_not_depend_on_the_micro_batch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = Base.from_block(ModelBlock(name=str(folder), dropout=0.0), "embedding")
    model = load_model(base, {}, head_is_new=False)
    loss, expected = whole_graph(model, micro_batches(base, len(ROWS)))
    for size in (1, 3, len(ROWS)):
        value, found = one_step(model, micro_batches(base, size))
        assert value == pytest.approx(loss, rel=1e-6)
        assert largest_difference(found, expected) < 1e-6
    monkeypatch.setattr(contrastive, "ANCHORS_AT_ONCE", 2)
    assert largest_difference(one_step(model, micro_batches(base, 3))[1], expected) < 1e-6
    # Micro batches by themselves have fewer negatives, and other gradients.
    parts = [embedding.loss(model(**batch).logits, labels, TARGET) for batch, labels in split(micro_batches(base, 3))]
    (sum(parts) / len(ROWS)).backward()
    assert largest_difference(gradients(model), expected) > 0.01


def test_rows_without_a_positive_change_the_mean_at_no_micro_batch(folder: Path) -> None:
    """A text alone in its class is its own positive."""
    base = Base.from_block(ModelBlock(name=str(folder), dropout=0.0), "embedding")
    rows = [{**row, "positive": row["query"]} if number % 2 else row for number, row in enumerate(ROWS)]
    model = load_model(base, {}, head_is_new=False)
    loss, expected = whole_graph(model, micro_batches(base, len(rows), rows))
    for size in (1, 2, len(rows)):
        value, found = one_step(model, micro_batches(base, size, rows))
        assert value == pytest.approx(loss, rel=1e-6)
        assert largest_difference(found, expected) < 1e-6
    alone = [{**row, "positive": row["query"]} for row in ROWS]
    value, found = one_step(model, micro_batches(base, 2, alone))
    assert value == 0
    assert all(torch.count_nonzero(gradient) == 0 for gradient in found.values())


def split(batches: Sequence[dict[str, torch.Tensor]]) -> list[tuple[dict[str, torch.Tensor], torch.Tensor]]:
    return [({name: one for name, one in batch.items() if name != "labels"}, batch["labels"]) for batch in batches]


@pytest.mark.parametrize("size", [1, 3, len(ROWS)])
def test_gradients_are_those_of_one_graph_with_the_same_dropout(folder: Path, size: int) -> None:
    base = Base.from_block(ModelBlock(name=str(folder), dropout=0.3), "embedding")
    model, batches = load_model(base, {}, head_is_new=False), micro_batches(base, size)
    torch.manual_seed(1)
    loss, expected = whole_graph(model, batches)
    after = torch.get_rng_state()
    torch.manual_seed(1)
    value, found = one_step(model, batches)
    assert value == pytest.approx(loss, rel=1e-6)
    assert largest_difference(found, expected) < 1e-6
    assert torch.equal(torch.get_rng_state(), after)
    torch.manual_seed(2)
    assert largest_difference(one_step(model, batches)[1], expected) > 0.01


@pytest.mark.long  # importing it takes seconds
@pytest.mark.parametrize("roles", [("query", "positive"), ("query", "positive", "negative")])
def test_loss_and_gradients_are_those_of_sentence_transformers(folder: Path, roles: tuple[str, ...]) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.losses import CachedMultipleNegativesRankingLoss

    base = Base.from_block(ModelBlock(name=str(folder), dropout=0.0), "embedding")
    write_sentence_files(folder, base.config, 32)
    with warnings.catch_warnings(action="ignore"):
        theirs = SentenceTransformer(str(folder), device="cpu", config_kwargs=dict.fromkeys(DROPOUTS, 0.0))
        loss = CachedMultipleNegativesRankingLoss(theirs, mini_batch_size=2)
        value = loss([theirs.preprocess([row[role] for row in ROWS]) for role in roles], None)
    value.backward()
    prefix = f"{load_model(base, {}, head_is_new=False).base_model_prefix}."
    expected = {prefix + name: tensor for name, tensor in gradients(theirs[0].model).items()}

    target = Target("query_and_positive", {role: role for role in roles})
    features = [example.features for [example] in embedding.encode(ROWS, target, base.processor, 32)]
    batches = [embedding.collate(part, base.processor.pad_token_id) for part in (features[:4], features[4:])]
    ours, found = one_step(load_model(base, {}, head_is_new=False), batches)
    assert ours == pytest.approx(float(value.detach()), abs=1e-5)
    assert largest_difference(found, expected) < 1e-5


DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob")


def test_two_ranks_gather_rows_that_differ_in_number() -> None:
    """Each rank gets its own slices of the gradient that one process with all rows computes."""
    vectors, labels = torch.randn(5, 2, 8), torch.tensor([[n, n, 10 + n] for n in range(5)])
    alone = ContrastiveLoss(embedding.row_losses, Accelerator(cpu=True))
    [(value, gradient)] = alone._share_out([vectors], [labels])
    parts = []
    for rank, part in enumerate((slice(0, 3), slice(3, 5))):
        contrast = ContrastiveLoss(embedding.row_losses, Accelerator(cpu=True))
        starts = iter([(vectors, part.start), (labels, part.start)])
        contrast._gather = lambda local, starts=starts: next(starts)  # type: ignore[method-assign]  # a fake
        parts += contrast._share_out(vectors[part].split(2), labels[part].split(2))
        assert rank in (0, 1)
    assert float(sum(value for value, _ in parts)) == pytest.approx(float(value))
    assert torch.allclose(torch.cat([one for _, one in parts]), gradient)
