"""Environment of a run, and the log of test rows scored."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import ValidationError

from fulltune.files import lines_of
from fulltune.records.base import Record

ACCESSES = "test-rows-scored.jsonl"
"""File beside the run folders with a line for each time that test rows were scored; it outlives the runs."""
COMPARISON = "comparison"


class MachineUsed(Record):
    """One of several machines that trained a model."""

    rank: int
    host: str
    cpu: str
    num_cores: int
    memory_bytes: int
    devices: tuple[str, ...]
    ranks: tuple[int, ...] = ()
    """Ranks of its training processes in the last attempt."""


class Environment(Record):
    """Machine, packages and duration of a run."""

    started: str
    """Start time, ISO 8601 with time zone."""
    fulltune: str
    python: str
    platform: str
    packages: dict[str, str]
    cpu: str
    num_cores: int
    memory_bytes: int
    devices: tuple[str, ...]
    commit: str | None = None
    machines: tuple[MachineUsed, ...] = ()
    """Machines of a run over several."""
    seconds: float | None = None
    """Duration of a whole `fulltune run`, report included."""


class Access(Record):
    """One scoring of test rows, by a trained model or by the verdict of a comparison."""

    time: str
    """Time, ISO 8601 with time zone."""
    run: str
    trial: str
    """Name of the model's trial, or `comparison`."""
    model: str
    """Hash of the training's outcome, so that scoring a model again counts once; empty for a comparison."""
    rows: str
    """Hash of the test rows, independent of their order."""

    @classmethod
    def of_same_rows(cls, folder: Path) -> tuple[Self, ...]:
        """List every scoring of a run's test rows, by this run or its neighbours; empty if this run scored none."""
        folder, accesses = folder.resolve(), []
        for line in lines_of(folder.parent / ACCESSES):
            try:
                accesses.append(cls.model_validate(line))
            except ValidationError:
                continue
        own_rows = [access.rows for access in accesses if access.run == folder.name][
            -1:
        ]  # a new run may reuse the name
        return tuple(access for access in accesses if access.rows in own_rows)
