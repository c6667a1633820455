"""Where several processes listen, and what whoever reaches these ports can do: no code of theirs is run."""

from __future__ import annotations

import base64
import contextlib
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist

from fulltune.errors import FulltuneError
from fulltune.system.hardware import num_cores
from tests.invariant import placed
from tests.invariant.placed import FAMILIES, Place
from tests.invariant.two_machines import two_machines
from tests.train import runs

pytestmark = [pytest.mark.long, pytest.mark.skipif(num_cores() < 2, reason="needs a CPU core per process")]

LOOPBACK = {"127.0.0.1", "::1"}
STEPS = 100_000
"""More than are done: what is looked at goes on until it is told to stop."""
READ_SECONDS = 7
"""A c10d rendezvous reads its store every five."""


class Payload:
    """Whoever unpickles it writes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"echo was here > '{self.file}'",)


def listening(processes: Iterable[psutil.Process]) -> list[tuple[str, int]]:
    """Addresses and ports on which these processes and those below them wait for others."""
    tree = [one for process in processes for one in (process, *process.children(recursive=True))]
    found = {one.laddr for process in tree for one in process.net_connections("tcp") if one.status == "LISTEN"}
    return sorted((one.ip, one.port) for one in found)


def attack(ports: Iterable[tuple[str, int]], file: Path) -> int:
    """Put code into every entry of the stores on these ports, and where a c10d rendezvous would look; returns how many
    entries there were."""
    found: list[str] = []

    def write(address: str, port: int) -> None:
        # Where no store answers, but a process's own connections, this waits or raises.
        with contextlib.suppress(RuntimeError):
            store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=2))
            keys = store.list_keys()
            found.extend(keys)
            ids = {word for key in keys for word in key.replace("/", " ").split()}
            for key in {*keys, *(f"torch.rendezvous.{one}" for one in ids)}:
                store.set(key, base64.b64encode(pickle.dumps(Payload(file))).decode())

    attackers = [threading.Thread(target=write, args=place, daemon=True) for place in ports]
    for one in attackers:
        one.start()
    for one in attackers:
        one.join(timeout=3)
    return len(found)


def test_attack_runs_code_where_a_store_is_unpickled(tmp_path: Path) -> None:
    """Else the tests below would show nothing."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--no-python", "sleep", "60"]
    launcher = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        process, until = psutil.Process(launcher.pid), time.monotonic() + 60
        while not process.children() and time.monotonic() < until:
            time.sleep(0.1)
        attack([("127.0.0.1", port) for _, port in listening([process])], tmp_path / "file")
        while not (tmp_path / "file").exists() and time.monotonic() < until:
            time.sleep(0.1)
    finally:
        for one in (*psutil.Process(launcher.pid).children(), launcher):
            with contextlib.suppress(psutil.NoSuchProcess):  # the attack may have ended it
                one.kill()
        launcher.wait()
    assert (tmp_path / "file").exists()


@pytest.mark.parametrize("name", ["ddp:2", pytest.param("zero2:2", marks=pytest.mark.zero)])
def test_one_machine_listens_on_its_loopback_alone_and_runs_nobodys_code(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place(name)
    if place.lacks:
        pytest.skip(place.lacks)
    # Meant for several machines, and for somebody else's torchrun.
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    monkeypatch.setenv("PET_STANDALONE", "1")
    found, attacked = list[tuple[str, int]](), list[int]()

    def look() -> None:
        found.extend(listening(psutil.Process().children()))
        attacked.append(attack(found, tmp_path / "file"))
        time.sleep(READ_SECONDS)
        signal.raise_signal(signal.SIGTERM)

    with contextlib.suppress(FulltuneError):  # told to stop, or disturbed
        placed.train(tmp_path, FAMILIES["encoder"], place, listener=runs.at_step(2, look), max_steps=STEPS)
    assert len(found) >= 3, "a store, and the connections of two processes"
    assert attacked[0] > 1, "entries of a store"
    assert {address for address, _ in found} <= LOOPBACK
    assert not (tmp_path / "file").exists()


def test_several_machines_listen_where_they_reach_each_other_and_run_nobodys_code(tmp_path: Path) -> None:
    own = [one.address for its in psutil.net_if_addrs().values() for one in its if one.family.name == "AF_INET"]
    host = next((address for address in own if not address.startswith("127.")), "127.0.0.1")
    with two_machines(tmp_path, FAMILIES["encoder"], Place("ddp:2"), host, max_steps=STEPS) as job:
        job.at_step(2)
        found = listening(psutil.Process(one.pid) for one in job.commands.values())
        assert {address for address, _ in found} == {host}
        assert (host, job.port) in found
        assert attack(found, tmp_path / "file") > 1, "entries of a store"
        time.sleep(READ_SECONDS)
        job.ask_to_stop(0)
        job.wait_for()
    assert not (tmp_path / "file").exists()
