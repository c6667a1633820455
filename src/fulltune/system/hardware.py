from __future__ import annotations

import errno
import math
import os
import platform
import shutil
import timeit
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path

import psutil

from fulltune.errors import FulltuneError
from fulltune.records.base import Record
from fulltune.system import memory
from fulltune.text import counted, listed

BUSY = 1.5
"""Load per core above which measured speeds are unreliable; this command itself causes about 1."""

ALIKE = 0.9
"""Minimum ratio of memory sizes at which machines count as equal."""
BF16_FROM, TENSOR_CORES_FROM = (8, 0), (7, 0)
"""Minimum compute capabilities for bf16 (Ampere) and tensor cores (Volta). Without tensor cores, torch's fp16 is no
faster than fp32 (cuBLAS's COMPUTE_32F)."""


_REPEATS = 8
_LEAST = (
    *("num_cores", "memory_bytes", "memory_available_bytes", "cpu_bf16_speedup", "cpu_flops"),
    "memory_bytes_per_second",
)


class Gpu(Record):
    name: str
    memory_bytes: int
    capability: tuple[int, int]
    """CUDA compute capability; for AMD, the architecture as torch reports it."""
    free_bytes: int | None = None
    """Memory that no other program uses, or None if not measured."""

    @property
    def bf16(self) -> bool:
        """True if the GPU computes in bf16, which GPUs before Ampere only emulate."""
        return self.capability >= BF16_FROM

    @property
    def label(self) -> str:
        return "{} (compute capability {}.{})".format(self.name, *self.capability)

    @property
    def available_bytes(self) -> int:
        return self.memory_bytes if self.free_bytes is None else self.free_bytes


class Machine(Record):
    """The hardware of a machine, with the memory that was free when measured."""

    cpu: str
    num_cores: int
    memory_bytes: int
    memory_available_bytes: int
    cpu_bf16_speedup: float
    """Measured speed of bf16 training on the CPU, relative to fp32."""
    gpus: tuple[Gpu, ...] = ()
    """GPUs in torch's order; local process i uses GPU i."""
    cpu_flops: float = 0.0
    """Measured FLOP/s of fp32 matrix products; 0 if unknown."""
    memory_bytes_per_second: float = 0.0
    """Measured bytes per second that a copy in host memory reads and writes; 0 if unknown."""
    shared_memory_bytes: int | None = None
    """Free bytes in /dev/shm, through which processes pass tensors."""
    load_average: float = 0.0
    differs: str = ""
    """In what the machines differ that this record combines, such as `cores`."""

    @property
    def busy_warning(self) -> str:
        """A warning if other programs slow this machine down, or an empty string."""
        effect = "measured speeds are too low and the chosen precision may be wrong"
        return busy_warning(self.load_average, self.num_cores, effect)


def busy_warning(load: float, cores: int, effect: str = "training is slow") -> str:
    """Return a warning if the load average shows that other programs use the cores, or an empty string."""
    if load < BUSY * cores:
        return ""
    busy = f"this machine is busy (load {load:.0f} on {counted(cores, 'core')}), so {effect}"
    return f"{busy}; if other programs keep running, try OMP_NUM_THREADS=1"


def machine_load() -> tuple[float, int]:
    """Return the load average of this process's cores, and their number."""
    # The load is that of the whole computer, but a container or CPU set may have only some of its cores.
    cores = num_cores()
    return (os.getloadavg()[0] * cores / (os.cpu_count() or 1) if hasattr(os, "getloadavg") else 0.0), cores


def measure_machine() -> Machine:
    """Measure this machine's memory, speed and GPUs; this imports torch."""
    total, available = total_and_free_memory()
    flops, copied, load = cpu_rates()
    lines = (line.partition(":") for line in memory.read_lines("/proc/cpuinfo"))
    names = [value.strip() for key, _, value in lines if key.strip() == "model name"]
    return Machine(
        cpu=names[0] if names else platform.processor() or platform.machine(),
        num_cores=num_cores(),
        memory_bytes=total,
        memory_available_bytes=available,
        cpu_bf16_speedup=cpu_bf16_speedup(),
        gpus=_list_gpus(),
        cpu_flops=flops,
        memory_bytes_per_second=copied,
        load_average=load,
        shared_memory_bytes=shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else None,
    )


def weakest_machine(machines: Sequence[Machine]) -> Machine:
    """Combine machines into one record with the lowest value of each property."""
    shared = [one.shared_memory_bytes for one in machines if one.shared_memory_bytes is not None]
    return Machine(
        cpu=" / ".join(dict.fromkeys(one.cpu for one in machines)),
        # The fewest GPUs of any machine, because local process i uses GPU i.
        gpus=tuple(_weakest_gpu(gpus) for gpus in zip(*(one.gpus for one in machines), strict=False)),
        load_average=max(one.load_average for one in machines),
        shared_memory_bytes=min(shared, default=None),
        differs=_describe_differences(machines),
        **{name: min(getattr(one, name) for one in machines) for name in _LEAST},
    )


def _weakest_gpu(gpus: Sequence[Gpu]) -> Gpu:
    """Return the oldest GPU's record, with the smallest memory of all GPUs."""
    oldest = min(gpus, key=lambda gpu: (gpu.capability, gpu.memory_bytes))
    free = min((gpu.available_bytes for gpu in gpus if gpu.free_bytes is not None), default=None)
    return oldest.model_copy(update={"memory_bytes": min(gpu.memory_bytes for gpu in gpus), "free_bytes": free})


