"""Memory that ran out is recognised in whatever words, and nothing else is taken for it."""

from __future__ import annotations

import errno
import logging
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from fulltune.errors import DoesNotFitError
from fulltune.system import memory
from fulltune.system.memory import (
    count_oom_kills,
    is_out_of_memory,
    log_shows_out_of_memory,
    requested_bytes,
    run_with_smaller_batches,
)
from fulltune.train.usage import memory_limit


class CudaError(RuntimeError):
    """Stands for a library's own kind."""


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ..."),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"),
        RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: ..."),
        RuntimeError("std::bad_alloc"),
        RuntimeError("unable to mmap 268435536 bytes from file <m.safetensors>: Cannot allocate memory (12)"),
        RuntimeError("could not create a primitive"),
        RuntimeError("could not create a memory object"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        SafetensorError("Error while deserializing: Cannot allocate memory (os error 12)"),
        CudaError("out of memory"),
    ],
    ids=repr,
)
def test_is_out_of_memory_knows_the_words_of_each_library(error: BaseException) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("could not create a primitive descriptor for a matmul primitive"),
        RuntimeError("shapes cannot be multiplied"),
        ValueError("the text says: out of memory"),
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("can't start new thread"),  # without a limit it is not memory
        SystemError("error return without exception set"),
        KeyboardInterrupt(),
    ],
    ids=repr,
)
def test_is_out_of_memory_leaves_other_errors_alone(error: BaseException) -> None:
    assert not is_out_of_memory(error)


def test_thread_that_cannot_start_means_memory_where_memory_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "memory_is_limited", lambda: True)

    assert is_out_of_memory(RuntimeError("can't start new thread"))
    assert is_out_of_memory(SystemError("error return without exception set"))


def test_numpy_and_pyarrow_raise_kinds_of_memory_error() -> None:
    import pyarrow as pa

    with pytest.raises(MemoryError) as of_numpy:
        np.ones((2**40, 2**10))

    assert is_out_of_memory(of_numpy.value)
    assert is_out_of_memory(pa.lib.ArrowMemoryError("malloc of size 8589934592 failed"))


@pytest.mark.parametrize(
    ("lines", "limited", "expected"),
    [
        (["terminate called after throwing an instance of 'std::bad_alloc'", "  what():  std::bad_alloc"], False, True),
        (["memory allocation of 1073741824 bytes failed"], False, True),
        (["libgomp: Thread creation failed: Resource temporarily unavailable"], True, True),
        (["libgomp: Thread creation failed: Resource temporarily unavailable"], False, False),
        (["ValueError: broken"], True, False),
        ([], True, False),
    ],
)
def test_last_words_of_a_process_say_whether_memory_ran_out(lines: list[str], limited: bool, expected: bool) -> None:
    assert log_shows_out_of_memory(lines, limited) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4294967296 bytes. Error code 12", 2**32),
        ("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 23.64 GiB", 5 * 2**29),
        ("CUDA out of memory. Tried to allocate 20.00 MiB.", 20 * 2**20),
        ("malloc of size 8589934592 failed", 2**33),
        ("MemoryError", 0),
    ],
)
def test_requested_bytes_reads_what_could_not_be_had(text: str, expected: int) -> None:
    assert requested_bytes(text) == expected


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"/proc/self/cgroup": "0::/a", "/sys/fs/cgroup/a/memory.events": "low 0\noom 3\noom_kill 2"}, 2),
        ({"/proc/self/cgroup": "0::/", "/sys/fs/cgroup//memory.events": "oom_kill 4"}, 4),
        ({"/proc/self/cgroup": "0::/hidden", "/sys/fs/cgroup/memory.events": "oom_kill 5"}, 5),
        (
            {
                "/proc/self/cgroup": "4:memory:/b\n0::/",
                "/sys/fs/cgroup/memory/b/memory.oom_control": "under_oom 0\noom_kill 1",
            },
            1,
        ),
        ({"/proc/vmstat": "nr_free_pages 9\noom_kill 7"}, 7),
        ({}, 0),
    ],
)
def test_oom_kills_are_counted_as_near_to_the_process_as_possible(
    files: dict[str, str], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "read_lines", lambda path: files.get(path, "").splitlines())

    assert count_oom_kills() == expected


