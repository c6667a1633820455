"""A TrainJob (Kubeflow Trainer 2) whose pods share a claim."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from typing import Any

from fulltune.errors import SetupError
from fulltune.launch.job import LaunchedJob, Manifest, notes_of
from fulltune.launch.settings import KubernetesSettings
from fulltune.launch.yaml_text import as_yaml
from fulltune.text import parse_seconds

_TRAINER = "trainer.kubeflow.org/v1alpha1"
_POD = r"""cd {folder} || exit 2
{setup}child='' told=''
trap 'told=1; kill -s TERM "$child" 2>/dev/null' TERM INT
{command} &
child=$!
if [ -n "$told" ]; then kill -s TERM "$child"; fi # before its number was known
wait "$child"
code=$?
# A signal ends the wait, not the run.
while kill -0 "$child" 2>/dev/null; do wait "$child"; code=$?; done
exit "$code"
"""
_RANK = ' --machine-rank "$PET_NODE_RANK" --rendezvous "$PET_MASTER_ADDR:$PET_MASTER_PORT"'
"""By what Trainer tells torchrun."""


def manifest(job: LaunchedJob, settings: KubernetesSettings) -> Manifest:
    """The TrainJob, behind a runtime of its own if one is wanted.

    Raises:
        SetupError: When a setting is given that would change nothing.
    """
    own = settings.own_runtime
    if unread := settings.model_fields_set & ({"runtime", "runtime_kind"} if own else {"backoff_limit"}):
        other = f"own_runtime={str(not own).lower()}"
        raise SetupError(
            [f"--with {name}: counts only with {other}; remove it, or give that" for name in sorted(unread)]
        )
    name = job.name(settings)
    named = _given({"name": name, "namespace": settings.namespace})
    labels = {"kueue.x-k8s.io/queue-name": settings.queue} if settings.queue else None
    trainer = {
        "image": settings.image,
        "command": ["/bin/bash", "-c", _script(job, settings)],
        "numNodes": job.num_machines,
        "numProcPerNode": job.processes,
        "resourcesPerNode": _resources(job, settings),
    }
    reference = {"name": settings.runtime, "kind": settings.runtime_kind}
    spec = {
        "runtimeRef": {"name": name, "kind": "TrainingRuntime"} if own else reference,
        "suspend": True if settings.queue else None,
        "trainer": _given(trainer),
        "runtimePatches": [] if own else [_runtime_patch(settings)],
    }
    metadata = _given({**named, "labels": labels})
    train_job = {"apiVersion": _TRAINER, "kind": "TrainJob", "metadata": metadata, "spec": _given(spec)}
    text = as_yaml(*([_runtime(job, settings, named)] if own else []), train_job)
    submit = ("kubectl", "apply", *(("--namespace", settings.namespace) if settings.namespace else ()), "--filename")
    return Manifest("trainjob.yaml", f"# {job.comment}\n{text}", submit, notes_of(job, job.file.parent))


def _script(job: LaunchedJob, settings: KubernetesSettings) -> str:
    """What a pod runs."""
    folder = settings.folder or settings.mount
    command = shlex.join([*job.words(f"{folder.rstrip('/')}/{job.file.name}"), *job.waits(settings)])
    text = _POD.format(
        folder=shlex.quote(folder),
        setup=f"{settings.setup}\n" if settings.setup else "",
        command=command + (_RANK if job.num_machines > 1 else ""),
    )
    # Kubernetes itself would replace $(NAME); $$ stands for a $.
    return re.sub(r"\$(?=[$(])", "$$", text)


def _resources(job: LaunchedJob, settings: KubernetesSettings) -> dict[str, Any]:
    asked = {name: value for name, value in (("cpu", settings.cpu), ("memory", settings.memory)) if value}
    gpus = job.gpus if settings.gpus_per_node is None else settings.gpus_per_node
    amds = job.hardware is not None and job.hardware.gpu is not None and job.hardware.gpu.name.startswith("MI")
    resource = settings.gpu_resource or ("amd.com/gpu" if amds else "nvidia.com/gpu")
    limits = {resource: str(gpus)} if gpus else {}
    found = {"requests": {**asked, **limits}, "limits": limits}
    return {name: values for name, values in found.items() if values}


def _pod(settings: KubernetesSettings, **node: Any) -> dict[str, Any]:
    """A pod's spec, with what is said of its container beside where the volumes stand."""
    mounts = [{"name": "shared", "mountPath": settings.mount}, {"name": "shm", "mountPath": "/dev/shm"}]
    found: dict[str, Any] = {
        "containers": [{"name": "node", "volumeMounts": mounts, **node}],
        "serviceAccountName": settings.service_account,
        "imagePullSecrets": [{"name": settings.pull_secret}] if settings.pull_secret else None,
        "nodeSelector": settings.node_selector,
        "tolerations": [{"key": key, "operator": "Exists"} for key in settings.tolerations],
        "volumes": [
            {"name": "shared", "persistentVolumeClaim": {"claimName": settings.claim}},
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": settings.shm}},
        ],
        "terminationGracePeriodSeconds": round(parse_seconds(settings.notice)),
    }
    return _given(found)


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value not in (None, {}, [])}


def _runtime_patch(settings: KubernetesSettings) -> dict[str, Any]:
    """What a TrainJob may change of a runtime that is there."""
    replicated = {"name": "node", "template": {"spec": {"template": {"spec": _pod(settings)}}}}
    spec = {"template": {"spec": {"replicatedJobs": [replicated]}}}
    return {"manager": "fulltune/launch", "trainingRuntimeSpec": spec}


def _runtime(job: LaunchedJob, settings: KubernetesSettings, named: Mapping[str, Any]) -> dict[str, Any]:
    """A runtime that tells refusals from interruptions."""
    refused = {"containerName": "node", "operator": "In", "values": [2, 3, 4, 5]}
    moved = {"type": "DisruptionTarget", "status": "True"}
    rules = [
        {"action": "FailJob", "onExitCodes": refused},
        # A pod that had to make room is not counted.
        {"action": "Ignore", "onPodConditions": [moved]},
    ]
    pods = {
        "backoffLimit": settings.backoff_limit,
        "podFailurePolicy": {"rules": rules},
        "template": {"spec": {"restartPolicy": "Never", **_pod(settings, image=settings.image)}},
    }
    step = {"labels": {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}}
    replicated = {"name": "node", "template": {"metadata": step, "spec": pods}}
    policy = {"numNodes": job.num_machines, "torch": {}}
    spec = {"mlPolicy": policy, "template": {"spec": {"replicatedJobs": [replicated]}}}
    return {"apiVersion": _TRAINER, "kind": "TrainingRuntime", "metadata": named, "spec": spec}
