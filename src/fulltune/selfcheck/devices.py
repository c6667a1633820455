"""The devices that torch sees here, and the versions that results depend on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from fulltune.system import hardware
from fulltune.system.run_folder import PACKAGES
from fulltune.text import counted, format_bytes

EXTRAS = ("triton", "flash-attn", "deepspeed", "bitsandbytes")
"""Named on the page where they are installed."""


@dataclass(frozen=True)
class Device:
    """One kind of device; the checks run on its first one."""

    label: str
    """`cpu`, `cuda`, `rocm` or `mps`."""
    type: str
    """Its name in torch; ROCm calls itself `cuda` there."""
    count: int = 1


class Result(NamedTuple):
    """How a check that ran ended."""

    passed: bool
    text: str


class NotHere(Exception):
    """This check cannot run here; the message says why."""


@dataclass(frozen=True)
class SelfCheck:
    """A line of the page."""

    name: str
    ran: str
    function: Callable[[Device], Result]


def devices() -> tuple[Device, ...]:
    """The CPU, and what else torch can compute on."""
    found = [Device("cpu", "cpu")]
    if torch.cuda.is_available():
        found.append(Device("rocm" if torch.version.hip else "cuda", "cuda", torch.cuda.device_count()))
    if torch.backends.mps.is_available():
        found.append(Device("mps", "mps"))
    return tuple(found)


def environment() -> dict[str, str]:
    """What is here, without host name, user name or paths."""
    machine = hardware.here()
    system = f"macOS {platform.mac_ver()[0]}" if platform.system() == "Darwin" else platform.system()
    installed = [f"{name} {version}" for name in (*PACKAGES, *EXTRAS) if (version := _version(name))]
    facts = {
        "fulltune": importlib.metadata.version("fulltune"),
        "python": f"{platform.python_version()} on {system} {platform.machine()}",
        "packages": ", ".join(installed),
        "cpu": f"{machine.cpu}, {counted(machine.num_cores, 'core')}, {counted(torch.get_num_threads(), 'thread')}, "
        f"{torch.backends.cpu.get_cpu_capability()}",
        "memory": f"{format_bytes(machine.memory_bytes)}, {format_bytes(machine.memory_available_bytes)} free",
    }
    for index, gpu in enumerate(machine.gpus):
        driver = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
        major, minor = torch.cuda.get_device_capability(index)
        facts[f"gpu {index}"] = f"{gpu.name}, {format_bytes(gpu.memory_bytes)}, capability {major}.{minor}, {driver}"
    if torch.backends.mps.is_available():
        facts["gpu"] = f"Apple, {format_bytes(torch.mps.recommended_max_memory())} usable"
    if len(facts) == 5:
        facts["gpu"] = "torch sees none"
    variables = [
        name for name in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES") if name in os.environ
    ]
    if variables:
        facts["set"] = ", ".join(f"{name}={os.environ[name]}" for name in variables)
    return facts


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
