"""`fulltune selfcheck`: what the hardware decides, run on the user's own machine and put on one page."""

from __future__ import annotations

import datetime
import time
import warnings
from collections.abc import Callable
from functools import partial

from fulltune.selfcheck import checks, processes
from fulltune.selfcheck.page import (
    CheckResult,
    Device,
    NotHere,
    Page,
    SelfCheck,
    Status,
    devices,
    environment,
    in_blocks,
    without_names,
)
from fulltune.system.run_folder import hide_progress_bars

__all__ = ["CHECKS", "Page", "in_blocks", "run"]

CHECKS: tuple[SelfCheck, ...] = (
    *(
        SelfCheck(name, ran.format(kind), partial(function, precision=kind))
        for name, ran, function in (
            ("precision", "{} product of 256 x 256 against float64", checks.product),
            ("steps", "20 AdamW steps of a tiny Llama in {}", checks.steps),
        )
        for kind in checks.TYPES
    ),
    SelfCheck("speed", "two linear layers, forward and backward, bf16 against fp32", checks.speed),
    SelfCheck("attention", "sdpa, as torch chooses, against eager", partial(checks.sdpa, backend=None)),
    *(
        SelfCheck("attention", f"sdpa {kind} against eager", partial(checks.sdpa, backend=kind))
        for kind in checks.BACKENDS
    ),
    SelfCheck("attention", "flash_attention_2 against eager", checks.flash_attention_2),
    SelfCheck("memory", "planned bytes against measured ones, AdamW on 6 M parameters", checks.planned_bytes),
    SelfCheck("processes", "all-reduce over two processes (gloo; nccl on GPUs)", processes.all_reduce),
)


def run(listener: Callable[[str], None] = lambda line: None) -> Page:
    """Run every check on every device, after its name was given to the listener; one that raised an error failed."""
    started = time.monotonic()
    hide_progress_bars()
    findings = []
    with warnings.catch_warnings():
        # Torch warns once for each reason why a kernel is not taken; the page says which ones are not here.
        warnings.simplefilter("ignore")
        for device in devices():
            for check in CHECKS:
                listener(f"{device.label}: {check.ran}")
                findings.append(_finding(check, device))
    today, seconds = datetime.date.today().isoformat(), round(time.monotonic() - started, 1)
    return Page(date=today, environment=environment(), findings=tuple(findings), seconds=seconds)


def _finding(check: SelfCheck, device: Device) -> CheckResult:
    started = time.monotonic()
    status: Status
    try:
        passed, text = check.function(device)
        status = "pass" if passed else "fail"
    except NotHere as reason:
        status, text = "not here", without_names(str(reason))
    except Exception as error:  # whatever breaks here is what the user wants to know
        status, text = "fail", without_names(f"{type(error).__name__}: {error}")
    return CheckResult(
        device=device.label,
        check=check.name,
        ran=check.ran,
        status=status,
        result=text,
        seconds=round(time.monotonic() - started, 1),
    )
