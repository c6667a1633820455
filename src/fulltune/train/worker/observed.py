"""What was measured while an attempt went on; the worker puts it into the outcome, also when the attempt failed."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fulltune.records.plan import TimeNeed
from fulltune.system.memory import Meter


@dataclass
class Observed:
    """Filled in step by step."""

    meter: Meter | None = None
    """Begins before the weights are read."""
    forecast: TimeNeed | None = None
    dry_run_growth_bytes: int = 0
    dry_run_loss: float | None = None
    disk_bytes: int = 0
    growth_of_processes: tuple[int, ...] = ()
    """Of each process at the end of the training."""

    def measure(self, device: str, writes: bool) -> None:
        """Count memory from now on; what the first evaluation would import is imported before."""
        if not writes:
            for name in ("scipy.stats", "sklearn.metrics"):
                importlib.import_module(name)
        self.meter = Meter(device)

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
            if self.growth_of_processes:  # the first process saves the model after that
                fields["growth_of_processes"] = (growth, *self.growth_of_processes[1:])
        return fields
