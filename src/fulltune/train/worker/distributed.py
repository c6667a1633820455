"""Several processes: how they are started, asked to stop and ended, and how they share the eval rows."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fulltune.inference.run import Share, batches, by_length
from fulltune.system import deepspeed as zero
from fulltune.system import hardware
from fulltune.train.request import Request

ALLOCATOR = "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0:glibc.malloc.mmap_threshold=33554432"
"""How the C library keeps freed memory on a CPU: small pieces join their neighbours at once, so a large block finds
room where the last one was. Activation checkpointing of a 58 M Llama peaked at 1.63 GB instead of 2.13, as fast; see
docs/memory.md. Other C libraries do not read it."""


class Child(Protocol):
    """A started worker."""

    pid: int
    args: Any

    def poll(self) -> int | None: ...

    def wait(self) -> int: ...


def command(request: Request, file: Path) -> list[str]:
    """The command that starts the worker, under torchrun for several processes."""
    worker = ["-m", "fulltune.train.worker.main", str(file)]
    processes = request.plan.num_processes
    # DeepSpeed needs torchrun's variables even for one process.
    if processes == 1 and not zero.wanted(request.recipe):
        return [sys.executable, *worker]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *worker]


def environment(request: Request) -> dict[str, str]:
    """The worker's variables."""
    variables = dict(os.environ)
    # A file in the user's folder that has a library's name must not take its place.
    variables["PYTHONSAFEPATH"] = "1"
    on_cpu = request.plan.device == "cpu"
    if on_cpu and request.plan.num_processes > 1:
        # torchrun would give each process one thread, whatever the number of cores.
        variables.setdefault("OMP_NUM_THREADS", str(max(1, hardware.num_cores() // request.plan.num_processes)))
    if on_cpu and zero.wanted(request.recipe):
        variables["DS_ACCELERATOR"] = "cpu"
    if on_cpu:
        variables.setdefault("GLIBC_TUNABLES", ALLOCATOR)
    return variables


def ask_to_stop(child: Child) -> None:
    """SIGTERM to the workers. torchrun itself would give them 30 seconds to save, and then kill them."""
    workers = _workers(child)
    if not workers:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGTERM)
    for worker in workers:
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker, signal.SIGTERM)


def end(child: Child) -> None:
    """SIGKILL to all that the child started: torchrun's workers are not in its process group."""
    import psutil

    below: list[Any] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        below = psutil.Process(child.pid).children(recursive=True)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    for process in below:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def _workers(child: Child) -> list[int]:
    """Process ids of torchrun's workers; none before it has started them, or when the child is the worker itself."""
    import psutil

    if "torch.distributed.run" not in map(str, child.args if isinstance(child.args, Sequence) else ()):
        return []
    try:
        return [process.pid for process in psutil.Process(child.pid).children()]
    except psutil.NoSuchProcess:
        return []


def start_deepspeed(arguments: Any) -> None:
    """Let DeepSpeed know the other processes: on a CPU transformers 5.24 connects them and does not tell it."""
    import deepspeed

    # Its calls of renamed functions of torch would fill the log.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    backend = "gloo" if arguments.use_cpu else None
    if arguments.world_size > 0:  # asking for it connects them
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)


def from_first(value: Any) -> Any:
    """What the first process has, in all of them."""
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0]


# ---- eval rows -------------------------------------------------------------------------------------------------


def share(order: Sequence[int], batch_size: int, rank: int, num_processes: int) -> tuple[list[int], int]:
    """The rows that one process scores: every n-th batch, so that each batch is what it would be in one process.

    All processes get equally many batches, as weights that are shared out need: who has one too few scores the last
    row once more.

    Args:
        order: Positions of all rows, longest first.
        batch_size: Rows per batch.
        rank: Number of this process.
        num_processes: How many there are.

    Returns:
        Positions of the rows, and how many of them count.
    """
    chunks = list(batches(order, batch_size))
    mine = chunks[rank::num_processes]
    positions = [position for chunk in mine for position in chunk]
    count = len(positions)
    if len(mine) < -(-len(chunks) // num_processes):
        positions.append(order[-1])
    return positions, count


def my_share(rows: Sequence[Mapping[str, Any]], batch_size: int, rank: int, num_processes: int) -> tuple[Share, int]:
    """See `share`."""
    positions, count = share(by_length(rows), batch_size, rank, num_processes)
    return Share(rows, positions), count


def put_together(kept: Mapping[str, np.ndarray], mine: Share, count: int) -> dict[str, np.ndarray]:
    """What all processes reduced their rows to, in the order of the rows; the same in every process."""
    from accelerate.utils import gather_object

    part = {name: values[:count] for name, values in kept.items()}
    parts = gather_object([(list(mine.positions[:count]), part)])
    place = np.argsort([position for positions, _ in parts for position in positions])
    return {name: np.concatenate([values[name] for _, values in parts])[place] for name in kept}
