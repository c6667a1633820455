"""What a head's layers read is found for the plain classes of many architectures, and the head can be set by it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import BertForSequenceClassification, FunnelConfig, FunnelForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutput

from fulltune.probe import initialise_head_from_probe, load_or_fit_probe
from fulltune.probe.layers import find_head_layers, recognise_activation, run_and_read_hidden
from fulltune.probe.linear import Items, LinearClassifier, NoProbe, mean_loss
from fulltune.recipe.tasks import ProblemType, TaskName
from tests.unit.probe.models import PAD, extractor_of, image_rows, logits_alone, model_of, rows_of

CASES: list[tuple[str, TaskName, ProblemType, str, str | None]] = [
    ("Albert", "text-classification", "single_label", "classifier", "albert.pooler"),
    ("Bart", "text-classification", "single_label", "classification_head.out_proj", "classification_head.dense"),
    ("Bert", "text-classification", "single_label", "classifier", "bert.pooler.dense"),
    ("Bert", "text-classification", "multi_label", "classifier", "bert.pooler.dense"),
    ("Bert", "text-classification", "regression", "classifier", "bert.pooler.dense"),
    ("Bert", "token-classification", "tags", "classifier", None),
    ("Bert", "question-answering", "span", "qa_outputs", None),
    ("Bert", "multiple-choice", "choice", "classifier", "bert.pooler.dense"),
    ("DebertaV2", "text-classification", "single_label", "classifier", "pooler.dense"),
    ("DistilBert", "text-classification", "single_label", "classifier", "pre_classifier"),
    ("Electra", "text-classification", "single_label", "classifier.out_proj", "classifier.dense"),
    ("GPT2", "text-classification", "single_label", "score", None),
    ("Llama", "text-classification", "single_label", "score", None),
    ("Llama", "token-classification", "tags", "score", None),
    ("MPNet", "text-classification", "single_label", "classifier.out_proj", "classifier.dense"),
    ("ModernBert", "text-classification", "single_label", "classifier", "head.dense"),
    ("ResNet", "image-classification", "single_label", "classifier.1", None),
    ("Roberta", "text-classification", "single_label", "classifier.out_proj", "classifier.dense"),
    ("T5", "text-classification", "single_label", "classification_head.out_proj", "classification_head.dense"),
    ("ViT", "image-classification", "single_label", "classifier", None),
]
ALONE = 24
"""Rows that are also run one by one."""
OUTPUTS = {"regression": 1, "choice": 1, "span": 2}


def rows_for(task: TaskName, kind: ProblemType, count: int, seed: int = 0) -> Any:
    return image_rows(count, seed) if task == "image-classification" else rows_of(kind, count, seed)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "task", "kind", "last", "dense"), CASES)
def test_what_the_head_reads_gives_the_models_own_logits(
    name: str, task: TaskName, kind: ProblemType, last: str, dense: str | None, tmp_path: Path
) -> None:
    """Padded as they are: rows of different lengths lie in one batch. After `initialise_head_from_probe` the plain
    model's loss is the one that was measured on its features."""
    outputs = OUTPUTS.get(kind, 3)
    model = model_of(name, task, outputs)
    layers = find_head_layers(model, task, outputs)
    assert layers == (last, dense)
    extractor = extractor_of(model, task, kind)
    eval_rows = rows_for(task, kind, 200, seed=1)

    def compare() -> np.ndarray:
        features = extractor.features(eval_rows, layers)
        assert features.last is not None
        parameters = dict(model.named_parameters())
        bias = parameters.get(f"{last}.bias", torch.zeros(outputs))
        linear = LinearClassifier(parameters[f"{last}.weight"].detach().numpy(), bias.detach().numpy())
        logits_of_items, alone = linear(features.last), logits_alone(extractor, eval_rows[:ALONE])
        if kind == "span":  # only some of the tokens are looked at
            for row, logits in enumerate(alone):
                start, end, *_ = eval_rows[row]["labels"]
                here, labels = logits_of_items[features.rows == row], features.labels[features.rows == row]
                for column, token in enumerate((start, end)):
                    [value] = here[labels[:, column] == 1, column]
                    assert value == pytest.approx(logits[token, column], abs=1e-4)
            return logits_of_items
        np.testing.assert_allclose(logits_of_items[features.rows < ALONE], np.concatenate(alone), atol=1e-4)
        if features.dense is not None:
            dense_outputs = model.get_submodule(dense)(torch.from_numpy(features.dense)).detach().numpy()
            activation = recognise_activation(model, str(dense), features.dense, features.last)
            assert activation is not None
            np.testing.assert_allclose(activation[1](dense_outputs), features.last, atol=1e-5)
        return logits_of_items

    compare()
    probe = load_or_fit_probe(tmp_path, lambda: extractor, rows_for(task, kind, 60), eval_rows)
    assert probe.head is not None, probe.failure
    assert probe.failure is None
    assert (probe.head.dense is None) == (dense is None)
    initialise_head_from_probe(model, tmp_path)
    logits = compare()
    features = extractor.features(eval_rows, layers)
    given = Items(kind, logits, features.labels, features.rows, outputs)
    assert mean_loss(given, LinearClassifier(np.eye(outputs), np.zeros(outputs))) == pytest.approx(
        probe.head.loss, abs=2e-3
    )


