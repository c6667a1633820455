"""`fulltune launch`: what it writes, what it says, what it refuses."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from fulltune.launch.slurm import _seconds_of
from tests import tiny
from tests.contract.command import fulltune
from tests.unit.launch.jobs import Place

PODS = ("--k8s", "--with", "image=me/it:1", "--with", "claim=ours")
SKY = ("--sky", "--with", "bucket=s3://runs", "--with", "setup=pip install fulltune")


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.fixture
def hosts(tmp_path: Path) -> Path:
    file = tmp_path / "hosts.txt"
    file.write_text("one\nme@two:2222\n", encoding="utf-8")
    return file


def of(path: Path) -> dict[str, Any]:
    return dict(yaml.safe_load(path.read_text(encoding="utf-8")))


def test_it_says_what_it_wrote_and_what_submits_it(place: Place, hosts: Path) -> None:
    for arguments, ending, command in (
        (("--slurm",), "slurm.sh", "sbatch"),
        (("--ssh", hosts), "ssh.sh", "bash"),
        (
            (*PODS, "--with", "namespace=a b"),
            "trainjob.yaml",
            "kubectl apply --namespace 'a b' --filename",
        ),
        ((*SKY, "--set", "train.device=cpu"), "sky.yaml", "sky jobs launch --yes --detach-run"),
    ):
        said = place.launch(*arguments)
        assert said.code == 0, said.err
        path = place.written(ending)
        assert f"wrote {path}; submit it: {command} {path}\n" in said.out
        assert "2 machines, 1 process each\n" in said.out
        assert path.read_text(encoding="utf-8").count("fulltune launch") == 1 or ending.endswith("sh")


def test_control_characters_of_the_command_are_escaped_in_its_comment(place: Place) -> None:
    file = place.work / "a\ab.yaml"
    assert place.launch(*PODS, "--output", file).code == 0
    text = file.read_text(encoding="utf-8")
    assert r"/a\x07b.yaml" in text.partition("\n")[0]
    assert list(yaml.safe_load_all(text))


def test_command_that_is_not_on_the_path_is_said_before_it_fails_in_the_queue(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    there = Path(sys.executable).parent
    assert f"--with setup='export PATH={there}:$PATH'" in place.launch("--slurm").out
    setup = ("--with", f"setup=export PATH={there}:$PATH", "--force")
    assert "PATH here" not in place.launch("--slurm", *setup).out
    monkeypatch.setenv("PATH", f"{place.programs}:/usr/bin:/bin")
    assert "PATH here" not in place.launch("--slurm", "--force").out


def test_for_says_machines_processes_and_gpus(place: Place) -> None:
    assert place.launch("--slurm", "--for", "4x 8x A100-80GB").code == 0
    script = place.written("slurm.sh").read_text(encoding="utf-8")
    assert "#SBATCH --nodes=4\n" in script
    assert "#SBATCH --gpus-per-node=8\n" not in script  # this recipe is for a CPU
    assert "--set train.num_machines=4 --set train.num_processes=32" in script
    device = ("--set", "train.device=cuda", "--force")
    assert place.launch("--slurm", "--for", "4x 8x A100-80GB", *device).code == 0
    assert "#SBATCH --gpus-per-node=8\n" in place.written("slurm.sh").read_text(encoding="utf-8")
    assert place.launch(*PODS, "--for", "2x 4x MI300X", *device).code == 0
    trainer = of(place.written("trainjob.yaml"))["spec"]["trainer"]
    assert (trainer["numNodes"], trainer["numProcPerNode"]) == (2, 4)
    assert trainer["resourcesPerNode"]["limits"] == {"amd.com/gpu": "4"}
    assert place.launch(*SKY, "--for", "8x H100", *device).code == 0
    task = of(place.written("sky.yaml"))
    assert (task["num_nodes"], task["resources"]["accelerators"]) == (1, "H100:8")


def test_one_machine_needs_no_number_and_no_rendezvous(place: Place, tmp_path: Path) -> None:
    (tmp_path / "one").write_text("only\n", encoding="utf-8")
    one = ("--set", "train.num_machines=1", "--set", "train.num_processes=1")
    for arguments in (("--slurm",), ("--ssh", tmp_path / "one"), PODS, SKY):
        assert place.launch(*arguments, *one).code == 0
    for path in place.recipe.parent.glob("recipe.*.*"):
        text = path.read_text(encoding="utf-8")
        assert "--rendezvous" not in text or "rendezvous=''\n" in text, path


def test_comparison_is_compared_and_search_is_run_on_one_machine(place: Place, tmp_path: Path) -> None:
    for name, blocks, command in (
        ("a", {"methods": [{"kind": "full"}, {"kind": "lora"}]}, "fulltune compare"),
        ("b", {"method": {"kind": "full", "learning_rate": "search"}}, "fulltune run"),
    ):
        recipe = tiny.write_recipe(tmp_path / f"{name}.yaml", "MODEL", "train.csv", **blocks)
        assert fulltune("launch", recipe, "--slurm").code == 0
        assert f"    {command} {recipe}\n" in (tmp_path / f"{name}.slurm.sh").read_text(encoding="utf-8")
        said = fulltune("launch", recipe, "--slurm", "--force", "--for", "2x 4x A100-80GB")
        assert said.code == 2
        assert "runs on one machine" in said.problems[0]


def test_pods_share_a_claim_and_have_time_to_save(place: Place) -> None:
    more = ("--with", "queue=q", "--with", "notice=5m", "--with", "memory=64Gi", "--with", "mount=/data")
    assert place.launch(*PODS, *more).code == 0
    job = of(place.written("trainjob.yaml"))
    assert job["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "q"}
    assert job["spec"]["suspend"] is True
    assert job["spec"]["runtimeRef"] == {"name": "torch-distributed", "kind": "ClusterTrainingRuntime"}
    [replicated] = job["spec"]["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = replicated["template"]["spec"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] == 300
    assert {"name": "shared", "persistentVolumeClaim": {"claimName": "ours"}} in pod["volumes"]
    assert {"name": "shared", "mountPath": "/data"} in pod["containers"][0]["volumeMounts"]
    assert {"name": "shm", "mountPath": "/dev/shm"} in pod["containers"][0]["volumeMounts"]
    assert job["spec"]["trainer"]["resourcesPerNode"] == {"requests": {"memory": "64Gi"}}
    assert "cd /data || exit 2\n" in job["spec"]["trainer"]["command"][2]


def test_runtime_of_its_own_tells_refusals_from_interruptions(place: Place) -> None:
    assert place.launch(*PODS, "--with", "own_runtime=true", "--with", "backoff_limit=7").code == 0
    runtime, job = yaml.safe_load_all(place.written("trainjob.yaml").read_text(encoding="utf-8"))
    assert job["spec"]["runtimeRef"] == {"name": runtime["metadata"]["name"], "kind": runtime["kind"]}
    assert "runtimePatches" not in job["spec"]
    [replicated] = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    pods = replicated["template"]["spec"]
    assert (pods["backoffLimit"], pods["template"]["spec"]["restartPolicy"]) == (7, "Never")
    assert pods["podFailurePolicy"]["rules"][0]["action"] == "FailJob"
    assert pods["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [2, 3, 4, 5]
    assert pods["template"]["spec"]["volumes"][0]["persistentVolumeClaim"] == {"claimName": "ours"}


def test_rented_machines_write_into_what_they_share(place: Place) -> None:
    more = ("--set", "train.device=cpu", "--with", "use_spot=true")
    assert place.launch(*SKY, *more).code == 0
    task = of(place.written("sky.yaml"))
    assert task["file_mounts"] == {"/mnt/fulltune": {"source": "s3://runs", "mode": "MOUNT"}}
    assert task["workdir"] == str(place.work)
    assert task["resources"]["use_spot"] is True
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [75]
    assert "exec fulltune run recipe.yaml --set train.device=cpu --set output=/mnt/fulltune/recipe" in task["run"]
    assert place.launch(*SKY, *more, "--force", "--set", "output=/mnt/fulltune/mine").code == 0
    assert of(place.written("sky.yaml"))["run"].count("output=") == 1


def test_what_is_not_in_the_recipes_folder_is_named_for_machines_elsewhere(place: Place, tmp_path: Path) -> None:
    rows = tmp_path / "elsewhere.csv"
    said = place.launch(*PODS, "--set", f"data.train={rows}")
    assert f"not in {place.work}, so see that the machines have it, too: {rows}\n" in said.out
    assert "not in" not in place.launch(*PODS, "--force").out
    more = ("--set", "train.device=cpu", "--set", f"data.train={rows}")
    assert f"not in {place.work}" in place.launch(*SKY, *more).out
    above = place.launch(*SKY, *more, "--with", f"workdir={tmp_path}", "--force")
    assert "not in" not in above.out
    assert "run work/recipe.yaml --set" in of(place.written("sky.yaml"))["run"]


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        ("3", 180),
        ("3:20", 200),
        ("1:00:01", 3601),
        ("1-0", 86400),
        ("1-1:01", 90060),
        ("1-01:01:01", 90061),
    ],
)
def test_time_limits_are_read_as_sbatch_reads_them(time: str, seconds: int) -> None:
    assert _seconds_of(time) == seconds


def test_what_the_job_needs_is_never_replaced(place: Place) -> None:
    before = place.recipe.read_bytes()
    said = place.launch("--slurm", "--output", place.recipe, "--force")
    assert said.code == 2
    assert "is a file that the job needs" in said.err.replace("\n", " ")
    assert place.recipe.read_bytes() == before


# ---- what is refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "launch: expected one of --ssh HOSTS, --slurm, --k8s and --sky, found none"),
        (
            ("--slurm", "--sky"),
            "launch: expected one of --ssh HOSTS, --slurm, --k8s and --sky, found --slurm and --sky",
        ),
        (("--slurm", "--for", "0x 8x A100-80GB"), "--for: '0x 8x A100-80GB' has no machine"),
        (("--slurm", "--for", "2x 8x A1000"), "--for: unknown GPU 'A1000'"),
        (
            ("--slurm", "--for", "8x A100-80GB", "--set", "train.num_processes=4"),
            "--for: says how many machines and processes; remove --set train.num_processes, or --for",
        ),
        (
            ("--slurm", "--set", "train.num_machines=3"),
            "train.num_processes: 2 is the total over all machines",
        ),
        (
            ("--slurm", "--with", "time=0:04:00", "--with", "notice=5m"),
            "--with time=0:04:00: is over before notice (5m) has passed",
        ),
        (("--slurm", "--with", "partion=x"), "--slurm has no setting 'partion'; did you mean 'partition'?"),
        (
            ("--slurm", "--with", "gres=gpu:1", "--with", "gpus_per_node=1"),
            "gres and --with gpus_per_node are both given",
        ),
        (("--ssh", "absent.txt"), "--ssh: absent.txt cannot be read (no such file or directory)"),
        (("--k8s",), "--with image=VALUE is missing"),
        ((*PODS, "--with", "backoff_limit=3"), "--with backoff_limit: counts only with own_runtime=true"),
        (
            (*PODS, "--with", "own_runtime=true", "--with", "runtime=r"),
            "--with runtime: counts only with own_runtime=false",
        ),
        (("--sky", "--with", "bucket=s3://a"), "--sky: machines begin empty; say how they get fulltune"),
        ((*SKY[:1], *SKY[3:]), "--sky: runs would go with the machines"),
        ((*SKY, "--with", "volume=v"), "--with bucket and --with volume are both given"),
        ((*SKY, "--set", "train.device=auto"), "--sky: which GPUs?"),
        ((*SKY, "--with", "workdir=/no/where"), "does not lie in it"),
    ],
)
def test_what_cannot_be_is_refused_with_what_to_do(place: Place, arguments: tuple[str, ...], words: str) -> None:
    said = place.launch(*arguments)
    assert said.code == 2
    assert any(words in problem for problem in said.problems), said.err
    assert not [path for path in place.recipe.parent.iterdir() if path != place.recipe]


def test_hosts_that_are_wrong_or_too_few_are_refused(place: Place, hosts: Path) -> None:
    said = place.launch("--ssh", hosts, "--set", "train.num_machines=1")
    assert (said.code, len(said.problems)) == (2, 1)
    assert f"{hosts}: has 2 hosts, but train.num_machines is 1" in said.problems[0]
    hosts.write_text("one\none two\n::1\n", encoding="utf-8")
    said = place.launch("--ssh", hosts)
    assert [problem.split("  ")[0] for problem in said.problems] == [f"{hosts}:2", f"{hosts}:3"]


def test_run_folder_is_refused(tmp_path: Path) -> None:
    said = fulltune("launch", tmp_path, "--slurm")
    assert (said.code, said.problems[0].split(",")[0]) == (2, f"{tmp_path}: is a folder")


def test_name_that_is_not_utf_8_is_refused(place: Place) -> None:
    other = place.recipe.with_name(os.fsdecode(b"\xff.yaml"))
    place.recipe.rename(other)
    place.recipe = other
    said = place.launch("--slurm")
    assert said.code == 2
    assert said.problems == [
        "launch: " + str(other).encode(errors="backslashreplace").decode() + " is not UTF-8, which "
        "manifests are; rename what is called so"
    ]


def test_file_that_is_there_is_kept_unless_forced(place: Place, tmp_path: Path) -> None:
    mine = tmp_path / "mine.sh"
    mine.write_text("mine")
    said = place.launch("--slurm", "--output", mine)
    assert said.code == 2
    assert said.problems == [f"{mine}: exists already; give --force to replace it, or another name with --output"]
    assert mine.read_text() == "mine"
    assert place.launch("--slurm", "--output", mine, "--force").code == 0
    assert mine.read_text().startswith("#!/bin/bash\n")
    assert place.launch("--slurm", "--output", tmp_path / "new").code == 0
    assert (tmp_path / "new" / "recipe.slurm.sh").exists()


# ---- submitting ------------------------------------------------------------------------------------------------


def test_launcher_that_is_not_there_leaves_the_file_and_the_command(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(place.programs))
    said = place.launch("--slurm", "--submit")
    path = place.written("slurm.sh")
    assert said.code == 2
    assert said.problems == [
        f"--submit: there is no 'sbatch' here; {path} is written, submit it where there is one: sbatch {path}"
    ]
    assert path.exists()


def test_launcher_gets_the_file_and_its_words_are_shown(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", place.environment["PATH"])
    place.program("sky", '#!/bin/sh\necho "job [1] of $*"\n')
    said = place.launch(*SKY, "--set", "train.device=cpu", "--submit")
    assert said.code == 0
    assert f"job [1] of jobs launch --yes --detach-run {shlex.quote(str(place.written('sky.yaml')))}" in said.err


def test_launcher_that_refuses_is_quoted_without_a_traceback(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", place.environment["PATH"])
    place.program("sbatch", '#!/bin/sh\necho "sbatch: error: invalid partition: [gpu]" >&2\nexit 3\n')
    said = place.launch("--slurm", "--submit")
    assert said.code == 1
    assert said.problems[0] == "sbatch: error: invalid partition: [gpu]"
    assert "was refused (exit code 3" in said.problems[1]
    assert "Traceback" not in said.err
