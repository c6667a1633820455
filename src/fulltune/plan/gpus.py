from __future__ import annotations

import re
import tomllib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fulltune.errors import RecipeError
from fulltune.records.base import Record
from fulltune.system.hardware import Gpu, Machine
from fulltune.text import listed, near_names, parse_bytes

GB, GIB = 10**9, 2**30
CPU_FLOPS_PER_CORE = 50 * GB
DEVICE_RESERVE = 2**29
"""Memory that the driver takes: torch sees 79.2 of an A100's 80 GiB."""
USUAL_NETWORK = 12.5
"""Default GB/s between machines: 100 Gb/s as on an a2-highgpu-8g."""
NETWORK_ASSUMED = f"{8 * USUAL_NETWORK:.0f} Gb/s between machines"


@dataclass(frozen=True)
class GpuModel:
    """Data-sheet values of a GPU; bandwidths are for one direction."""

    name: str
    capability: tuple[int, int]
    memory_gib: float
    tflops: float
    """Dense 16-bit matrix-multiply throughput, in TFLOP/s."""
    memory_gb_per_second: float
    link_gb_per_second: float
    nvlink_gb_per_second: float
    usual_host_gb: int
    aliases: tuple[str, ...]
    flags: tuple[str, ...]
    """`desktop`, or `ecc` for GDDR memory with error correction."""

    @property
    def memory_bytes(self) -> int:
        return int(self.memory_gib * GIB * (15 / 16 if "ecc" in self.flags else 1))

    @property
    def idle_gpu(self) -> Gpu:
        size = self.memory_bytes
        return Gpu(name=self.name, memory_bytes=size, capability=self.capability, free_bytes=size - DEVICE_RESERVE)

    @property
    def host_memory_gb_per_second(self) -> float:
        return 60.0 if "desktop" in self.flags else 200.0


GPUS = tuple(
    GpuModel(*list[Any](tuple(value) if isinstance(value, list) else value for value in row))
    for row in tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))["gpus"]
)


@dataclass(frozen=True)
class NamedHardware:
    """Hardware as a user writes it in `--for`; omitted details are None."""

    gpu: GpuModel | None
    count: int = 1
    machines: int = 1
    host_bytes: int | None = None
    disk_bytes: int | None = None
    cores: int | None = None
    network: float | None = None
    """Bandwidth between machines in Gb/s."""

    def __str__(self) -> str:
        """Return the hardware in the syntax of `--for`."""
        machines = f"{self.machines}x " if self.machines > 1 else ""
        words = [machines + (f"{self.count}x {self.gpu.name}" if self.gpu else "cpu")]
        words += [f"{self.cores} cores"] if self.cores else []
        words += [f"{self.host_bytes / GB:.6g}GB host"] if self.host_bytes else []
        words += [f"{self.disk_bytes / GB:.6g}GB disk"] if self.disk_bytes else []
        words += [f"{self.network:.6g}Gb network"] if self.network else []
        return ", ".join(words)


class Fleet(Record):
    """The hardware to plan for: one machine, or several equal ones."""

    name: str
    machine: Machine
    num_machines: int = 1
    network_gb_per_second: float = USUAL_NETWORK
    gpu_model: GpuModel | None = None
    """The GPU model. If it is None, no speed is estimated."""
    disk_bytes: int | None = None
    """Free space on the run folder's disk, or None if unknown."""
    disk_at: str = ""
    disk_speed: tuple[float, float] | None = None  # measured bytes per second, read and written
    state_disk_bytes: int | None = None  # free on the disk of a streamed run's state
    host_memory_gb_per_second: float = 60.0
    assumed: tuple[str, ...] = ()
    """Descriptions of values assumed for omitted details."""
    named: NamedHardware = NamedHardware(None)
    here: bool = False

    @property
    def num_devices(self) -> int:
        """Number of GPUs, or of machines if they have none."""
        return self.num_machines * max(1, len(self.machine.gpus))


# ---- by name -----------------------------------------------------------------------------------------------------


def _normalised_name(name: str) -> str:
    """Normalise a GPU's name, such as `NVIDIA GeForce RTX 4090` to `4090`."""
    vendors = r"nvidia|geforce|tesla|quadro|amd|instinct|radeon|rtx|gtx|generation|gpu"
    return re.sub(r"gi?b|[^a-z0-9]", "", re.sub(vendors, "", name.lower()))


_BY_KEY = {_normalised_name(name): model for model in GPUS for name in (model.name, *model.aliases)}


def _models_named(name: str) -> list[GpuModel]:
    """Return the GPU models with this name; a name without a memory size matches all sizes."""
    key = _normalised_name(name)
    if key in _BY_KEY:
        return [_BY_KEY[key]]
    return [model for model in GPUS if key and re.fullmatch(re.escape(key) + r"\d{1,3}", _normalised_name(model.name))]


def gpu_model_of(name: str, memory_bytes: int = 2**60) -> GpuModel | None:
    """Return the known GPU model with this driver name and the nearest memory size, or None."""
    return min(_models_named(name), key=lambda model: abs(model.memory_bytes - memory_bytes), default=None)


def find_gpu(name: str) -> GpuModel:
    """Return the GPU model that a user names; raise `RecipeError` if the name is unknown or matches several memory
    sizes."""
    models = _models_named(name)
    if len(models) == 1:
        return models[0]
    if models:
        sizes = listed([model.name for model in reversed(models)], "or")
        raise RecipeError(f"--for: '{name}' comes in several sizes; write {sizes}")
    near = [_BY_KEY[key].name for key in near_names(_normalised_name(name), _BY_KEY, most=6, cutoff=0.5)]
    near = list(dict.fromkeys(near))[:3]
    hint = (
        f"did you mean {listed(near, 'or')}?"
        if near
        else f"known names are {', '.join(one.name for one in GPUS)}, or cpu"
    )
    raise RecipeError(f"--for: unknown GPU '{name}'; {hint}")


