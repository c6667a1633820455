"""Cards by name, and hardware in words."""

from __future__ import annotations

import pytest

from fulltune.errors import RecipeError
from fulltune.plan import gpus
from fulltune.system.hardware import Gpu, Machine

GB, GIB = 10**9, 2**30


@pytest.mark.parametrize("gpu", gpus.GPUS, ids=lambda gpu: gpu.name)
def test_gpu_is_found_by_each_of_its_names(gpu: gpus.GpuModel) -> None:
    for name in (gpu.name, *gpu.aliases, gpu.name.lower(), gpu.name.replace(" ", "-"), f"NVIDIA {gpu.name}"):
        assert gpus.find_gpu(name) == gpu


def test_names_are_those_of_one_gpu_each() -> None:
    names = [gpus._normalised_name(name) for gpu in gpus.GPUS for name in (gpu.name, *gpu.aliases)]
    assert len({gpu.name for gpu in gpus.GPUS}) == len(gpus.GPUS) >= 25
    owners = {name: gpu.name for gpu in gpus.GPUS for name in map(gpus._normalised_name, (gpu.name, *gpu.aliases))}
    assert all(owners[gpus._normalised_name(gpu.name)] == gpu.name for gpu in gpus.GPUS)
    assert len(set(names)) == len(owners)


@pytest.mark.parametrize(
    ("driver", "name"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("Tesla T4", "T4"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
        ("AMD Instinct MI300X", "MI300X"),
        ("NVIDIA A100-PCIE-40GB", "A100-PCIe-40GB"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "RTX PRO 6000"),
        ("NVIDIA GeForce RTX 5060 Ti", "RTX 5060 Ti 16GB"),
    ],
)
def test_gpu_is_found_by_the_drivers_name(driver: str, name: str) -> None:
    model = gpus.gpu_model_of(driver)
    assert model is not None
    assert model.name == name


def test_unknown_gpu_of_a_driver_is_none() -> None:
    assert gpus.gpu_model_of("NVIDIA Z9999") is None


@pytest.mark.parametrize(
    ("text", "count", "gpu", "host", "disk", "assumed"),
    [
        ("8x A100-80GB", 8, "A100-80GB", 1024 * GB, None, ("1,024 GB of host memory (usually 128 GB per GPU)",)),
        ("8 X a100 80gb,1TB host", 8, "A100-80GB", 1000 * GB, None, ()),
        ("1x RTX 4090, 64GB host", 1, "RTX 4090", 64 * GB, None, ()),
        ("geforce rtx-4090, 64GiB RAM", 1, "RTX 4090", 64 * GIB, None, ()),
        ("2x H100, 1TB host, 2TB disk", 2, "H100-80GB", 1000 * GB, 2000 * GB, ()),
        ("4xL4, 0.5 TB disk", 4, "L4", 192 * GB, 500 * GB, ("192 GB of host memory (usually 48 GB per GPU)",)),
    ],
)
def test_hardware_in_words_is_read(
    text: str, count: int, gpu: str, host: int, disk: int | None, assumed: tuple[str, ...]
) -> None:
    fleet = gpus.parse_hardware(text)
    assert fleet.gpu_model is not None
    assert (fleet.num_devices, fleet.gpu_model.name, len(fleet.machine.gpus)) == (count, gpu, count)
    assert (fleet.machine.memory_bytes, fleet.disk_bytes, fleet.assumed) == (host, disk, assumed)
    assert fleet.machine.memory_available_bytes < host
    assert fleet.machine.gpus[0].available_bytes == fleet.gpu_model.memory_bytes - gpus.DEVICE_RESERVE


def test_cpu_is_read() -> None:
    fleet = gpus.parse_hardware("cpu, 16 cores, 64GB host")
    assert (fleet.gpu_model, fleet.num_devices, fleet.machine.gpus) == (None, 1, ())
    assert (fleet.machine.num_cores, fleet.machine.memory_bytes) == (16, 64 * GB)
    assert fleet.machine.cpu_flops == 16 * gpus.CPU_FLOPS_PER_CORE
    assert fleet.assumed == ("50 GFLOP/s per core in fp32, no fast bf16",)


def test_checked_memory_of_a_gpu_is_less() -> None:
    # nvidia-smi shows 15,360 MiB on a T4 and 46,068 MiB on an L40S.
    assert gpus.find_gpu("T4").memory_bytes == 15 * GIB
    assert gpus.find_gpu("L40S").memory_bytes == 45 * GIB


KNOWN = ", ".join(gpu.name for gpu in gpus.GPUS)
UNREAD = "cannot be read; write, for example, '64GB host', '2TB disk', '16 cores' or '400Gb network'"


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        ("8x A100", ("--for: 'A100' comes in several sizes; write A100-40GB or A100-80GB",)),
        ("V100", ("--for: 'V100' comes in several sizes; write V100-16GB or V100-32GB",)),
        ("4060 Ti", ("--for: '4060 Ti' comes in several sizes; write RTX 4060 Ti 8GB or RTX 4060 Ti 16GB",)),
        ("2x H1000", ("--for: unknown GPU 'H1000'; did you mean H100-80GB, A100-80GB or A100-40GB?",)),
        ("abacus", (f"--for: unknown GPU 'abacus'; known names are {KNOWN}, or cpu",)),
        ("0x H100", ("--for: '0x H100': numbers must be greater than 0; omit what you do not know",)),
        ("", (f"--for: unknown GPU ''; known names are {KNOWN}, or cpu",)),
        (
            "RTX 4900, 3 bananas, 0GB host",
            (
                "--for: unknown GPU 'RTX 4900'; did you mean RTX 4090, RTX 4080 or RTX 4070 Ti?",
                f"--for: '3 bananas' {UNREAD}",
                f"--for: '0GB host' {UNREAD}",
            ),
        ),
    ],
)
def test_hardware_that_cannot_be_read_is_refused_with_all_problems(text: str, problems: tuple[str, ...]) -> None:
    with pytest.raises(RecipeError) as raised:
        gpus.parse_hardware(text)
    assert raised.value.problems == problems


def test_this_machine_is_a_fleet() -> None:
    gpu = Gpu(name="NVIDIA L4", memory_bytes=22 * GIB, capability=(8, 9), free_bytes=20 * GIB)
    machine = Machine(
        cpu="x",
        num_cores=8,
        memory_bytes=32 * GIB,
        memory_available_bytes=30 * GIB,
        cpu_bf16_speedup=1.0,
        gpus=(gpu, gpu),
    )
    fleet = gpus.local_hardware(machine, 7 * GB)
    assert fleet.name == "this machine: 2x NVIDIA L4, 8 cores, 32 GiB"
    assert fleet.gpu_model == gpus.find_gpu("L4")
    assert (fleet.here, fleet.num_devices, fleet.disk_bytes) == (True, 2, 7 * GB)


@pytest.mark.parametrize(("memory_gib", "name"), [(7.6, "RTX 4060 Ti 8GB"), (15.6, "RTX 4060 Ti 16GB")])
def test_size_of_a_gpu_here_is_told_by_its_memory(memory_gib: float, name: str) -> None:
    gpu = Gpu(name="NVIDIA GeForce RTX 4060 Ti", memory_bytes=int(memory_gib * GIB), capability=(8, 9), free_bytes=GIB)
    machine = Machine(
        cpu="x", num_cores=8, memory_bytes=GIB, memory_available_bytes=GIB, cpu_bf16_speedup=1.0, gpus=(gpu,)
    )
    assert gpus.local_hardware(machine, GB).gpu_model == gpus.find_gpu(name)
