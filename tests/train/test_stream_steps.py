"""Single steps of a streamed run: their optimizer, and what is repeated after a kill."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from fulltune.stream.state import DiskState
from fulltune.stream.training import attach
from fulltune.stream.units import find_units, placeholder, use_placeholders
from fulltune.train.loop.streamed import StreamedTrainer
from fulltune.train.optim import optimizers
from fulltune.train.optim.streamed import StreamedAdamW, initial_sections, unit_layouts

OPTIONS: dict[str, Any] = {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
CODES = {"moments_format": "8bit"}


@pytest.mark.parametrize(
    ("optim", "kind", "more"),
    [("adamw_torch_fused", torch.optim.AdamW, {}), ("adamw_8bit", optimizers.AdamW, CODES)],
)
def test_weight_whose_gradients_come_later_is_updated_as_in_memory(
    tmp_path: Path, optim: str, kind: Any, more: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.ModuleList([nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)]))
    other, units = copy.deepcopy(model), find_units(model)
    names, parameters = ["0.0.weight", "0.1.weight"], list(other.parameters())
    layouts = unit_layouts(other, units, optim)
    common: dict[str, Any] = {"gradients": torch.float32, "identity": {}}
    state = DiskState(tmp_path, layouts, **common, create=True)
    for number, name in enumerate(names):
        state.write(number, {name: initial_sections(parameters[number], parameters[number].detach(), optim)})
    use_placeholders(other)
    expected = kind(model.parameters(), **OPTIONS, **more, **({} if more else {"fused": True}))
    for having in ([0], [], [0, 1], [1], [0, 1]):
        optimizer = StreamedAdamW(other, state, kind, [{"params": parameters}], OPTIONS | more)
        for number, one in enumerate(model.parameters()):
            one.grad = torch.randn(8, 8) if number in having else None
            parameters[number].grad = placeholder((8, 8), torch.float32) if number in having else None
            if one.grad is not None:
                state.gradients(number)[names[number]].copy_(one.grad)
                state.park(number, [names[number]])
        expected.step()
        optimizer.step()
        state.close()
        state = DiskState(tmp_path, layouts, **common)
    with pytest.raises(ValueError, match="continue the pending update"):
        state.read(names[0])
    StreamedAdamW(other, state, kind, [{"params": parameters}], OPTIONS | more)
    for name, one in model.named_parameters():
        assert torch.equal(state.read(name)["weights"], one), name


@pytest.mark.parametrize(("now", "expected"), [(4, [1.0, 2.0, 3.0, 6.0]), (2, [6.0, 6.0]), (1, [12.0])])
def test_step_that_was_made_before_a_kill_has_the_same_loss_in_other_micro_batches(
    now: int, expected: list[float]
) -> None:
    model = nn.Linear(2, 2)
    part = SimpleNamespace(executor=SimpleNamespace(device=torch.device("cpu")))
    attach(model, part)  # type: ignore[arg-type]  # all that is read of it
    torch.manual_seed(7)
    random = torch.get_rng_state()
    notes = {"norm": 1.5, "tensors": ["weight"], "random": [random.numpy().tobytes().hex()]}
    trainer: Any = StreamedTrainer.__new__(StreamedTrainer)
    trainer.model, trainer.state, trainer._samples = model, SimpleNamespace(global_step=2), [{}] * now
    trainer.optimizer = SimpleNamespace(finished={"step": 3, "losses": [1.0, 2.0, 3.0, 6.0], **notes})
    torch.manual_seed(8)
    assert [float(loss) for loss in trainer._run_step(model, None)] == expected
    assert torch.equal(torch.get_rng_state(), random)
    assert float(trainer._norm) == 1.5
    assert trainer.optimizer.is_replaying
    assert model.weight.grad is not None
    assert model.bias.grad is None
