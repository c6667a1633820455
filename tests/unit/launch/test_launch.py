"""`fulltune launch`: what it writes, what it says, what it refuses."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from fulltune.launch import LAUNCHERS
from tests import tiny
from tests.contract.command import fulltune
from tests.unit.launch.jobs import Place

CUDA = ("--set", "train.device=cuda")


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def of(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


def test_it_says_what_it_wrote_and_what_submits_it(place: Place) -> None:
    for launcher, ending, command in (
        ("slurm", "slurm.sh", "sbatch"),
        ("ssh", "ssh.sh", "bash"),
        ("kubernetes", "trainjob.yaml", "kubectl apply --filename"),
        ("skypilot", "sky.yaml", "sky jobs launch --yes --detach-run"),
    ):
        said = place.launch(launcher)
        assert said.code == 0, said.err
        path = place.written(ending)
        assert f"wrote {path}; edit lines marked '# edit:', then submit it: {command} {path}\n" in said.out
        assert "2 machines, 1 process each\n" in said.out
        assert "# edit:" in path.read_text(encoding="utf-8")
        assert path.stat().st_mode & 0o100 == 0o100 * ending.endswith("sh")


def test_for_says_machines_processes_and_gpus(place: Place) -> None:
    assert place.launch("slurm", "--for", "4x 8x A100-80GB").code == 0
    script = place.written("slurm.sh").read_text(encoding="utf-8")
    assert "#SBATCH --nodes=4\n" in script
    assert "#SBATCH --gpus-per-node=8\n" not in script  # this recipe is for a CPU
    assert "--set train.num_machines=4 --set train.num_processes=32" in script
    assert place.launch("slurm", "--for", "4x 8x A100-80GB", *CUDA, "--force").code == 0
    assert "#SBATCH --gpus-per-node=8\n" in place.written("slurm.sh").read_text(encoding="utf-8")
    assert place.launch("kubernetes", "--for", "2x 4x MI300X", *CUDA).code == 0
    trainer = of(place.written("trainjob.yaml"))[1]["spec"]["trainer"]
    assert (trainer["numNodes"], trainer["numProcPerNode"]) == (2, 4)
    assert trainer["resourcesPerNode"]["limits"] == {"amd.com/gpu": "4"}
    for fleet, machines, accelerators in (("8x H100", 1, "H100:8"), ("2x 4x A100-PCIe-80GB", 2, "A100-80GB:4")):
        assert place.launch("skypilot", "--for", fleet, *CUDA, "--force").code == 0
        [task] = of(place.written("sky.yaml"))
        assert (task["num_nodes"], task["resources"]["accelerators"]) == (machines, accelerators)


def test_one_machine_needs_no_number_and_no_rendezvous(place: Place) -> None:
    one = ("--set", "train.num_machines=1", "--set", "train.num_processes=1")
    for launcher, (template, _) in LAUNCHERS.items():
        assert place.launch(launcher, *one).code == 0
        assert "rendezvous" not in place.written(template).read_text(encoding="utf-8")


def test_comparison_is_compared_and_search_is_run_on_one_machine(tmp_path: Path) -> None:
    for name, blocks, command in (
        ("a", {"methods": [{"kind": "full"}, {"kind": "lora"}]}, "fulltune compare"),
        ("b", {"method": {"kind": "full", "learning_rate": "search"}}, "fulltune run"),
    ):
        recipe = tiny.write_recipe(tmp_path / f"{name}.yaml", "MODEL", "train.csv", **blocks)
        assert fulltune("launch", recipe, "--on", "slurm").code == 0
        text = (tmp_path / f"{name}.slurm.sh").read_text(encoding="utf-8")
        assert f"command=({command} ./{name}.yaml)\n" in text
        said = fulltune("launch", recipe, "--on", "slurm", "--force", "--for", "2x 4x A100-80GB")
        assert said.code == 2
        assert "runs on one machine" in said.problems[0]


def test_pods_share_a_claim_and_tell_refusals_from_interruptions(place: Place) -> None:
    assert place.launch("kubernetes").code == 0
    runtime, job = of(place.written("trainjob.yaml"))
    assert job["spec"]["runtimeRef"] == {"name": runtime["metadata"]["name"], "kind": runtime["kind"]}
    [replicated] = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    pods = replicated["template"]["spec"]
    assert pods["template"]["spec"]["restartPolicy"] == "Never"
    assert pods["podFailurePolicy"]["rules"][0]["action"] == "FailJob"
    assert pods["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [2, 3, 4, 5]
    assert pods["template"]["spec"]["terminationGracePeriodSeconds"] == 600
    volumes = {one["name"] for one in pods["template"]["spec"]["volumes"]}
    [container] = pods["template"]["spec"]["containers"]
    assert {one["name"] for one in container["volumeMounts"]} == volumes


def test_rented_machines_write_into_what_they_share(place: Place) -> None:
    assert place.launch("skypilot").code == 0
    [task] = of(place.written("sky.yaml"))
    assert task["file_mounts"]["/mnt/fulltune"]["mode"] == "MOUNT"
    assert task["workdir"] == str(place.work)
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [75]
    assert "exec fulltune run ./recipe.yaml --set output=/mnt/fulltune/recipe --machine-rank" in task["run"]
    assert place.launch("skypilot", "--force", "--set", "output=/mnt/fulltune/mine").code == 0
    assert of(place.written("sky.yaml"))[0]["run"].count("output=") == 1


@pytest.mark.parametrize("launcher", ["kubernetes", "skypilot"])
def test_what_is_not_in_the_recipes_folder_is_named_for_machines_elsewhere(
    place: Place, tmp_path: Path, launcher: str
) -> None:
    rows = tmp_path / "elsewhere.csv"
    said = place.launch(launcher, "--set", f"data.train={rows}")
    assert f"these inputs are outside {place.work}; copy them to the machines yourself: {rows}\n" in said.out
    assert "outside" not in place.launch(launcher, "--force").out


def test_name_of_the_job_is_a_text_in_yaml(place: Place) -> None:
    for launcher, known in (("kubernetes", "trainjob.yaml"), ("skypilot", "sky.yaml")):
        assert place.launch(launcher, "--set", "name='off'").code == 0
        first = of(place.written(known))[0]
        assert first.get("metadata", first)["name"] == "off"


def test_what_the_job_needs_is_never_replaced(place: Place) -> None:
    before = place.recipe.read_bytes()
    said = place.launch("slurm", "--output", place.recipe, "--force")
    assert said.code == 2
    assert "is a file that the job needs" in said.err.replace("\n", " ")
    assert place.recipe.read_bytes() == before


# ---- what is refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("slrum",), "--on slrum: expected ssh, slurm, kubernetes or skypilot; did you mean 'slurm'?"),
        (("slurm", "--for", "0x 8x A100-80GB"), "--for: '0x 8x A100-80GB': numbers must be greater than 0"),
        (("slurm", "--for", "2x 8x A1000"), "--for: unknown GPU 'A1000'"),
        (
            ("slurm", "--for", "8x A100-80GB", "--set", "train.num_processes=4"),
            "--for: sets the number of machines and processes; remove --set train.num_processes, or --for",
        ),
        (
            ("slurm", "--set", "train.num_machines=3"),
            "train.num_processes: expected a multiple of num_machines",
        ),
    ],
)
def test_what_cannot_be_is_refused_with_what_to_do(place: Place, arguments: tuple[str, ...], words: str) -> None:
    said = place.launch(*arguments)
    assert said.code == 2
    assert any(words in problem for problem in said.problems), said.err
    assert not [path for path in place.recipe.parent.iterdir() if path != place.recipe]


def test_run_folder_is_refused(tmp_path: Path) -> None:
    said = fulltune("launch", tmp_path, "--on", "slurm")
    assert (said.code, said.problems[0].split(",")[0]) == (2, f"{tmp_path}: is a folder")


def test_name_that_is_not_utf_8_is_refused(place: Place) -> None:
    other = place.recipe.with_name(os.fsdecode(b"\xff.yaml"))
    place.recipe.rename(other)
    place.recipe = other
    said = place.launch("slurm")
    assert said.code == 2
    assert said.problems == [
        "launch: " + str(other).encode(errors="backslashreplace").decode() + " is not valid UTF-8, "
        "which job files need; rename it"
    ]


def test_file_that_is_there_is_kept_unless_forced(place: Place, tmp_path: Path) -> None:
    mine = tmp_path / "mine.sh"
    mine.write_text("mine")
    said = place.launch("slurm", "--output", mine)
    assert said.code == 2
    assert said.problems == [f"{mine}: already exists; give --force to replace it, or another name with --output"]
    assert mine.read_text() == "mine"
    assert place.launch("slurm", "--output", mine, "--force").code == 0
    assert mine.read_text().startswith("#!/bin/bash\n")
    assert place.launch("slurm", "--output", tmp_path / "new").code == 0
    assert (tmp_path / "new" / "recipe.slurm.sh").exists()
