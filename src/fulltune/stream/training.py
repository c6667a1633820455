from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from fulltune.stream.executor import Executor
from fulltune.stream.state import DiskState
from fulltune.stream.units import Unit

_ATTRIBUTE = "_streamed"


@dataclass(frozen=True)
class Streamed:
    """What belongs to a model that is trained from a disk."""

    units: tuple[Unit, ...]
    sizes: Sequence[int]
    """Bytes of each unit's weights."""
    state: DiskState
    executor: Executor

    def weights(self, name: str) -> torch.Tensor:
        """Read a parameter's current values."""
        return self.state.read(name, "weights")["weights"]


def attach(model: nn.Module, streamed: Streamed) -> None:
    vars(model)[_ATTRIBUTE] = streamed


def streamed_of(model: nn.Module) -> Streamed | None:
    """Return what `attach` stored, or None for a model in memory."""
    return vars(model).get(_ATTRIBUTE)
