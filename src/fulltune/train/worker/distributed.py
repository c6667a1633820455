"""Exchanges values between the ranks of a training, and splits the eval rows over them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np
import torch

from fulltune.inference.run import batches

T = TypeVar("T")


def all_gather(value: T) -> list[T]:
    if not torch.distributed.is_initialized():
        return [value]
    values: list[T] = [value] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def sum_counts(counts: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """Sum pairs of counts by name over all ranks."""
    parts = all_gather(dict(counts))
    of_name = {name: [part[name] for part in parts if name in part] for part in parts for name in part}
    return {name: (sum(first for first, _ in pairs), sum(last for _, last in pairs)) for name, pairs in of_name.items()}


# ---- eval rows -------------------------------------------------------------------------------------------------


def share(order: Sequence[int], batch_size: int, rank: int, num_processes: int) -> tuple[list[int], int]:
    """Return the row positions that one rank scores (every n-th batch), and how many of them count.

    A rank with one batch fewer repeats the last row, uncounted, because sharded weights need equally many passes on all
    ranks.
    """
    chunks = list(batches(order, batch_size))
    mine = chunks[rank::num_processes]
    positions = [position for chunk in mine for position in chunk]
    count = len(positions)
    if len(mine) < -(-len(chunks) // num_processes):
        positions.append(order[-1])
    return positions, count


def gather_rows(mine: Mapping[str, np.ndarray], positions: Sequence[int]) -> dict[str, np.ndarray]:
    """Gather the values of all ranks in row order, by name: [rows, ...]. A rank's values beyond its positions are
    ignored."""
    parts = all_gather((list(positions), {name: values[: len(positions)] for name, values in mine.items()}))
    order = np.argsort([position for positions, _ in parts for position in positions])
    return {name: np.concatenate([values[name] for _, values in parts])[order] for name in parts[0][1]}
