"""Memory and cores as a container limits them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from fulltune.system import hardware, memory

K = 1024


def pretend(monkeypatch: pytest.MonkeyPatch, files: dict[str, str]) -> None:
    monkeypatch.setattr(memory, "read_lines", lambda path: files.get(path, "").splitlines())
    monkeypatch.setattr(hardware.psutil, "virtual_memory", lambda: (16000 * K, 8000 * K, 50.0))


@pytest.mark.parametrize(
    ("limit", "used", "stat", "expected"),
    [
        ("", "", "", (16000 * K, 8000 * K)),
        ("max\n", "5000", "", (16000 * K, 8000 * K)),
        (f"{4000 * K}\n", f"{1000 * K}\n", "anon 5\nfile 0\n", (4000 * K, 3000 * K)),
        (f"{4000 * K}", f"{3000 * K}", f"anon 1\nfile {2000 * K}\nfile_mapped 7\n", (4000 * K, 3000 * K)),
        (f"{64000 * K}", "0", "file 0\n", (16000 * K, 8000 * K)),
    ],
    ids=["no cgroup", "no limit", "limit", "cache counts as free", "limit above the machine"],
)
def test_memory_respects_the_cgroup(
    monkeypatch: pytest.MonkeyPatch, limit: str, used: str, stat: str, expected: tuple[int, int]
) -> None:
    cgroup = "/sys/fs/cgroup/memory."
    pretend(monkeypatch, {cgroup + "max": limit, cgroup + "current": used, cgroup + "stat": stat})
    assert hardware.total_and_free_memory() == expected


@pytest.mark.parametrize(
    ("quota", "cores"),
    [
        ("", 8),
        ("max 100000", 8),
        ("200000 100000", 2),
        ("150000 100000", 2),
        ("50000 100000", 1),
        ("9900000 100000", 8),
    ],
)
def test_cores_respect_the_cgroup(monkeypatch: pytest.MonkeyPatch, quota: str, cores: int) -> None:
    monkeypatch.setattr(hardware.os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    pretend(monkeypatch, {"/sys/fs/cgroup/cpu.max": quota})
    assert hardware.num_cores() == cores


def test_machine_is_described() -> None:
    machine = hardware.measure_machine()
    assert machine.num_cores >= 1
    assert 0 < machine.memory_available_bytes <= machine.memory_bytes
    assert hardware.disk_free_bytes(Path("/not/there/yet")) > 0


@pytest.mark.parametrize(("small", "large", "expected"), [(0.1, 9.0, 0.1), (0.9, 3.0, 3.0)])
def test_bf16_speedup_of_a_cpu_without_bf16_is_known_from_a_small_product(
    monkeypatch: pytest.MonkeyPatch, small: float, large: float, expected: float
) -> None:
    monkeypatch.setattr(hardware, "_measure_bf16_speedup", lambda rows, width: small if rows == 64 else large)
    assert hardware.cpu_bf16_speedup.__wrapped__() == expected


def test_memory_respects_the_limit_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, {})
    unlimited = memory.resource.RLIM_INFINITY
    limits = {memory.resource.RLIMIT_DATA: 3000 * K, memory.resource.RLIMIT_AS: unlimited}
    monkeypatch.setattr(memory.resource, "getrlimit", lambda kind: (limits[kind], unlimited))
    assert hardware.total_and_free_memory() == (3000 * K, 3000 * K)


@pytest.mark.parametrize(("host", "load", "is_busy"), [(64, 48.0, False), (64, 128.0, True), (4, 9.0, True)])
def test_a_part_of_a_computer_is_as_busy_as_the_whole(
    monkeypatch: pytest.MonkeyPatch, host: int, load: float, is_busy: bool
) -> None:
    """Four cores of a container: the load is that of all tasks of the host."""
    monkeypatch.setattr(hardware, "_measure_cpu_rates", lambda: (1e9, 1e9))
    monkeypatch.setattr(hardware, "num_cores", lambda: 4)
    monkeypatch.setattr(os, "cpu_count", lambda: host)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(hardware, "cpu_rates", hardware.cpu_rates.__wrapped__)  # measured anew
    assert bool(hardware.measure_machine().busy_warning) == is_busy


@pytest.mark.parametrize(("load", "cores", "is_busy"), [(9.0, 2, True), (2.6, 2, False), (9.0, 16, False)])
def test_machine_is_busy_when_others_want_its_cores(load: float, cores: int, is_busy: bool) -> None:
    said = hardware.measure_machine().model_copy(update={"load_average": load, "num_cores": cores}).busy_warning
    assert said.startswith("this machine is busy (load 9 on 2 cores)") == is_busy == bool(said)


def test_speeds_are_measured_without_drawing_a_random_number() -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    assert min(hardware._measure_cpu_rates(rows=16, width=16, megabytes=1)) > 0
    assert hardware.cpu_bf16_speedup.__wrapped__() > 0
    assert torch.equal(torch.rand(1), expected)
