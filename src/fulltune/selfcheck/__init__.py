"""`fulltune selfcheck`: what the hardware decides, run on the user's own machine and put on one page.

Layer 4: it goes the whole line. `CHECKS` is the list of what runs, on each device that torch sees.
"""

from __future__ import annotations

import datetime
import time
import warnings
from collections.abc import Callable
from functools import partial

from fulltune.errors import InterruptedRun
from fulltune.selfcheck import attention, precision, processes, training
from fulltune.selfcheck.devices import Check, Device, NotHere, devices, environment
from fulltune.selfcheck.page import Finding, Page, Status, markdown, without_names
from fulltune.system.run_folder import hide_progress_bars

__all__ = ["CHECKS", "Finding", "Page", "markdown", "run"]

CHECKS: tuple[Check, ...] = (
    *(
        Check("precision", f"{name} product of 256 x 256 against float64", partial(precision.product, precision=name))
        for name in precision.TYPES
    ),
    Check("speed", "two linear layers, forward and backward, bf16 against fp32", precision.speed),
    *(
        Check("steps", f"20 AdamW steps of a tiny Llama in {name}", partial(precision.steps, precision=name))
        for name in precision.TYPES
    ),
    Check("attention", "sdpa, as torch chooses, against eager", partial(attention.sdpa, backend=None)),
    *(
        Check("attention", f"sdpa {name} against eager", partial(attention.sdpa, backend=name))
        for name in attention.BACKENDS
    ),
    Check("attention", "flash_attention_2 against eager", attention.flash_attention_2),
    Check("checkpointing", "tiny BERT with dropout, with and without activation checkpointing", training.checkpointing),
    Check("memory", "planned bytes against measured ones, AdamW on 6 M parameters", training.planned_bytes),
    Check("resume", "a run that stops and goes on against an unbroken one", training.resume),
    Check("processes", "all-reduce over two processes (gloo; nccl on GPUs)", processes.all_reduce),
    Check("compile", "torch.compile of a tiny Llama against eager", processes.compiled),
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


def _finding(check: Check, device: Device) -> Finding:
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
    return Finding(
        device=device.label,
        check=check.name,
        ran=check.ran,
        status=status,
        result=text,
        seconds=round(time.monotonic() - started, 1),
    )
