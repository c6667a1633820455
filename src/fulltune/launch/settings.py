"""Settings of clusters, as given by `--with NAME=VALUE`: one frozen block for each launcher."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, field_validator

from fulltune.errors import SetupError
from fulltune.recipe.block import Block
from fulltune.recipe.training import Duration
from fulltune.text import did_you_mean


def _pairs(given: Any) -> Any:
    """`gpu=a100,zone=b` as a mapping."""
    if not isinstance(given, str):
        return given
    pairs = [one.partition("=") for one in given.split(",")]
    if not all(name.strip() and equals for name, equals, _ in pairs):
        raise ValueError(f"expected NAME=VALUE,NAME=VALUE, found '{given}'")
    return {name.strip(): value.strip() for name, _, value in pairs}


def _names(given: Any) -> Any:
    """`a,b` as a list."""
    return tuple(one.strip() for one in given.split(",") if one.strip()) if isinstance(given, str) else given


def _slurm_time(given: str) -> str:
    if not re.fullmatch(r"(\d+-)?\d+(:\d{1,2}){0,2}", given):
        raise ValueError(
            f"expected a time as Slurm writes it, such as 90 (minutes), 12:00:00 or 2-00:00:00, found '{given}'"
        )
    return given


def _sbatch_options(given: str) -> str:
    try:
        words = shlex.split(given)
    except ValueError:  # a quote that does not end
        words = [""]
    if not all(re.fullmatch(r"--[a-z][a-z-]*(=.*)?", word) for word in words):
        raise ValueError(f"expected options such as --mail-type=END, each with its value behind '=', found '{given}'")
    return given


def _absolute(given: str) -> str:
    if not given.startswith("/"):
        raise ValueError(f"expected a whole path, such as /shared/project, found '{given}'")
    return given


def _home_or_absolute(given: str) -> str:
    return given if given.startswith("~/") else _absolute(given)


SlurmTime = Annotated[str, AfterValidator(_slurm_time)]
SbatchOptions = Annotated[str, AfterValidator(_sbatch_options)]
Absolute = Annotated[str, AfterValidator(_absolute)]
HomeOrAbsolute = Annotated[str, AfterValidator(_home_or_absolute)]
Pairs = Annotated[dict[str, str], BeforeValidator(_pairs)]
Names = Annotated[tuple[str, ...], BeforeValidator(_names)]


class LauncherSettings(Block):
    """What all launchers have in common."""

    name: str | None = None
    """What the job is called. Left out: the recipe's name, else its file's."""
    setup: str | None = None
    """Lines of shell before the start, on each machine: `module load cuda`, `source /venv/bin/activate`."""
    wait_for_machines: Duration | None = None
    """How long machines wait for each other, such as `30m`, where a cluster does not start all of them at once."""

    @field_validator("*")
    @classmethod
    def _one_line(cls, given: Any, info: Any) -> Any:
        """A manifest gives each of them a line; only shell may have several."""
        texts = given.values() if isinstance(given, dict) else given if isinstance(given, tuple) else (given,)
        for text in texts:
            if isinstance(text, str) and info.field_name != "setup" and not text.isprintable():
                raise ValueError(f"expected one line of printable characters, found {text!r}")
            if text == "":
                raise ValueError("is empty; leave it out, or give a value")
        return given


class SshSettings(LauncherSettings):
    """Machines that one can log in to."""

    user: str | None = None
    """Whom to log in as, where a line of the hosts file does not say it."""
    port: int | None = Field(default=None, ge=1, le=65535)
    """Port of sshd, where a line of the hosts file does not say it."""
    identity: str | None = None
    """A file with a private key."""
    folder: HomeOrAbsolute | None = None
    """The recipe's folder as the machines see it, `~/...` in each one's home. Left out: the same path as here."""
    rendezvous: str | None = None
    """How the other machines reach the first one, such as `10.0.0.1` or `10.0.0.1:29500`, where that is not its name in
    the hosts file."""
    connect_timeout: int = Field(default=10, ge=1)
    """Seconds until a host counts as one that does not answer."""


class SlurmSettings(LauncherSettings):
    """A Slurm cluster, by the names of sbatch's options."""

    partition: str | None = None
    """Queue, or several: `a100,h100`."""
    account: str | None = None
    """Who pays."""
    qos: str | None = None
    """Quality of service."""
    time: SlurmTime | None = None
    """Time limit, such as `12:00:00`. A run that needs longer saves before, and is queued again."""
    constraint: str | None = None
    """Features that the nodes must have."""
    nodelist: str | None = None
    """Nodes to take."""
    exclude: str | None = None
    """Nodes to leave out."""
    reservation: str | None = None
    """A reservation's name."""
    mem: str | None = None
    """Memory of each node, such as `200G`; `0` is all of it."""
    cpus_per_task: int | None = Field(default=None, ge=1)
    """Cores for each machine. Left out: 4 for each training process; with `exclusive` all."""
    exclusive: bool = False
    """Take whole nodes."""
    gpus_per_node: int | None = Field(default=None, ge=0)
    """GPUs of each node. Left out: one for each training process, none where `train.device` is cpu."""
    gres: str | None = None
    """Generic resources in the cluster's own words, such as `gpu:a100:8`, instead of `gpus_per_node`."""
    comment: str | None = None
    """Any text."""
    options: SbatchOptions | None = None
    """Further options of sbatch as they are: `--mail-type=END --licenses=x:1`."""
    notice: Duration = "2m"
    """How long before the time limit the run is told to save."""
    max_requeues: int = Field(default=100, ge=0)
    """How often an interrupted run is queued again."""
    folder: Absolute | None = None
    """The recipe's folder as the nodes see it. Left out: the same path as here."""


