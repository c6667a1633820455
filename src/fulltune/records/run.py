"""Where, with what and how long a run was made."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import ValidationError

from fulltune.files import lines_of
from fulltune.records.base import Record

ACCESSES = "test-rows-scored.jsonl"
"""Beside the run folders, and outliving each of them: a line for each time that test rows were scored."""
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
    """Of the training processes that ran there in the last attempt."""


class Environment(Record):
    """Where and with what a run was made."""

    started: str
    """ISO 8601 with time zone."""
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
    """Of several that train a model all."""
    seconds: float | None = None
    """Of a whole `fulltune run`, from its start to its report."""


class Access(Record):
    """Test rows were scored: by a trained model, or all at once by the verdict of a comparison."""

    time: str
    """ISO 8601 with time zone."""
    run: str
    trial: str
    """Method and seed of the model; or `comparison`."""
    model: str
    """Hash of how its training ended, the same when it is scored again; empty: of a comparison."""
    rows: str
    """Hash of the test rows, whatever their order."""

    @classmethod
    def of_same_rows(cls, folder: Path) -> tuple[Self, ...]:
        """Every time that a run folder's test rows were scored, by it or by others beside it; empty: not by it.

        Lines that cannot be read, or are of another version, are passed over.
        """
        folder, found = folder.resolve(), []
        for line in lines_of(folder.parent / ACCESSES):
            try:
                found.append(cls.model_validate(line))
            except ValidationError:
                continue
        mine = [one.rows for one in found if one.run == folder.name][-1:]  # of a folder that was made anew its last
        return tuple(one for one in found if one.rows in mine)
