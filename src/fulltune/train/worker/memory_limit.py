"""Hold this process to `train.memory_limit`: what the plan promised, the system enforces.

On CUDA torch's allocator keeps to a share of the card. On the CPU RLIMIT_DATA counts what was reserved, not what was
touched, and libraries reserve far more than they use: so it is VmData now + (limit - VmRSS now). Mapped files do not
count.
"""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Callable, Iterator

import torch

from fulltune.errors import DoesNotFitError
from fulltune.system.memory import status_bytes
from fulltune.text import format_bytes


@contextlib.contextmanager
def held_to(limit_bytes: int | None, device: str, warn: Callable[[str], None]) -> Iterator[None]:
    """Inside, taking more than the limit fails like memory that ran out; entered when the libraries are imported.
    DoesNotFitError when more than that is held already."""
    with contextlib.ExitStack() as undo:  # also what is said about an error needs memory
        if limit_bytes is not None and device == "cuda":
            total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, limit_bytes / total))
            undo.callback(torch.cuda.set_per_process_memory_fraction, 1.0)
        elif limit_bytes is not None and status_bytes("VmData"):
            before = resource.getrlimit(resource.RLIMIT_DATA)
            resource.setrlimit(resource.RLIMIT_DATA, (_data_limit(limit_bytes, before), before[1]))
            undo.callback(resource.setrlimit, resource.RLIMIT_DATA, before)
        elif limit_bytes is not None:
            warn("memory limit: only the plan keeps to it, because this system cannot enforce it")
        yield


def _data_limit(limit_bytes: int, before: tuple[int, int]) -> int:
    # Has torch start its pool: a thread that finds no memory for its stack later ends the process without a word.
    torch.mm(torch.ones(512, 512), torch.ones(512, 512))
    held = status_bytes("VmRSS")
    if limit_bytes <= held:
        raise DoesNotFitError(
            f"train.memory_limit: {format_bytes(limit_bytes)}, but Python and its libraries alone hold "
            f"{format_bytes(held)}; set a higher limit"
        )
    allowed = [value for value in before if value != resource.RLIM_INFINITY]
    return min([status_bytes("VmData") + limit_bytes - held, *allowed])
