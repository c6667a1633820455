"""What is written, run with stand-ins for ssh and Slurm: names stay whole, signals arrive, exit codes are read."""

from __future__ import annotations

import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.unit.launch.jobs import NASTY, Place

SETTINGS = ("--set", "name=x", "--set", "data.text=$(touch HURT) 'x'\ny")
SHELLCHECK = shutil.which("shellcheck") or shutil.which("shellcheck", path=str(Path(sys.executable).parent))


@pytest.fixture
def nasty(tmp_path: Path) -> Place:
    """Recipe and folder have names that hurt where they are not quoted."""
    return Place(tmp_path, f"{NASTY}.yaml", NASTY.replace("/", ""))


SETUP = f'export PATH="$PATH":{shlex.quote(str(Path(sys.executable).parent))}\n'
"""What is written in place of the user's lines before the start."""
HOSTS = (("    EDIT-HOST-0\n", "    one\n"), ("    EDIT-HOST-1\n", "    ssh://me@two:2222\n"), ("EDIT-HOST-0:", "h:"))


def sound(script: Path) -> None:
    """Bash and ShellCheck have nothing against it."""
    assert subprocess.run(["bash", "-n", script], capture_output=True, check=False).returncode == 0
    if SHELLCHECK is None:
        pytest.skip("shellcheck is not installed (extra dev)")
    found = subprocess.run([SHELLCHECK, script], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not happen"
        time.sleep(0.05)


def test_scripts_with_nasty_names_are_sound(nasty: Place) -> None:
    for launcher in ("slurm", "ssh"):
        assert nasty.launch(launcher, *SETTINGS).code == 0
        sound(nasty.edit(f"{launcher}.sh", (SETUP, "export A='a b'\ntrue\n")))


def test_manifests_keep_nasty_names_whole(nasty: Place) -> None:
    for launcher in ("kubernetes", "skypilot"):
        assert nasty.launch(launcher, *SETTINGS).code == 0
    command = list(yaml.safe_load_all(nasty.written("trainjob.yaml").read_text()))[1]["spec"]["trainer"]["command"]
    words = [f"./{nasty.recipe.name}", *SETTINGS]
    assert command[6:] == [word.replace("$(", "$$(") for word in words]
    task = yaml.safe_load(nasty.written("sky.yaml").read_text())
    assert task["workdir"] == str(nasty.work)
    done = nasty.shell("bash", "-c", task["run"], more={"SKYPILOT_NODE_RANK": "1", "SKYPILOT_NODE_IPS": "1.2.3.4\n5"})
    assert done.returncode == 0, done.stderr
    more = ["--set", "output=/mnt/fulltune/x", "--machine-rank", "1", "--rendezvous", "1.2.3.4:29500"]
    assert nasty.called(1)[1:] == ["run", *words, *more]
    assert not list(nasty.notes.parent.rglob("HURT"))


# ---- Slurm -----------------------------------------------------------------------------------------------------

SRUN = r"""#!/bin/bash
# Two tasks, as srun starts them; its code is the highest.
printf '%s\n' "$@" >"NOTES/srun"
while [[ "$1" == --* ]]; do shift; done
SLURM_NODEID=1 "$@" & second=$!
SLURM_NODEID=0 "$@"; code=$?
wait "$second"; other=$?
exit $((other > code ? other : code))
"""


def slurm(place: Place) -> Callable[[str], subprocess.CompletedProcess[str]]:
    """A cluster that says of the job's state what it is told."""
    place.program("srun", SRUN.replace("NOTES", str(place.notes)))
    place.program(
        "scontrol",
        f'#!/bin/sh\nif [ "$1" = show ]; then echo n1; echo n2; else echo "$@" >>"{place.notes}/scontrol"; fi\n',
    )

    def run(state: str = "RUNNING", **more: str) -> subprocess.CompletedProcess[str]:
        place.program("squeue", f"#!/bin/sh\necho {state}\n")
        variables = {"SLURM_JOB_ID": "20007", "SLURM_JOB_NODELIST": "n[1-2]", **more}
        return place.shell("bash", place.written("slurm.sh"), more=variables)

    return run


def test_slurm_starts_each_machine_with_its_number_and_the_first_as_rendezvous(nasty: Place) -> None:
    assert nasty.launch("slurm", *SETTINGS).code == 0
    nasty.edit("slurm.sh", (SETUP, "export A=b\n"))
    done = slurm(nasty)(SLURM_CPUS_PER_TASK="4")
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        place, *words = nasty.called(rank)
        assert place == str(nasty.work)
        more = ["--machine-rank", str(rank), "--rendezvous", "n1:10007"]
        assert words == ["run", f"./{nasty.recipe.name}", *SETTINGS, *more]
    assert "A=b\n" in (nasty.notes / "env-1").read_text()
    assert not (nasty.notes / "scontrol").exists()
    assert {"--kill-on-bad-exit=1", "--mpi=none", "--cpus-per-task=4"} <= set(
        (nasty.notes / "srun").read_text().split()
    )


@pytest.mark.parametrize(
    ("codes", "state", "restarts", "code", "requeued"),
    [
        ((75, 75), "RUNNING", "0", 75, True),
        ((0, 75), "RUNNING", "99", 75, True),
        ((75, 75), "RUNNING", "100", 75, False),
        ((75, 75), "COMPLETING", "0", 75, False),  # after scancel, or where Slurm queues it again itself
        ((5, 75), "RUNNING", "0", 5, False),
        ((2, 2), "RUNNING", "0", 2, False),
    ],
)
def test_slurm_queues_an_interrupted_job_again_and_no_other(
    tmp_path: Path, codes: tuple[int, int], state: str, restarts: str, code: int, requeued: bool
) -> None:
    place = Place(tmp_path)
    assert place.launch("slurm").code == 0
    for rank in (0, 1):
        place.codes(rank, codes[rank])
    done = slurm(place)(state, SLURM_RESTART_COUNT=restarts)
    assert done.returncode == code
    asked = place.notes / "scontrol"
    assert (asked.read_text() if asked.exists() else "") == "requeue 20007\n" * requeued
    assert not list(place.work.glob("*.interrupted"))


def test_slurm_options_stand_in_the_lines_that_sbatch_reads(tmp_path: Path) -> None:
    place = Place(tmp_path, inside="it's %j")
    assert place.launch("slurm", "--set", "name=My-Run.").code == 0
    script = place.edit("slurm.sh", ("##SBATCH --partition=gpu", "#SBATCH --partition=a,b"))
    options = script.read_text().partition("\ncd ")[0]
    assert re.findall(r"^#SBATCH (.*)$", options, re.MULTILINE) == [
        "--job-name=my-run",
        "--nodes=2",
        "--ntasks-per-node=1",
        "--output=my-run-%j.log",
        "--open-mode=append",
        "--requeue",
        "--cpus-per-task=4",
        "--signal=TERM@120",
        "--partition=a,b",
    ]
    # sbatch stops looking at the first command.
    assert all(line.startswith("#") or not line for line in options.partition("\nmax_requeues")[0].splitlines())


# ---- ssh -------------------------------------------------------------------------------------------------------

SSH = r"""#!/bin/bash
# What sshd does: the last argument is a line for a shell.
printf '%s\n' "${@:1:$#-1}" >>"NOTES/ssh"
if [[ " $* " == *" absent "* ]]; then echo "ssh: connect to host absent: No route to host" >&2; exit 255; fi
exec env --default-signal=INT,TERM,HUP sh -c "${@: -1}"
"""


def over_ssh(place: Place) -> None:
    place.program("ssh", SSH.replace("NOTES", str(place.notes)))


def test_ssh_starts_each_machine_with_its_number_and_the_first_as_rendezvous(nasty: Place) -> None:
    over_ssh(nasty)
    assert nasty.launch("ssh", *SETTINGS).code == 0
    script = nasty.edit("ssh.sh", *HOSTS, (SETUP, "export A='a b'\n"), ("BatchMode=yes", "BatchMode=yes -i 'a key'"))
    done = nasty.shell("bash", script)
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        place, *words = nasty.called(rank)
        assert place == str(nasty.work)
        more = ["--machine-rank", str(rank), "--rendezvous", "h:29500"]
        assert words == ["run", f"./{nasty.recipe.name}", *SETTINGS, *more]
        assert "A=a b\n" in (nasty.notes / f"env-{rank}").read_text()
    told = (nasty.notes / "ssh").read_text()
    assert "BatchMode=yes\n-i\na key\n" in told
    assert "--\none\n" in told
    assert "--\nssh://me@two:2222\n" in told


def test_ssh_names_all_hosts_that_do_not_answer_or_lack_something_and_starts_none(tmp_path: Path) -> None:
    place = Place(tmp_path)
    over_ssh(place)
    (place.programs / "fulltune").unlink()
    assert place.launch("ssh").code == 0
    script = place.edit("ssh.sh", (SETUP, ""), (HOSTS[0][0], "    absent\n"), (HOSTS[1][0], "    two\n"))
    done = place.shell("bash", script, more={"PATH": f"{place.programs}:/usr/bin:/bin"})
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "machine 0, absent: does not answer: ssh: connect to host absent: No route to host",
        "machine 1, two: has no fulltune on its PATH",
        "nothing was started",
    ]


