"""What is written, given to real programs: OpenSSH's server on loopback, the parsers of Kubeflow and SkyPilot. Each is
skipped where it is not installed; `.ci/run` and `make test-long` install them."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import tiny, untraced_command
from tests.unit.launch.jobs import NASTY, Place
from tests.unit.launch.test_scripts import SETTINGS, SETUP, until

pytestmark = pytest.mark.long

PATHS = os.environ.get("PYTHONPATH", "")
"""Where this process has fulltune from, if it is not installed."""
SBIN = f"{os.environ['PATH']}:/usr/sbin:/sbin"


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def program(name: str) -> str:
    found = shutil.which(name, path=SBIN)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


# ---- ssh -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Server:
    """An sshd that lets one key in."""

    port: int
    key: Path


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    sshd, folder, port = program("sshd"), tmp_path_factory.mktemp("sshd"), free_port()
    for name in ("host", "key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    lines = [f"Port {port}", "ListenAddress 127.0.0.1", f"HostKey {folder}/host", f"PidFile {folder}/pid"]
    lines += [f"AuthorizedKeysFile {folder}/key.pub", "StrictModes no", "PasswordAuthentication no", "UsePAM no"]
    (folder / "config").write_text("\n".join(lines))
    Path("/run/sshd").mkdir(exist_ok=True)
    child = subprocess.Popen([sshd, "-D", "-f", folder / "config", "-E", folder / "log"])
    try:
        until(lambda: (folder / "pid").exists())
        yield Server(port, folder / "key")
    finally:
        child.terminate()
        child.wait()


def machines(place: Place, server: Server, *hosts: str, recipe_as_it_is: bool = False) -> Path:
    """The script for these hosts, edited as its user does."""
    said = place.launch("ssh", *(() if recipe_as_it_is else SETTINGS))
    assert said.code == 0, said.err
    port = free_port() if recipe_as_it_is else 29500
    script = place.edit(
        "ssh.sh",
        *((f"    EDIT-HOST-{rank}\n", f"    {host}\n") for rank, host in enumerate(hosts)),
        ("rendezvous=EDIT-HOST-0:29500", f"rendezvous=127.0.0.1:{port}"),
        ("ssh=(ssh ", f"ssh=(ssh -i {server.key} -p {server.port} "),
        (SETUP, f"export PATH={place.programs}:$PATH PYTHONPATH={PATHS}\n"),
    )
    # No file of the user's is touched: keys of hosts are taken as they are.
    ssh = shutil.which("ssh")
    quiet = "-o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR"
    place.program("ssh", f'#!/bin/sh\nexec {ssh} {quiet} "$@"\n')
    return script


@pytest.fixture
def nasty(tmp_path: Path) -> Place:
    return Place(tmp_path, f"{NASTY}.yaml", NASTY)


def test_ssh_starts_all_and_ends_with_0(nasty: Place, server: Server) -> None:
    script = machines(nasty, server, "127.0.0.1", "localhost")
    done = nasty.shell("bash", script)
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        more = ["--machine-rank", str(rank), "--rendezvous", "127.0.0.1:29500"]
        assert nasty.called(rank) == [str(nasty.work), "run", f"./{nasty.recipe.name}", *SETTINGS, *more]
    assert not list(nasty.notes.parent.rglob("HURT"))


@pytest.mark.parametrize("which", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_ssh_signal_to_the_script_or_the_whole_group_has_all_machines_save(
    nasty: Place, server: Server, which: signal.Signals
) -> None:
    """Also where the script itself is killed, or the connection ends: then nobody waits for the code."""
    script = machines(nasty, server, "127.0.0.1", "localhost")
    nasty.hold(0, 1)
    with (nasty.notes / "said").open("w") as said:
        words = ["bash", str(script)]
        child = subprocess.Popen(words, env=nasty.environment, stdout=said, stderr=said, start_new_session=True)
    until(lambda: {"start 0", "start 1"} <= set(nasty.events()))
    if which == signal.SIGTERM:
        child.send_signal(which)
    else:
        os.killpg(child.pid, which)
    assert child.wait(60) == (-9 if which == signal.SIGKILL else 75)
    until(lambda: {"TERM 0", "TERM 1"} <= set(nasty.events()))
    assert nasty.events().count("TERM 0") == 1


def test_ssh_trains_a_model_on_two_machines_and_reports(tmp_path: Path, server: Server, tiny_encoder: Path) -> None:
    """How two machines save and go on: `tests/invariant/test_machines.py`."""
    place = Place(tmp_path)
    place.program("fulltune", f'#!/bin/sh\nexec {sys.executable} -P {untraced_command.__file__} "$@"\n')
    tiny.write_csv(place.work / "train.csv", tiny.topic_rows(64))
    train = {"num_machines": 2, "num_processes": 2, "max_steps": 12, "save_steps": 2, "oversubscribe": True}
    evaluate = {"baselines": False, "bootstrap_samples": 100}
    tiny.write_recipe(place.recipe, tiny_encoder, "train.csv", train=train, evaluate=evaluate)
    script = machines(place, server, "127.0.0.1", "localhost", recipe_as_it_is=True)
    words = ["bash", str(script)]
    done = subprocess.run(words, env=place.environment, capture_output=True, text=True, check=False, timeout=400)
    assert done.returncode == 0, done.stderr
    [run] = place.work.glob("runs/recipe-*")
    assert (run / "report.md").exists()
    assert len(json.loads((run / "environment.json").read_text())["machines"]) == 2


# ---- Kubernetes and SkyPilot -----------------------------------------------------------------------------------


def parsers() -> Path:
    """A Python with the packages of Kubeflow and SkyPilot, which want other versions than fulltune does."""
    beside = Path(sys.prefix) / "launchers" / "bin" / "python"
    found = Path(os.environ.get("FULLTUNE_LAUNCHERS_PYTHON", beside))
    if not found.exists():
        pytest.skip("no environment with kubeflow-trainer-api and skypilot; make test-long makes it")
    return found


def parsed(*files: Path) -> subprocess.CompletedProcess[str]:
    words = [str(parsers()), str(Path(__file__).with_name("parsers.py")), *map(str, files)]
    # What SkyPilot notes of itself goes into the folder, not into the user's home.
    environment = {**os.environ, "HOME": str(files[0].parent), "PYTHONPATH": ""}
    return subprocess.run(words, capture_output=True, text=True, check=False, env=environment, timeout=300)


BUCKET = ("s3://EDIT-BUCKET", "s3://runs")


def test_manifests_are_read_by_their_own_packages(tmp_path: Path) -> None:
    """Also with every line that is off taken."""
    place = Place(tmp_path, f"{NASTY}.yaml", NASTY)
    for launcher in ("kubernetes", "skypilot"):
        said = place.launch(launcher, *SETTINGS, "--set", "train.device=cuda", "--for", "4x 8x A100-80GB")
        assert said.code == 0, said.err
    files = [place.written("trainjob.yaml"), place.edit("sky.yaml", BUCKET)]
    for off in (True, False):
        for file in () if off else files:
            text = file.read_text(encoding="utf-8")
            taken, number = re.subn(r"^( *)# (?!edit)([A-Za-z]\w*: .*)$", r"\1\2", text, flags=re.MULTILINE)
            assert number >= 4
            file.write_text(taken, encoding="utf-8")
        done = parsed(*files)
        assert done.returncode == 0, done.stderr
        for reader in ("runtime", "train_job", "sky_task"):
            assert f"read by {reader}\n" in done.stdout
