"""Faster code in the place of a model's own: its repeated blocks compiled, and Liger's Triton kernels."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
from collections.abc import Callable
from typing import Any

from fulltune.errors import SetupError
from fulltune.models.sharding import lists_of_blocks

MOST_COMPILED = 64
"""Times that the code of a block is compiled, for other kinds of it and other shapes, before torch leaves it as it is:
torch's own 8 are too few for T5, whose encoder's and decoder's, first and later blocks are of one class."""


def lacking(device: str) -> str:
    """What is missing here to compile for a `cpu` or `cuda`; empty: nothing."""
    if device == "cuda":
        return "" if importlib.util.find_spec("triton") is not None else "triton (pip install triton)"
    compilers = (os.environ.get("CXX") or "g++", "clang++")
    return "" if any(map(shutil.which, compilers)) else "C++ compiler (g++ or clang++)"


def compile_blocks(model: Any, device: str, *, backend: str = "inductor", dynamic: bool | None = None) -> int:
    """Have the model's repeated blocks run compiled in training mode alone, and count them; in generating, caches
    differ from layer to layer."""
    import torch

    if missing := lacking(device):
        raise SetupError(
            f"train.torch_compile: needs a {missing}, which is not here; install it, or remove the setting"
        )
    blocks = [block for path in lists_of_blocks(model) for block in model.get_submodule(path)]
    if not blocks:
        raise SetupError(
            f"train.torch_compile: {type(model).__name__} has no repeated blocks (no torch.nn.ModuleList with weights) "
            "to compile; remove the setting"
        )
    torch._dynamo.config.recompile_limit = MOST_COMPILED
    for block in blocks:
        block.forward = _in_training(block, torch.compile(block.forward, backend=backend, dynamic=dynamic))
    return len(blocks)


def _in_training(block: Any, compiled: Callable[..., Any]) -> Callable[..., Any]:
    plain = block.forward
    return functools.wraps(plain)(lambda *args, **named: (compiled if block.training else plain)(*args, **named))


OURS = {"cross_entropy": False, "fused_linear_cross_entropy": False}
"""Parts of Liger's that are left out."""


def put_kernels(model: Any) -> None:
    """Replace what Liger has kernels for, in place; the names of the weights stay."""
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    from transformers.integrations.liger import apply_liger_kernel

    kind = model.config.model_type
    if kind not in MODEL_TYPE_TO_APPLY_LIGER_FN:  # transformers would say it in a log alone
        raise SetupError(f"train.use_liger_kernel: Liger has no kernels for models of type '{kind}'; remove it")
    apply_liger_kernel(model, OURS)
