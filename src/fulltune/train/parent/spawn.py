from __future__ import annotations

import contextlib
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import psutil

from fulltune.system import hardware, memory
from fulltune.system.machines import MachineAddress
from fulltune.train.parent import ranks
from fulltune.train.request import Request

_JOINED = "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0"
ALLOCATOR = f"{_JOINED}:glibc.malloc.mmap_threshold=33554432"
"""glibc settings that merge freed small blocks: the peak fell from 2.13 to 1.63 GB (docs/concepts/memory.md)."""
FSDP2_ALLOCATOR = f"{_JOINED}:glibc.malloc.mmap_threshold=4194304:glibc.malloc.arena_max=1"
"""glibc settings that return freed blocks of 4 MiB or more to the system and make all threads share one heap. Two ranks
peaked at 745 MB instead of 1,020 to 1,100, but steps took 15 to 23 % longer."""

KERNEL_CACHES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64", "LRU_CACHE_CAPACITY": "64"}
"""Most kernels that oneDNN and PyTorch cache, one per shape: 1,024 took 280 MiB; a step needs under 64."""


LAUNCHER = ranks.__name__  # starts several processes


class WorkerProcess(Protocol):
    pid: int
    args: Any

    def poll(self) -> int | None: ...

    def wait(self) -> int: ...


Starter = Callable[[Request, Path], WorkerProcess]


def start_in_new_process(request: Request, log: Path, machine: MachineAddress | None = None) -> WorkerProcess:
    """Start this machine's worker processes, under torchrun if there are several here or on other machines."""
    with log.open("w", encoding="utf-8") as out:
        return subprocess.Popen(
            worker_command(request, request.folder / "request.json", machine),
            stdout=out,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env=worker_environment(request) | (multi_machine_variables(machine) if machine else loopback_variables()),
        )


def worker_command(request: Request, file: Path, machine: MachineAddress | None = None) -> list[str]:
    """Return the command that starts this machine's workers, which read the request from `file`."""
    worker = ["-m", "fulltune.train.worker.main", str(file)]
    processes = request.plan.num_processes
    torchrun = [sys.executable, "-m", LAUNCHER]
    if machine is not None:
        train = request.recipe.train
        together = ["join" if machine.rank else "listen", machine.rendezvous, f"--node-rank={machine.rank}"]
        together += [f"--nnodes={train.num_machines}", f"--nproc-per-node={train.processes_per_machine}"]
        together += [f"--rdzv-id={machine.attempt}", f"--rdzv-conf=timeout={max(60, round(machine.wait_seconds))}"]
        logs = ["--tee=3", f"--log-dir={file.parent / 'ranks' / f'machine-{machine.rank}'}"]
        return [*torchrun, *together, *logs, *worker, str(os.getpid())]
    # An engine needs torchrun's variables even for one process.
    if processes == 1 and not request.recipe.train.zero_enabled_by:
        return [sys.executable, *worker]
    return [*torchrun, *ranks.ONE_MACHINE, f"--nproc-per-node={processes}", *worker]


def worker_environment(request: Request) -> dict[str, str]:
    # A file in the user's folder must not shadow a library of the same name.
    variables = os.environ | {"PYTHONSAFEPATH": "1"}
    # A package may have installed ninja, which torch compiles with, beside a Python that is not in PATH.
    variables["PATH"] = os.pathsep.join([*filter(None, [os.environ.get("PATH")]), str(Path(sys.executable).parent)])
    if request.plan.device != "cpu":
        return variables | memory.allocator_variables(variables, platform.system(), platform.release())
    tunables = FSDP2_ALLOCATOR if request.plan.placement in ("fsdp2", "stream") else ALLOCATOR
    variables = {"GLIBC_TUNABLES": tunables} | KERNEL_CACHES | variables
    if request.plan.num_processes > 1:
        # torchrun would give each process one thread, whatever the number of cores.
        threads = max(1, hardware.num_cores() // request.recipe.train.processes_per_machine)
        variables.setdefault("OMP_NUM_THREADS", str(threads))
    if request.recipe.train.zero_enabled_by:
        variables["DS_ACCELERATOR"] = "cpu"
    return variables


def multi_machine_variables(machine: MachineAddress) -> dict[str, str]:
    """Return a machine's environment variables. They set gloo's interface, because gloo often takes the loopback."""
    variables = {"TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE": "[rank ${rank}] "}
    if (interface := _interface_with_address(machine.address)) is not None:
        variables["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME", interface)
    return variables


def loopback_variables() -> dict[str, str]:
    """Return environment variables that restrict processes to this machine's loopback."""
    name = _interface_with_address("127.0.0.1") or "lo"
    return {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": f"={name}"}


def _interface_with_address(address: str) -> str | None:
    interfaces = psutil.net_if_addrs().items()
    return next((name for name, own in interfaces if address in {one.address.partition("%")[0] for one in own}), None)


def ask_workers_to_stop(child: WorkerProcess) -> None:
    """Send SIGTERM to the workers but not to torchrun, which would kill them after 30 seconds."""
    launched = isinstance(child.args, Sequence) and LAUNCHER in map(str, child.args)
    workers = _descendants(child, recursive=False) if launched else []
    with contextlib.suppress(ProcessLookupError):
        if not workers:
            os.killpg(child.pid, signal.SIGTERM)
    for worker in workers:
        with contextlib.suppress(psutil.NoSuchProcess):
            worker.terminate()


def kill_workers(child: WorkerProcess) -> None:
    """Kill all descendant processes, even torchrun's workers, which have their own process groups."""
    below = _descendants(child, recursive=True)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    for process in below:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def _descendants(child: WorkerProcess, recursive: bool) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(child.pid).children(recursive)
    return []


def die_with_parent(parent_pid: int) -> None:
    """Make the Linux kernel kill this process when its parent ends."""
    import ctypes

    set_parent_death_signal = 1  # PR_SET_PDEATHSIG of linux/prctl.h
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != parent_pid:  # it ended just before
        os._exit(1)
