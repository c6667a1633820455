"""A checkpoint that brings a head: its rows follow the labels' names, or a new head is drawn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from fulltune.models import sharding
from fulltune.models.base import Base
from fulltune.models.load import (
    HeadOrigin,
    head_origin_by_labels,
    initialise_missing_from_seed,
    load_model,
    predict_head_origin,
)
from fulltune.models.shapes import measure_shapes
from fulltune.recipe.model import ModelBlock
from fulltune.tasks import Target, task_named
from tests import tiny
from tests.invariant import placed
from tests.unit.train.test_fsdp2 import process_group

LABELS = ("bad", "fine", "good")


@pytest.mark.parametrize(
    ("theirs", "ours", "order", "why"),
    [
        (LABELS, LABELS, (0, 1, 2), " for 3 of 3 labels"),
        (LABELS, ("good", "bad", "fine"), (2, 0, 1), " for 3 of 3 labels"),
        (LABELS, ("bad", "good"), (0, 2), " for 2 of 2 labels; dropped: fine"),
        (LABELS, ("new", "good", "bad"), (None, 2, 0), " for 2 of 3 labels; new: new; dropped: fine"),
        (("LABEL_0", "LABEL_1"), ("LABEL_1", "LABEL_2"), None, None),
        (("a", "b", "c", "d"), LABELS, None, "the checkpoint's 4 labels are different (a, b, c ...)"),
        (("LABEL_0", "LABEL_1"), ("0", "1"), None, "the checkpoint's 2 labels have no names (LABEL_0, LABEL_1)"),
        (("LABEL_0", "LABEL_1"), ("LABEL_1", "LABEL_0"), (1, 0), None),
        (("bad", "bad"), ("bad", "good"), None, "the checkpoint's 2 labels are different (bad, bad)"),
        (("LABEL_0",), ("value",), (0,), ""),
    ],
)
def test_rows_of_a_head_follow_the_names(
    theirs: tuple[str, ...], ours: tuple[str, ...], order: tuple[int, ...] | None, why: str | None
) -> None:
    found = head_origin_by_labels(theirs, ours)
    assert found.order == order
    assert why is None or found.why == why


def test_head_of_another_class_is_not_taken() -> None:
    config = transformers.BertConfig(
        architectures=["BertForTokenClassification"], id2label=dict(enumerate(LABELS)), label2id={}
    )
    changes = {"id2label": dict(enumerate(LABELS))}
    assert predict_head_origin(config, "BertForTokenClassification", changes).order == (0, 1, 2)
    assert predict_head_origin(config, "BertForSequenceClassification", changes).order is None
    assert predict_head_origin(config, "BertForTokenClassification", {}) == HeadOrigin((), "")  # has no rows for labels
    assert predict_head_origin(config, "BertForMultipleChoice", {}).order is None


def _checkpoint(folder: Path, kind: str, task: str, labels: tuple[str, ...]) -> Any:
    """Save a tiny model with a head for these labels; returns it."""
    tokenizer = tiny.usual_tokenizer(kind)
    names = {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    model = getattr(transformers, task_named(task).FACTS.auto_class).from_config(tiny.config(kind, tokenizer, **names))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)  # biases, too, tell their rows apart
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def _loaded(folder: Path, task: str, labels: tuple[str, ...], seed: int = 0) -> tuple[Any, HeadOrigin]:
    heads: list[HeadOrigin] = []
    module, target = task_named(task), Target("single_label", {}, labels)
    changes = module.config_changes(target, tiny.encoder_tokenizer())
    torch.manual_seed(seed)
    model = load_model(
        Base.from_block(ModelBlock(name=str(folder)), task), changes, head_is_new=True, on_head=heads.append
    )
    return model, heads[0]


def _answers(model: Any) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=torch.arange(5, 15)[None]).logits


@pytest.mark.parametrize(
    ("kind", "task"),
    [
        ("bert", "text-classification"),
        ("roberta", "text-classification"),
        ("llama", "text-classification"),
        ("distilbert", "token-classification"),
    ],
)
def test_head_with_the_same_labels_in_another_order_gives_the_same_answers(
    tmp_path: Path, kind: str, task: str
) -> None:
    before = _answers(_checkpoint(tmp_path, kind, task, LABELS))
    model, head = _loaded(tmp_path, task, ("good", "bad", "fine"))
    assert head.description == "kept from the checkpoint for 3 of 3 labels"
    assert torch.allclose(_answers(model), before[..., [2, 0, 1]], atol=1e-6)
    assert model.config.id2label == {0: "good", 1: "bad", 2: "fine"}


def test_rows_of_a_head_are_the_numbers_in_the_config_not_their_order_in_the_file(tmp_path: Path) -> None:
    labels = tuple(f"label {place}" for place in "abcdefghijkl")
    before = _answers(_checkpoint(tmp_path, "bert", "text-classification", labels))
    config = json.loads((tmp_path / "config.json").read_text())
    config["id2label"] = {key: config["id2label"][key] for key in sorted(config["id2label"])}  # 0, 1, 10, 11, 2
    (tmp_path / "config.json").write_text(json.dumps(config))
    model, head = _loaded(tmp_path, "text-classification", labels)
    assert head.description == "kept from the checkpoint for 12 of 12 labels"
    assert torch.allclose(_answers(model), before, atol=1e-6)


def test_head_without_labels_is_expected_of_its_own_class_only_and_taken_where_it_is(tmp_path: Path) -> None:
    _checkpoint(tmp_path, "bert", "text-classification", ("one",))
    block = ModelBlock(name=str(tmp_path))
    assert not measure_shapes(Base.from_block(block, "question-answering"), {}).head_is_kept
    heads: list[HeadOrigin] = []
    load_model(Base.from_block(block, "multiple-choice"), {}, head_is_new=True, on_head=heads.append)
    assert heads == [HeadOrigin((), "")], "one row that rates texts, as a choice is rated"


@pytest.mark.parametrize(
    ("kind", "task", "labels"),
    [
        ("bert", "text-classification", ("good", "odd", "bad", "fine", "even")),
        ("roberta", "text-classification", ("new", "good", "bad")),  # as many rows as the checkpoint has
        ("distilbert", "token-classification", ("good", "new")),
        ("bert", "text-classification", ("good", "bad")),
    ],
)
def test_known_labels_keep_their_rows_bit_for_bit_beside_new_ones_of_their_size(
    kind: str, task: str, labels: tuple[str, ...], tmp_path: Path
) -> None:
    saved = _checkpoint(tmp_path, kind, task, LABELS).state_dict()
    model, head = _loaded(tmp_path, task, labels)
    ours = model.state_dict()
    changed = {name for name in ours if not torch.equal(ours[name], saved[name])}
    assert changed == set(head.known_rows) & set(head.missing), (
        "the body and the head's other layers are the checkpoint's"
    )
    [weight, bias] = sorted(changed, key=lambda name: ours[name].dim(), reverse=True)
    theirs = [LABELS.index(label) for label in labels if label in LABELS]
    new, known = ([(label in LABELS) == kept for label in labels] for kept in (False, True))

    def check() -> None:
        for name in (weight, bias):
            assert torch.equal(model.state_dict()[name][known], saved[name][theirs])
        if any(new):
            sizes, kept = (model.state_dict()[weight][rows].norm(dim=1).mean() for rows in (new, known))
            assert sizes == pytest.approx(float(kept), rel=1e-4)

    check()
    before = ours[weight].clone()
    initialise_missing_from_seed(model, head, 6)
    check()
    assert torch.equal(model.state_dict()[weight], before) != any(new)
    drawn = model.state_dict()[weight].clone()
    with process_group(tmp_path):
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        model._is_distributed_loading_by_transformers = True
        initialise_missing_from_seed(model, head, 6)
        assert torch.equal(sharding.full_tensor(model.get_parameter(weight).detach()), drawn)


def test_known_labels_of_pickled_weights_have_no_rows_to_keep(tmp_path: Path) -> None:
    saved = _checkpoint(tmp_path, "bert", "text-classification", LABELS).state_dict()
    (tmp_path / "model.safetensors").unlink()
    torch.save(saved, tmp_path / "pytorch_model.bin")
    changes = task_named("text-classification").config_changes(
        Target("single_label", {}, ("good", "new")), tiny.encoder_tokenizer()
    )
    heads: list[HeadOrigin] = []
    base = Base.from_block(ModelBlock(name=str(tmp_path), allow_pickled_weights=True), "text-classification")
    load_model(base, changes, head_is_new=True, on_head=heads.append)
    assert heads[0].order is None
    assert "*.safetensors lack the rows of its head" in heads[0].description


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_head_with_other_labels_is_drawn_anew(tmp_path: Path, kind: str) -> None:
    saved = _checkpoint(tmp_path, kind, "text-classification", LABELS)
    model, head = _loaded(tmp_path, "text-classification", ("a", "b", "c"))
    assert head.description == "new, randomly initialised: the checkpoint's 3 labels are different (bad, fine, good)"
    theirs, ours = saved.state_dict(), model.state_dict()
    changed = {name for name in ours if not torch.equal(ours[name], theirs[name])}
    rows = "classifier" if kind == "bert" else "classifier.out_proj"
    assert changed == {f"{rows}.weight", f"{rows}.bias"}
    weight, bias = ours[f"{rows}.weight"], ours[f"{rows}.bias"]
    assert not bias.any()
    assert float(weight.std()) == pytest.approx(0.2, rel=0.5), "as transformers draws a head that a checkpoint lacks"
    again, _ = _loaded(tmp_path, "text-classification", ("a", "b", "c"))
    other, _ = _loaded(tmp_path, "text-classification", ("a", "b", "c"), seed=1)
    assert torch.equal(again.state_dict()[f"{rows}.weight"], weight)
    assert not torch.equal(other.state_dict()[f"{rows}.weight"], weight)


def test_checkpoint_without_a_head_says_so(tiny_encoder: Path) -> None:
    _, head = _loaded(tiny_encoder, "text-classification", ("LABEL_0", "LABEL_1"))
    assert head.description == "new, randomly initialised: the checkpoint has no head for this task"


@pytest.mark.parametrize("kind", ["bert", "modernbert"])
def test_head_is_drawn_as_transformers_draws_it(kind: str, tmp_path: Path) -> None:
    """In ModernBERT the modules above the head's layers draw their values, with other spreads than a layer's own."""
    if kind == "bert":
        tiny.save_model(tmp_path, kind)
    else:
        placed.save_encoder(tmp_path, "ModernBertConfig")
    heads: list[HeadOrigin] = []
    changes = {"id2label": dict(enumerate(LABELS)), "label2id": {name: i for i, name in enumerate(LABELS)}}
    base = Base.from_block(ModelBlock(name=str(tmp_path)), "text-classification")
    torch.manual_seed(5)
    model = load_model(base, changes, head_is_new=True, on_head=heads.append)
    expected = {name: one.detach().clone() for name, one in model.named_parameters()}
    assert "classifier.weight" in heads[0].missing

    state = torch.get_rng_state()
    initialise_missing_from_seed(model, heads[0], 6)
    assert torch.equal(torch.get_rng_state(), state)
    other = {name: one.detach().clone() for name, one in model.named_parameters()}
    initialise_missing_from_seed(model, heads[0], 5)
    again = dict(model.named_parameters())

    assert {name for name in expected if not torch.equal(expected[name], again[name])} == set()
    matrices = {name for name in heads[0].missing if expected[name].dim() > 1}
    assert {name for name in expected if not torch.equal(expected[name], other[name])} == matrices

    with process_group(tmp_path):  # of each process's own part another one would be drawn
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        model._is_distributed_loading_by_transformers = True
        initialise_missing_from_seed(model, heads[0], 6)
        shared = {name: sharding.full_tensor(one.detach()) for name, one in model.named_parameters()}
        assert {name for name in other if not torch.equal(other[name], shared[name])} == set()
