"""An optimizer's state in a checkpoint, whatever shared it out when it was written and when it is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fulltune.models import sharding
from fulltune.train import shared_state
from fulltune.train.optim.optimizers import AdamW, in_fp32
from fulltune.train.shared_state import OPTIMIZER


def state_of(model: Any, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The state of a shared-out model's optimizer, by parameter and kind, each tensor placed as its parameter is."""
    sharding.free(model)
    found: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        state: dict[str, torch.Tensor] = optimizer.state.get(parameter, {})
        if state and isinstance(optimizer, AdamW):
            held = in_fp32(state, sharding.local(parameter).shape)
            state = {kind: one if kind == "step" else sharding.part(one, parameter) for kind, one in held.items()}
        for kind, value in state.items():
            # A number of steps has no axis, and a file of parts tells them by their offsets.
            found[f"{OPTIMIZER}{name}.{kind}"] = value.reshape(1) if value.dim() == 0 else value
    return found


def load(model: Any, optimizer: torch.optim.Optimizer, checkpoint: Path) -> None:
    """Put a checkpoint's state into a new optimizer of the model, sharded or not; rates follow from the schedule."""
    sharding.free(model)
    names = {parameter: name for name, parameter in model.named_parameters()}
    ordered = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    if shared_state.is_in(checkpoint):
        state = _from_parts(model, checkpoint)
    else:
        saved = torch.load(checkpoint / "optimizer.pt", weights_only=True, map_location="cpu", mmap=True)["state"]
        state = {ordered[index]: values for index, values in saved.items()}
    if sharding.is_shared(model):
        parameters = dict(model.named_parameters())
        state = {name: _parts_of(values, parameters[name]) for name, values in state.items()}
        if isinstance(optimizer, AdamW):
            for name, values in state.items():
                optimizer.take_over({kind: sharding.local(one) for kind, one in values.items()}, parameters[name])
            return
    # By the optimizer's own way: one of ours may keep its moments in another form, others want steps on the device.
    by_index = {index: state[name] for index, name in enumerate(ordered) if name in state}
    optimizer.load_state_dict({**optimizer.state_dict(), "state": by_index})


def _parts_of(values: dict[str, torch.Tensor], parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    """A parameter's state, whole or in parts, placed as the parameter is; numbers stay as they are."""
    if "exp_avg" in values and values["exp_avg"].shape != parameter.shape:  # of one of ours, as one process keeps it
        values = in_fp32(values, parameter.shape)
    placed = {}
    for kind, one in values.items():
        is_whole = one.shape == parameter.shape and not hasattr(one, "placements")
        placed[kind] = sharding.like(one, parameter).clone() if is_whole else one  # not in the file's own memory
    return placed


def _from_parts(model: Any, checkpoint: Path) -> dict[str, dict[str, torch.Tensor]]:
    """By parameter and kind, what this process needs: a moment of a 16-bit weight may be fp32."""
    parameters, state = dict(model.named_parameters()), dict[str, torch.Tensor]()
    for key, (size, dtype) in shared_state.kinds(checkpoint).items():
        if key.startswith(OPTIMIZER):
            parameter = parameters[key.removeprefix(OPTIMIZER).rpartition(".")[0]].detach()
            is_like = size == parameter.shape
            state[key] = torch.empty_like(parameter, dtype=dtype) if is_like else torch.empty(size)
    shared_state.read(state, checkpoint)
    found: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in state.items():
        name, _, kind = key.removeprefix(OPTIMIZER).rpartition(".")
        found.setdefault(name, {})[kind] = value.reshape(()) if kind == "step" else value
    return found
