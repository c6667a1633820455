from __future__ import annotations

import functools
import importlib.util
import os
import shutil
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fulltune.errors import SetupError
from fulltune.models.sharding import block_list_paths

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

MAX_COMPILATIONS = 64
"""Maximum number of compilations per block; torch's default of 8 is too low for T5."""


def missing_compiler(device: str) -> str | None:
    """Return the name of the missing compiler that `torch.compile` needs on this device, or None."""
    if device == "cuda":
        return None if importlib.util.find_spec("triton") is not None else "triton (pip install triton)"
    compilers = (os.environ.get("CXX") or "g++", "clang++")
    return None if any(map(shutil.which, compilers)) else "C++ compiler (g++ or clang++)"


def compile_blocks(model: nn.Module, device: str, *, backend: str = "inductor", dynamic: bool | None = None) -> None:
    """Compile each repeated block for training; raise `SetupError` if compiling is impossible."""
    import torch

    if missing := missing_compiler(device):
        raise SetupError(f"train.torch_compile: no {missing} was found; install it, or remove the setting")
    blocks = [block for path in block_list_paths(model) for block in model.get_submodule(path).children()]
    if not blocks:
        raise SetupError(
            f"train.torch_compile: {type(model).__name__} has no repeated blocks (no torch.nn.ModuleList with weights) "
            "to compile; remove the setting"
        )
    torch._dynamo.config.recompile_limit = MAX_COMPILATIONS
    for block in blocks:
        block.forward = _compiled_in_training(block, torch.compile(block.forward, backend=backend, dynamic=dynamic))


def _compiled_in_training(block: nn.Module, compiled: Callable[..., Any]) -> Callable[..., Any]:
    plain = block.forward
    return functools.wraps(plain)(lambda *args, **named: (compiled if block.training else plain)(*args, **named))


_KERNELS_OFF = {"cross_entropy": False, "fused_linear_cross_entropy": False}
"""Liger kernels that stay off, because fulltune has its own loss."""


def apply_liger_kernels(model: PreTrainedModel) -> None:
    """Replace modules with Liger's kernels in place, or raise `SetupError` if Liger does not support the model."""
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    from transformers.integrations.liger import apply_liger_kernel

    kind = model.config.model_type
    if kind not in MODEL_TYPE_TO_APPLY_LIGER_FN:  # transformers only logs this
        raise SetupError(
            f"train.use_liger_kernel: Liger has no kernels for models of type '{kind}'; remove the setting"
        )
    apply_liger_kernel(model, _KERNELS_OFF)
