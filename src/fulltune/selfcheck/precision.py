"""Number formats: are products as exact as the format allows, does training work in it, is bf16 worth it?"""

from __future__ import annotations

import math

import torch

from fulltune.inference.run import autocast
from fulltune.plan.resolve import LEAST_BF16_SPEEDUP
from fulltune.selfcheck import tiny
from fulltune.selfcheck.devices import Device, NotHere, Result
from fulltune.system import hardware

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BOUNDS = {"fp32": 1e-5, "bf16": 1e-2, "fp16": 2e-3}
"""Largest relative error of a product: several times that of rounding once; TensorFloat-32 (5e-4) is no fp32."""


def product(device: Device, precision: str) -> Result:
    """Error of a product against float64, relative to the size of the product."""
    draw = torch.Generator().manual_seed(0)
    one, other = (torch.randn(256, 256, generator=draw) for _ in range(2))
    exact = one.double() @ other.double()
    here = [matrix.to(device.type, TYPES[precision]) for matrix in (one, other)]
    error = relative_error((here[0] @ here[1]).cpu(), exact)
    return Result(error <= BOUNDS[precision], f"relative error {error:.1e}, bound {BOUNDS[precision]:.0e}")


def speed(device: Device) -> Result:
    """The measurement that `precision: auto` decides by on a CPU."""
    if device.type != "cpu":
        return Result(True, f"bf16 about {hardware.measure_bf16_speedup(device.type):.1f} times as fast as fp32")
    ratio = hardware.bf16_speedup()
    chosen = "bf16" if ratio >= LEAST_BF16_SPEEDUP else "fp32"
    return Result(True, f"bf16 about {ratio:.1f} times as fast as fp32: precision auto is {chosen}")


def steps(device: Device, precision: str, count: int = 20) -> Result:
    """Learn a batch by heart: the loss falls, every parameter moves, nothing stops being finite."""
    if precision == "fp16" and device.type != "cuda":
        raise NotHere(f"refused on {device.label}: fp16 needs a GPU's loss scaling")
    model, ids = tiny.decoder(device.type), tiny.tokens(device.type)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    losses = []
    for _ in range(count):
        with autocast(model, precision):
            loss = model(input_ids=ids, labels=ids).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    after = list(model.parameters())
    finite = all(torch.isfinite(parameter).all() for parameter in after) and all(map(math.isfinite, losses))
    moved = sum(not torch.equal(old, new) for old, new in zip(before, after, strict=True))
    text = f"loss {losses[0]:.2f} to {losses[-1]:.2f}, {moved} of {len(after)} parameters moved"
    if not finite:
        text += ", NaN or infinite values"
    return Result(finite and moved == len(after) and losses[-1] < 0.9 * losses[0], text)


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Size of the difference over that of the exact tensor; infinite for NaN. On the CPU: MPS has no float64."""
    found, exact = found.detach().cpu().double(), exact.detach().cpu().double()
    error = float((found - exact).norm() / exact.norm())
    return error if math.isfinite(error) else math.inf
