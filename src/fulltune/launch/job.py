"""What is to be run, whatever starts it: the command, how many machines, how many processes and GPUs on each."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fulltune.errors import RecipeError
from fulltune.launch.settings import LauncherSettings
from fulltune.plan.elsewhere.machines import fleet_of
from fulltune.plan.gpus import GpuModel
from fulltune.recipe.fields import Recipe
from fulltune.recipe.file import load_recipe
from fulltune.recipe.paths import named_paths
from fulltune.text import listed


@dataclass(frozen=True)
class Hardware:
    """What `--for` names."""

    num_machines: int
    num_devices: int
    """Of each machine; without a GPU one."""
    gpu: GpuModel | None
    """None: a CPU."""

    @property
    def overrides(self) -> list[str]:
        """One process for each device."""
        return [
            f"train.num_machines={self.num_machines}",
            f"train.num_processes={self.num_machines * self.num_devices}",
        ]


@dataclass(frozen=True)
class LaunchedJob:
    """A recipe with what its command needs."""

    file: Path
    """The recipe, with its whole path."""
    recipe: Recipe
    overrides: tuple[str, ...]
    hardware: Hardware | None
    typed: tuple[str, ...]
    """The command that asked for the job."""

    @property
    def num_machines(self) -> int:
        return self.recipe.train.num_machines

    @property
    def processes(self) -> int:
        """Of each machine."""
        return self.recipe.train.processes_per_machine

    @property
    def gpus(self) -> int:
        """Of each machine: one for each process, none on a CPU."""
        on_cpu = self.recipe.train.device == "cpu" or (self.hardware is not None and self.hardware.gpu is None)
        return 0 if on_cpu else self.processes

    def words(self, recipe: str, more: Sequence[str] = ()) -> list[str]:
        """The command without what differs by machine.

        Args:
            recipe: The file, as the machines see it.
            more: Further overrides.
        """
        verb = "compare" if self.recipe.methods else "run"
        sets = [word for one in (*self.overrides, *more) for word in ("--set", one)]
        return ["fulltune", verb, recipe, *sets]

    def name(self, settings: LauncherSettings) -> str:
        """Of the job, of characters that all launchers take."""
        wanted = settings.name or self.recipe.name or self.file.stem
        plain = re.sub(r"[^a-z0-9]+", "-", wanted.lower()).strip("-")[:40].strip("-")
        return plain if plain[:1].isalpha() else f"fulltune-{plain}".strip("-")

    def waits(self, settings: LauncherSettings) -> list[str]:
        """What only several machines have in common."""
        several = self.num_machines > 1 and settings.wait_for_machines
        return ["--wait-for-machines", str(settings.wait_for_machines)] if several else []

    @property
    def comment(self) -> str:
        """The command that asked for it, in one line; YAML takes no control characters, not even here."""
        line = " ".join(shlex.join(self.typed).split())
        return f"Written by: {''.join(one if one.isprintable() else ascii(one)[1:-1] for one in line)}"


@dataclass(frozen=True)
class Manifest:
    """A file that a launcher reads."""

    ending: str
    """What its name ends with, after the recipe's: `slurm.sh`."""
    text: str
    submit: tuple[str, ...]
    """The command that submits it, without its path."""
    notes: tuple[str, ...] = ()
    """What a person has to see to beside it."""


def job_of(file: Path, overrides: Sequence[str], hardware: str | None, typed: Sequence[str]) -> LaunchedJob:
    """Read the recipe and what `--for` says.

    Raises:
        RecipeError: With all problems at once.
    """
    problems: list[str] = []
    found = None
    try:
        found = None if hardware is None else _hardware_of(hardware)
    except RecipeError as error:
        problems += error.problems
    for one in overrides if found else ():
        if (name := one.partition("=")[0].strip()) in ("train.num_machines", "train.num_processes"):
            problems.append(f"--for: says how many machines and processes; remove --set {name}, or --for")
    if file.is_dir():
        problems.append(f"{file}: is a folder, expected a recipe (YAML)")
    for word in dict.fromkeys((*typed, str(file))):
        if (shown := word.encode("utf-8", "backslashreplace").decode()) != word:
            problems.append(f"launch: {shown} is not UTF-8, which manifests are; rename what is called so")
    if problems:
        raise RecipeError(problems)
    whole = (*overrides, *(found.overrides if found else ()))
    recipe = load_recipe(file, whole)
    return LaunchedJob(Path(os.path.abspath(file)), recipe, whole, found, tuple(typed))  # noqa: PTH100  # links stay


def _hardware_of(words: str) -> Hardware:
    fleet = fleet_of(words)
    return Hardware(fleet.num_machines, fleet.num_devices // fleet.num_machines, fleet.gpu_model)


def notes_of(job: LaunchedJob, folder: Path) -> tuple[str, ...]:
    """That machines which get only this folder lack what the recipe names outside of it."""
    absent = list(_outside(job, folder))
    said = f"not in {folder}, so see that the machines have it, too: {listed(absent)}"
    return (said,) if absent else ()


def _outside(job: LaunchedJob, folder: Path) -> Iterator[str]:
    """Paths of the recipe that do not lie in a folder."""
    folder = Path(os.path.realpath(folder))
    return (path for path in named_paths(job.recipe) if not Path(path).is_relative_to(folder))
