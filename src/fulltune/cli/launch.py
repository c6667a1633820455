from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from fulltune.cli import options
from fulltune.cli.stages import out
from fulltune.errors import SetupError
from fulltune.text import counted, did_you_mean, listed

For = Annotated[
    str | None,
    typer.Option("--for", help='The machines: "4x 8x A100-80GB". Default: from the recipe.', metavar="MACHINES"),
]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        help="A folder, or a file with an extension. Default: beside the recipe.",
        metavar="FILE|FOLDER",
    ),
]


def launch(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe (YAML).", show_default=False)],
    on: Annotated[
        str, typer.Option("--on", help="ssh, slurm, kubernetes or skypilot.", metavar="LAUNCHER", show_default=False)
    ],
    hardware: For = None,
    set_: options.Overrides = None,
    output: Output = None,
    force: options.Force = False,
) -> None:
    """Write a job file that runs a recipe on one or several machines, to edit and submit."""
    from fulltune import launch

    if on not in launch.LAUNCHERS:
        hint = did_you_mean(on, launch.LAUNCHERS)
        expected = f"--on {on}: expected {listed(list(launch.LAUNCHERS), 'or')}"
        raise SetupError(f"{expected}; {hint}" if hint else expected)
    job = launch.load_job(recipe, set_ or [], hardware)
    path = launch.job_file_path(job, on, output)
    command = launch.write_job_file(job, on, path, force)
    train = job.recipe.train
    each = f", {counted(train.processes_per_machine, 'process', 'processes')} each" if train.num_machines > 1 else ""
    out.print(f"{counted(train.num_machines, 'machine')}{each}", soft_wrap=True)
    submit = escape(shlex.join(command))
    out.print(f"wrote {escape(str(path))}; edit lines marked '# edit:', then submit it: {submit}", soft_wrap=True)
    for note in launch.missing_input_warnings(job, on):
        out.print(escape(note), soft_wrap=True)