class KubernetesSettings(LauncherSettings):
    """A Kubernetes cluster with Kubeflow Trainer 2."""

    image: str
    """Container image that has fulltune (docs/container.md)."""
    claim: str
    """PersistentVolumeClaim that all pods can write to (access mode ReadWriteMany)."""
    mount: Absolute = "/shared"
    """Where the claim stands in the pods."""
    folder: Absolute | None = None
    """The recipe's folder as the pods see it. Left out: `mount`."""
    namespace: str | None = None
    """Left out: kubectl's own."""
    gpus_per_node: int | None = Field(default=None, ge=0)
    """GPUs of each pod. Left out: one for each training process, none where `train.device` is cpu."""
    gpu_resource: str | None = None
    """What the cluster calls a GPU. Left out: `nvidia.com/gpu`, or `amd.com/gpu` where `--for` names one of AMD's."""
    cpu: str | None = None
    """Cores that each pod asks for, such as `32`."""
    memory: str | None = None
    """Memory that each pod asks for, such as `200Gi`."""
    shm: str = "16Gi"
    """Size of `/dev/shm`, through which processes of a pod talk; it counts as memory of the pod."""
    node_selector: Pairs = Field(default_factory=dict)
    """Labels that nodes must have: `gpu=a100,zone=b`."""
    tolerations: Names = ()
    """Taints that the pods bear, by their keys: `nvidia.com/gpu,spot`."""
    service_account: str | None = None
    """Service account of the pods."""
    pull_secret: str | None = None
    """Secret with which the image is pulled."""
    queue: str | None = None
    """Kueue's local queue; the job then begins suspended, and Kueue admits it."""
    notice: Duration = "10m"
    """How long a pod that is told to stop may take to save (terminationGracePeriodSeconds)."""
    runtime: str = "torch-distributed"
    """The training runtime, whose pods have a container `node`."""
    runtime_kind: Literal["ClusterTrainingRuntime", "TrainingRuntime"] = "ClusterTrainingRuntime"
    """The cluster's, or one of the namespace."""
    own_runtime: bool = False
    """Write a runtime of its own into the file, whose pods do not start again after a refusal."""
    backoff_limit: int = Field(default=100, ge=0)
    """Restarts until the job has failed, with `own_runtime`; another runtime says so itself."""


