"""Whether updates arrive: measured on values of each tensor, said where rounding eats them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import ResNetConfig, ResNetModel

from fulltune.records.events import Event, Message, UpdatesMeasured
from fulltune.train.loop.callbacks import _sample_weights, compare_samples
from tests import tiny
from tests.train import runs


def test_update_is_compared_value_by_value() -> None:
    before = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([0.0, 0.0]), "c": torch.ones(4)}
    after = {"a": torch.tensor([3.0, 4.5]), "b": torch.tensor([1.0, 0.0]), "c": torch.full((4,), 1.01)}
    assert compare_samples(7, before, after).changed_share == 6 / 8


@pytest.mark.parametrize(("rounding", "is_eaten"), [(None, False), ("stochastic", False), ("nearest", True)])
def test_updates_that_rounding_eats_are_said_once(rounding: str | None, is_eaten: bool, tmp_path: Path) -> None:
    model = tiny.save_model(tmp_path / "model", "bert")
    seen: list[Event] = []
    blocks = {"method": {"learning_rate": 1e-5}}
    train: dict[str, object] = {"max_steps": 30, "optim": "adamw_bf16"} if rounding else {"max_steps": 30}
    if rounding:
        blocks |= {"model": {"weights_dtype": "bf16"}}
        train |= {"bf16_rounding": rounding, "precision": "bf16"}
    runs.run(tmp_path, model, tiny.topic_rows(80), train=train, options={"listener": seen.append}, **blocks)
    measured = [event for event in seen if isinstance(event, UpdatesMeasured)]
    assert len(measured) > 10
    warned = [event.text for event in seen if isinstance(event, Message) and "sampled values changed" in event.text]
    assert len(warned) == is_eaten
    assert all(0 < event.changed_share <= 1 for event in measured)


def test_model_without_token_embeddings_is_sampled() -> None:
    model = ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic"))
    assert _sample_weights(model).keys() == dict(model.named_parameters()).keys()
