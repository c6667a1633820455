"""Several processes that train one model: what they tell each other, and how they share the eval rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fulltune.inference.run import batches

Part = tuple[list[int], dict[str, np.ndarray]]
"""Positions of rows, and name to values[these rows, ...]."""


def from_first(value: Any) -> Any:
    """What the first process has, in all of them."""
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0]


def gathered(number: int) -> tuple[int, ...]:
    """The number of each process, in all of them."""
    from accelerate.utils import gather_object

    return tuple(gather_object([number]))


def summed(counts: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """Each name's two counts, added up over all processes: the same in each."""
    from accelerate.utils import gather_object

    found: dict[str, tuple[int, int]] = {}
    for part in gather_object([dict(counts)]):
        for name, (one, other) in part.items():
            before = found.get(name, (0, 0))
            found[name] = before[0] + one, before[1] + other
    return found


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


def put_together(mine: Mapping[str, np.ndarray], positions: Sequence[int]) -> dict[str, np.ndarray]:
    """What all processes reduced their rows to, by name, in the order of the rows; the same in every process."""
    from accelerate.utils import gather_object

    return merged(gather_object([part_of(mine, positions)]))


def part_of(mine: Mapping[str, np.ndarray], positions: Sequence[int]) -> Part:
    """What one process sends: of the rows that count, their positions and what they were reduced to."""
    return list(positions), {name: values[: len(positions)] for name, values in mine.items()}


def merged(parts: Sequence[Part]) -> dict[str, np.ndarray]:
    """The parts of all processes in the order of the rows: name to values[rows, ...]."""
    place = np.argsort([position for positions, _ in parts for position in positions])
    return {name: np.concatenate([values[name] for _, values in parts])[place] for name in parts[0][1]}