# ---- in words ----------------------------------------------------------------------------------------------------

_FIRST = re.compile(r"(?:(\d+)\s*x\s*(?=\d+\s*x|cpu))?(?:(\d+)\s*x\s*)?(.*)", re.IGNORECASE)
_SIZE = r"((?=.*[1-9])\d+(?:\.\d+)?\s*[MGT]i?B)\s*"
_DETAILS: dict[str, tuple[str, Callable[[str], float]]] = {
    "host_bytes": (_SIZE + "(?:host|RAM)", parse_bytes),
    "disk_bytes": (_SIZE + "disk", parse_bytes),
    "cores": (r"(\d+)\s*cores?", int),
    "network": (r"(\d+(?:\.\d+)?)\s*Gb(?:/s|ps)?\s*network", float),
}


def parse_hardware(text: str) -> Fleet:
    """Parse a value of `--for`, such as `1x RTX 4090, 64GB host`, or `4x 8x A100-80GB` for four machines.

    Raises `RecipeError` with each part that cannot be parsed.
    """
    first, *parts = (part.strip() for part in text.split(","))
    problems, details = list[str](), dict[str, Any]()
    for part in parts:
        for name, (pattern, number) in _DETAILS.items():
            if match := re.fullmatch(pattern, part):
                details[name] = number(match[1])
                break
        else:
            examples = "'64GB host', '2TB disk', '16 cores' or '400Gb network'"
            problems.append(f"--for: '{part}' cannot be read; write, for example, {examples}")
    match = _FIRST.fullmatch(first)
    assert match is not None
    machines, count = int(match[1] or 1), int(match[2] or 1)
    gpu = None
    try:
        gpu = None if match[3].lower() == "cpu" else find_gpu(match[3])
    except RecipeError as error:
        problems = [*error.problems, *problems]
    if 0 in (machines, count, *details.values()):
        problems.append(f"--for: '{text}': numbers must be greater than 0; omit what you do not know")
    if gpu is None:
        machines, count = machines * count, 1
    if machines == 1 and "network" in details:
        problems.append("--for: a network needs several machines, but --for names only one; write '4x 8x A100-80GB'")
    if problems:
        raise RecipeError(problems)
    return complete_hardware(NamedHardware(gpu, count, machines, **details))


def complete_hardware(named: NamedHardware) -> Fleet:
    """Return the hardware that `--for` describes, with typical values for omitted details."""
    gpu, count, host, cores = named.gpu, named.count, named.host_bytes, named.cores or 8 * named.count
    each_has, assumed = " in each machine" if named.machines > 1 else "", list[str]()
    if host is None:
        host = (gpu.usual_host_gb * count if gpu else 32) * GB
        usual = f" (usually {gpu.usual_host_gb} GB per GPU)" if gpu else ""
        assumed.append(f"{host / GB:,.0f} GB of host memory{each_has}{usual}")
    if gpu is None:
        assumed += [] if named.cores else [f"{cores} cores{each_has}"]
        assumed.append(f"{CPU_FLOPS_PER_CORE / GB:.0f} GFLOP/s per core in fp32, no fast bf16")
    if named.machines > 1 and not named.network:
        assumed.append(f"{NETWORK_ASSUMED} (or write '400Gb network' in --for)")
    machine = Machine(
        cpu="not here",
        num_cores=cores,
        memory_bytes=host,
        # The system and other programs use the rest.
        memory_available_bytes=host - max(2 * GB, host // 20) if host > 4 * GB else host // 2,
        cpu_bf16_speedup=1.0,
        gpus=(gpu.idle_gpu,) * count if gpu else (),
        cpu_flops=0.0 if gpu else float(cores * CPU_FLOPS_PER_CORE),
    )
    complete = replace(named, host_bytes=host, cores=named.cores if gpu else cores)
    name = str(complete)
    if named.machines > 1:
        name = f"{named.machines} machines, each {replace(complete, machines=1, disk_bytes=None)}"
        name += f"; {named.disk_bytes / GB:.6g}GB shared disk" if named.disk_bytes else ""
    return Fleet(
        name=name,
        machine=machine,
        num_machines=named.machines,
        network_gb_per_second=named.network / 8 if named.network else USUAL_NETWORK,
        gpu_model=gpu,
        disk_bytes=named.disk_bytes,
        host_memory_gb_per_second=gpu.host_memory_gb_per_second if gpu else 60.0,
        assumed=tuple(assumed),
        named=named,
    )


def local_hardware(machine: Machine, disk_free_bytes: int, num_machines: int = 1, disk_at: str = "") -> Fleet:
    """Return the hardware of `num_machines` machines like this one. `disk_at` is the folder whose disk was measured."""
    model = gpu_model_of(machine.gpus[0].name, machine.gpus[0].memory_bytes) if machine.gpus else None
    gpus = "".join(f"{count}x {name}, " for name, count in Counter(gpu.name for gpu in machine.gpus).items())
    named = f"{num_machines} machines like this one, each" if num_machines > 1 else "this machine:"
    return Fleet(
        name=f"{named} {gpus}{machine.num_cores} cores, {machine.memory_bytes / GIB:,.0f} GiB",
        machine=machine,
        num_machines=num_machines,
        assumed=(NETWORK_ASSUMED,) if num_machines > 1 else (),
        gpu_model=model,
        disk_bytes=disk_free_bytes,
        disk_at=disk_at,
        host_memory_gb_per_second=machine.memory_bytes_per_second / 1e9 or (200.0 if machine.gpus else 20.0),
        here=True,
    )
