from __future__ import annotations

import contextlib
import datetime
import getpass
import importlib.metadata
import json
import math
import os
import platform
import re
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from fulltune.inference.run import autocast
from fulltune.records.base import Record
from fulltune.report.format.blocks import Facts, Paragraph, Section, Table
from fulltune.system import hardware
from fulltune.system.run_folder import PACKAGES, hide_progress_bars
from fulltune.text import counted, format_bytes
from fulltune.train.parent import ranks, spawn

CheckOutcome = tuple[bool, str]
"""Whether a check passed, and its result as text."""


class NotHere(Exception):
    """Raised by a check that cannot run on this machine; the message is the reason."""


TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PRODUCT_BOUNDS = {"fp32": 1e-5, "bf16": 1e-2, "fp16": 2e-3}
"""Largest allowed relative error of a product. TensorFloat-32 (5e-4) does not pass as fp32."""
BACKENDS = {
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
VOCABULARY = 128
ATTENTION_BOUNDS = {"fp32": 1e-4, "bf16": 5e-2}


# ---- number formats --------------------------------------------------------------------------------------------


def check_matrix_product(device: str, precision: str) -> CheckOutcome:
    """Check that a matrix product's relative error against float64 is within its bound."""
    draw = torch.Generator().manual_seed(0)
    first, second = (torch.randn(256, 256, generator=draw) for _ in range(2))
    here = [matrix.to(device, TYPES[precision]) for matrix in (first, second)]
    error, bound = relative_error(here[0] @ here[1], first.double() @ second.double()), PRODUCT_BOUNDS[precision]
    return (error <= bound, f"relative error {error:.1e}, bound {bound:.0e}")


# ---- attention kernels -----------------------------------------------------------------------------------------


def check_sdpa(device: str, backend: str | None) -> CheckOutcome:
    """Check torch's scaled-dot-product attention with one of `BACKENDS`, or with torch's choice if None."""
    kernel = contextlib.nullcontext() if backend is None else sdpa_kernel(BACKENDS[backend])
    # On a GPU these two are written for 16-bit types only; on a CPU flash takes fp32 as well.
    half = device == "cuda" and backend in ("flash", "cudnn")
    with kernel:
        return compare_with_eager(device, "sdpa", "bf16" if half else "fp32")


def check_flash_attention_2(device: str) -> CheckOutcome:
    from transformers import utils

    if device != "cuda":
        raise NotHere("needs an NVIDIA or AMD GPU")
    if not utils.is_flash_attn_2_available():  # type: ignore[attr-defined]  # exported lazily
        raise NotHere("the package flash-attn is not installed")
    return compare_with_eager(device, "flash_attention_2", "bf16")


def compare_with_eager(device: str, implementation: str, precision: str) -> CheckOutcome:
    """Check an attention implementation's logits and gradients against eager fp32, with and without padding."""
    ids = torch.randint(0, VOCABULARY, (3, 24), generator=torch.Generator().manual_seed(1)).to(device)
    mask = torch.ones_like(ids)
    mask[1, 15:] = 0
    mask[2, 5:] = 0
    plain = make_llama(device, attn_implementation="eager")
    model = make_llama(device, attn_implementation=implementation)
    bound = ATTENTION_BOUNDS[precision]
    errors: list[float] = []
    words = []
    for name, attention_mask in (("unpadded", None), ("padded", mask)):
        expected = _logits_and_gradients(plain, ids, attention_mask)
        try:
            with autocast(model, precision):
                results = _logits_and_gradients(model, ids, attention_mask)
        except RuntimeError as error:
            # Torch's messages for a kernel that does not exist here, or not for this call.
            if not any(text in str(error) for text in ("No available kernel", "No viable backend")):
                raise
            if name == "unpadded":
                raise NotHere("torch has no such kernel on this machine") from None
            words.append(f"{name}: no kernel")
            continue
        errors.append(max(relative_error(one, other) for one, other in zip(results, expected, strict=True)))
        words.append(f"{name} off by {errors[-1]:.0e}")
    kind = "" if precision == "fp32" else f" in {precision}"
    return (max(errors) <= bound, f"{', '.join(words)}{kind}; bound {bound:.0e}")


def _logits_and_gradients(
    model: Any, ids: torch.Tensor, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the unpadded tokens' logits [tokens, vocabulary], and all gradients in one vector."""
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    model.zero_grad()
    outputs = model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(~real, -100))
    outputs.loss.backward()
    gradients = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
    return outputs.logits[real].detach(), torch.cat(gradients)


# ---- two processes, started as in a run --------------------------------------------------------------------------

SECONDS = 60.0


def check_all_reduce(device: str) -> CheckOutcome:
    """Check that two processes, started as for `num_processes: 2`, sum a tensor correctly."""
    if device == "cuda" and torch.cuda.device_count() < 2:
        raise NotHere("needs two GPUs, but this machine has one")
    launcher = [sys.executable, "-m", spawn.LAUNCHER, *ranks.ONE_MACHINE, "--nproc-per-node=2"]
    child = subprocess.Popen(
        [*launcher, __file__, device],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        # Safe path: a file in the user's folder must not shadow a library.
        env={**os.environ, **spawn.loopback_variables(), "PYTHONSAFEPATH": "1"},
    )
    try:
        out, err = child.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        child.terminate()  # torchrun ends its workers then
        child.communicate()
        return False, f"no answer within {SECONDS:g} seconds"
    answers = [line for line in out.splitlines() if line.startswith("[")]
    if child.returncode != 0 or not answers:
        lines = [line for line in err.splitlines() if "Error" in line] or err.splitlines() or ["nothing was written"]
        raise RuntimeError(f"the processes ended with code {child.returncode}: {lines[-1]}")
    total, expected = json.loads(answers[-1])
    return (total == expected, f"sum {total:g}, expected {expected:g}")


def sum_over_processes(device: str) -> tuple[float, float] | None:
    """Sum a tensor over all processes. Return the sum and its expected value on rank 0, None elsewhere."""
    import torch.distributed as dist

    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # Half of the parent's timeout, so that a worker that waits in vain ends by itself.
    dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=datetime.timedelta(seconds=SECONDS / 2))
    rank, size = dist.get_rank(), dist.get_world_size()
    numbers = torch.full((1000,), rank + 1.0, device=device)
    dist.all_reduce(numbers)
    answer = float(numbers.sum()), 1000.0 * size * (size + 1) / 2
    dist.destroy_process_group()
    return answer if rank == 0 else None


