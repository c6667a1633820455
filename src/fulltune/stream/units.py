from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from fulltune.errors import SetupError
from fulltune.models.sharding import block_list_paths

MOST_TOGETHER = 2
"""Units whose weights are in memory at the same time."""


@dataclass(frozen=True)
class Unit:
    """Modules whose weights are in memory at the same time: a block, an embedding, a norm or a head."""

    path: str
    """Path of the module whose call uses these weights."""
    names: tuple[str, ...]
    """Parameters of this unit, in the model's order."""
    tied: tuple[str, ...] = ()
    """Parameters of earlier units that this one uses too."""


def placeholder(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu") -> torch.Tensor:
    """Return a tensor of NaN that takes no memory, so that a read of absent weights is noticed."""
    return torch.full((), torch.nan, dtype=dtype, device=device).expand(shape)


def use_placeholders(model: nn.Module, device: torch.device | str = "cpu") -> None:
    """Replace all parameters by placeholders on a device, and move the buffers there."""
    for parameter in model.parameters():
        parameter.data = placeholder(parameter.shape, parameter.dtype, device)
    for buffer in model.buffers():
        buffer.data = buffer.to(device)


def find_units(model: nn.Module) -> tuple[Unit, ...]:
    """Split the model into its repeated blocks and the other modules with weights; raise `SetupError` if it has no
    blocks or keeps weights beside them."""
    blocks = [
        f"{path}.{name}" for path in block_list_paths(model) for name, _ in model.get_submodule(path).named_children()
    ]
    if not blocks:
        raise SetupError(
            f"train.placement: stream: {type(model).__name__} has no repeated blocks (no torch.nn.ModuleList with "
            "weights) to stream; use single"
        )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    owned: set[str] = set()
    units: list[Unit] = []
    for path in _unit_paths(model, "", set(blocks)):
        inside = dict.fromkeys(names[id(one)] for one in model.get_submodule(path).parameters())
        own = tuple(name for name in inside if name not in owned)
        owned |= set(own)
        units.append(Unit(path, own, tuple(name for name in inside if name not in own)))
    return tuple(units)


def _unit_paths(model: nn.Module, path: str, blocks: set[str]) -> list[str]:
    """Return the paths of all units in or below a module, in the model's order."""
    module = model.get_submodule(path)
    if path in blocks:
        return [path] if any(True for _ in module.parameters()) else []
    has_own = any(parameter is not None for parameter in module._parameters.values())
    below = f"{path}." if path else ""
    if has_own and not any(block.startswith(below) for block in blocks):
        return [path]
    if has_own:
        beside = ", ".join(name for name, parameter in module._parameters.items() if parameter is not None)
        raise SetupError(
            f"train.placement: stream: {type(module).__name__} has weights of its own beside its blocks ({beside}), "
            "which cannot be streamed; use single"
        )
    return [found for name, _ in module.named_children() for found in _unit_paths(model, f"{below}{name}", blocks)]


def unit_sizes(model: nn.Module) -> dict[str, int]:
    """Return the number of parameters of each unit, by its path; raise `SetupError` if the model cannot be trained unit
    by unit."""
    if any(getattr(module, "running_mean", None) is not None for module in model.modules()):
        raise SetupError(
            f"train.placement: stream: {type(model).__name__} has running statistics (batch normalization), which the "
            "backward pass would update again; use single"
        )
    units, sizes = find_units(model), {name: parameter.numel() for name, parameter in model.named_parameters()}
    owner = {name: unit.path for unit in units for name in unit.names}
    used = [{owner[name] for name in unit.names + unit.tied} for unit in units]
    for path in owner.values():  # a shared weight's gradient is computed with all weights of those that use it
        together = set[str]().union(*(paths for paths in used if path in paths))
        if len(together) > MOST_TOGETHER:
            raise SetupError(
                f"train.placement: stream: {len(together)} parts of {type(model).__name__} with weights of their own "
                f"share weights ({', '.join(sorted(together)[:3])}), but at most {MOST_TOGETHER} can; use single"
            )
    return {unit.path: sum(sizes[name] for name in unit.names) for unit in units}
