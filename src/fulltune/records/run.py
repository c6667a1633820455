from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import Field, ValidationError

from fulltune.files import read_json_lines
from fulltune.recipe.model import PairsReading
from fulltune.records.base import Record

ACCESSES = "test-rows-scored.jsonl"
"""File beside the run folders that logs each scoring of test rows."""
COMPARISON = "comparison"


class Environment(Record):
    start_time: str
    fulltune: str
    python: str
    platform: str
    packages: dict[str, str]
    cpu: str
    num_cores: int
    memory_bytes: int
    devices: tuple[str, ...]
    commit: str | None = None
    machines: dict[str, str] = Field(default_factory=dict)
    """Hardware of each of several machines in the last attempt."""
    seconds: float | None = None
    functions: dict[str, str] = Field(default_factory=dict)
    """Hash of the file of each function, `module:function`, that the recipe names."""


class PairsChoice(Record):
    """How a run reads the two texts of a row if `model.pairs` is `auto`."""

    pairs: PairsReading
    reason: str
    losses: dict[PairsReading, float] = Field(default_factory=dict)
    """Held-out loss of a linear probe of the pretrained model, by way of reading."""
    metrics: dict[PairsReading, float] = Field(default_factory=dict)
    """Metric on the eval rows after a short training, by way of reading."""


class Access(Record):
    """A logged use of the test rows, by a model's scores or a comparison's verdict."""

    time: str
    run: str
    trial: str
    model: str
    """Hash of the training's outcome, or empty for a comparison."""
    rows: str
    """Hash of the test rows, regardless of order."""

    @classmethod
    def load_for_same_rows(cls, folder: Path) -> tuple[Self, ...]:
        """Load the log entries of all runs that scored this run's test rows, or an empty tuple if it scored none."""
        folder, accesses = folder.resolve(), []
        for line in read_json_lines(folder.parent / ACCESSES):
            try:
                accesses.append(cls.model_validate(line))
            except ValidationError:
                continue
        # The last, because a new run may reuse the name.
        own_rows = [access.rows for access in accesses if access.run == folder.name][-1:]
        return tuple(access for access in accesses if access.rows in own_rows)