# ---- helpers of the checks -------------------------------------------------------------------------------------


def make_llama(device: str, **options: Any) -> Any:
    """Return a Llama with fixed random weights and head size 32, which every attention kernel supports."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, **options).to(device)


def relative_error(value: torch.Tensor, exact: torch.Tensor) -> float:
    """Return the norm of the difference divided by the norm of `exact`, or infinity for NaN."""
    value, exact = value.detach().cpu().double(), exact.detach().cpu().double()
    error = float((value - exact).norm() / exact.norm())
    return error if math.isfinite(error) else math.inf


# ---- the page ------------------------------------------------------------------------------------------------------

EXTRAS = ("triton", "flash-attn", "deepspeed", "bitsandbytes")
CHECKS: tuple[tuple[str, Callable[[str], CheckOutcome]], ...] = (
    *(
        (f"{kind} product of 256 x 256 against float64", partial(check_matrix_product, precision=kind))
        for kind in TYPES
    ),
    ("sdpa with the kernel that torch chooses, against eager", partial(check_sdpa, backend=None)),
    *((f"sdpa {kind} against eager", partial(check_sdpa, backend=kind)) for kind in BACKENDS),
    ("flash_attention_2 against eager", check_flash_attention_2),
    ("all-reduce over two processes (gloo; nccl on GPUs)", check_all_reduce),
)


class CheckResult(Record):
    device: str
    ran: str
    status: Literal["pass", "fail", "not here"]
    result: str


class Page(Record):
    """Results of all checks, without host and user names."""

    date: str
    environment: dict[str, str]
    findings: tuple[CheckResult, ...]
    seconds: float


def run_checks(listener: Callable[[str], None] = lambda line: None) -> Page:
    """Run every check on every device, announcing each to `listener`. A check that raises counts as failed."""
    started = time.monotonic()
    hide_progress_bars()
    findings = []
    with warnings.catch_warnings():
        # Torch warns for each reason why it skips a kernel; the page shows which ones are missing.
        warnings.simplefilter("ignore")
        for device in devices_to_check():
            for ran, function in CHECKS:
                listener(f"{device}: {ran}")
                findings.append(_run_check(ran, function, device))
    today, seconds = datetime.date.today().isoformat(), round(time.monotonic() - started, 1)
    return Page(date=today, environment=describe_environment(), findings=tuple(findings), seconds=seconds)


def _run_check(label: str, function: Callable[[str], CheckOutcome], device: str) -> CheckResult:
    """Run a check; if it raises an error, return a failed result."""
    status: Literal["pass", "fail", "not here"]
    try:
        passed, text = function("cpu" if device == "cpu" else "cuda")  # ROCm calls itself cuda in torch
        status = "pass" if passed else "fail"
    except NotHere as reason:
        status, text = "not here", mask_names(str(reason))
    except Exception as error:  # any failure is a result that the user wants to see
        status, text = "fail", mask_names(f"{type(error).__name__}: {error}")
    return CheckResult(device=device, ran=label, status=status, result=text)


def report_section_of_page(page: Page) -> Section:
    rows = tuple((one.ran, one.device, one.status.replace("fail", "FAIL"), one.result) for one in page.findings)
    passed, failed, absent = (
        sum(one.status == status for one in page.findings) for status in ("pass", "fail", "not here")
    )
    verdict = Paragraph(f"{passed} passed, {failed} failed, {absent} not here; {page.seconds:.0f} seconds")
    blocks = (Facts(tuple(page.environment.items())), Table("", ("check", "device", "status", "result"), rows), verdict)
    return Section("selfcheck", f"fulltune selfcheck, {page.date}", blocks)


def mask_names(text: str) -> str:
    """Shorten an error's text, and mask paths, host and user names."""
    text = " ".join(text.split()).replace(str(Path.home()), "~")
    text = re.sub(r"(?<![\w/])~?(?:/[\w.+@~-]+)+/?", lambda match: match[0].rstrip("/").rpartition("/")[2], text)
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # an id without a name, as in some containers
        user = ""
    for name, instead in ((socket.gethostname(), "HOST"), (user, "USER")):
        if name:
            text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", instead, text)
    return text if len(text) <= 300 else text[:298] + " …"


