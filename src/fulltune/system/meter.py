"""How much memory this process holds, and its peak since it was last asked to begin.

On the CPU it is the resident set (VmRSS and VmHWM of /proc, which can be reset; elsewhere the highest of the whole life
of the process), on CUDA what torch's allocator has reserved.
"""

from __future__ import annotations

import contextlib
import resource
import sys
from pathlib import Path

from fulltune.system.proc import sizes_of


class Meter:
    """Measures growth from the moment it is made.

    Args:
        device: `cpu` or `cuda`.
    """

    def __init__(self, device: str) -> None:
        self.on_gpu = device == "cuda"
        self.begin()

    def begin(self) -> None:
        """Take what is held now as the ground, and forget the peak until now."""
        self.forget_peak()
        self.base_bytes = self.held_bytes()

    def held_bytes(self) -> int:
        if self.on_gpu:
            import torch

            return int(torch.cuda.memory_reserved())
        return status_bytes("VmRSS") or life_peak_bytes()

    def peak_bytes(self) -> int:
        """Most that was held since `begin`."""
        if self.on_gpu:
            import torch

            return int(torch.cuda.max_memory_reserved())
        return status_bytes("VmHWM") or life_peak_bytes()

    def growth_bytes(self) -> int:
        """Most that was held since `begin`, beyond what was held then."""
        return max(0, self.peak_bytes() - self.base_bytes)

    def forget_peak(self) -> None:
        """As if no more had been held than is held now."""
        if self.on_gpu:
            import torch

            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            return
        with contextlib.suppress(OSError):  # not Linux, or not permitted: the peak is that of the whole life
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def status_bytes(key: str) -> int:
    """A size of /proc/self/status; 0 where there is none."""
    return sizes_of("/proc/self/status").get(key, 0)


def life_peak_bytes() -> int:
    """Most that this process has held since it began."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)