@pytest.mark.parametrize(("name", "task", "kind", "last", "dense"), CASES)
def test_the_mean_over_tokens_is_seen_without_the_head(
    name: str, task: TaskName, kind: ProblemType, last: str, dense: str | None
) -> None:
    outputs = OUTPUTS.get(kind, 3)
    model = model_of(name, task, outputs)
    extractor, rows = extractor_of(model, task, kind), rows_for(task, kind, 20)
    without_head = extractor.features(rows, None)
    with_head = extractor.features(rows, find_head_layers(model, task, outputs))
    assert without_head.last is None
    assert without_head.dense is None
    if kind == "span":
        assert without_head.mean is None
        return
    assert without_head.mean is not None
    assert with_head.mean is not None
    np.testing.assert_allclose(without_head.mean, with_head.mean, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(without_head.mean, axis=1), 1, atol=1e-5)
    np.testing.assert_array_equal(without_head.rows, with_head.rows)
    alone = extractor_of(model, task, kind, batch_size=1).features(rows, None)
    assert alone.mean is not None
    np.testing.assert_allclose(without_head.mean, alone.mean, atol=1e-4)


def test_items_stand_in_the_order_of_their_rows_with_their_labels() -> None:
    model = model_of("Bert", "token-classification")
    rows = rows_of("tags", 30)
    features = extractor_of(model, "token-classification", "tags").features(rows, None)
    np.testing.assert_array_equal(features.labels, np.concatenate([row["tags"] for row in rows]))
    np.testing.assert_array_equal(features.rows, np.repeat(np.arange(30), [len(row["tags"]) for row in rows]))
    chosen = rows_of("choice", 30)
    features = extractor_of(model_of("Bert", "multiple-choice"), "multiple-choice", "choice").features(chosen, None)
    np.testing.assert_array_equal(features.labels.reshape(30, 4).argmax(axis=1), [row["labels"] for row in chosen])


class Scaled(nn.Module):
    """A head that makes something else of its last layer's values."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.inner, self.factor = nn.Linear(32, 3), factor

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.inner(features)) * self.factor


class Twice(nn.Module):
    """A head that asks its last layer twice."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(32, 3)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.inner(features) if self.inner(features).shape else features


