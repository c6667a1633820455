"""torch.compile of a model's repeated blocks, each in its place.

All blocks of a kind share what was compiled for the first. What is around them stays as it is: the model's class, the
names of its tensors, and the hooks at its embeddings, its body and its head, by which prompts, the selective head and
the loss in pieces work.
"""

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
    """Have the model's repeated blocks run compiled in training mode, and count them.

    In evaluation they run as they are: generating from a cache differs from layer to layer, and would be compiled for
    each of them.

    Args:
        model: With its method's modules and hooks: what is put into a block later may be passed over.
        device: `cpu` or `cuda`.
        backend: As for `torch.compile`.
        dynamic: Sizes differ from the first pass on; None: they are taken to be fixed until they differ, which makes
            faster code where they never do, and one or two more compilations where they do.

    Raises:
        SetupError: When there are none, or no compiler.
    """
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

    @functools.wraps(plain)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return (compiled if block.training else plain)(*args, **kwargs)

    return forward
