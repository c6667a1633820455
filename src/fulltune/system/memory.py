from __future__ import annotations

import contextlib
import errno
import gc
import logging
import re
import resource
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from fulltune.errors import DoesNotFitError, SetupError
from fulltune.recipe.functions import describe_error


def read_lines(path: str) -> list[str]:
    """Return a file's lines, or an empty list if it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def process_memory_limit() -> int | None:
    """Return the user's memory limit per process in bytes (`ulimit -d`, `ulimit -v`), or None without a limit."""
    kinds = (resource.RLIMIT_DATA, resource.RLIMIT_AS)
    limits = [limit for limit, _ in map(resource.getrlimit, kinds) if limit != resource.RLIM_INFINITY]
    return min(limits, default=None)


class Meter:
    """Measures the growth of a process's or a GPU's memory since its creation."""

    def __init__(self, device: str) -> None:
        self.on_gpu = device == "cuda"
        self.reset_peak()
        self.base_bytes = self.bytes_in_use()

    def bytes_in_use(self) -> int:
        """Return the process's resident memory, or torch's reserved memory on a GPU."""
        if self.on_gpu:
            import torch

            return int(torch.cuda.memory_reserved())
        return status_bytes("VmRSS") or process_peak_bytes()

    def peak_bytes(self) -> int:
        """Return the highest number of bytes in use since `reset_peak`."""
        if self.on_gpu:
            import torch

            return int(torch.cuda.max_memory_reserved())
        return status_bytes("VmHWM") or process_peak_bytes()

    def growth_bytes(self) -> int:
        return max(0, self.peak_bytes() - self.base_bytes)

    def reset_peak(self) -> None:
        if self.on_gpu:
            import torch

            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            return
        with contextlib.suppress(OSError):  # not Linux or not permitted, so the peak is the whole process's
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def status_bytes(key: str) -> int:
    """Return a size in bytes from /proc/self/status by its name, or 0 if missing."""
    values = dict(line.split(":", 1) for line in read_lines("/proc/self/status"))  # such as `VmRSS: 123 kB`
    return 1024 * int(values.get(key, "0").split()[0])


def process_peak_bytes() -> int:
    """Return the peak memory of this process since its start."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


T = TypeVar("T")
_log = logging.getLogger(__name__)

_OUT_OF_MEMORY_TEXT = re.compile(
    r"DefaultCPUAllocator"
    r"|\bout of memory\b"  # CUDA, HIP, MPS, NCCL
    r"|CUBLAS_STATUS_ALLOC_FAILED|CUDNN_STATUS_ALLOC_FAILED"
    r"|std::bad_alloc"  # C++; torch raises it as a RuntimeError
    r"|cannot allocate memory"  # the system's message, for example when safetensors maps a file
    # oneDNN; "primitive descriptor" instead means an unsupported operation
    r"|could not create a (memory object|primitive(?! descriptor))",
    re.IGNORECASE,
)
_LAST_WORDS = re.compile(
    r"what\(\):\s+std::bad_alloc"  # C++ in a separate thread, which aborts the process
    r"|memory allocation of \d+ bytes failed"  # Rust (tokenizers, safetensors), which aborts as well
    r"|Cannot allocate memory"
)
_NO_THREAD = re.compile(r"can't start new thread|Thread creation failed: Resource temporarily unavailable")
_LOST = re.compile(r"error return without exception set|without setting an exception")
_UNITS = ("bytes", "KiB", "MiB", "GiB")
_ALLOCATION_SIZE = re.compile(r"tried to allocate ([\d.]+) ?(bytes|KiB|MiB|GiB)?|malloc of size (\d+)", re.IGNORECASE)


def call_own(place: str, function: Callable[..., Any], *arguments: object, **named: object) -> Any:
    """Call the user's function, and raise `SetupError`, which names `place`, if it fails for lack of anything but
    memory."""
    try:
        return function(*arguments, **named)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise SetupError(f"{place} failed with {describe_error(error)}") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception means that memory ran out."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    if isinstance(error, SystemError):  # a C extension has lost the MemoryError
        return _LOST.search(str(error)) is not None and memory_is_limited()
    if not isinstance(error, (RuntimeError, OSError)) and type(error).__name__ != "SafetensorError":
        return False
    text = str(error)
    # A thread needs memory for its stack. Without a memory limit, the limit on threads was reached.
    return _OUT_OF_MEMORY_TEXT.search(text) is not None or (_NO_THREAD.search(text) is not None and memory_is_limited())


def log_shows_out_of_memory(lines: Sequence[str], limited: bool) -> bool:
    """Return whether a dead process's log shows that memory ran out; `limited` is True under a memory limit."""
    text = "\n".join(lines)
    return _LAST_WORDS.search(text) is not None or (limited and _NO_THREAD.search(text) is not None)


