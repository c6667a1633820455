"""Several processes that train one model: what they tell each other, and how they share the eval rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from fulltune.inference.run import batches


def every(value: Any) -> list[Any]:
    """The value of each process, by rank; the same list in all of them."""
    if not torch.distributed.is_initialized():
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def summed(counts: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """Each name's two counts, added up over all processes: the same in each."""
    parts = every(dict(counts))
    of_name = {name: [part[name] for part in parts if name in part] for part in parts for name in part}
    return {name: (sum(one for one, _ in both), sum(other for _, other in both)) for name, both in of_name.items()}


# ---- eval rows -------------------------------------------------------------------------------------------------


def share(order: Sequence[int], batch_size: int, rank: int, num_processes: int) -> tuple[list[int], int]:
    """Positions of the rows that one process scores, every n-th batch, and how many count: with one batch too few the
    last row comes once more, as sharded weights need equally many passes."""
    chunks = list(batches(order, batch_size))
    mine = chunks[rank::num_processes]
    positions = [position for chunk in mine for position in chunk]
    count = len(positions)
    if len(mine) < -(-len(chunks) // num_processes):
        positions.append(order[-1])
    return positions, count


def gathered(mine: Mapping[str, np.ndarray], positions: Sequence[int]) -> dict[str, np.ndarray]:
    """What all processes reduced their rows to, by name, in the order of the rows: name to values[rows, ...]; the same
    in every process. Of one process's values, only those of the first `positions` count."""
    parts = every((list(positions), {name: values[: len(positions)] for name, values in mine.items()}))
    place = np.argsort([position for positions, _ in parts for position in positions])
    return {name: np.concatenate([values[name] for _, values in parts])[place] for name in parts[0][1]}
