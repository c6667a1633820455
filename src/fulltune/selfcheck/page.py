"""The page that can be given to others: devices and versions that are here, findings, and no names or paths."""

from __future__ import annotations

import getpass
import importlib.metadata
import os
import platform
import re
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from fulltune.records.base import Record
from fulltune.report.format.blocks import Facts, Paragraph, Section, Table
from fulltune.system import hardware
from fulltune.system.run_folder import PACKAGES
from fulltune.text import counted, format_bytes

EXTRAS = ("triton", "flash-attn", "deepspeed", "bitsandbytes")
"""Named on the page where they are installed."""
Status = Literal["pass", "fail", "not here"]


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


class CheckResult(Record):
    """One check on one device."""

    device: str
    check: str
    """What is checked, in a word or two: `precision`, `attention` ..."""
    ran: str
    """What was run."""
    status: Status
    result: str
    """What came out; for `not here` the reason."""
    seconds: float


class Page(Record):
    """Everything that was found. Holds no host name, user name or path."""

    date: str
    environment: dict[str, str]
    findings: tuple[CheckResult, ...]
    seconds: float

    @property
    def failed(self) -> tuple[CheckResult, ...]:
        return tuple(finding for finding in self.findings if finding.status == "fail")

    @property
    def verdict(self) -> str:
        """One line: the counts, and how long it took."""
        passed, absent = (sum(one.status == status for one in self.findings) for status in ("pass", "not here"))
        return f"{passed} passed, {len(self.failed)} failed, {absent} not here; {self.seconds:.0f} seconds"


def in_blocks(page: Page) -> Section:
    """The page for an issue, a chat, a file or the terminal."""
    rows = tuple(
        (one.ran, one.device, one.status.replace("fail", "FAIL"), one.result, f"{one.seconds:.1f}")
        for one in page.findings
    )
    header = ("what was run", "on", "status", "result", "seconds")
    blocks = (Facts(tuple(page.environment.items())), Table("", header, rows, frozenset({4})), Paragraph(page.verdict))
    return Section("selfcheck", f"fulltune selfcheck, {page.date}", blocks)


def without_names(text: str, most: int = 300) -> str:
    """An error's text for a page that others read: no paths but their last part, no host name, no user name."""
    text = " ".join(text.split()).replace(str(Path.home()), "~")
    text = re.sub(r"(?<![\w/])~?(?:/[\w.+@~-]+)+/?", lambda found: found[0].rstrip("/").rpartition("/")[2], text)
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # an id without a name, as in some containers
        user = ""
    for name, instead in ((socket.gethostname(), "HOST"), (user, "USER")):
        if name:
            text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", instead, text)
    return text if len(text) <= most else text[: most - 2] + " …"


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
    if not machine.gpus:
        facts.setdefault("gpu", "torch sees none")
    variables = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
    if given := [f"{name}={os.environ[name]}" for name in variables if name in os.environ]:
        facts["set"] = ", ".join(given)
    return facts


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
