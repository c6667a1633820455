"""The files of a job written, and one of them submitted."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fulltune.errors import FulltuneError, SetupError
from fulltune.files import write_text
from fulltune.launch.job import LaunchedJob, Manifest
from fulltune.recipe.paths import named_paths
from fulltune.system.run_folder import writing


@dataclass(frozen=True)
class Written:
    """A manifest on disk."""

    path: Path
    command: tuple[str, ...]
    """What submits it."""

    @property
    def by_hand(self) -> str:
        """The same, to be typed."""
        return shlex.join(self.command)


def places(job: LaunchedJob, endings: Sequence[str], output: Path | None) -> list[Path]:
    """Where the files go: beside the recipe, into a folder, or, one file, where it is named.

    Raises:
        SetupError: When several files are to be written and one is named.
    """
    stem = job.file.stem
    if output is None or output.is_dir() or not output.suffix:
        folder = job.file.parent if output is None else output
        return [folder / f"{stem}.{ending}" for ending in endings]
    if len(endings) > 1:
        raise SetupError(
            f"--output: {output} is one file, but two are written (a PyTorchJob and a TrainJob, which would both run); "
            "name a folder, or one of them: --with job=pytorchjob or --with job=trainjob"
        )
    return [output]


def refuse_existing(paths: Sequence[Path], force: bool, job: LaunchedJob) -> None:
    """Files of the user's are kept, the recipe and what it names in any case.

    Raises:
        SetupError: Naming each that is there.
    """
    needed = {os.path.realpath(one) for one in (str(job.file), *named_paths(job.recipe))}
    if kept := [path for path in paths if os.path.realpath(path) in needed]:
        raise SetupError([f"--output: {path} is a file that the job needs; name another one" for path in kept])
    found = [path for path in paths if path.exists() and not force]
    if found:
        raise SetupError(
            [f"{path}: exists already; give --force to replace it, or another name with --output" for path in found]
        )


def write(manifests: Sequence[Manifest], paths: Sequence[Path]) -> list[Written]:
    """Write each whole; scripts can be run."""
    written = []
    for manifest, path in zip(manifests, paths, strict=True):
        with writing(path):
            write_text(path, manifest.text)
            if manifest.text.startswith("#!"):
                path.chmod(path.stat().st_mode | 0o111)
        shown = str(path) if not str(path).startswith("-") else f"./{path}"
        written.append(Written(path, (*manifest.submit, shown)))
    return written


def submit(written: Written, say: Callable[[str], None]) -> None:
    """Run the command that submits it; for ssh that is the job itself, which takes this process's place.

    Args:
        written: What to submit.
        say: Takes each line that the launcher writes.

    Raises:
        SetupError: When the launcher is not installed.
        FulltuneError: When it refuses.
    """
    program = shutil.which(written.command[0])
    if program is None:
        raise SetupError(
            f"--submit: there is no '{written.command[0]}' here; {written.path} is written, submit it where there is "
            f"one: {written.by_hand}"
        )
    if written.command[0] == "bash":
        if shutil.which("ssh") is None:
            raise SetupError(f"--submit: there is no 'ssh' here; install it, then: {written.by_hand}")
        sys.stdout.flush()
        os.execv(program, written.command)
    child = subprocess.Popen(
        written.command,
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
            f"--submit: '{written.by_hand}' was refused (exit code {child.returncode}; its words are above); "
            f"{written.path} is written: repair what they name, then give that command again"
        )
