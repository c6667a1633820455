from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from fulltune.errors import RecipeError, SetupError
from fulltune.files import write_text
from fulltune.plan.gpus import Fleet, parse_hardware
from fulltune.recipe.fields import Recipe, local_paths
from fulltune.recipe.file import load_recipe
from fulltune.system.machines import DEFAULT_PORT
from fulltune.system.run_folder import explain_os_errors
from fulltune.text import listed

_CORES_FOR_EACH_PROCESS = 4
_SKY_NAMES = {
    "H100-80GB": "H100",
    "A100-40GB": "A100",
    "A100-PCIe-80GB": "A100-80GB",
    "A100-PCIe-40GB": "A100",
    "V100-16GB": "V100",
    "V100-PCIe-16GB": "V100",
    "V100-PCIe-32GB": "V100-32GB",
    "RTX 6000 Ada": "RTX6000-Ada",
}


LAUNCHERS = {
    "ssh": ("ssh.sh", ("bash",)),
    "slurm": ("slurm.sh", ("sbatch",)),
    "kubernetes": ("trainjob.yaml", ("kubectl", "apply", "--filename")),
    "skypilot": ("sky.yaml", ("sky", "jobs", "launch", "--yes", "--detach-run")),
}
_GET_THE_FOLDER = ("kubernetes", "skypilot")
"""Launchers whose machines receive only the recipe's folder."""


@dataclass(frozen=True)
class LaunchedJob:
    file: Path
    recipe: Recipe
    overrides: tuple[str, ...]
    hardware: Fleet | None

    @property
    def gpus(self) -> int:
        """GPUs per machine: one per process, or 0 on a CPU."""
        on_cpu = self.recipe.train.device == "cpu" or (self.hardware is not None and self.hardware.gpu_model is None)
        return 0 if on_cpu else self.recipe.train.processes_per_machine

    @property
    def command(self) -> list[str]:
        """The `fulltune` command as words, run in the recipe's folder, without options that differ by machine."""
        verb = "compare" if self.recipe.methods else "run"
        return ["fulltune", verb, f"./{self.file.name}", *(word for one in self.overrides for word in ("--set", one))]

    @property
    def name(self) -> str:
        """Job name in characters that all launchers accept."""
        plain = re.sub(r"[^a-z0-9]+", "-", (self.recipe.name or self.file.stem).lower()).strip("-")[:40].strip("-")
        return plain if plain[:1].isalpha() else f"fulltune-{plain}".strip("-")


def load_job(file: Path, overrides: Sequence[str], hardware: str | None) -> LaunchedJob:
    """Load the recipe and parse `hardware`, the value of `--for`. Raise `RecipeError` with all problems."""
    problems, fleet = list[str](), None
    try:
        fleet = parse_hardware(hardware) if hardware is not None else None
    except RecipeError as error:
        problems += error.problems
    for override in overrides if fleet else ():
        if (name := override.partition("=")[0].strip()) in ("train.num_machines", "train.num_processes"):
            problems.append(f"--for: sets the number of machines and processes; remove --set {name}, or --for")
    if file.is_dir():
        problems.append(f"{file}: is a folder, expected a recipe (YAML)")
    for word in dict.fromkeys((str(file), *overrides)):
        if (shown := word.encode("utf-8", "backslashreplace").decode()) != word:
            problems.append(f"launch: {shown} is not valid UTF-8, which job files need; rename it")
    if problems:
        raise RecipeError(problems)
    sizes = (f"train.num_machines={fleet.num_machines}", f"train.num_processes={fleet.num_devices}") if fleet else ()
    whole = (*overrides, *sizes)
    recipe = load_recipe(file, whole)
    return LaunchedJob(Path(os.path.abspath(file)), recipe, whole, fleet)  # noqa: PTH100  # links stay


def render_job_file(job: LaunchedJob, launcher: str) -> str:
    """Return the content of the job file for a launcher such as "slurm"."""
    jinja = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        undefined=StrictUndefined,
        comment_start_string="{%#",  # `{#` is bash's, of ${#array[@]}
        comment_end_string="#%}",
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    jinja.filters |= {
        "shell": shlex.join,
        "yaml": _yaml_string,
        "yaml_block": _yaml_block_string,
        # $(NAME) would be replaced in a container's arguments.
        "kubernetes": lambda word: re.sub(r"\$(?=[$(])", "$$", word),
    }
    gpu = job.hardware.gpu_model if job.hardware else None
    return jinja.get_template(LAUNCHERS[launcher][0]).render(
        job=job,
        folder=str(job.file.parent),
        train=job.recipe.train,
        port=DEFAULT_PORT,
        programs=str(Path(sys.executable).parent),
        cores=_CORES_FOR_EACH_PROCESS * job.recipe.train.processes_per_machine,
        gpu_resource="amd.com/gpu" if gpu and gpu.name.startswith("MI") else "nvidia.com/gpu",
        accelerators=f"{_SKY_NAMES.get(gpu.name, gpu.name.replace(' ', '')) if gpu else 'EDIT'}:{job.gpus}",
        gives_output=any(one.partition("=")[0].strip() == "output" for one in job.overrides),
    )


def _yaml_string(value: str) -> str:
    return yaml.safe_dump(value, default_style='"', allow_unicode=True, width=sys.maxsize).rstrip("\n")


def _yaml_block_string(value: str) -> str:
    plain = value.replace("\n", "").isprintable()
    return yaml.safe_dump(value, default_style="|", width=sys.maxsize).rstrip("\n") if plain else _yaml_string(value)


def job_file_path(job: LaunchedJob, launcher: str, output: Path | None) -> Path:
    """Return the job file's path: `output`, in the folder `output`, or beside the recipe."""
    if output is not None and output.suffix and not output.is_dir():
        return output
    return (output or job.file.parent) / f"{job.file.stem}.{LAUNCHERS[launcher][0]}"


def write_job_file(job: LaunchedJob, launcher: str, path: Path, force: bool) -> list[str]:
    """Write the job file and return the command that submits it. Raise `SetupError` if the file exists and `force` is
    False, or if the file is one of the job's inputs."""
    if os.path.realpath(path) in {os.path.realpath(one) for one in (str(job.file), *local_paths(job.recipe))}:
        raise SetupError(f"--output: {path} is a file that the job needs; choose another file")
    if path.exists() and not force:
        raise SetupError(f"{path}: already exists; give --force to replace it, or another name with --output")
    text = render_job_file(job, launcher)
    with explain_os_errors(path):
        write_text(path, text)
        if text.startswith("#!"):
            path.chmod(path.stat().st_mode | 0o111)
    return [*LAUNCHERS[launcher][1], str(path) if not str(path).startswith("-") else f"./{path}"]


def missing_input_warnings(job: LaunchedJob, launcher: str) -> Iterator[str]:
    """Yield a warning if the launcher copies only the recipe's folder and inputs are outside it."""
    folder = Path(os.path.realpath(job.file.parent))
    outside = [path for path in local_paths(job.recipe) if not Path(path).is_relative_to(folder)]
    if outside and launcher in _GET_THE_FOLDER:
        yield f"these inputs are outside {folder}; copy them to the machines yourself: {listed(outside)}"
