"""The command `fulltune launch`: a recipe as a job for a launcher."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from fulltune.cli import options
from fulltune.cli.stages import err, out
from fulltune.errors import SetupError
from fulltune.text import counted, listed

if TYPE_CHECKING:
    from fulltune.launch.job import LaunchedJob, Manifest

Hosts = Annotated[
    Path | None,
    typer.Option(
        "--ssh", help="A script that starts all over ssh; a file with user@host:port, one a line.", metavar="HOSTS"
    ),
]
Submit = Annotated[bool, typer.Option("--submit", help="Submit it, too: sbatch, kubectl, sky; ssh: run it.")]
For = Annotated[
    str | None,
    typer.Option("--for", help='The machines: "4x 8x A100-80GB". Left out: what the recipe says.', metavar="MACHINES"),
]
With = Annotated[
    list[str] | None,
    typer.Option("--with", help="A setting of the cluster, such as partition=gpu. Repeatable.", metavar="NAME=VALUE"),
]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output", "-o", help="Folder, or file with an ending. Default: beside the recipe.", metavar="FILE|FOLDER"
    ),
]


def launch(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe (YAML).", show_default=False)],
    ssh: Hosts = None,
    slurm: Annotated[bool, typer.Option("--slurm", help="A batch script for Slurm.")] = False,
    k8s: Annotated[bool, typer.Option("--k8s", help="A TrainJob for Kubernetes.")] = False,
    sky: Annotated[bool, typer.Option("--sky", help="A task for SkyPilot.")] = False,
    submit: Submit = False,
    hardware: For = None,
    with_: With = None,
    set_: options.Overrides = None,
    output: Output = None,
    force: options.Force = False,
) -> None:
    """Write the job that runs a recipe on one or several machines: for ssh, Slurm, Kubernetes or SkyPilot."""
    from fulltune.launch import write as writing
    from fulltune.launch.job import job_of

    chosen = [name for name, is_given in (("ssh", ssh), ("slurm", slurm), ("k8s", k8s), ("sky", sky)) if is_given]
    if len(chosen) != 1:
        found = listed([f"--{name}" for name in chosen]) or "none"
        raise SetupError(f"launch: expected one of --ssh HOSTS, --slurm, --k8s and --sky, found {found}")
    job = job_of(recipe, set_ or [], hardware, ["fulltune", *sys.argv[1:]])
    manifest, path = _manifest(job, chosen[0], ssh, with_ or [], output)
    writing.refuse_existing(path, force, job)
    command = writing.write(manifest, path)
    each = f", {counted(job.processes, 'process', 'processes')} each" if job.num_machines > 1 else ""
    out.print(f"{counted(job.num_machines, 'machine')}{each}", soft_wrap=True)
    out.print(f"wrote {escape(str(path))}; submit it: {escape(shlex.join(command))}", soft_wrap=True)
    for note in manifest.notes:
        out.print(escape(note), soft_wrap=True)
    if submit:
        writing.submit(command, lambda line: err.print(escape(line), soft_wrap=True))


def _manifest(
    job: LaunchedJob, launcher: str, hosts: Path | None, given: list[str], output: Path | None
) -> tuple[Manifest, Path]:
    """What to write, and where."""
    from fulltune.launch import kubernetes, settings, sky, slurm, ssh
    from fulltune.launch.hosts import read_hosts
    from fulltune.launch.write import place

    match launcher:
        case "ssh":
            assert hosts is not None
            how = settings.read_settings(settings.SshSettings, given)
            logs = str(place(job, "ssh.sh", output).absolute().with_suffix(".logs"))
            found = ssh.manifest(job, how, read_hosts(hosts, job.num_machines), logs)
        case "slurm":
            found = slurm.manifest(job, settings.read_settings(settings.SlurmSettings, given))
        case "k8s":
            found = kubernetes.manifest(job, settings.read_settings(settings.KubernetesSettings, given))
        case _:
            found = sky.manifest(job, settings.read_settings(settings.SkySettings, given))
    return found, place(job, found.ending, output)
