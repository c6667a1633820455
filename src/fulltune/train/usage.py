from __future__ import annotations

import contextlib
import importlib
import resource
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fulltune.errors import DoesNotFitError
from fulltune.records.plan import TimeNeed
from fulltune.system.memory import Meter, status_bytes
from fulltune.text import format_bytes


@dataclass
class ResourceUsage:
    """Resources that an attempt has used so far."""

    meter: Meter | None = None
    forecast: TimeNeed | None = None
    tokens_per_second: float = 0.0
    """Training speed so far; in a measuring attempt, the forecast speed."""
    dry_run_growth_bytes: int = 0
    dry_run_loss: float | None = None
    disk_bytes: int = 0
    memory_growth_per_process: tuple[int, ...] = ()

    def start_measuring(self, device: str, generates_text: bool) -> None:
        """Import the metrics' libraries unless `generates_text`, then start measuring memory."""
        if not generates_text:
            for name in ("scipy.stats", "sklearn.metrics"):
                importlib.import_module(name)
        self.meter = Meter(device)

    def growth_bytes(self) -> int:
        """Return the peak memory in bytes beyond the use before the weights were loaded."""
        return 0 if self.meter is None else self.meter.growth_bytes()

    def update_peak_disk(self, *paths: Path) -> None:
        """Update the peak disk usage with the current size of these files and folders."""
        files = [file for path in paths for file in (path.rglob("*") if path.is_dir() else [path])]
        self.disk_bytes = max(self.disk_bytes, sum(file.stat().st_size for file in files if file.is_file()))

    def as_outcome_fields(self) -> dict[str, Any]:
        fields = {name: value for name, value in vars(self).items() if name != "meter"}
        if self.meter is not None:
            fields["peak_memory_bytes"] = self.meter.peak_bytes()
            growth = fields["memory_growth_bytes"] = self.meter.growth_bytes()
            if self.memory_growth_per_process:  # rank 0 saves the model after that
                fields["memory_growth_per_process"] = (growth, *self.memory_growth_per_process[1:])
        return fields


@contextlib.contextmanager
def memory_limit(limit_bytes: int | None, device: str, warn: Callable[[str], None]) -> Iterator[None]:
    """Make allocations beyond `train.memory_limit` fail as if memory had run out. Enter this context after importing
    the libraries.

    On CUDA torch's allocator is limited; on the CPU RLIMIT_DATA is set to VmData + (limit - VmRSS), because RLIMIT_DATA
    counts reserved memory, and libraries reserve far more than they use.

    Raises:
        DoesNotFitError: More memory than the limit is already in use.
    """
    import torch

    with contextlib.ExitStack() as undo:  # reporting an error also needs memory
        if limit_bytes is not None and device == "cuda":
            total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, limit_bytes / total))
            undo.callback(torch.cuda.set_per_process_memory_fraction, 1.0)
        elif limit_bytes is not None and status_bytes("VmData"):
            # Start torch's thread pool: a thread without memory for its stack would later end the process silently.
            torch.mm(torch.ones(512, 512), torch.ones(512, 512))
            # The stacks of later threads count as a whole, however little of them is used.
            undo.callback(threading.stack_size, threading.stack_size(2**20))
            used = status_bytes("VmRSS")
            if limit_bytes <= used:
                raise DoesNotFitError(
                    f"train.memory_limit: {format_bytes(limit_bytes)}, but Python and its libraries alone use "
                    f"{format_bytes(used)}; set a higher limit"
                )
            before = resource.getrlimit(resource.RLIMIT_DATA)
            limits = [value for value in before if value != resource.RLIM_INFINITY]
            limit = min([status_bytes("VmData") + limit_bytes - used, *limits])
            resource.setrlimit(resource.RLIMIT_DATA, (limit, before[1]))
            undo.callback(resource.setrlimit, resource.RLIMIT_DATA, before)
        elif limit_bytes is not None:
            warn("train.memory_limit: only the plan respects the limit, because this system cannot enforce it")
        yield
