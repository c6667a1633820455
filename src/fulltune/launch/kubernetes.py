"""A PyTorchJob (Kubeflow's Training Operator, v1) and a TrainJob (Kubeflow Trainer, v2), on a shared claim."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from fulltune.launch.job import LaunchedJob, Manifest, notes_of
from fulltune.launch.settings import KubernetesSettings
from fulltune.launch.yaml_text import as_yaml
from fulltune.system.machines import DEFAULT_PORT
from fulltune.text import parse_seconds

_OPERATOR, _TRAINER = "kubeflow.org/v1", "trainer.kubeflow.org/v1alpha1"
_POD = r"""cd {folder} || exit 2
{setup}child='' told=''
trap 'told=1; kill -s TERM "$child" 2>/dev/null' TERM INT
# What the operator says to torchrun is not for the torchrun that fulltune starts itself.
{rendezvous}unset RANK WORLD_SIZE MASTER_ADDR MASTER_PORT
unset PET_NNODES PET_NODE_RANK PET_NPROC_PER_NODE PET_MASTER_ADDR PET_MASTER_PORT
unset PET_RDZV_BACKEND PET_RDZV_ENDPOINT PET_RDZV_ID PET_RDZV_CONF PET_MAX_RESTARTS
{command} &
child=$!
if [ -n "$told" ]; then kill -s TERM "$child"; fi # before its number was known
wait "$child"
code=$?
# A signal ends the wait, not the run.
while kill -0 "$child" 2>/dev/null; do wait "$child"; code=$?; done
{ending}exit "$code"
"""
_RETRYABLE = r"""# Interrupted and saved. The policy ExitCode takes 1 to 127 for final and 138 for "once more".
if [ "$code" -eq 75 ]; then exit 138; fi
"""


def manifests(job: LaunchedJob, settings: KubernetesSettings) -> list[Manifest]:
    """The files: one job in each."""
    wanted = [settings.job] if settings.job else ["pytorchjob", "trainjob"]
    made = {"pytorchjob": _pytorch_job, "trainjob": _train_job}
    submit = ("kubectl", "apply", *(("--namespace", settings.namespace) if settings.namespace else ()), "--filename")
    notes = notes_of(job, job.file.parent)
    return [
        Manifest(f"{kind}.yaml", f"# {job.comment}\n{as_yaml(*made[kind](job, settings))}", submit, notes)
        for kind in wanted
    ]


def _script(job: LaunchedJob, settings: KubernetesSettings, rank: str, host: str, ending: str) -> str:
    """What a pod runs.

    Args:
        job: What to run.
        settings: Where.
        rank: The variable with this machine's number.
        host: Variables with the first machine's name and port.
        ending: What to make of the exit code.
    """
    folder = settings.folder or settings.mount
    command = shlex.join([*job.words(f"{folder.rstrip('/')}/{job.file.name}"), *job.waits(settings)])
    several = job.num_machines > 1
    text = _POD.format(
        folder=shlex.quote(folder),
        setup=f"{settings.setup}\n" if settings.setup else "",
        rendezvous=f'rank="${{{rank}}}" rendezvous="{host}"\n' if several else "",
        command=command + (' --machine-rank "$rank" --rendezvous "$rendezvous"' if several else ""),
        ending=ending,
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


def _volumes(settings: KubernetesSettings) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Volumes of a pod, and where they stand in its container."""
    shared = {"name": "shared", "persistentVolumeClaim": {"claimName": settings.claim}}
    shm = {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": settings.shm}}
    mounts = [{"name": "shared", "mountPath": settings.mount}, {"name": "shm", "mountPath": "/dev/shm"}]
    return [shared, shm], mounts


def _pod(settings: KubernetesSettings) -> dict[str, Any]:
    """What both kinds of jobs say of a pod, beside its container."""
    found: dict[str, Any] = {
        "serviceAccountName": settings.service_account,
        "imagePullSecrets": [{"name": settings.pull_secret}] if settings.pull_secret else None,
        "nodeSelector": settings.node_selector,
        "tolerations": [{"key": key, "operator": "Exists"} for key in settings.tolerations],
        "volumes": _volumes(settings)[0],
        "terminationGracePeriodSeconds": round(parse_seconds(settings.notice)),
    }
    return _given(found)


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value not in (None, {}, [])}


def _metadata(job: LaunchedJob, settings: KubernetesSettings) -> dict[str, Any]:
    labels = {"kueue.x-k8s.io/queue-name": settings.queue} if settings.queue else None
    return _given({"name": job.name(settings), "namespace": settings.namespace, "labels": labels})


