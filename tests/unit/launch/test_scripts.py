"""What is written, run with stand-ins for ssh and Slurm: names stay whole, signals arrive, exit codes are read."""

from __future__ import annotations

import re
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


@pytest.fixture
def hosts(tmp_path: Path) -> Path:
    file = tmp_path / "hosts"
    file.write_text("one\nme@two:2222\n")
    return file


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


def test_scripts_with_nasty_names_are_sound(nasty: Place, hosts: Path) -> None:
    setup = ("--with", "setup=export A='a b'\ntrue")
    assert nasty.launch("--slurm", *SETTINGS, *setup, "--with", 'comment=it\'s #1 "x" $y').code == 0
    assert nasty.launch("--ssh", hosts, *SETTINGS, *setup, "--with", "identity=a key").code == 0
    sound(nasty.written("slurm.sh"))
    sound(nasty.written("ssh.sh"))


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
    assert nasty.launch("--slurm", *SETTINGS, "--with", "wait_for_machines=5m", "--with", "setup=export A=b").code == 0
    done = slurm(nasty)()
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        place, *words = nasty.called(rank)
        assert place == str(nasty.work)
        more = ["--wait-for-machines", "5m", "--machine-rank", str(rank), "--rendezvous", "n1:10007"]
        assert words == ["run", str(nasty.recipe), *SETTINGS, *more]
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
    assert place.launch("--slurm").code == 0
    for rank in (0, 1):
        place.codes(rank, codes[rank])
    done = slurm(place)(state, SLURM_RESTART_COUNT=restarts)
    assert done.returncode == code
    asked = place.notes / "scontrol"
    assert (asked.read_text() if asked.exists() else "") == "requeue 20007\n" * requeued
    assert not list(place.work.glob("*.interrupted"))


def test_slurm_options_stand_in_the_lines_that_sbatch_reads(tmp_path: Path) -> None:
    place = Place(tmp_path)
    given = ("partition=a,b", "account=us", "time=2:00:00", "mem=0", "exclusive=true", "gres=gpu:a100:8", "notice=5m")
    given += ("comment=two words", "options=--mail-type=END --licenses='x y'", "name=My Run!")
    assert place.launch("--slurm", *(word for one in given for word in ("--with", one))).code == 0
    lines = re.findall(r"^#SBATCH (.*)$", place.written("slurm.sh").read_text(), re.MULTILINE)
    assert lines == [
        "--job-name=my-run",
        "--nodes=2",
        "--ntasks-per-node=1",
        f"--output={place.work}/my-run-%j.log",
        "--open-mode=append",
        "--requeue",
        "--signal=TERM@300",
        "--exclusive",
        "--partition=a,b",
        "--account=us",
        "--time=2:00:00",
        "--mem=0",
        "--gres=gpu:a100:8",
        "--comment='two words'",
        "--mail-type=END",
        "--licenses='x y'",
    ]


# ---- ssh -------------------------------------------------------------------------------------------------------

SSH = r"""#!/bin/bash
# What sshd does: the last argument is a line for a shell.
printf '%s\n' "${@:1:$#-1}" >>"NOTES/ssh"
if [[ " $* " == *" absent "* ]]; then echo "ssh: connect to host absent: No route to host" >&2; exit 255; fi
exec env --default-signal=INT,TERM,HUP sh -c "${@: -1}"
"""


def over_ssh(place: Place) -> None:
    place.program("ssh", SSH.replace("NOTES", str(place.notes)))


def test_ssh_starts_each_machine_with_its_number_and_the_first_as_rendezvous(nasty: Place, hosts: Path) -> None:
    over_ssh(nasty)
    how = (
        "--with",
        "user=you",
        "--with",
        "setup=export A='a b'",
        "--with",
        "identity=a key",
        "--with",
        "rendezvous=h:7",
    )
    assert nasty.launch("--ssh", hosts, *SETTINGS, *how).code == 0
    done = nasty.shell("bash", nasty.written("ssh.sh"))
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        place, *words = nasty.called(rank)
        assert place == str(nasty.work)
        assert words == ["run", f"./{nasty.recipe.name}", *SETTINGS, "--machine-rank", str(rank), "--rendezvous", "h:7"]
        assert "A=a b\n" in (nasty.notes / f"env-{rank}").read_text()
    told = (nasty.notes / "ssh").read_text()
    assert "BatchMode=yes" in told
    assert "-i\na key\n" in told
    assert "--\nyou@one\n" in told
    assert "-p\n2222\n--\nme@two\n" in told


