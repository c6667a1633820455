"""A task for SkyPilot: its machines, what they share, and the command with their numbers."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fulltune.errors import SetupError
from fulltune.launch.job import LaunchedJob, Manifest, notes_of
from fulltune.launch.settings import SkySettings
from fulltune.launch.yaml_text import as_yaml
from fulltune.system.machines import DEFAULT_PORT

_NAMES = {
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


def manifest(job: LaunchedJob, settings: SkySettings) -> Manifest:
    """The task.

    Raises:
        SetupError: With all that is missing for machines that begin empty.
    """
    workdir = os.path.abspath(Path(settings.workdir).expanduser() if settings.workdir else job.file.parent)  # noqa: PTH100  # links stay
    problems = list(_problems(job, settings, workdir))
    if problems:
        raise SetupError(problems)
    shared = settings.bucket or settings.volume
    more = [f"output={settings.mount}/{job.name(settings)}"] if shared and not _given_output(job) else []
    recipe = os.path.relpath(job.file, workdir)
    words = [*job.words(recipe if not recipe.startswith("-") else f"./{recipe}", more), *job.waits(settings)]
    several = job.num_machines > 1
    rank = ' --machine-rank "$SKYPILOT_NODE_RANK" --rendezvous "$rendezvous"' if several else ""
    # The first address is that of machine 0.
    rendezvous = f'rendezvous="$(head -n 1 <<<"$SKYPILOT_NODE_IPS"):{DEFAULT_PORT}"\n' if several else ""
    task: dict[str, Any] = {
        "name": job.name(settings),
        "num_nodes": job.num_machines,
        "resources": _resources(job, settings),
        "workdir": workdir,
        "setup": settings.setup,
        "run": f"{rendezvous}exec {shlex.join(words)}{rank}\n",
    }
    if settings.bucket:
        task["file_mounts"] = {settings.mount: {"source": settings.bucket, "mode": settings.bucket_mode}}
    if settings.volume:
        task["volumes"] = {settings.mount: settings.volume}
    text = as_yaml({name: value for name, value in task.items() if value is not None})
    submit = ("sky", "jobs", "launch", "--yes", "--detach-run")
    return Manifest("sky.yaml", f"# {job.comment}\n{text}", submit, notes_of(job, Path(workdir)))


def _given_output(job: LaunchedJob) -> bool:
    return any(one.partition("=")[0].strip() == "output" for one in job.overrides)


def _problems(job: LaunchedJob, settings: SkySettings, workdir: str) -> Iterator[str]:
    if not (settings.setup or settings.image_id):
        yield (
            "--sky: machines begin empty; say how they get fulltune: --with setup='pip install fulltune', or --with "
            "image_id=docker:IMAGE"
        )
    if settings.bucket and settings.volume:
        yield "--with bucket and --with volume are both given; keep one"
    if not (settings.bucket or settings.volume or (_given_output(job) and Path(job.recipe.output).is_absolute())):
        yield (
            "--sky: runs would go with the machines; give what they share and what stays: --with bucket=s3://NAME, "
            "--with volume=NAME, or --set output=/A/FOLDER that all machines see"
        )
    if not job.file.is_relative_to(workdir):
        yield f"--with workdir={settings.workdir}: {job.file} does not lie in it; name a folder that has the recipe"
    if not (settings.accelerators or settings.instance_type or job.hardware) and job.gpus:
        yield (
            '--sky: which GPUs? Give --for "8x A100-80GB", --with accelerators=A100-80GB:8, or, for none, --set '
            "train.device=cpu"
        )


def _resources(job: LaunchedJob, settings: SkySettings) -> dict[str, Any]:
    accelerators = settings.accelerators
    if accelerators is None and job.hardware is not None and job.hardware.gpu is not None:
        name = job.hardware.gpu.name
        accelerators = f"{_NAMES.get(name, name.replace(' ', ''))}:{job.hardware.num_devices}"
    # 75: interrupted and saved; a machine that was taken away is no exit code, and is recovered from anyway.
    recovery = {"max_restarts_on_errors": settings.max_restarts_on_errors, "recover_on_exit_codes": [75]}
    named = {
        name: getattr(settings, name) for name in ("infra", "instance_type", "cpus", "memory", "image_id", "disk_size")
    }
    found = {**named, "accelerators": accelerators, "use_spot": settings.use_spot, "job_recovery": recovery}
    return {name: value for name, value in found.items() if value is not None}
