"""Which package one of transformers' optimizers needs: said before any data are read, not in the training process."""

from __future__ import annotations

import importlib.util

import pytest

from fulltune.errors import SetupError
from fulltune.train.loop.arguments import check_trainable, package_for_optimizer
from tests import plans


@pytest.mark.parametrize(
    ("optim", "install"),
    [
        ("adamw_torch_fused", ""),
        ("adafactor", ""),
        ("sgd", ""),
        ("adamw_8bit", ""),
        ("adamw_bf16", ""),
        ("adamw_bnb_8bit", "bitsandbytes"),
        ("paged_adamw_32bit", "bitsandbytes"),
        ("lion_8bit", "bitsandbytes"),
        ("rmsprop_bnb", "bitsandbytes"),
        ("ademamix", "bitsandbytes"),
        ("adamw_torch_8bit", "torchao"),
        ("adamw_torch_4bit", "torchao"),
        ("galore_adamw_8bit", "galore-torch"),
        ("apollo_adamw", "apollo-torch"),
        ("adalomo", "lomo-optim"),
        ("grokadamw", "grokadamw"),
        ("schedule_free_sgd", "schedulefree"),
        ("stable_adamw", "torch-optimi"),
    ],
)
def test_package_of_each_kind_of_optimizer(optim: str, install: str) -> None:
    assert package_for_optimizer(optim)[1] == install


def test_a_missing_package_is_refused_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "bitsandbytes" else real(name, *rest)
    )
    with pytest.raises(SetupError) as caught:
        check_trainable(plans.recipe(train={"optim": "adamw_bnb_8bit"}))
    assert caught.value.problems == (
        "train.optim: 'adamw_bnb_8bit' needs a missing package; run: pip install bitsandbytes",
    )
