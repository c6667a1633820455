"""Attention kernels: each one that is here gives the logits and gradients of the plain one."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from fulltune.inference.run import autocast
from fulltune.selfcheck import tiny
from fulltune.selfcheck.devices import Device, NotHere, Result
from fulltune.selfcheck.precision import relative_error

BACKENDS = {
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
BOUNDS = {"fp32": 1e-4, "bf16": 5e-2}
_ABSENT = ("No available kernel", "No viable backend")
"""How torch says that a kernel does not exist here, or not for this call."""


def sdpa(device: Device, backend: str | None) -> Result:
    """Torch's attention with one backend, or with the one that torch chooses."""
    chosen = contextlib.nullcontext() if backend is None else sdpa_kernel(BACKENDS[backend])
    # On a GPU these two are written for 16-bit types only; on a CPU flash takes fp32 as well.
    half = device.type == "cuda" and backend in ("flash", "cudnn")
    with chosen:
        return compare(device, "sdpa", "bf16" if half else "fp32")


def flash_attention_2(device: Device) -> Result:
    """The package flash-attn, as `model.attn_implementation: flash_attention_2` uses it."""
    from transformers import utils

    if device.type != "cuda":
        raise NotHere("needs a GPU of NVIDIA or AMD")
    if not utils.is_flash_attn_2_available():  # type: ignore[attr-defined]  # exported lazily
        raise NotHere("the package flash-attn is not installed")
    return compare(device, "flash_attention_2", "bf16")


def compare(device: Device, implementation: str, precision: str) -> Result:
    """Logits and gradients against eager attention in fp32, for rows of one length and for padded ones.

    bf16 means fp32 weights under autocast, as in training.
    """
    ids = tiny.tokens(device.type, rows=3)
    mask = torch.ones_like(ids)
    mask[1, 15:] = 0
    mask[2, 5:] = 0
    plain = tiny.decoder(device.type, attn_implementation="eager")
    model = tiny.decoder(device.type, attn_implementation=implementation)
    bound = BOUNDS[precision]
    errors: dict[str, float] = {}
    words = []
    for name, given in (("unpadded", None), ("padded", mask)):
        expected = _compute(plain, ids, given)
        try:
            with autocast(model, precision):
                found = _compute(model, ids, given)
        except RuntimeError as error:
            if not any(text in str(error) for text in _ABSENT):
                raise
            if name == "unpadded":
                raise NotHere("torch has no such kernel here") from None
            words.append(f"{name}: no kernel")
            continue
        errors[name] = max(relative_error(one, other) for one, other in zip(found, expected, strict=True))
        words.append(f"{name} off by {errors[name]:.0e}")
    kind = "" if precision == "fp32" else f" in {precision}"
    return Result(all(error <= bound for error in errors.values()), f"{', '.join(words)}{kind}; bound {bound:.0e}")


def _compute(model: Any, ids: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the real tokens [tokens, vocabulary], and all gradients in one vector."""
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    outputs, gradients = tiny.backward(model, input_ids=ids, attention_mask=mask, labels=ids.masked_fill(~real, -100))
    return outputs.logits[real].detach(), gradients
