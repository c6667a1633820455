"""What the parent hands to a worker, as a file; where an attempt's files lie."""

from __future__ import annotations

from pathlib import Path

from fulltune.recipe.fields import Recipe, with_placement
from fulltune.records.base import Record
from fulltune.records.plan import Plan

INITIAL_WEIGHTS = "initial.safetensors"


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
    def first_step(self) -> int:
        """The steps up to this one are in the checkpoint."""
        return 0 if self.checkpoint is None else number_in(Path(self.checkpoint))

    @property
    def recipe_as_planned(self) -> Recipe:
        """The recipe with the planned placement."""
        return with_placement(self.recipe, self.plan.placement)

    @property
    def folder(self) -> Path:
        if self.probe:
            return Path(self.run_folder) / "plan" / "probes" / f"{self.attempt:02d}"
        return Path(self.run_folder) / "attempts" / f"{self.plan.trial}-{self.attempt:02d}"

    def initial_weights(self, rank: int) -> Path:
        """What one process keeps of the weights before step 1, as long as the attempt runs."""
        return self._of_rank(INITIAL_WEIGHTS, rank)

    @property
    def all_initial_weights(self) -> list[Path]:
        """Of all processes, those that are there."""
        return sorted(self.folder.glob(f"{Path(INITIAL_WEIGHTS).stem}*.safetensors"))

    def trained_weights(self, rank: int) -> Path:
        """The same of those after training, while a point between both is chosen."""
        return self._of_rank("trained.safetensors", rank)

    def _of_rank(self, name: str, rank: int) -> Path:
        file = self.folder / name
        return file.with_stem(f"{file.stem}-rank{rank}") if rank else file

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


def number_in(folder: Path) -> int:
    """The step of a checkpoint's folder, the number of an attempt's."""
    return int(folder.name.rpartition("-")[2])


def attempt_folders(run_folder: Path, trial: str) -> list[Path]:
    """A trial's attempts, by number: 100 comes after 99."""
    return sorted((run_folder / "attempts").glob(f"{trial}-[0-9]*"), key=number_in)
