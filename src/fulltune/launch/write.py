"""The file of a job: a launcher's template with the job's values, each quoted as its place needs it."""

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

from fulltune.errors import SetupError
from fulltune.files import write_text
from fulltune.launch.job import LaunchedJob
from fulltune.recipe.fields import named_paths
from fulltune.system.machines import DEFAULT_PORT
from fulltune.system.run_folder import writing
from fulltune.text import listed

_CORES_FOR_EACH_PROCESS = 4
_SKY_NAMES = {
    "H100-80GB": "H100",
    "H100-PCIe": "H100-PCIe",
    "A100-40GB": "A100",
    "A100-PCIe-80GB": "A100-80GB",
    "A100-PCIe-40GB": "A100",
    "V100-16GB": "V100",
    "V100-PCIe-16GB": "V100",
    "V100-PCIe-32GB": "V100-32GB",
    "RTX 6000 Ada": "RTX6000-Ada",
}
"""What SkyPilot calls otherwise; all others without blanks."""


@dataclass(frozen=True)
class Launcher:
    """What starts a job."""

    template: str
    """In `templates/`; the file's name ends with it, after the recipe's."""
    submit: tuple[str, ...]
    """The command that submits the file, without its path."""
    copies_folder: bool = False
    """Its machines have the recipe's folder, and nothing else that is here."""


LAUNCHERS = {
    "ssh": Launcher("ssh.sh", ("bash",)),
    "slurm": Launcher("slurm.sh", ("sbatch",)),
    "kubernetes": Launcher("trainjob.yaml", ("kubectl", "apply", "--filename"), copies_folder=True),
    "skypilot": Launcher("sky.yaml", ("sky", "jobs", "launch", "--yes", "--detach-run"), copies_folder=True),
}


def text_of(job: LaunchedJob, launcher: Launcher) -> str:
    """The launcher's template, filled in."""
    jinja = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        undefined=StrictUndefined,
        comment_start_string="{%#",  # `{#` is bash's, of ${#array[@]}
        comment_end_string="#%}",
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    jinja.filters |= {"shell": _shell, "yaml": _yaml, "yaml_block": _yaml_block, "kubernetes": _kubernetes}
    folder = str(job.file.parent)
    gpu = job.hardware.gpu_model if job.hardware else None
    template = jinja.get_template(launcher.template)
    return template.render(
        job=job,
        folder=folder,
        several=job.num_machines > 1,
        port=DEFAULT_PORT,
        programs=str(Path(sys.executable).parent),
        cores=_CORES_FOR_EACH_PROCESS * job.processes,
        log=f"{_log_folder(folder)}{job.name}-%j.log",
        gpu_resource="amd.com/gpu" if gpu and gpu.name.startswith("MI") else "nvidia.com/gpu",
        accelerators=f"{_SKY_NAMES.get(gpu.name, gpu.name.replace(' ', '')) if gpu else 'EDIT'}:{job.gpus}",
        gives_output=any(one.partition("=")[0].strip() == "output" for one in job.overrides),
    )


def _shell(value: str | Sequence[str]) -> str:
    """A word, or words, as a shell reads them again."""
    return shlex.quote(value) if isinstance(value, str) else shlex.join(value)


def _yaml(value: str) -> str:
    """A text in quotes, in one line."""
    return yaml.safe_dump(value, default_style='"', allow_unicode=True, width=sys.maxsize).rstrip("\n")


def _yaml_block(value: str) -> str:
    """Lines as a block where YAML can have them so, else in quotes."""
    plain = value.replace("\n", "").isprintable()
    return yaml.safe_dump(value, default_style="|", width=sys.maxsize).rstrip("\n") if plain else _yaml(value)


def _kubernetes(word: str) -> str:
    """Kubernetes itself would replace $(NAME) in a container's words; $$ stands for a $."""
    return re.sub(r"\$(?=[$(])", "$$", word)


def _log_folder(folder: str) -> str:
    """That of the recipe, unless a line of sbatch cannot say it: then where the job is submitted."""
    plain = folder.isprintable() and "\\" not in folder
    return f"{folder.rstrip('/').replace('%', '%%')}/" if plain else ""


def path_of(job: LaunchedJob, launcher: Launcher, output: Path | None) -> Path:
    """Where the file goes: beside the recipe, into a folder, or where it is named."""
    if output is not None and output.suffix and not output.is_dir():
        return output
    return (output or job.file.parent) / f"{job.file.stem}.{launcher.template}"


def write(job: LaunchedJob, launcher: Launcher, path: Path, force: bool) -> list[str]:
    """Write the file whole, a script so that it can be run; return the command that submits it.

    Raises:
        SetupError: When a file of the user's is there: it is kept, the recipe and what it names in any case.
    """
    if os.path.realpath(path) in {os.path.realpath(one) for one in (str(job.file), *named_paths(job.recipe))}:
        raise SetupError(f"--output: {path} is a file that the job needs; name another one")
    if path.exists() and not force:
        raise SetupError(f"{path}: exists already; give --force to replace it, or another name with --output")
    text = text_of(job, launcher)
    with writing(path):
        write_text(path, text)
        if text.startswith("#!"):
            path.chmod(path.stat().st_mode | 0o111)
    return [*launcher.submit, str(path) if not str(path).startswith("-") else f"./{path}"]


def absent(job: LaunchedJob, launcher: Launcher) -> Iterator[str]:
    """That machines which get only the recipe's folder lack what the recipe names outside of it."""
    folder = Path(os.path.realpath(job.file.parent))
    outside = [path for path in named_paths(job.recipe) if not Path(path).is_relative_to(folder)]
    if outside and launcher.copies_folder:
        yield f"not in {folder}, so see that the machines have it, too: {listed(outside)}"