def devices_to_check() -> tuple[str, ...]:
    """Return "cpu" and, if there is a GPU, "cuda" or "rocm"."""
    if not torch.cuda.is_available():
        return ("cpu",)
    return "cpu", "rocm" if torch.version.hip else "cuda"


def describe_environment() -> dict[str, str]:
    """Return versions, hardware and relevant environment variables by name."""
    machine = hardware.measure_machine()
    distributions = importlib.metadata.distributions()
    installed = {re.sub(r"[-_.]+", "-", one.name).lower(): one.version for one in distributions}
    packages = [f"{name} {installed[name]}" for name in (*PACKAGES, *EXTRAS) if name in installed]
    facts = {
        "fulltune": importlib.metadata.version("fulltune"),
        "python": f"{platform.python_version()} on {platform.platform()}",
        "packages": ", ".join(packages),
        "cpu": f"{machine.cpu}, {counted(machine.num_cores, 'core')}, {counted(torch.get_num_threads(), 'thread')}, "
        f"{torch.backends.cpu.get_cpu_capability()}",
        "memory": f"{format_bytes(machine.memory_bytes)}, {format_bytes(machine.memory_available_bytes)} free",
    }
    driver = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    for index, gpu in enumerate(machine.gpus):
        facts[f"gpu {index}"] = f"{gpu.label}, {format_bytes(gpu.memory_bytes)}, {driver}"
    if not machine.gpus:
        facts["gpu"] = "not visible to torch"
    variables = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
    if present := [f"{name}={os.environ[name]}" for name in variables if name in os.environ]:
        facts["set"] = ", ".join(present)
    return facts


if __name__ == "__main__" and (answer := sum_over_processes(sys.argv[1])):
    print(json.dumps(answer), flush=True)
