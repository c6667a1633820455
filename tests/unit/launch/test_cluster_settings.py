"""Settings of clusters: what is unknown is refused with near names, what does not fit with what was expected."""

from __future__ import annotations

import re
from typing import Any

import pytest

from fulltune.errors import SetupError
from fulltune.launch.settings import KubernetesSettings, SkySettings, SlurmSettings, SshSettings, read_settings


def problems(kind: Any, *given: str) -> list[str]:
    with pytest.raises(SetupError) as caught:
        read_settings(kind, given)
    return list(caught.value.problems)


def test_values_have_the_types_of_their_fields() -> None:
    slurm = read_settings(SlurmSettings, ["time=12:00:00", "gpus-per-node=4", "exclusive=true", "setup=a\nb"])
    assert (slurm.time, slurm.gpus_per_node, slurm.exclusive, slurm.setup) == ("12:00:00", 4, True, "a\nb")
    pods = read_settings(
        KubernetesSettings, ["image=a:1=x", "claim=c", "node_selector=gpu=a, zone=1", "tolerations=a,b"]
    )
    assert (pods.image, pods.node_selector, pods.tolerations) == ("a:1=x", {"gpu": "a", "zone": "1"}, ("a", "b"))


@pytest.mark.parametrize(
    ("kind", "given", "words"),
    [
        (SlurmSettings, "partion=x", "--slurm has no setting 'partion'; did you mean 'partition'?"),
        (SlurmSettings, "bucket=x", "--slurm has no setting 'bucket'; it belongs to --sky; known here: name, setup,"),
        (SshSettings, "frobnicate=x", "--ssh has no setting 'frobnicate'; known here: name, setup,"),
        (SlurmSettings, "partition", "--with partition: expected NAME=VALUE"),
        (SlurmSettings, "=x", "--with =x: expected NAME=VALUE"),
        (SlurmSettings, "partition=", "--with partition: is empty"),
        (SlurmSettings, "time=soon", "--with time: expected a time as Slurm writes it"),
        (SlurmSettings, "cpus_per_task=0", "--with cpus_per_task: expected greater than or equal to 1, found '0'"),
        (SlurmSettings, "exclusive=perhaps", "--with exclusive: expected a valid boolean, found 'perhaps'"),
        (SlurmSettings, "notice=120", "--with notice: expected a time such as 30m, 2h or 90s, found '120'"),
        (SlurmSettings, "comment=a\n#SBATCH --uid=0", "--with comment: expected one line of printable characters"),
        (SlurmSettings, "options=-p x", "--with options: expected options such as --mail-type=END"),
        (SlurmSettings, "options=--a='", "--with options: expected options such as --mail-type=END"),
        (SlurmSettings, "folder=here", "--with folder: expected a whole path"),
        (SshSettings, "port=70000", "--with port: expected less than or equal to 65535, found '70000'"),
        (SkySettings, "bucket_mode=COPY", "--with bucket_mode: expected 'MOUNT' or 'MOUNT_CACHED', found 'COPY'"),
    ],
)
def test_wrong_setting_is_refused_in_words(kind: Any, given: str, words: str) -> None:
    [said] = problems(kind, given)
    assert words in said


def test_all_problems_are_named_at_once_with_what_is_missing() -> None:
    said = problems(KubernetesSettings, "imagine=x", "shm=1Gi", "shm=2Gi", "node_selector=gpu")
    assert [re.split(r"[:;]", one)[0] for one in said] == [
        "--with imagine=x",
        "--with shm=2Gi",
        "--k8s",
        "--k8s",
        "--with node_selector",
    ]
    assert "--with image=VALUE is missing" in said[2]
    assert "--with claim=VALUE is missing; expected: PersistentVolumeClaim" in said[3]
