"""The file of a job written, and submitted."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from fulltune.errors import FulltuneError, SetupError
from fulltune.files import write_text
from fulltune.launch.job import LaunchedJob, Manifest
from fulltune.recipe.paths import named_paths
from fulltune.system.run_folder import writing


def place(job: LaunchedJob, ending: str, output: Path | None) -> Path:
    """Where the file goes: beside the recipe, into a folder, or where it is named."""
    if output is not None and output.suffix and not output.is_dir():
        return output
    return (output or job.file.parent) / f"{job.file.stem}.{ending}"


def refuse_existing(path: Path, force: bool, job: LaunchedJob) -> None:
    """A file of the user's is kept, the recipe and what it names in any case.

    Raises:
        SetupError: Naming it.
    """
    if os.path.realpath(path) in {os.path.realpath(one) for one in (str(job.file), *named_paths(job.recipe))}:
        raise SetupError(f"--output: {path} is a file that the job needs; name another one")
    if path.exists() and not force:
        raise SetupError(f"{path}: exists already; give --force to replace it, or another name with --output")


def write(manifest: Manifest, path: Path) -> list[str]:
    """Write it whole, a script so that it can be run; the command that submits it."""
    with writing(path):
        write_text(path, manifest.text)
        if manifest.text.startswith("#!"):
            path.chmod(path.stat().st_mode | 0o111)
    return [*manifest.submit, str(path) if not str(path).startswith("-") else f"./{path}"]


def submit(command: list[str], say: Callable[[str], None]) -> None:
    """Run the command that submits it; for ssh that is the job itself, which takes this process's place.

    Args:
        command: The program, and what it is told; the file last.
        say: Takes each line that the launcher writes.

    Raises:
        SetupError: When the launcher is not installed.
        FulltuneError: When it refuses.
    """
    by_hand, path = shlex.join(command), command[-1]
    program = shutil.which(command[0])
    if program is None:
        raise SetupError(
            f"--submit: there is no '{command[0]}' here; {path} is written, submit it where there is one: {by_hand}"
        )
    if command[0] == "bash":
        if shutil.which("ssh") is None:
            raise SetupError(f"--submit: there is no 'ssh' here; install it, then: {by_hand}")
        sys.stdout.flush()
        os.execv(program, command)
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
    )
    assert child.stdout is not None
    with child:
        for line in child.stdout:
            say(line.rstrip("\n"))
    if child.returncode:
        raise FulltuneError(
            f"--submit: '{by_hand}' was refused (exit code {child.returncode}; its words are above); "
            f"{path} is written: repair what they name, then give that command again"
        )