def test_ssh_wants_as_many_hosts_as_machines(tmp_path: Path) -> None:
    place = Place(tmp_path)
    over_ssh(place)
    assert place.launch("ssh").code == 0
    done = place.shell("bash", place.edit("ssh.sh", (HOSTS[1][0], "")))
    assert done.returncode == 2
    assert done.stderr == "1 hosts in targets=(...), expected 2 (train.num_machines); nothing was started\n"
    assert not (place.notes / "ssh").exists()


def test_ssh_tells_the_others_to_save_when_one_fails_and_ends_with_the_code_of_the_first(tmp_path: Path) -> None:
    place = Place(tmp_path)
    over_ssh(place)
    assert place.launch("ssh").code == 0
    place.edit("ssh.sh", *HOSTS)
    place.codes(1, 4)
    place.hold(0)
    done = place.shell("bash", place.written("ssh.sh"))
    assert done.returncode == 75
    assert "machine 1, ssh://me@two:2222: ended with code 4" in done.stderr
    assert {"end 1 4", "TERM 0"} <= set(place.events())
    assert len(list(place.written("ssh.logs").iterdir())) == 2


# ---- a pod -----------------------------------------------------------------------------------------------------


POD = {"PET_NODE_RANK": "1", "PET_MASTER_ADDR": "it-node-0-0.it", "PET_MASTER_PORT": "29400"}


