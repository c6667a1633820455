"""The least of several machines, which a plan for all of them takes."""

from __future__ import annotations

from typing import Any

from fulltune.system.hardware import Gpu, Machine, weakest_machine

GIB = 2**30


def gpu(name: str, gib: int, capability: tuple[int, int], free: int | None = None) -> Gpu:
    return Gpu(
        name=name, memory_bytes=gib * GIB, capability=capability, free_bytes=None if free is None else free * GIB
    )


def machine(*gpus: Gpu, **changes: Any) -> Machine:
    values = {"cpu": "x", "num_cores": 16, "memory_bytes": 64 * GIB, "memory_available_bytes": 60 * GIB, **changes}
    return Machine(**{"cpu_bf16_speedup": 1.5, "cpu_flops": 2e12, "memory_bytes_per_second": 2e10, **values}, gpus=gpus)


def test_machines_that_are_alike_are_one_of_them() -> None:
    one = machine(gpu("A100", 80, (8, 0), 79), shared_memory_bytes=GIB)
    assert weakest_machine([one]) == weakest_machine([one] * 3) == one
    busier = one.model_copy(update={"memory_available_bytes": 58 * GIB})
    assert weakest_machine([one, busier]) == busier, "what the system takes differs a little everywhere"


def test_each_number_is_the_least() -> None:
    first = machine(cpu="x", num_cores=64, memory_available_bytes=10 * GIB, shared_memory_bytes=4 * GIB, cpu_flops=1e12)
    second = machine(cpu="y", memory_bytes=32 * GIB, cpu_bf16_speedup=0.2, memory_bytes_per_second=1e9)
    found = weakest_machine([first, second])
    assert found == machine(
        cpu="x / y",
        memory_bytes=32 * GIB,
        memory_available_bytes=10 * GIB,
        cpu_bf16_speedup=0.2,
        cpu_flops=1e12,
        memory_bytes_per_second=1e9,
        shared_memory_bytes=4 * GIB,
        differs="cores, memory and free memory",
    )


def test_gpus_are_as_many_as_the_poorest_has_and_the_least_at_each_number() -> None:
    a100, t4 = gpu("A100", 80, (8, 0), 79), gpu("T4", 15, (7, 5), 14)
    found = weakest_machine([machine(a100, t4, a100), machine(gpu("A100", 80, (8, 0), 20), a100)])
    assert found.gpus == (gpu("A100", 80, (8, 0), 20), t4)
    assert found.differs == "GPUs"
    large_and_old = gpu("V100", 32, (7, 0), 31)
    [mixed] = weakest_machine([machine(gpu("RTX 4080", 16, (8, 9), 15)), machine(large_and_old)]).gpus
    assert mixed == gpu("V100", 16, (7, 0), 15), "its type of the computations, the other's memory"
    assert weakest_machine([machine(a100), machine()]).gpus == ()
    assert weakest_machine([machine(gpu("A100", 80, (8, 0))), machine(a100)]).gpus[0].available_bytes == 79 * GIB
