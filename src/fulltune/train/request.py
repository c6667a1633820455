"""What the parent hands to a worker, as a file."""

from __future__ import annotations

from pathlib import Path

from fulltune.recipe.fields import Recipe, with_attention
from fulltune.records.base import Record
from fulltune.records.plan import Plan


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
    probe: bool = False
    """Stop after the dry-run step and write only the outcome: no weights, no checkpoint, no model."""

    dry_run: bool = True
    """False: an attempt with the same shapes has passed it."""

    @property
    def recipe_as_planned(self) -> Recipe:
        """The recipe with the attention implementation that was found to be the fastest."""
        return with_attention(self.recipe, self.plan.attn_implementation)

    @property
    def folder(self) -> Path:
        if self.probe:
            return Path(self.run_folder) / "plan" / "probes" / f"{self.attempt:02d}"
        return Path(self.run_folder) / "attempts" / f"{self.plan.trial}-{self.attempt:02d}"

    @property
    def initial_weights(self) -> Path:
        """The weights before step 1, as long as the attempt runs."""
        return self.folder / "initial.safetensors"

    @property
    def checkpoints(self) -> Path:
        """Shared by the attempts of a trial, so that the best one can be older than the attempt."""
        if self.probe:
            return self.folder / "checkpoints"
        return Path(self.run_folder) / "checkpoints" / self.plan.trial

    @property
    def tensorboard(self) -> Path:
        """Of this trial, in all its attempts; `tensorboard --logdir RUN/tensorboard` shows all trials."""
        return Path(self.run_folder) / "tensorboard" / self.plan.trial

    @property
    def model_folder(self) -> Path:
        return Path(self.run_folder) / self.plan.model_folder
