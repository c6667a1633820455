from __future__ import annotations

from pathlib import Path

from fulltune.recipe.fields import Recipe
from fulltune.records.base import Record
from fulltune.records.plan import Plan

INITIAL_WEIGHTS = "initial.safetensors"


class Request(Record):
    """A request to run one attempt."""

    run_folder: str
    recipe: Recipe
    plan: Plan
    attempt: int
    checkpoint: str | None
    parent_pid: int | None
    probe: bool = False
    """If True, stop after the dry run and write only the outcome."""
    dry_run: bool = True
    """False if an attempt with the same shapes has passed the dry run."""

    @property
    def first_step(self) -> int:
        """Step of the checkpoint, or 0 if there is none."""
        return 0 if self.checkpoint is None else number_in(Path(self.checkpoint))

    @property
    def folder(self) -> Path:
        """Folder of this attempt; measurements (`probe`) have their own."""
        if self.probe:
            return Path(self.run_folder) / "plan" / "probes" / f"{self.attempt:02d}"
        return Path(self.run_folder) / "attempts" / f"{self.plan.trial}-{self.attempt:02d}"

    def initial_weights(self, rank: int) -> Path:
        """Return the file of a rank's weights before step 1."""
        return self._rank_file(INITIAL_WEIGHTS, rank)

    @property
    def all_initial_weights(self) -> list[Path]:
        return sorted(self.folder.glob(f"{Path(INITIAL_WEIGHTS).stem}*.safetensors"))

    def trained_weights(self, rank: int) -> Path:
        return self._rank_file("trained.safetensors", rank)

    def _rank_file(self, name: str, rank: int) -> Path:
        file = self.folder / name
        return file.with_stem(f"{file.stem}-rank{rank}") if rank else file

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints, which all attempts of the trial share."""
        if self.probe:
            return self.folder / "checkpoints"
        return Path(self.run_folder) / "checkpoints" / self.plan.trial

    @property
    def tensorboard(self) -> Path:
        return Path(self.run_folder) / "tensorboard" / self.plan.trial

    @property
    def model_folder(self) -> Path:
        return Path(self.run_folder) / self.plan.model_folder


def number_in(folder: Path) -> int:
    """Return the step of a checkpoint folder, or the number of an attempt folder."""
    return int(folder.name.rpartition("-")[2])


def attempt_folders(run_folder: Path, trial: str) -> list[Path]:
    return sorted((run_folder / "attempts").glob(f"{trial}-[0-9]*"), key=number_in)