class SkySettings(LauncherSettings):
    """SkyPilot, which rents machines of clouds or takes those of a cluster."""

    infra: str | None = None
    """Where: `aws`, `gcp/us-central1`, `k8s`. Left out: the cheapest that there is."""
    accelerators: str | None = None
    """GPUs of each machine by SkyPilot's names, such as `A100-80GB:8`. Left out: those of `--for`."""
    instance_type: str | None = None
    """A cloud's name for a kind of machine."""
    cpus: str | None = None
    """Cores of each machine, such as `32+`."""
    memory: str | None = None
    """GB of each machine, such as `256+`."""
    image_id: str | None = None
    """A machine image, or `docker:IMAGE`."""
    disk_size: int | None = Field(default=None, ge=1)
    """GB of each machine's own disk."""
    use_spot: bool = False
    """Take machines that may be taken away; the job then goes on with others."""
    workdir: str | None = None
    """The folder here that is copied to the machines. Left out: the recipe's folder."""
    bucket: str | None = None
    """A bucket that all machines mount, such as `s3://my-runs`; runs are written into it."""
    bucket_mode: Literal["MOUNT", "MOUNT_CACHED"] = "MOUNT"
    """How. MOUNT writes through, so that all machines see it."""
    volume: str | None = None
    """A SkyPilot volume that several machines can write to, instead of a bucket."""
    mount: Absolute = "/mnt/fulltune"
    """Where bucket or volume stands on the machines."""
    max_restarts_on_errors: int = Field(default=0, ge=0)
    """How often a run that failed for another reason than an interruption is tried again."""


KINDS: dict[str, type[LauncherSettings]] = {
    "ssh": SshSettings,
    "slurm": SlurmSettings,
    "k8s": KubernetesSettings,
    "sky": SkySettings,
}
"""By the option that names the launcher."""

Settings = TypeVar("Settings", bound=LauncherSettings)


def read_settings(kind: type[Settings], given: Sequence[str]) -> Settings:
    """The settings of a launcher, from `NAME=VALUE`.

    Raises:
        SetupError: With all problems at once: unknown names with near ones, values that do not fit, what is missing.
    """
    values: dict[str, str] = {}
    problems: list[str] = []
    for one in given:
        name, equals, value = one.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name:
            problems.append(f"--with {one}: expected NAME=VALUE, such as --with name=my-run")
        elif name not in kind.model_fields:
            problems.append(f"--with {one}: {_option(kind)} has no setting '{name}'; {_instead(kind, name)}")
        elif name in values:
            problems.append(f"--with {one}: given twice; keep one")
        else:
            values[name] = value
    try:
        settings = kind.model_validate(values)
    except ValidationError as error:
        raise SetupError([*problems, *(_in_words(kind, item) for item in error.errors())]) from None
    if problems:
        raise SetupError(problems)
    return settings


def _option(kind: type[LauncherSettings]) -> str:
    return next(f"--{name}" for name, known in KINDS.items() if known is kind)


def _instead(kind: type[LauncherSettings], name: str) -> str:
    if hint := did_you_mean(name, kind.model_fields):
        return hint
    others = [f"--{option}" for option, other in KINDS.items() if name in other.model_fields]
    belongs = f"it belongs to {' and '.join(others)}; " if others else ""
    return f"{belongs}known here: {', '.join(kind.model_fields)}"


def _in_words(kind: type[LauncherSettings], item: Any) -> str:
    name = str(item["loc"][0])
    if item["type"] == "missing":
        meaning = " ".join((kind.model_fields[name].description or "").split()).rstrip(".")
        return f"{_option(kind)}: --with {name}=VALUE is missing; expected: {meaning}"
    said = item["msg"].removeprefix("Value error, ").replace("Input should be", "expected").split(", unable")[0]
    found = "" if "found" in said or not item["input"] else f", found '{item['input']}'"
    return f"--with {name}: {said}{found}"