def _shell(script: str) -> Sequence[str]:
    return ["/bin/bash", "-c", script]


def _pytorch_job(job: LaunchedJob, settings: KubernetesSettings) -> list[dict[str, Any]]:
    container = {
        "name": "pytorch",  # the operator looks for this name
        "image": settings.image,
        "command": _shell(_script(job, settings, "RANK", "${MASTER_ADDR}:${MASTER_PORT}", _RETRYABLE)),
        "ports": [{"name": "pytorchjob-port", "containerPort": DEFAULT_PORT}],
        "resources": _resources(job, settings),
        "volumeMounts": _volumes(settings)[1],
    }

    def replicas(number: int) -> dict[str, Any]:
        # Istio's sidecar would keep a pod alive that is done.
        metadata = {"annotations": {"sidecar.istio.io/inject": "false"}}
        template = {"metadata": metadata, "spec": {"containers": [_given(container)], **_pod(settings)}}
        return {"replicas": number, "restartPolicy": "ExitCode", "template": template}

    kinds = {"Master": replicas(1), **({"Worker": replicas(job.num_machines - 1)} if job.num_machines > 1 else {})}
    policy = {"cleanPodPolicy": "Running", "backoffLimit": settings.backoff_limit}
    policy["suspend"] = True if settings.queue else None
    spec = {"runPolicy": _given(policy), "pytorchReplicaSpecs": kinds}
    return [{"apiVersion": _OPERATOR, "kind": "PyTorchJob", "metadata": _metadata(job, settings), "spec": spec}]


def _train_job(job: LaunchedJob, settings: KubernetesSettings) -> list[dict[str, Any]]:
    trainer = {
        "image": settings.image,
        "command": _shell(_script(job, settings, "PET_NODE_RANK", "${PET_MASTER_ADDR}:${PET_MASTER_PORT}", "")),
        "numNodes": job.num_machines,
        "numProcPerNode": job.processes,
        "resourcesPerNode": _resources(job, settings),
    }
    node = {"name": "node", "volumeMounts": _volumes(settings)[1]}
    reference = {"name": settings.runtime, "kind": settings.runtime_kind}
    patches, runtimes = [_runtime_patch(settings, node)], []
    if settings.own_runtime:
        reference = {"name": job.name(settings), "kind": "TrainingRuntime"}
        patches, runtimes = [], [_runtime(job, settings, {**node, "image": settings.image})]
    spec = {
        "runtimeRef": reference,
        "suspend": True if settings.queue else None,
        "trainer": _given(trainer),
        "runtimePatches": patches,
    }
    made = {"apiVersion": _TRAINER, "kind": "TrainJob", "metadata": _metadata(job, settings), "spec": _given(spec)}
    return [*runtimes, made]


def _runtime_patch(settings: KubernetesSettings, node: Mapping[str, Any]) -> dict[str, Any]:
    """What a TrainJob may change of a runtime that is there."""
    pod = {"containers": [node], **_pod(settings)}
    replicated = {"name": "node", "template": {"spec": {"template": {"spec": pod}}}}
    spec = {"template": {"spec": {"replicatedJobs": [replicated]}}}
    return {"manager": "fulltune/launch", "trainingRuntimeSpec": spec}


def _runtime(job: LaunchedJob, settings: KubernetesSettings, node: Mapping[str, Any]) -> dict[str, Any]:
    """A runtime that tells refusals from interruptions."""
    refused = {"containerName": "node", "operator": "In", "values": [2, 3, 4, 5]}
    moved = {"type": "DisruptionTarget", "status": "True"}
    rules = [
        {"action": "FailJob", "onExitCodes": refused},
        # A pod that had to make room is not counted.
        {"action": "Ignore", "onPodConditions": [moved]},
    ]
    pods = {
        "backoffLimit": 100 if settings.backoff_limit is None else settings.backoff_limit,
        "podFailurePolicy": {"rules": rules},
        "template": {"spec": {"restartPolicy": "Never", "containers": [node], **_pod(settings)}},
    }
    step = {"labels": {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}}
    replicated = {"name": "node", "template": {"metadata": step, "spec": pods}}
    policy = {"numNodes": job.num_machines, "torch": {}}
    spec = {"mlPolicy": policy, "template": {"spec": {"replicatedJobs": [replicated]}}}
    named = {name: value for name, value in _metadata(job, settings).items() if name != "labels"}
    return {"apiVersion": _TRAINER, "kind": "TrainingRuntime", "metadata": named, "spec": spec}
