"""Our dropout on the CPU: the same distribution, scale and gradient as torch's, from torch's own generator."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fulltune.models.dropout import SixteenBitDropout, drop_threshold, replace_dropout
from tests import tiny

ODD = (3, 5, 7)
"""Not a multiple of the four values of a draw."""


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_share_and_scale_are_those_of_the_probability(p: float) -> None:
    torch.manual_seed(0)
    ones = torch.ones(400, 1001)

    made = SixteenBitDropout(p)(ones)

    true = drop_threshold(p) / 65536
    assert abs(true - p) <= 0.5 / 65536
    sigma = (true * (1 - true) / ones.numel()) ** 0.5
    assert float((made == 0).float().mean()) == pytest.approx(true, abs=5 * sigma)
    assert float(made.max()) == pytest.approx(1 / (1 - true), rel=1e-6)
    assert set(made.unique().tolist()) == {0.0, float(made.max())}


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_gradients_pass_where_values_do(kind: torch.dtype) -> None:
    values = torch.ones(ODD, dtype=kind, requires_grad=True)

    made = SixteenBitDropout(0.5)(values)
    made.sum().backward()

    assert made.dtype == kind
    assert values.grad is not None
    assert torch.equal(values.grad, made.detach())


def test_one_seed_gives_the_same_numbers_also_when_recomputed() -> None:
    dropout, values = SixteenBitDropout(0.5), torch.randn(ODD, requires_grad=True)
    torch.manual_seed(3)
    first = dropout(values)
    torch.manual_seed(3)
    again = checkpoint(dropout, values, use_reentrant=False)
    torch.rand(1)  # what happens between forward and backward pass changes nothing

    assert torch.equal(first, again)
    assert not torch.equal(first, dropout(values))
    one, two = (torch.autograd.grad(made.sum(), values)[0] for made in (first, again))
    assert torch.equal(one, two)


def test_install_replaces_dropout_and_keeps_weights_and_modes() -> None:
    from transformers import BertForSequenceClassification

    model = BertForSequenceClassification(tiny.config("bert", tiny.encoder_tokenizer())).eval()
    names = list(model.state_dict())
    count = sum(type(module) is nn.Dropout for module in model.modules())

    assert replace_dropout(model) == count > 3
    assert not any(type(module) is nn.Dropout for module in model.modules())
    assert list(model.state_dict()) == names
    assert not any(module.training for module in model.modules())
    assert replace_dropout(model) == 0