# ---- smaller batches -------------------------------------------------------------------------------------------


def test_with_smaller_batches_halves_until_it_fits(caplog: pytest.LogCaptureFixture) -> None:
    sizes: list[int] = []

    def run(size: int) -> str:
        sizes.append(size)
        if size > 3:
            raise MemoryError
        return "done"

    with caplog.at_level(logging.WARNING):
        assert run_with_smaller_batches("scoring", 13, run) == "done"

    assert sizes == [13, 6, 3]
    assert [record.getMessage() for record in caplog.records] == [
        "scoring: memory ran out; continuing with batches of 6 rows",
        "scoring: memory ran out; continuing with batches of 3 rows",
    ]


def test_with_smaller_batches_frees_what_the_failed_batch_held() -> None:
    import weakref

    held: list[Any] = []

    def run(size: int) -> int:
        if held:
            assert held[0]() is None, "the tensor of the batch before is still there"
            return size
        tensor = torch.ones(3)
        held.append(weakref.ref(tensor))
        raise MemoryError

    assert run_with_smaller_batches("scoring", 4, run) == 2


@pytest.mark.parametrize("error", [MemoryError, ValueError])
def test_with_smaller_batches_gives_up_at_one_row_and_on_other_errors(error: type[Exception]) -> None:
    sizes: list[int] = []

    def run(size: int) -> None:
        sizes.append(size)
        raise error

    with pytest.raises(error):
        run_with_smaller_batches("scoring", 2, run)
    assert sizes == ([2, 1] if error is MemoryError else [2])


# ---- the limit -------------------------------------------------------------------------------------------------

LIMITED = """
import threading
import torch
from fulltune.system.memory import status_bytes
from fulltune.system.memory import is_out_of_memory
from fulltune.train.usage import memory_limit

MIB = 2**20
torch.mm(torch.ones(64, 64), torch.ones(64, 64))
limit, began = status_bytes("VmRSS") + 200 * MIB, status_bytes("RssAnon")
fits = 0
end = threading.Event()
with memory_limit(limit, "cpu", print):
    for _ in range(16):  # their stacks of 8 MiB, hardly used, would take half of it
        threading.Thread(target=end.wait, daemon=True).start()
    try:
        kept = [torch.ones(MIB // 4) for _ in range(150)]
        fits = len(kept)
        kept += [torch.ones(MIB // 4) for _ in range(100)]
    except RuntimeError as error:
        assert is_out_of_memory(error), error
        # Mapped files do not count: how many of their pages are there is the kernel's choice.
        print("ran out after", fits, "with", (status_bytes("RssAnon") - began) // MIB < 208)
kept += [torch.ones(MIB // 4) for _ in range(300)]
print("free again")
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux can hold a process to a limit")
def test_held_to_counts_the_whole_process_and_ends_with_the_block() -> None:
    done = subprocess.run([sys.executable, "-c", LIMITED], capture_output=True, text=True, check=True)

    assert done.stdout.splitlines() == ["ran out after 150 with True", "free again"]


def test_held_to_less_than_the_libraries_is_refused() -> None:
    with (
        pytest.raises(DoesNotFitError, match=r"train.memory_limit: 10 MiB, but Python and its libraries alone use "),
        memory_limit(10 * 2**20, "cpu", print),
    ):
        pass


def test_held_to_nothing_and_held_to_where_it_cannot_be_enforced(monkeypatch: pytest.MonkeyPatch) -> None:
    from fulltune.train import usage

    before, warnings = resource.getrlimit(resource.RLIMIT_DATA), []
    monkeypatch.setattr(usage, "status_bytes", lambda key: 0)

    with memory_limit(None, "cpu", warnings.append):
        assert resource.getrlimit(resource.RLIMIT_DATA) == before
    with memory_limit(2**30, "cpu", warnings.append):
        assert resource.getrlimit(resource.RLIMIT_DATA) == before

    assert warnings == ["train.memory_limit: only the plan respects the limit, because this system cannot enforce it"]
