"""What the parent hands to a worker, as a file."""

from __future__ import annotations

from pathlib import Path

from fulltune.recipe import Recipe
from fulltune.records import Plan, Record


class Request(Record):
    """One attempt."""

    run_folder: str
    recipe: Recipe
    plan: Plan
    attempt: int
    checkpoint: str | None
    """Folder to continue from; None starts from the pretrained weights."""
    parent_pid: int | None
    """The worker ends when this process does."""

    @property
    def folder(self) -> Path:
        return Path(self.run_folder) / "attempts" / f"{self.plan.trial}-{self.attempt:02d}"

    @property
    def initial_weights(self) -> Path:
        """The weights before step 1, as long as the attempt runs."""
        return self.folder / "initial.safetensors"

    @property
    def checkpoints(self) -> Path:
        """Shared by the attempts of a trial, so that the best one can be older than the attempt."""
        return Path(self.run_folder) / "checkpoints" / self.plan.trial

    @property
    def model_folder(self) -> Path:
        return Path(self.run_folder) / "models" / self.plan.method
