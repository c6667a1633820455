"""DeepSpeed's compiled parts, built before training starts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fulltune.errors import SetupError


def build(on_cpu: bool, offload_optimizer: bool, phase: Callable[[str], None]) -> None:
    """Compile what is missing of the extensions that a run needs; the first process does it for all.

    Args:
        on_cpu: Training runs on the CPU.
        offload_optimizer: The optimizer runs on the CPU.
        phase: Told what takes time.

    Raises:
        SetupError: When compiling fails.
    """
    from deepspeed.accelerator import get_accelerator
    from torch.utils import cpp_extension

    names = [*(["ShareMemCommBuilder"] if on_cpu else []), *(["CPUAdamBuilder"] if offload_optimizer else [])]
    for name in names:
        builder: Any = get_accelerator().create_op_builder(name)
        if builder is None or not hasattr(builder, "jit_load") or not builder.is_compatible(verbose=False):
            continue  # DeepSpeed does without it, or says itself what is missing
        folder = Path(cpp_extension._get_build_directory(builder.name, verbose=False))
        if (lock := folder / "lock").exists():  # torch waits for it, without a word and for ever
            phase(f"waiting for {lock}: {builder.name} is being compiled; if nothing compiles, delete this file")
        if not (folder / f"{builder.name}.so").exists():
            phase(f"compiling DeepSpeed's {builder.name}, once: about a minute")
        try:
            builder.load(verbose=False)
        except (RuntimeError, OSError, ImportError) as error:
            reason = " ".join(str(error).split())[:300]
            raise SetupError(
                f"DeepSpeed's {builder.name} cannot be compiled: {reason}; it needs a C++ compiler (such as g++) and "
                f"ninja; compiled parts lie in {folder}"
            ) from error