class Alone(nn.Module):
    """A head whose last layer does not give the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(32, 3), nn.Linear(32, 3)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.one(features) + 0 * self.two(features)
        return logits


@pytest.mark.parametrize("head", [Scaled(30), Twice(), Alone()])
def test_a_head_that_cannot_be_seen_starts_at_random_and_means_are_still_a_rival(
    head: nn.Module, tmp_path: Path
) -> None:
    model = model_of("Bert", "text-classification")
    model.classifier = head
    layers = find_head_layers(model, "text-classification", 3)
    rows = rows_of("single_label", 40)
    batch = extractor_of(model, "text-classification", "single_label").task.collate(rows[:4], PAD)
    del batch["labels"]
    with pytest.raises(
        NoProbe, match="the logits of BertForSequenceClassification are not the outputs of its last layer"
    ):
        run_and_read_hidden(model, layers, batch)
    probe = load_or_fit_probe(tmp_path, lambda: extractor_of(model, "text-classification", "single_label"), rows, rows)
    assert probe.head is None
    assert "not the outputs of its last layer" in str(probe.failure)
    assert probe.baseline is not None
    assert probe.baseline.pooling == "mean"
    before = {name: one.clone() for name, one in model.state_dict().items()}
    initialise_head_from_probe(model, tmp_path)
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())


def test_a_head_without_a_linear_layer_or_a_body_without_a_name_says_so(tmp_path: Path) -> None:
    model = model_of("Bert", "text-classification")
    model.classifier = nn.Bilinear(1, 1, 3)
    with pytest.raises(NoProbe, match="does not end in a linear layer"):
        find_head_layers(model, "text-classification", 3)
    model = model_of("Bert", "text-classification")
    model.base_model_prefix = "elsewhere"
    with pytest.raises(NoProbe, match="has no separate body"):
        find_head_layers(model, "text-classification", 3)
    rows = rows_of("single_label", 20)
    probe = load_or_fit_probe(tmp_path, lambda: extractor_of(model, "text-classification", "single_label"), rows, rows)
    assert (probe.head, probe.baseline) == (None, None)
    assert "has no separate body" in str(probe.failure)


def test_tokens_of_an_answer_are_not_read_where_no_layer_can_be_fitted(tmp_path: Path) -> None:
    model, rows = model_of("Bert", "question-answering"), rows_of("span", 20)
    model.qa_outputs = nn.Identity()
    passes = list[Any]()
    model.bert.register_forward_pre_hook(lambda module, args: passes.append(args))
    probe = load_or_fit_probe(tmp_path, lambda: extractor_of(model, "question-answering", "span"), rows, rows)
    assert (probe.head, probe.baseline, passes) == (None, None, [])
    assert "does not end in a linear layer" in str(probe.failure)


class Unread(BertForSequenceClassification):
    """Its pooler is there, and the classifier reads the mean over all tokens."""

    def forward(self, **batch: torch.Tensor) -> Any:
        outputs = self.bert(**batch)
        return SequenceClassifierOutput(logits=self.classifier(outputs[0].mean(dim=1)))


class ReadBeside(BertForSequenceClassification):
    """Its classifier reads the pooler and the mean."""

    def forward(self, **batch: torch.Tensor) -> Any:
        outputs = self.bert(**batch)
        return SequenceClassifierOutput(logits=self.classifier(outputs[1] + outputs[0].mean(dim=1)))


class ReadStacked(BertForSequenceClassification):
    """The same, as a stack of both."""

    def forward(self, **batch: torch.Tensor) -> Any:
        outputs = self.bert(**batch)
        both = torch.stack([outputs[1], outputs[0].mean(dim=1)])
        return SequenceClassifierOutput(logits=self.classifier(both.mean(dim=0)))


@pytest.mark.parametrize("kind", [Unread, ReadBeside, ReadStacked])
def test_pooler_that_the_last_layer_does_not_read_alone_is_kept(kind: Any, tmp_path: Path) -> None:
    plain = model_of("Bert", "text-classification")
    model = kind(plain.config).eval()
    model.load_state_dict(plain.state_dict())
    extractor = extractor_of(model, "text-classification", "single_label")
    eval_rows = rows_of("single_label", 200, seed=1)
    probe = load_or_fit_probe(tmp_path, lambda: extractor, rows_of("single_label", 60), eval_rows)
    assert probe.head is not None
    assert probe.head.dense == "loaded"
    initialise_head_from_probe(model, tmp_path)
    features = extractor.features(eval_rows, find_head_layers(model, "text-classification", 3))
    assert features.last is not None
    classifier = LinearClassifier(model.classifier.weight.detach().numpy(), model.classifier.bias.detach().numpy())
    assert mean_loss(extractor.items(features.last, features), classifier) == pytest.approx(probe.head.loss, abs=2e-3)
    assert torch.equal(model.bert.pooler.dense.weight, plain.bert.pooler.dense.weight)


def test_features_that_are_not_finite_say_so(tmp_path: Path) -> None:
    model = model_of("Bert", "text-classification")
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[17] = torch.nan
    rows = rows_of("single_label", 40)
    rows[7]["input_ids"][0] = 17
    probe = load_or_fit_probe(tmp_path, lambda: extractor_of(model, "text-classification", "single_label"), rows, rows)
    assert (probe.head, probe.baseline) == (None, None)
    assert probe.failure == "the pretrained model's features are not finite"
    assert probe.head_origin == "randomly initialised: the pretrained model's features are not finite"


def test_body_with_fewer_states_than_tokens_has_no_mean_and_still_a_probe(tmp_path: Path) -> None:
    size = {"d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 64, "block_sizes": [1, 1], "num_labels": 3}
    config = FunnelConfig(vocab_size=100, pad_token_id=PAD, **size)
    model = FunnelForSequenceClassification(config).eval()
    rows = rows_of("single_label", 40)
    probe = load_or_fit_probe(tmp_path, lambda: extractor_of(model, "text-classification", "single_label"), rows, rows)
    assert probe.head is not None
    assert probe.baseline is None
