"""What an attempt takes: measured while it goes on, for the outcome of one that failed as well, and held to a limit."""

from __future__ import annotations

import contextlib
import importlib
import resource
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fulltune.errors import DoesNotFitError
from fulltune.records.plan import TimeNeed
from fulltune.system.memory import Meter, status_bytes
from fulltune.text import format_bytes


@dataclass
class Observed:
    """Filled in step by step."""

    meter: Meter | None = None
    """Begins before the weights are read."""
    forecast: TimeNeed | None = None
    tokens_per_second: float = 0.0
    """Of the training so far; in a probe as it is foreseen."""
    dry_run_growth_bytes: int = 0
    dry_run_loss: float | None = None
    disk_bytes: int = 0
    memory_growth_per_process: tuple[int, ...] = ()
    """Of each process at the end of the training."""

    def measure(self, device: str, writes: bool) -> None:
        """Count memory from now on; what the first evaluation would import is imported before."""
        if not writes:
            for name in ("scipy.stats", "sklearn.metrics"):
                importlib.import_module(name)
        self.meter = Meter(device)

    def growth_bytes(self) -> int:
        """Most that was held so far beyond what was held before the weights; 0 before they are read."""
        return 0 if self.meter is None else self.meter.growth_bytes()

    def disk(self, *paths: Path) -> None:
        """Keep the most that these files and folders took together."""
        files = [file for path in paths for file in (path.rglob("*") if path.is_dir() else [path])]
        self.disk_bytes = max(self.disk_bytes, sum(file.stat().st_size for file in files if file.is_file()))

    def for_outcome(self) -> dict[str, Any]:
        """Fields of `Outcome`; sizes of memory only from when there was a meter."""
        fields = {name: value for name, value in vars(self).items() if name != "meter"}
        if self.meter is not None:
            fields["peak_memory_bytes"] = self.meter.peak_bytes()
            growth = fields["memory_growth_bytes"] = self.meter.growth_bytes()
            if self.memory_growth_per_process:  # the first process saves the model after that
                fields["memory_growth_per_process"] = (growth, *self.memory_growth_per_process[1:])
        return fields


@contextlib.contextmanager
def held_to(limit_bytes: int | None, device: str, warn: Callable[[str], None]) -> Iterator[None]:
    """Inside, taking more than `train.memory_limit` fails like memory that ran out; entered when the libraries are
    imported. DoesNotFitError when more than that is held already.

    On CUDA torch's allocator keeps to a share of the card. On the CPU RLIMIT_DATA counts what was reserved, not what
    was touched, and libraries reserve far more than they use: so it is VmData now + (limit - VmRSS now).
    """
    import torch

    with contextlib.ExitStack() as undo:  # also what is said about an error needs memory
        if limit_bytes is not None and device == "cuda":
            total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, limit_bytes / total))
            undo.callback(torch.cuda.set_per_process_memory_fraction, 1.0)
        elif limit_bytes is not None and status_bytes("VmData"):
            # Has torch start its pool: a thread that finds no memory for its stack later ends the process silently.
            torch.mm(torch.ones(512, 512), torch.ones(512, 512))
            before = resource.getrlimit(resource.RLIMIT_DATA)
            resource.setrlimit(resource.RLIMIT_DATA, (_data_limit(limit_bytes, before), before[1]))
            undo.callback(resource.setrlimit, resource.RLIMIT_DATA, before)
        elif limit_bytes is not None:
            warn("memory limit: only the plan keeps to it, because this system cannot enforce it")
        yield


def _data_limit(limit_bytes: int, before: tuple[int, int]) -> int:
    held = status_bytes("VmRSS")
    if limit_bytes <= held:
        raise DoesNotFitError(
            f"train.memory_limit: {format_bytes(limit_bytes)}, but Python and its libraries alone hold "
            f"{format_bytes(held)}; set a higher limit"
        )
    allowed = [value for value in before if value != resource.RLIM_INFINITY]
    return min([status_bytes("VmData") + limit_bytes - held, *allowed])
