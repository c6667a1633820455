"""Full fine-tuning moves every parameter that receives a gradient, and says how many moved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fulltune.train.worker.weights import InitialWeights
from tests import tiny
from tests.train import runs

THREE_STEPS = {"max_steps": 3, "weight_decay": 0.0, "warmup_steps": 0, "lr_scheduler_type": "constant"}


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_full_after_three_steps_moved_equals_requires_grad(kind: str, tmp_path: Path) -> None:
    model = tiny.save_model(tmp_path / kind, kind)
    before: dict[str, torch.Tensor] = {}
    seen: dict[str, Any] = {}
    original = InitialWeights.count_changes

    def moved(self: InitialWeights, model: Any, optimizer: Any, with_gradient: frozenset[str]) -> Any:
        from safetensors.torch import load_file

        before.update(load_file(self.path))
        seen.update(model=model, optimizer=optimizer, with_gradient=with_gradient)
        return original(self, model, optimizer, with_gradient)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InitialWeights, "count_changes", moved)
        outcome = runs.run(tmp_path, model, tiny.topic_rows(), train=THREE_STEPS).outcome

    parameters = dict(seen["model"].named_parameters())
    requires_grad = {name for name, parameter in parameters.items() if parameter.requires_grad}
    changed = {name for name, parameter in parameters.items() if not torch.equal(parameter.detach(), before[name])}
    assert requires_grad == set(parameters)
    assert changed == requires_grad
    # Rows of the embedding whose token never came have no gradient: they stay, and do not count.
    embedding = max(parameters, key=lambda name: parameters[name].shape[0])
    rows = (parameters[embedding].detach() != before[embedding]).any(dim=1)
    assert 0 < int(rows.sum()) < len(rows)
    assert outcome is not None
    assert outcome.parameter_changes is not None
    assert (
        outcome.parameter_changes.num_tensors_changed
        == outcome.parameter_changes.num_tensors_with_gradient
        == len(parameters)
    )
    assert outcome.parameter_changes.num_values_with_gradient < sum(
        parameter.numel() for parameter in parameters.values()
    )
    assert outcome.parameter_changes.share > 0.99
    assert outcome.parameter_changes.unchanged_tensors == ()


def test_bf16_weights_at_a_small_rate_most_values_stay_and_are_listed(tiny_encoder: Path, tmp_path: Path) -> None:
    outcome = runs.run(
        tmp_path,
        tiny_encoder,
        tiny.topic_rows(),
        model={"weights_dtype": "bf16"},
        method={"learning_rate": 1e-6},
        train={**THREE_STEPS, "precision": "bf16", "bf16_rounding": "nearest"},
    ).outcome

    assert outcome is not None
    assert outcome.parameter_changes is not None
    assert 0 < outcome.parameter_changes.share < 0.3
    assert outcome.parameter_changes.unchanged_tensors
    assert any("LayerNorm.weight" in name for name in outcome.parameter_changes.unchanged_tensors)