def pod_command(place: Place) -> list[str]:
    """What the container runs, after Kubernetes has replaced `$(NAME)` in it."""
    assert place.launch("kubernetes", *SETTINGS).code == 0
    _, job = yaml.safe_load_all(place.written("trainjob.yaml").read_text(encoding="utf-8"))
    command = job["spec"]["trainer"]["command"]
    assert command[:4] == ["/bin/bash", "-c", command[2], "/shared"]
    command = [re.sub(r"\$(\$|\([^)]*\))", lambda at: "$" if at[1] == "$" else "REPLACED", word) for word in command]
    return [*command[:3], str(place.work), *command[4:]]


def test_pod_takes_number_and_rendezvous_from_the_operator(tmp_path: Path) -> None:
    place = Place(tmp_path, "it's $(HOME) $$ x.yaml", "a $(touch HURT) b")
    done = place.shell(*pod_command(place), more=POD)
    assert done.returncode == 0, done.stderr
    whole = ["run", f"./{place.recipe.name}", *SETTINGS, "--machine-rank", "1", "--rendezvous", "it-node-0-0.it:29400"]
    assert place.called(1) == [str(place.work), *whole]


@pytest.mark.parametrize("code", [75, 5])
def test_pod_ends_with_the_code_of_the_run(tmp_path: Path, code: int) -> None:
    place = Place(tmp_path)
    place.codes(1, code)
    assert place.shell(*pod_command(place), more=POD).returncode == code


def test_pod_that_is_told_to_stop_passes_it_on_and_waits(tmp_path: Path) -> None:
    place = Place(tmp_path)
    place.hold(1)
    command = pod_command(place)
    child = subprocess.Popen(command, env={**place.environment, **POD}, stdout=subprocess.DEVNULL)
    try:
        until(lambda: "start 1" in place.events())
        child.send_signal(signal.SIGTERM)
        assert child.wait(60) == 75
        assert "TERM 1" in place.events()
    finally:
        child.kill()
        child.wait()
