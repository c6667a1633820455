"""Environment of a run, and the log of test rows scored."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import ValidationError

from fulltune.files import lines_of
from fulltune.records.base import Record

ACCESSES = "test-rows-scored.jsonl"
"""File beside the run folders that records each scoring of test rows and outlives them."""
COMPARISON = "comparison"


class MachineRecord(Record):
    """One of several machines of a run."""

    rank: int
    host: str
    cpu: str
    num_cores: int
    memory_bytes: int
    devices: tuple[str, ...]
    ranks: tuple[int, ...] = ()
    """Ranks of its training processes."""


class Environment(Record):
    """Machine, packages and duration of a run."""

    start_time: str
    """Start, ISO 8601 with time zone."""
    fulltune: str
    python: str
    platform: str
    packages: dict[str, str]
    cpu: str
    num_cores: int
    memory_bytes: int
    devices: tuple[str, ...]
    commit: str | None = None
    machines: tuple[MachineRecord, ...] = ()
    seconds: float | None = None
    """Duration of `fulltune run`."""


class Access(Record):
    """A scoring of test rows by a model or by a comparison's verdict."""

    time: str
    """Time, ISO 8601 with time zone."""
    run: str
    trial: str
    """Trial, or `comparison`."""
    model: str
    """Hash of the training's outcome; empty for a comparison."""
    rows: str
    """Order-independent hash of the test rows."""

    @classmethod
    def of_same_rows(cls, folder: Path) -> tuple[Self, ...]:
        """List the scorings of a run's test rows by any run; empty if this run scored none."""
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
