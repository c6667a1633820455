from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import numpy as np
import torch
from transformers import TrainingArguments

from fulltune.inference.run import RowSubset, batches, positions_by_length
from fulltune.tasks import Predictions, RowFeatures

T = TypeVar("T")


def all_gather(value: T) -> list[T]:
    """Return every rank's value."""
    if not torch.distributed.is_initialized():
        return [value]
    values: list[T] = [value] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def sum_counts(counts: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """Sum each name's pair of counts over all ranks."""
    parts = all_gather(dict(counts))
    of_name = {name: [part[name] for part in parts if name in part] for part in parts for name in part}
    return {name: (sum(first for first, _ in pairs), sum(last for _, last in pairs)) for name, pairs in of_name.items()}


# ---- eval rows -------------------------------------------------------------------------------------------------


def rows_of_rank(order: Sequence[int], batch_size: int, rank: int, num_processes: int) -> tuple[list[int], int]:
    """Return the positions of the rows that a rank scores (every n-th batch of `order`), and how many of them count.

    A rank with one batch fewer also runs the last row of `order`, without counting it, because with sharded weights all
    ranks must run the same number of passes.
    """
    chunks = list(batches(order, batch_size))
    mine = chunks[rank::num_processes]
    positions = [position for chunk in mine for position in chunk]
    count = len(positions)
    if len(mine) < -(-len(chunks) // num_processes):
        positions.append(order[-1])
    return positions, count


def predict_shared(
    rows: Sequence[RowFeatures],
    batch_size: int,
    arguments: TrainingArguments,
    predict: Callable[[Sequence[RowFeatures]], Predictions],
) -> Predictions:
    """Share the rows among all ranks, and return all ranks' predictions by name: [rows, ...]."""
    ranks = arguments.process_index, arguments.world_size
    positions, count = rows_of_rank(positions_by_length(rows), batch_size, *ranks)
    return gather_scores(predict(RowSubset(rows, positions)), positions[:count])


def gather_scores(local_values: Mapping[str, np.ndarray], positions: Sequence[int]) -> dict[str, np.ndarray]:
    """Gather all ranks' values by name, in row order: [rows, ...]. Values beyond a rank's `positions` are ignored."""
    parts = all_gather((list(positions), {name: values[: len(positions)] for name, values in local_values.items()}))
    order = np.argsort([position for positions, _ in parts for position in positions])
    return {name: np.concatenate([values[name] for _, values in parts])[order] for name in parts[0][1]}
