"""Losses against torch's own, counts, what evaluation keeps, padding."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fulltune.tasks import LossSettings, Target, causal_lm, classes, text_classification
from fulltune.tasks.columns import find_column

SINGLE = Target("single_label", {}, ("a", "b", "c"))
MULTI = Target("multi_label", {}, ("a", "b", "c"))
NUMBER = Target("regression", {})
CHAT = Target("chat", {})


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(6, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_single_label_is_cross_entropy(logits: torch.Tensor, smoothing: float) -> None:
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    found = text_classification.loss(logits, labels, SINGLE, LossSettings(smoothing))
    assert torch.isclose(found / 6, torch.nn.CrossEntropyLoss(label_smoothing=smoothing)(logits, labels))
    assert text_classification.count_items(labels) == 6


def test_loss_single_label_with_class_weights_scales_each_row(logits: torch.Tensor) -> None:
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    weights = torch.tensor([1.0, 2.0, 0.5])
    expected = (F.cross_entropy(logits, labels, reduction="none") * weights[labels]).sum()
    found = text_classification.loss(logits, labels, SINGLE, LossSettings(class_weights=[1.0, 2.0, 0.5]))
    assert torch.isclose(found, expected)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_loss_multi_label_is_binary_cross_entropy(logits: torch.Tensor, smoothing: float) -> None:
    labels = torch.tensor([[1.0, 0, 0], [0, 1, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0], [1, 0, 1]])
    soft = labels * (1 - smoothing) + 0.5 * smoothing
    found = text_classification.loss(logits, labels, MULTI, LossSettings(smoothing))
    assert torch.isclose(found / 6, torch.nn.BCEWithLogitsLoss()(logits, soft))


def test_loss_regression_is_squared_error() -> None:
    outputs, labels = torch.tensor([[0.5], [2.0]]), torch.tensor([0.0, 3.0])
    assert text_classification.loss(outputs, labels, NUMBER) == pytest.approx(1.25)


@pytest.mark.parametrize(
    ("mean", "spread", "logit_scale"),
    [(1e6, 1e3, (1e6, 1e3)), (1e6, 1e3, (0.0, 1e6)), (1e6, 1e3, (0.0, 1.0)), (2e-4, 1e-5, (2e-4, 1e-5))],
)
def test_loss_of_numbers_is_in_units_of_their_spread_whatever_the_logits_are_in(
    mean: float, spread: float, logit_scale: tuple[float, float]
) -> None:
    target = Target("regression", {}, scale=(mean, spread), logit_scale=logit_scale)
    shift, factor = logit_scale
    given, true = (mean + spread * torch.tensor(values, dtype=torch.float64) for values in ([-1.0, 0.5], [0.0, 2.0]))
    logits = ((given - shift) / factor).float().unsqueeze(-1)

    kept = text_classification.reduce_logits(logits, true.float(), target)

    assert kept["loss"] == pytest.approx([1.0, 2.25], rel=1e-3)
    assert kept["logits"].squeeze(-1) == pytest.approx(given.tolist(), abs=1e-3 * spread)
    assert text_classification.loss(logits, true.float(), target) == pytest.approx(3.25, rel=1e-3)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_of_tokens_is_shifted_and_masked(smoothing: float) -> None:
    logits = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([[-100, -100, 3, 4, -100], [-100, 1, 2, 3, 4]])
    found = causal_lm.loss(logits, labels, CHAT, LossSettings(smoothing))
    expected = torch.nn.CrossEntropyLoss(ignore_index=-100, label_smoothing=smoothing)(
        logits[:, :-1].reshape(-1, 7), labels[:, 1:].reshape(-1)
    )
    assert causal_lm.count_items(labels) == 6
    assert torch.isclose(found / 6, expected)


def test_reduce_of_tokens_gives_sums_per_row() -> None:
    logits = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([[-100, -100, 3, 4, -100], [-100, 1, 2, 3, 4]])
    kept = {name: value.numpy() for name, value in causal_lm.reduce_logits(logits, labels, CHAT).items()}
    assert kept["tokens"].tolist() == [2, 4]
    for row in range(2):
        alone = causal_lm.loss(logits[row : row + 1], labels[row : row + 1], CHAT)
        assert kept["nll"][row] == pytest.approx(float(alone), rel=1e-5)
    values = causal_lm.metrics(kept, CHAT)
    assert values["loss"] == pytest.approx(kept["nll"].sum() / 6, rel=1e-5)
    assert values["perplexity"] == pytest.approx(np.exp(values["loss"]))


def test_worst_rows_are_the_wrong_ones_with_the_highest_loss() -> None:
    kept = {
        "logits": np.array([[5.0, 0, 0], [5, 0, 0], [9, 0, 0]]),
        "labels": np.array([0, 1, 2]),
        "loss": np.array([0.0, 5.0, 9.0]),
    }
    found = list(classes.worst_rows(kept, ["x", "y", "z"], SINGLE, 5))
    assert [(answer.text, answer.expected, answer.predicted) for answer in found] == [("z", "c", "a"), ("y", "b", "a")]


@pytest.mark.parametrize(
    ("value", "labels"),
    [
        ("a;b", ["a", "b"]),
        ("a|b", ["a", "b"]),
        ('["a", "b"]', ["a", "b"]),
        (["b", "a", "b"], ["a", "b"]),
        ([], []),
        ("", []),
        (None, []),
        (3, ["3"]),
        (float("nan"), []),
        ([1.0, 2], ["1", "2"]),
    ],
)
def test_multi_label_cell_in_each_form_is_read(value: Any, labels: list[str]) -> None:
    target = Target("multi_label", {"label": "y"}, ("a", "b"))
    assert text_classification.row_labels({"y": value}, target) == labels


@pytest.mark.parametrize(
    ("role", "given", "columns", "found"),
    [
        ("label", None, ["Text", " Label "], " Label "),
        ("label", "x", ["x", "label"], "x"),
        ("text", None, ["a", "b"], None),
        ("completion", None, ["prompt", "response"], "response"),
    ],
)
def test_column_for_role_is_found(role: str, given: str | None, columns: list[str], found: str | None) -> None:
    assert find_column(role, given, columns, "f") == found


@pytest.mark.parametrize("bos", [None, "<s>"])
@pytest.mark.parametrize("completion", [" blue", " blue<|im_end|>"])
def test_pair_trains_the_answer_and_one_end_token(bos: str | None, completion: str) -> None:
    from tests import tiny

    tokenizer = tiny.decoder_tokenizer(bos=bos)
    target = Target("prompt_completion", {"prompt": "p", "completion": "c"})
    example = causal_lm.encode([{"p": "sky:", "c": completion}], target, tokenizer, 99)[0][0]
    segments = causal_lm.preview(example.features, target, tokenizer).segments
    assert [(segment.text, segment.trained) for segment in segments] == [
        (f"{bos or ''}sky:", False),
        (" blue<|im_end|>", True),
    ]
