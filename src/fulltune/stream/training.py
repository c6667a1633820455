from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from fulltune.stream.executor import Executor
from fulltune.stream.skeleton import Skeleton
from fulltune.stream.state import DiskState
from fulltune.stream.units import Unit

_ATTRIBUTE = "_streamed"


@dataclass(frozen=True)
class Streamed:
    """What belongs to a model that is trained from a disk."""

    units: tuple[Unit, ...]
    skeleton: Skeleton
    state: DiskState
    executor: Executor

    def weights(self, name: str) -> torch.Tensor:
        """Read a parameter's current values."""
        return self.state.read(name, "weights")["weights"]

    def weights_bytes(self, unit: int) -> int:
        parameters = [self.skeleton.model.get_parameter(name) for name in self.units[unit].names]
        return sum(parameter.numel() * parameter.element_size() for parameter in parameters)

    def write(self, values: Mapping[str, torch.Tensor]) -> None:
        """Replace parameters' values, unit by unit."""
        for number, unit in enumerate(self.units):
            if own := {name: {"weights": values[name]} for name in unit.names if name in values}:
                self.state.write(number, own)


def attach(model: nn.Module, streamed: Streamed) -> None:
    vars(model)[_ATTRIBUTE] = streamed


def streamed_of(model: nn.Module) -> Streamed | None:
    """Return what `attach` stored, or None for a model in memory."""
    return vars(model).get(_ATTRIBUTE)