def _describe_differences(machines: Sequence[Machine]) -> str:
    """Return in what the machines differ, such as `GPUs and cores`, or an empty string if they do not."""
    memory, free = ([getattr(one, name) for one in machines] for name in ("memory_bytes", "memory_available_bytes"))
    differing = {
        "GPUs": len({tuple(sorted(gpu.name for gpu in one.gpus)) for one in machines}) > 1,
        "cores": len({one.num_cores for one in machines}) > 1,
        "memory": min(memory) < ALIKE * max(memory),
        "free memory": min(free) < ALIKE * max(free),
    }
    return listed([name for name, differs in differing.items() if differs])


@cache
def cpu_bf16_speedup() -> float:
    """Return the speedup of a training step under bf16 autocast over fp32, measured once per process."""
    small = _measure_bf16_speedup(rows=64, width=128)
    # Without bf16 instructions, a larger product would take seconds and not change the answer.
    return small if small < 0.5 else _measure_bf16_speedup(rows=256, width=512)


@cache
def cpu_rates() -> tuple[float, float, float]:
    """Return the FLOP/s of fp32 products, the bytes per second of a copy, and the load before measuring."""
    load, _ = machine_load()
    return (*_measure_cpu_rates(), load)


def _measure_cpu_rates(rows: int = 256, width: int = 512, megabytes: int = 64) -> tuple[float, float]:
    """Measure the FLOP/s of fp32 matrix products and a copy's bytes per second."""
    import torch

    draw = torch.Generator().manual_seed(0)
    inputs, weights = (torch.randn(*shape, generator=draw) for shape in ((rows, width), (4 * width, width)))
    source = torch.ones(megabytes * 2**18)
    target = torch.empty_like(source)
    product = min(timeit.repeat(lambda: torch.nn.functional.linear(inputs, weights), number=1, repeat=_REPEATS))
    copy = min(timeit.repeat(lambda: target.copy_(source), number=1, repeat=_REPEATS))
    return 2 * rows * width * 4 * width / product, 2 * source.nbytes / copy


def _measure_bf16_speedup(rows: int, width: int) -> float:
    """Measure the speedup on two linear layers with `rows` inputs of size `width`."""
    import torch
    from torch.nn import functional as F

    # A separate generator, so that a run's random numbers do not depend on this measurement.
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randn(rows, width, generator=draw)
    up = torch.randn(4 * width, width, generator=draw).requires_grad_()
    down = torch.randn(width, 4 * width, generator=draw).requires_grad_()

    def run_training_step(bf16: bool) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            outputs = F.linear(F.gelu(F.linear(inputs, up)), down)
        loss = outputs.float().square().mean()
        torch.autograd.grad(loss, (up, down))

    # Alternate, so that other programs slow both equally.
    times = [
        [timeit.timeit(partial(run_training_step, bf16), number=1) for bf16 in (False, True)] for _ in range(_REPEATS)
    ]
    fp32, bf16 = map(min, zip(*times, strict=True))
    return fp32 / bf16


def disk_free_bytes(path: Path) -> int:
    """Return the free bytes on the disk of `path` or its nearest existing parent."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def _list_gpus() -> tuple[Gpu, ...]:
    import torch

    if not torch.cuda.is_available():
        return ()
    devices = [
        (torch.cuda.get_device_properties(index), torch.cuda.mem_get_info(index)[0])
        for index in range(torch.cuda.device_count())
    ]
    return tuple(
        Gpu(name=gpu.name, memory_bytes=gpu.total_memory, capability=(gpu.major, gpu.minor), free_bytes=free)
        for gpu, free in devices
    )


def num_cores() -> int:
    """Return the number of cores that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = "".join(memory.read_lines("/sys/fs/cgroup/cpu.max")).split()
    if len(quota) == 2 and quota[0] != "max":
        cores = min(cores, max(1, math.ceil(int(quota[0]) / int(quota[1]))))
    return cores


def total_and_free_memory() -> tuple[int, int]:
    """Return the total and free bytes of memory for this process."""
    total, available, *_ = psutil.virtual_memory()
    limit, used = ("".join(memory.read_lines(f"/sys/fs/cgroup/memory.{name}")) for name in ("max", "current"))
    if limit.isdigit() and used.isdigit():
        total = min(total, int(limit))
        # A cgroup counts page cache as used, although the kernel frees it on demand.
        counts = dict(line.split(" ", 1) for line in memory.read_lines("/sys/fs/cgroup/memory.stat"))
        available = min(available, int(limit) - int(used) + int(counts.get("file", 0)))
    own = memory.process_memory_limit() or total
    return min(total, own), min(available, own)


_DISK_FULL = ("No space left", "PytorchStreamWriter failed", "enforce fail at inline_container")
_MAYBE_DISK_FULL = ("iostream error", "requested and")
"""Error texts of C++ and numpy that mean a full disk only if less than 1 MiB is free."""


def is_disk_full(error: BaseException, folder: Path) -> bool:
    """Return whether an exception means that the disk of this folder is full."""
    text = "" if isinstance(error, FulltuneError) else str(error)
    no_room = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    may_be = any(words in text for words in _MAYBE_DISK_FULL) and disk_free_bytes(folder) < 2**20
    return no_room or may_be or any(words in text for words in _DISK_FULL)
