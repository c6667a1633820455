"""Kernels that round otherwise: with `NOISY_KERNELS=1`, results of matrix products, convolutions and attention move by
one unit in the last place, as another CPU's would. What a test then finds different rests on last digits.

Which elements move, and where to, depends on the operation, the shapes of what it is given, and the column alone: an
operation that is done again gives the same, and rows of one batch are treated alike.
"""

from __future__ import annotations

import contextlib
import os
import zlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

INTEGERS = {
    torch.float32: torch.int32,
    torch.float64: torch.int64,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}
"""Of the same size, in whose order neighbouring numbers of one sign are neighbours."""
aten = torch.ops.aten
COMPUTES = {
    aten.mm,
    aten.addmm,
    aten.bmm,
    aten.baddbmm,
    aten.convolution,
    aten.convolution_backward,
    aten._scaled_dot_product_flash_attention_for_cpu,
    aten._scaled_dot_product_flash_attention_for_cpu_backward,
}


class NoisyKernels(TorchDispatchMode):
    """Moves the results of what computes."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket not in COMPUTES:
            return result
        shapes = [tuple(one.shape) for one in tree_leaves(args) if isinstance(one, torch.Tensor)]
        seed = zlib.crc32(f"{func} {shapes}".encode())
        return tree_map_only(torch.Tensor, lambda one: moved(one, seed), result)


def moved(result: torch.Tensor, seed: int) -> torch.Tensor:
    """Move every third column of a tensor up by one unit in the last place, every third down, in place."""
    if (
        type(result) is not torch.Tensor
        or result.device.type != "cpu"
        or result.dtype not in INTEGERS
        or not result.ndim
    ):
        return result
    columns = (torch.arange(result.shape[-1], dtype=torch.int64) + seed) % 3 - 1
    can_move = torch.isfinite(result) & (result != 0)
    result.view(INTEGERS[result.dtype]).add_((columns * can_move).to(INTEGERS[result.dtype]))
    return result


def noise() -> AbstractContextManager[Any]:
    """Return the mode where the environment asks for it, else nothing."""
    return NoisyKernels() if os.environ.get("NOISY_KERNELS") else contextlib.nullcontext()
