"""What this machine has: cores, memory, disk, GPUs, and the number formats it computes fast.

Layer 1. Memory and cores respect a container's limits (cgroup v2), which `os.cpu_count` and `/proc/meminfo` do not.
"""

from __future__ import annotations

import math
import os
import platform
import shutil
from pathlib import Path

from fulltune.records import Record


class Gpu(Record):
    """A CUDA device."""

    name: str
    memory_bytes: int
    bf16: bool


class Machine(Record):
    """What is here. Free memory is a snapshot."""

    cpu: str
    num_cores: int
    memory_bytes: int
    memory_available_bytes: int
    cpu_bf16_fast: bool
    """True when the CPU multiplies bf16 in hardware (AVX512-BF16, AMX or Arm BF16); without it bf16 is slower than
    fp32."""
    gpus: tuple[Gpu, ...] = ()


def here() -> Machine:
    """Look at this machine. Imports torch only to ask for GPUs."""
    total, available = _memory_bytes()
    flags, name = _cpu()
    return Machine(
        cpu=name,
        num_cores=_num_cores(),
        memory_bytes=total,
        memory_available_bytes=available,
        cpu_bf16_fast=bool(flags & {"avx512_bf16", "amx_bf16", "bf16"}),
        gpus=_gpus(),
    )


def disk_free_bytes(path: Path) -> int:
    """Free bytes on the disk of `path`, or of its nearest existing parent."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def _gpus() -> tuple[Gpu, ...]:
    import torch

    if not torch.cuda.is_available():
        return ()
    found = (torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count()))
    # bf16 needs compute capability 8.0 (Ampere); older cards emulate it slowly.
    return tuple(Gpu(name=gpu.name, memory_bytes=gpu.total_memory, bf16=gpu.major >= 8) for gpu in found)


def _cpu() -> tuple[set[str], str]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        return set(), platform.processor() or platform.machine()
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    return flags, fields.get("model name") or platform.machine()


def _num_cores() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _read("/sys/fs/cgroup/cpu.max").split()
    if len(quota) == 2 and quota[0] != "max":
        cores = min(cores, max(1, math.ceil(int(quota[0]) / int(quota[1]))))
    return cores


def _memory_bytes() -> tuple[int, int]:
    fields = {line.split(":")[0]: line.split()[1] for line in _read("/proc/meminfo").splitlines() if ":" in line}
    if "MemTotal" in fields:
        total = int(fields["MemTotal"]) * 1024
        available = int(fields.get("MemAvailable", fields["MemTotal"])) * 1024
    else:  # not Linux
        total = available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit, used = _read("/sys/fs/cgroup/memory.max").strip(), _read("/sys/fs/cgroup/memory.current").strip()
    if limit.isdigit() and used.isdigit():
        total = min(total, int(limit))
        # Page cache counts as used in a cgroup although the kernel gives it back on demand.
        cache = next(
            (int(x.split()[1]) for x in _read("/sys/fs/cgroup/memory.stat").splitlines() if x[:5] == "file "), 0
        )
        available = min(available, int(limit) - int(used) + cache)
    return total, available


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""
