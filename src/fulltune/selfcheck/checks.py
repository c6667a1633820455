"""Number formats, attention kernels and memory, on tiny models with random weights: nothing is read from a network."""

from __future__ import annotations

import contextlib
import gc
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from fulltune.inference.run import autocast
from fulltune.plan import memory
from fulltune.plan.resolve import LEAST_BF16_SPEEDUP
from fulltune.system import hardware
from fulltune.text import format_bytes
from fulltune.train.parent import ranks, spawn

Outcome = tuple[bool, str]
"""Whether a check passed, and what came out."""


@dataclass(frozen=True)
class Device:
    """One kind of device; the checks run on its first one."""

    label: str
    """`cpu`, `cuda` or `rocm`."""
    type: str
    """Its name in torch; ROCm calls itself `cuda` there."""
    count: int = 1


class NotHere(Exception):
    """This check cannot run here; the message says why."""


TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PRODUCT_BOUNDS = {"fp32": 1e-5, "bf16": 1e-2, "fp16": 2e-3}
"""Largest relative error of a product: several times that of rounding once; TensorFloat-32 (5e-4) is no fp32."""
BACKENDS = {
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
ATTENTION_BOUNDS = {"fp32": 1e-4, "bf16": 5e-2}


# ---- number formats --------------------------------------------------------------------------------------------


def product(device: Device, precision: str) -> Outcome:
    """Error of a product against float64, relative to the size of the product."""
    draw = torch.Generator().manual_seed(0)
    one, other = (torch.randn(256, 256, generator=draw) for _ in range(2))
    here = [matrix.to(device.type, TYPES[precision]) for matrix in (one, other)]
    error, bound = relative_error(here[0] @ here[1], one.double() @ other.double()), PRODUCT_BOUNDS[precision]
    return (error <= bound, f"relative error {error:.1e}, bound {bound:.0e}")


def speed(device: Device) -> Outcome:
    """The measurement that `precision: auto` decides by on a CPU."""
    if device.type != "cpu":
        return (True, f"bf16 about {hardware.measure_bf16_speedup(device.type):.1f} times as fast as fp32")
    ratio = hardware.bf16_speedup()
    chosen = "bf16" if ratio >= LEAST_BF16_SPEEDUP else "fp32"
    return (True, f"bf16 about {ratio:.1f} times as fast as fp32: precision auto is {chosen}")


# ---- attention kernels -----------------------------------------------------------------------------------------


def sdpa(device: Device, backend: str | None) -> Outcome:
    """Torch's attention with one backend, or with the one that torch chooses."""
    chosen = contextlib.nullcontext() if backend is None else sdpa_kernel(BACKENDS[backend])
    # On a GPU these two are written for 16-bit types only; on a CPU flash takes fp32 as well.
    half = device.type == "cuda" and backend in ("flash", "cudnn")
    with chosen:
        return compare(device, "sdpa", "bf16" if half else "fp32")


def flash_attention_2(device: Device) -> Outcome:
    """The package flash-attn, as `model.attn_implementation: flash_attention_2` uses it."""
    from transformers import utils

    if device.type != "cuda":
        raise NotHere("needs a GPU of NVIDIA or AMD")
    if not utils.is_flash_attn_2_available():  # type: ignore[attr-defined]  # exported lazily
        raise NotHere("the package flash-attn is not installed")
    return compare(device, "flash_attention_2", "bf16")


def compare(device: Device, implementation: str, precision: str) -> Outcome:
    """Logits and gradients against eager attention in fp32, for rows of one length and for padded ones.

    bf16 means fp32 weights under autocast, as in training.
    """
    ids = tokens(device.type, rows=3)
    mask = torch.ones_like(ids)
    mask[1, 15:] = 0
    mask[2, 5:] = 0
    plain = decoder(device.type, attn_implementation="eager")
    model = decoder(device.type, attn_implementation=implementation)
    bound = ATTENTION_BOUNDS[precision]
    errors: list[float] = []
    words = []
    for name, given in (("unpadded", None), ("padded", mask)):
        expected = _compute(plain, ids, given)
        try:
            with autocast(model, precision):
                found = _compute(model, ids, given)
        except RuntimeError as error:
            # How torch says that a kernel does not exist here, or not for this call.
            if not any(text in str(error) for text in ("No available kernel", "No viable backend")):
                raise
            if name == "unpadded":
                raise NotHere("torch has no such kernel here") from None
            words.append(f"{name}: no kernel")
            continue
        errors.append(max(relative_error(one, other) for one, other in zip(found, expected, strict=True)))
        words.append(f"{name} off by {errors[-1]:.0e}")
    kind = "" if precision == "fp32" else f" in {precision}"
    return (max(errors) <= bound, f"{', '.join(words)}{kind}; bound {bound:.0e}")


def _compute(model: Any, ids: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the real tokens [tokens, vocabulary], and all gradients in one vector."""
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    model.zero_grad()
    outputs = model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(~real, -100))
    outputs.loss.backward()
    found = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
    return outputs.logits[real].detach(), torch.cat(found)


# ---- memory ----------------------------------------------------------------------------------------------------


def planned_bytes(device: Device) -> Outcome:
    """Weights, gradients and AdamW's moments after a step: counted by the plan, and measured."""
    # The first product on a GPU also takes work space that stays.
    decoder(device.type)(input_ids=tokens(device.type)).logits.sum().backward()
    gc.collect()
    before = _allocated(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    model = decoder(device.type, layers=4, width=256, vocabulary=4096)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    ids = tokens(device.type, vocabulary=4096)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    planned = sum(memory.state_bytes(sum(parameter.numel() for parameter in model.parameters()), "fp32").values())
    if device.type == "cpu":
        tensors = [tensor for parameter in model.parameters() for tensor in (parameter, parameter.grad)]
        tensors += [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
        measured = sum(tensor.nbytes for tensor in tensors)
    else:
        measured = _allocated(device) - before
    error = measured / planned - 1
    text = f"planned {format_bytes(planned)}, measured {format_bytes(measured)} ({error:+.1%})"
    if device.type == "cuda":
        text += f", {format_bytes(torch.cuda.max_memory_allocated() - before)} with activations"
    return (abs(error) <= 0.05, f"{text}; bound 5%")


def _allocated(device: Device) -> int:
    if device.type == "cpu":
        return 0
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


# ---- two processes that are started as a run's are ---------------------------------------------------------------

SECONDS = 60.0


def all_reduce(device: Device) -> Outcome:
    """Two processes, started as a run with `num_processes: 2` is, add up a tensor."""
    if device.type == "cuda" and device.count < 2:
        raise NotHere("needs two GPUs, there is one")
    module = "fulltune.selfcheck.checks"
    child = subprocess.Popen(
        [sys.executable, "-m", spawn.LAUNCHER, *ranks.ONE_MACHINE, "--nproc-per-node=2", "-m", module, device.type],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        # Safe path: a file in the user's folder must not stand in for a library.
        env={**os.environ, **spawn.on_loopback(), "PYTHONSAFEPATH": "1"},
    )
    try:
        out, err = child.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        child.terminate()  # torchrun ends its workers then
        child.communicate()
        return False, f"no answer within {SECONDS:g} seconds"
    answers = [line for line in out.splitlines() if line.startswith("[")]
    if child.returncode != 0 or not answers:
        said = [line for line in err.splitlines() if "Error" in line] or err.splitlines() or ["nothing was written"]
        raise RuntimeError(f"ended with code {child.returncode}: {said[-1]}")
    found, expected = json.loads(answers[-1])
    return (found == expected, f"sum {found:g}, expected {expected:g}")


def add_up(device: str) -> tuple[float, float] | None:
    """In each process: the sum of the ranks' numbers and what it has to be; only the first rank answers."""
    import torch.distributed as dist

    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # Half of the parent's patience: a worker that waits for nothing ends by itself.
    dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=timedelta(seconds=SECONDS / 2))
    rank, size = dist.get_rank(), dist.get_world_size()
    numbers = torch.full((1000,), rank + 1.0, device=device)
    dist.all_reduce(numbers)
    answer = float(numbers.sum()), 1000.0 * size * (size + 1) / 2
    dist.destroy_process_group()
    return answer if rank == 0 else None


# ---- what the checks share -------------------------------------------------------------------------------------


@contextlib.contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """Same random numbers each time on the CPU and every GPU, without a trace outside."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


def decoder(device: str, *, layers: int = 2, width: int = 64, vocabulary: int = 128, **options: Any) -> Any:
    """A Llama with heads of 32, a size that every attention kernel takes; the same weights each time."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 32,
        max_position_embeddings=64,
    )
    with seeded():
        return AutoModelForCausalLM.from_config(config, **options).to(device)


def tokens(device: str, rows: int = 4, length: int = 24, vocabulary: int = 128) -> torch.Tensor:
    """Token ids, the same each time."""
    return torch.randint(0, vocabulary, (rows, length), generator=torch.Generator().manual_seed(1)).to(device)


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Size of the difference over that of the exact tensor; infinite for NaN."""
    found, exact = found.detach().cpu().double(), exact.detach().cpu().double()
    error = float((found - exact).norm() / exact.norm())
    return error if math.isfinite(error) else math.inf


if __name__ == "__main__" and (answer := add_up(sys.argv[1])):
    print(json.dumps(answer), flush=True)