def memory_is_limited() -> bool:
    return process_memory_limit() is not None


def requested_bytes(text: str) -> int:
    """Return the failed allocation's size in bytes from an error's text, or 0 if the text does not state it."""
    match = _ALLOCATION_SIZE.search(text)
    if match is None:
        return 0
    return int(match[3]) if match[3] else int(float(match[1]) * 1024 ** _UNITS.index(match[2] or "bytes"))


def count_oom_kills() -> int:
    """Return how many processes the kernel killed in this container, or on this machine, because memory ran out."""
    groups = dict(line.split(":", 2)[1:] for line in read_lines("/proc/self/cgroup"))
    for file in (
        f"/sys/fs/cgroup{groups.get('', '/')}/memory.events",
        "/sys/fs/cgroup/memory.events",  # inside a container, the group's path is hidden
        f"/sys/fs/cgroup/memory{groups.get('memory', '/')}/memory.oom_control",
        "/sys/fs/cgroup/memory/memory.oom_control",
        "/proc/vmstat",
    ):
        for line in read_lines(file):
            name, _, count = line.partition(" ")
            if name == "oom_kill":
                return int(count)
    return 0


def run_with_smaller_batches(activity: str, batch_size: int, run: Callable[[int], T]) -> T:
    """Return `run(batch_size)`, halving the size each time memory runs out. Re-raise the error at batch size 1."""
    while True:
        try:
            return run(batch_size)
        except Exception as error:
            if batch_size == 1 or not is_out_of_memory(error):
                raise
            traceback.clear_frames(error.__traceback__)  # the frames refer to tensors of the failed batch
        batch_size = batch_size // 2
        release_unused()
        _log.warning("%s: memory ran out; continuing with batches of %d rows", activity, batch_size)


def release_unused() -> None:
    """Give memory that no object uses back to the GPU's other processes."""
    gc.collect()
    if (torch := sys.modules.get("torch")) is not None:
        torch.cuda.empty_cache()  # has no effect if no GPU is in use


@contextlib.contextmanager
def explain_out_of_memory(activity: str, remedy: str) -> Iterator[None]:
    """Turn an out-of-memory error in the block into a `DoesNotFitError`."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        cause = " ".join(str(error).split())[:300] or "MemoryError"
        raise DoesNotFitError(f"{activity}: memory ran out: {cause}; {remedy}") from None


ALLOCATOR_NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
EXPANDABLE = "expandable_segments:True"


def allocator_variables(variables: Mapping[str, str], system: str, release: str) -> dict[str, str]:
    """Return environment variables for expandable GPU memory segments, which avoid fragmentation.

    The result is empty if the user has set such a variable, outside Linux, and on WSL (pytorch issue 192330).
    """
    if system != "Linux" or "microsoft" in release.lower() or any(name in variables for name in ALLOCATOR_NAMES):
        return {}
    # torch 2.9 reads only the second name, later versions the first.
    return dict.fromkeys(ALLOCATOR_NAMES[:2], EXPANDABLE)
