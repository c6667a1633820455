"""`fulltune selfcheck`: what the hardware decides, run on the user's own machine and put on one page.

It goes the whole line of a run. `CHECKS` is the list of what runs, on each device that torch sees.
"""

from __future__ import annotations

import datetime
import time
import warnings
from collections.abc import Callable
from functools import partial

from fulltune.errors import InterruptedRun
from fulltune.selfcheck import attention, precision, processes, training
from fulltune.selfcheck.devices import Device, NotHere, SelfCheck, devices, environment
from fulltune.selfcheck.page import CheckResult, Page, Status, markdown, without_names
from fulltune.system.run_folder import hide_progress_bars

__all__ = ["CHECKS", "CheckResult", "Page", "markdown", "run"]

_IN_EACH_TYPE = (
    ("precision", "{} product of 256 x 256 against float64", precision.product),
    ("steps", "20 AdamW steps of a tiny Llama in {}", precision.steps),
)
CHECKS: tuple[SelfCheck, ...] = (
    *(
        SelfCheck(name, ran.format(kind), partial(function, precision=kind))
        for name, ran, function in _IN_EACH_TYPE
        for kind in precision.TYPES
    ),
    SelfCheck("speed", "two linear layers, forward and backward, bf16 against fp32", precision.speed),
    SelfCheck("attention", "sdpa, as torch chooses, against eager", partial(attention.sdpa, backend=None)),
    *(
        SelfCheck("attention", f"sdpa {kind} against eager", partial(attention.sdpa, backend=kind))
        for kind in attention.BACKENDS
    ),
    SelfCheck("attention", "flash_attention_2 against eager", attention.flash_attention_2),
    SelfCheck(
        "checkpointing", "tiny BERT with dropout, with and without activation checkpointing", training.checkpointing
    ),
    SelfCheck("memory", "planned bytes against measured ones, AdamW on 6 M parameters", training.planned_bytes),
    SelfCheck("resume", "a run that stops and goes on against an unbroken one", training.resume),
    SelfCheck("processes", "all-reduce over two processes (gloo; nccl on GPUs)", processes.all_reduce),
    SelfCheck("compile", "torch.compile of a tiny Llama against eager", processes.compiled),
)


def run(listener: Callable[[str], None] = lambda line: None) -> Page:
    """Run every check on every device.

    Args:
        listener: Called with the name of each check before it runs.

    Returns:
        The page; a check that raised an error is on it as failed, with the error's text.
    """
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
    return Page(
        date=datetime.date.today().isoformat(),
        environment=environment(),
        findings=tuple(findings),
        seconds=round(time.monotonic() - started, 1),
    )


def _finding(check: SelfCheck, device: Device) -> CheckResult:
    started = time.monotonic()
    status: Status
    try:
        passed, text = check.function(device)
        status = "pass" if passed else "fail"
    except NotHere as reason:
        status, text = "not here", without_names(str(reason))
    except InterruptedRun:
        raise KeyboardInterrupt from None
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
