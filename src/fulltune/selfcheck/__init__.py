"""`fulltune selfcheck`: what the hardware decides, run on the user's own machine and put on one page.

The page can be given to others: it has devices, versions and findings, and no names or paths.
"""

from __future__ import annotations

import datetime
import getpass
import importlib.metadata
import os
import platform
import re
import socket
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from fulltune.records.base import Record
from fulltune.report.format.blocks import Facts, Paragraph, Section, Table
from fulltune.selfcheck import checks
from fulltune.selfcheck.checks import Device, NotHere, Outcome
from fulltune.system import hardware
from fulltune.system.run_folder import PACKAGES, hide_progress_bars
from fulltune.text import counted, format_bytes

EXTRAS = ("triton", "flash-attn", "deepspeed", "bitsandbytes")
"""Named on the page where they are installed."""
CHECKS: tuple[tuple[str, str, Callable[[Device], Outcome]], ...] = (
    *(
        ("precision", f"{kind} product of 256 x 256 against float64", partial(checks.product, precision=kind))
        for kind in checks.TYPES
    ),
    ("speed", "two linear layers, forward and backward, bf16 against fp32", checks.speed),
    ("attention", "sdpa, as torch chooses, against eager", partial(checks.sdpa, backend=None)),
    *(("attention", f"sdpa {kind} against eager", partial(checks.sdpa, backend=kind)) for kind in checks.BACKENDS),
    ("attention", "flash_attention_2 against eager", checks.flash_attention_2),
    ("memory", "planned bytes against measured ones, AdamW on 6 M parameters", checks.planned_bytes),
    ("processes", "all-reduce over two processes (gloo; nccl on GPUs)", checks.all_reduce),
)
"""Of each what is checked, in a word, and what is run."""


class CheckResult(Record):
    """One check on one device."""

    device: str
    check: str
    """What is checked, in a word or two: `precision`, `attention` ..."""
    ran: str
    """What was run."""
    status: Literal["pass", "fail", "not here"]
    result: str
    """What came out; for `not here` the reason."""
    seconds: float


class Page(Record):
    """Everything that was found. Holds no host name, user name or path."""

    date: str
    environment: dict[str, str]
    findings: tuple[CheckResult, ...]
    seconds: float


def run(listener: Callable[[str], None] = lambda line: None) -> Page:
    """Run every check on every device, after its name was given to the listener; one that raised an error failed."""
    started = time.monotonic()
    hide_progress_bars()
    findings = []
    with warnings.catch_warnings():
        # Torch warns once for each reason why a kernel is not taken; the page says which ones are not here.
        warnings.simplefilter("ignore")
        for device in devices():
            for name, ran, function in CHECKS:
                listener(f"{device.label}: {ran}")
                findings.append(_finding(name, ran, function, device))
    today, seconds = datetime.date.today().isoformat(), round(time.monotonic() - started, 1)
    return Page(date=today, environment=environment(), findings=tuple(findings), seconds=seconds)


def _finding(name: str, ran: str, function: Callable[[Device], Outcome], device: Device) -> CheckResult:
    started = time.monotonic()
    status: Literal["pass", "fail", "not here"]
    try:
        passed, text = function(device)
        status = "pass" if passed else "fail"
    except NotHere as reason:
        status, text = "not here", without_names(str(reason))
    except Exception as error:  # whatever breaks here is what the user wants to know
        status, text = "fail", without_names(f"{type(error).__name__}: {error}")
    seconds = round(time.monotonic() - started, 1)
    return CheckResult(device=device.label, check=name, ran=ran, status=status, result=text, seconds=seconds)


def in_blocks(page: Page) -> Section:
    """The page for an issue, a chat, a file or the terminal."""
    rows = tuple(
        (one.ran, one.device, one.status.replace("fail", "FAIL"), one.result, f"{one.seconds:.1f}")
        for one in page.findings
    )
    header = ("what was run", "on", "status", "result", "seconds")
    passed, failed, absent = (
        sum(one.status == status for one in page.findings) for status in ("pass", "fail", "not here")
    )
    verdict = Paragraph(f"{passed} passed, {failed} failed, {absent} not here; {page.seconds:.0f} seconds")
    blocks = (Facts(tuple(page.environment.items())), Table("", header, rows, frozenset({4})), verdict)
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
    if not torch.cuda.is_available():
        return (Device("cpu", "cpu"),)
    gpu = Device("rocm" if torch.version.hip else "cuda", "cuda", torch.cuda.device_count())
    return Device("cpu", "cpu"), gpu


def environment() -> dict[str, str]:
    """What is here, without host name, user name or paths."""
    machine = hardware.here()
    system = f"macOS {platform.mac_ver()[0]}" if platform.system() == "Darwin" else platform.system()
    found = importlib.metadata.distributions()
    installed = {re.sub(r"[-_.]+", "-", one.name).lower(): one.version for one in found}
    packages = [f"{name} {installed[name]}" for name in (*PACKAGES, *EXTRAS) if name in installed]
    facts = {
        "fulltune": importlib.metadata.version("fulltune"),
        "python": f"{platform.python_version()} on {system} {platform.machine()}",
        "packages": ", ".join(packages),
        "cpu": f"{machine.cpu}, {counted(machine.num_cores, 'core')}, {counted(torch.get_num_threads(), 'thread')}, "
        f"{torch.backends.cpu.get_cpu_capability()}",
        "memory": f"{format_bytes(machine.memory_bytes)}, {format_bytes(machine.memory_available_bytes)} free",
    }
    for index, gpu in enumerate(machine.gpus):
        driver = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
        major, minor = torch.cuda.get_device_capability(index)
        facts[f"gpu {index}"] = f"{gpu.name}, {format_bytes(gpu.memory_bytes)}, capability {major}.{minor}, {driver}"
    if not machine.gpus:
        facts["gpu"] = "torch sees none"
    variables = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
    if given := [f"{name}={os.environ[name]}" for name in variables if name in os.environ]:
        facts["set"] = ", ".join(given)
    return facts
