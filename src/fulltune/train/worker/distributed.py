"""Several processes that train one model: what they tell each other, and how they share the eval rows."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fulltune.errors import SetupError
from fulltune.inference.run import batches

Part = tuple[list[int], dict[str, np.ndarray]]
"""Positions of rows, and name to values[these rows, ...]."""


def start_deepspeed(arguments: Any) -> None:
    """Let DeepSpeed know the other processes: on a CPU transformers 5.24 connects them and does not tell it."""
    import deepspeed

    # Its calls of renamed functions of torch would fill the log.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    backend = "gloo" if arguments.use_cpu else None
    if arguments.world_size > 0:  # asking for it connects them
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)


def build_extensions(on_cpu: bool, offload_optimizer: bool, phase: Callable[[str], None]) -> None:
    """Compile what is missing of DeepSpeed's extensions that a run needs, in the first process for all."""
    from deepspeed.accelerator import get_accelerator
    from torch.utils import cpp_extension

    names = [*(["ShareMemCommBuilder"] if on_cpu else []), *(["CPUAdamBuilder"] if offload_optimizer else [])]
    for name in names:
        builder: Any = get_accelerator().create_op_builder(name)
        if builder is None or not hasattr(builder, "jit_load") or not builder.is_compatible(verbose=False):
            continue  # DeepSpeed does without it, or says itself what is missing
        folder = Path(cpp_extension._get_build_directory(builder.name, verbose=False))
        if (lock := folder / "lock").exists():  # torch waits for it, without a word and for ever
            phase(f"waiting for {lock}: {builder.name} is being compiled; if nothing compiles, delete this file")
        if not (folder / f"{builder.name}.so").exists():
            phase(f"compiling DeepSpeed's {builder.name}, once: about a minute")
        try:
            builder.load(verbose=False)
        except (RuntimeError, OSError, ImportError) as error:
            reason = " ".join(str(error).split())[:300]
            raise SetupError(
                f"DeepSpeed's {builder.name} cannot be compiled: {reason}; it needs a C++ compiler (such as g++) and "
                f"ninja; compiled parts lie in {folder}"
            ) from error


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
