"""Where, with what and how long a run was made."""

from __future__ import annotations

from fulltune.records.base import Record


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


class Command(Record):
    """A whole `fulltune run`, from its start to its report."""

    seconds: float
