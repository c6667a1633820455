"""What is to be run, whatever starts it: the command, how many machines, how many processes and GPUs on each."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fulltune.errors import RecipeError
from fulltune.plan.gpus import Fleet, parse
from fulltune.recipe.fields import Recipe
from fulltune.recipe.file import load_recipe


@dataclass(frozen=True)
class LaunchedJob:
    """A recipe with what its command needs."""

    file: Path
    """The recipe, with its whole path."""
    recipe: Recipe
    overrides: tuple[str, ...]
    hardware: Fleet | None
    """What `--for` names."""
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
        on_cpu = self.recipe.train.device == "cpu" or (self.hardware is not None and self.hardware.gpu_model is None)
        return 0 if on_cpu else self.processes

    @property
    def words(self) -> list[str]:
        """The command in the recipe's folder, without what differs by machine."""
        verb = "compare" if self.recipe.methods else "run"
        return ["fulltune", verb, f"./{self.file.name}", *(word for one in self.overrides for word in ("--set", one))]

    @property
    def name(self) -> str:
        """Of the job, of characters that all launchers take."""
        plain = re.sub(r"[^a-z0-9]+", "-", (self.recipe.name or self.file.stem).lower()).strip("-")[:40].strip("-")
        return plain if plain[:1].isalpha() else f"fulltune-{plain}".strip("-")

    @property
    def comment(self) -> str:
        """The command that asked for it, in one line; YAML takes no control characters, not even here."""
        line = " ".join(shlex.join(self.typed).split())
        return f"Written by: {''.join(one if one.isprintable() else ascii(one)[1:-1] for one in line)}"


def job_of(file: Path, overrides: Sequence[str], hardware: str | None, typed: Sequence[str]) -> LaunchedJob:
    """Read the recipe and what `--for` says.

    Raises:
        RecipeError: With all problems at once.
    """
    problems: list[str] = []
    fleet = None
    try:
        fleet = None if hardware is None else parse(hardware)
    except RecipeError as error:
        problems += error.problems
    for one in overrides if fleet else ():
        if (name := one.partition("=")[0].strip()) in ("train.num_machines", "train.num_processes"):
            problems.append(f"--for: says how many machines and processes; remove --set {name}, or --for")
    if file.is_dir():
        problems.append(f"{file}: is a folder, expected a recipe (YAML)")
    for word in dict.fromkeys((*typed, str(file))):
        if (shown := word.encode("utf-8", "backslashreplace").decode()) != word:
            problems.append(f"launch: {shown} is not UTF-8, which jobs are; rename what is called so")
    if problems:
        raise RecipeError(problems)
    sizes = (f"train.num_machines={fleet.num_machines}", f"train.num_processes={fleet.num_devices}") if fleet else ()
    whole = (*overrides, *sizes)
    recipe = load_recipe(file, whole)
    return LaunchedJob(Path(os.path.abspath(file)), recipe, whole, fleet, tuple(typed))  # noqa: PTH100  # links stay