def test_ssh_names_all_hosts_that_do_not_answer_or_lack_something_and_starts_none(tmp_path: Path, hosts: Path) -> None:
    place = Place(tmp_path)
    over_ssh(place)
    hosts.write_text("absent\ntwo\n")
    (place.programs / "fulltune").unlink()
    assert place.launch("--ssh", hosts).code == 0
    done = place.shell("bash", place.written("ssh.sh"), more={"PATH": f"{place.programs}:/usr/bin:/bin"})
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "machine 0, absent: does not answer: ssh: connect to host absent: No route to host",
        "machine 1, two: has no fulltune on its PATH",
        "nothing was started",
    ]


def test_ssh_tells_the_others_to_save_when_one_fails_and_ends_with_the_code_of_the_first(
    tmp_path: Path, hosts: Path
) -> None:
    place = Place(tmp_path)
    over_ssh(place)
    assert place.launch("--ssh", hosts).code == 0
    place.codes(1, 4)
    place.hold(0)
    done = place.shell("bash", place.written("ssh.sh"))
    assert done.returncode == 75
    assert "machine 1, me@two: ended with code 4" in done.stderr
    assert {"end 1 4", "TERM 0"} <= set(place.events())
    assert len(list(place.written("ssh.logs").iterdir())) == 2


# ---- a pod -----------------------------------------------------------------------------------------------------


POD = {"PET_NODE_RANK": "1", "PET_MASTER_ADDR": "it-node-0-0.it", "PET_MASTER_PORT": "29400"}


def pod_script(place: Place) -> str:
    """What the container runs, after Kubernetes has replaced `$(NAME)` in it."""
    folder = ("--with", f"folder={place.work}")
    assert place.launch("--k8s", "--with", "image=i", "--with", "claim=c", *folder, *SETTINGS).code == 0
    job = yaml.safe_load(place.written("trainjob.yaml").read_text(encoding="utf-8"))
    command = job["spec"]["trainer"]["command"]
    assert command[:2] == ["/bin/bash", "-c"]
    return re.sub(r"\$(\$|\([^)]*\))", lambda found: "$" if found[1] == "$" else "REPLACED", command[2])


def test_pod_takes_number_and_rendezvous_from_the_operator(tmp_path: Path) -> None:
    place = Place(tmp_path, "it's $(HOME) $$ x.yaml", "a $(touch HURT) b")
    done = place.shell("bash", "-c", pod_script(place), more=POD)
    assert done.returncode == 0, done.stderr
    whole = ["run", str(place.recipe), *SETTINGS, "--machine-rank", "1", "--rendezvous", "it-node-0-0.it:29400"]
    assert place.called(1) == [str(place.work), *whole]


@pytest.mark.parametrize("code", [75, 5])
def test_pod_ends_with_the_code_of_the_run(tmp_path: Path, code: int) -> None:
    place = Place(tmp_path)
    place.codes(1, code)
    assert place.shell("bash", "-c", pod_script(place), more=POD).returncode == code


def test_pod_that_is_told_to_stop_passes_it_on_and_waits(tmp_path: Path) -> None:
    place = Place(tmp_path)
    place.hold(1)
    script = pod_script(place)
    child = subprocess.Popen(["bash", "-c", script], env={**place.environment, **POD}, stdout=subprocess.DEVNULL)
    try:
        until(lambda: "start 1" in place.events())
        child.send_signal(signal.SIGTERM)
        assert child.wait(60) == 75
        assert "TERM 1" in place.events()
    finally:
        child.kill()
        child.wait()
