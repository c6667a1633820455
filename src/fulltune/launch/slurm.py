"""A batch script for Slurm: one task a node, told to save before its time is over, queued again when interrupted."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from fulltune.errors import SetupError
from fulltune.launch.job import LaunchedJob, Manifest
from fulltune.launch.settings import SlurmSettings
from fulltune.text import parse_seconds

CORES_FOR_EACH_PROCESS = 4

_SCRIPT = r"""# Names are quoted so that nothing in them is expanded:
# shellcheck disable=SC2016

# Slurm tells this shell, too, that the end is near; it stays, to see how the tasks end.
trap ':' TERM
cd {folder} || exit 2
{setup}
{rendezvous}# A machine that was interrupted has saved: no failure, for which srun would end others that still save.
interrupted="fulltune-$SLURM_JOB_ID.interrupted"
export interrupted
rm -f "$interrupted"
# Without --mpi=none libraries would take the variables of Slurm's MPI for those of a launcher of their own.
srun --mpi=none --kill-on-bad-exit=1 {srun} \
    bash -c {task} fulltune-machine \
    {command}
code=$?
if ((code == 0)) && [[ -e "$interrupted" ]]; then
    code=75
fi
rm -f "$interrupted"
# Not after scancel, and not where Slurm itself queues the job again: then it is no longer running.
if ((code == 75)) && [[ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)" == RUNNING ]]; then
    if ((${{SLURM_RESTART_COUNT:-0}} < {max_requeues})); then
        echo "interrupted and saved; queued again"
        scontrol requeue "$SLURM_JOB_ID"
    else
        echo "interrupted and saved, for the {max_requeues}th time; not queued again" >&2
    fi
fi
exit "$code"
"""

_RENDEZVOUS = r"""first="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
rendezvous="$first:$((10000 + SLURM_JOB_ID % 20000))"
export rendezvous
"""

_NOT_ON_PATH = (
    "fulltune is not on the PATH here, which sbatch hands on to the job: --with setup='export PATH={}:$PATH' (or the "
    "line that loads its environment), unless the nodes have it"
)

_TASK = r"""
trap : TERM
"$@"{rank}
code=$?
if ((code == 75)); then : > "$interrupted"; exit 0; fi
exit "$code"
"""


def manifest(job: LaunchedJob, settings: SlurmSettings) -> Manifest:
    """The script, with its settings as lines that sbatch reads.

    Raises:
        SetupError: When GPUs are asked for twice, or the time is too short to save in.
    """
    if settings.gres is not None and settings.gpus_per_node is not None:
        raise SetupError("--with gres and --with gpus_per_node are both given; keep one")
    if (limit := _seconds_of(settings.time)) is not None and limit <= parse_seconds(settings.notice):
        raise SetupError(
            f"--with time={settings.time}: is over before notice ({settings.notice}) has passed, so the run would be "
            "told to save when it starts; give more time, or a shorter --with notice"
        )
    folder = settings.folder or str(job.file.parent)
    several = job.num_machines > 1
    cores = _cores(job, settings)
    # Since Slurm 22.05 a step does not inherit the cores of its job's tasks.
    srun = [*(["--label"] if several else []), *([f"--cpus-per-task={cores}"] if cores else [])]
    command = [*job.words(f"{folder.rstrip('/')}/{job.file.name}"), *job.waits(settings)]
    rank = ' --machine-rank "$SLURM_NODEID" --rendezvous "$rendezvous"' if several else ""
    body = _SCRIPT.format(
        folder=shlex.quote(folder),
        setup=f"\n{settings.setup}\n" if settings.setup else "",
        rendezvous=_RENDEZVOUS if several else "",
        srun=" ".join(srun),
        task=shlex.quote(_TASK.format(rank=rank)),
        command=shlex.join(command),
        max_requeues=settings.max_requeues,
    )
    options = "".join(
        f"#SBATCH {name}{'=' * bool(value)}{shlex.quote(value) if value else ''}\n"
        for name, value in _options(job, settings, folder, cores)
    )
    notes = () if settings.setup or shutil.which("fulltune") else (_NOT_ON_PATH.format(Path(sys.executable).parent),)
    return Manifest("slurm.sh", f"#!/bin/bash\n# {job.comment}\n{options}{body}", ("sbatch",), notes)


def _seconds_of(time: str | None) -> int | None:
    """A time limit as sbatch reads it: minutes, minutes:seconds, hours:minutes:seconds, or with days in front."""
    if time is None:
        return None
    days, has_days, rest = time.rpartition("-")
    numbers = [int(one) for one in rest.split(":")]
    units = {1: (60,), 2: (60, 1), 3: (3600, 60, 1)}[len(numbers)] if not has_days else (3600, 60, 1)
    return 86400 * int(days or 0) + sum(number * unit for number, unit in zip(numbers, units, strict=False))


def _cores(job: LaunchedJob, settings: SlurmSettings) -> int | None:
    if settings.cpus_per_task is not None or settings.exclusive:
        return settings.cpus_per_task
    return CORES_FOR_EACH_PROCESS * job.processes


def _log(folder: str, name: str) -> str:
    """Beside the recipe, unless a line of sbatch cannot say that: then where it is submitted."""
    plain = folder.isprintable() and "\\" not in folder
    return f"{folder.rstrip('/').replace('%', '%%')}/{name}-%j.log" if plain else f"{name}-%j.log"


def _options(job: LaunchedJob, settings: SlurmSettings, folder: str, cores: int | None) -> Iterator[tuple[str, str]]:
    """Names and values of sbatch's options."""
    name = job.name(settings)
    yield "--job-name", name
    yield "--nodes", str(job.num_machines)
    yield "--ntasks-per-node", "1"
    yield "--output", _log(folder, name)
    yield "--open-mode", "append"
    yield "--requeue", ""
    yield "--signal", f"TERM@{round(parse_seconds(settings.notice))}"
    gpus = job.gpus if settings.gpus_per_node is None else settings.gpus_per_node
    if gpus and settings.gres is None:
        yield "--gpus-per-node", str(gpus)
    if cores:
        yield "--cpus-per-task", str(cores)
    if settings.exclusive:
        yield "--exclusive", ""
    given = ("partition", "account", "qos", "time", "constraint", "nodelist", "exclude", "reservation", "mem", "gres")
    for field in (*given, "comment"):
        if (value := getattr(settings, field)) is not None:
            yield f"--{field}", value
    for word in shlex.split(settings.options or ""):
        option, _, value = word.partition("=")
        yield option, value
