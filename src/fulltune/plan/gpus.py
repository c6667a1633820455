"""GPUs by name, and what stands behind `--for "8x A100-80GB, 1TB host"`: hardware that is not here.

Figures are of the vendors' data sheets: dense 16-bit matrix products with sums in fp32 (never with sparsity), one
direction of a link. Sources: NVIDIA data sheets and architecture white papers (Pascal to Blackwell; for GeForce the
white papers' "FP16 with FP32 accumulate"), AWS for the A10G, AMD Instinct data sheets. Pascal has no tensor cores, and
torch sums fp16 products in fp32 there: its rate in fp32 is given. A GPU whose GDDR memory is checked (ECC) has 15/16 of
it to give.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from fulltune.errors import RecipeError
from fulltune.records.base import Record
from fulltune.system.hardware import Gpu, Machine
from fulltune.text import listed, near_names

GB, GIB = 10**9, 2**30
PCIE3, PCIE4, PCIE5 = 16.0, 32.0, 64.0
"""GB/s of 16 lanes, one direction."""


@dataclass(frozen=True)
class GpuModel:
    """A kind of GPU."""

    name: str
    capability: tuple[int, int]
    """CUDA's compute capability; of AMD's, as torch gives it, the numbers of its architecture."""
    memory_gib: float
    tflops: float
    """Dense 16-bit matrix products, 1e12 operations a second."""
    memory_gb_per_second: float
    link_gb_per_second: float
    """To the host, one direction."""
    nvlink_gb_per_second: float | None
    """To the other GPUs of the machine, one direction, by NVLink or Infinity Fabric."""
    usual_host_gb: int
    """Memory of the host that machines with it usually have for each GPU."""
    aliases: tuple[str, ...] = ()
    desktop: bool = False
    ecc: bool = False

    @property
    def peer_gb_per_second(self) -> float:
        """To the other GPUs of the machine, one direction."""
        return self.nvlink_gb_per_second or self.link_gb_per_second

    @property
    def memory_bytes(self) -> int:
        return int(self.memory_gib * GIB * (15 / 16 if self.ecc else 1))

    @property
    def host_memory_gb_per_second(self) -> float:
        """Usual bandwidth of the host's memory: two channels of DDR5, or a server's eight and more."""
        return 60.0 if self.desktop else 200.0


# fmt: off
GPUS: tuple[GpuModel, ...] = (
    # name, capability, GiB, TFLOP/s, memory GB/s, link GB/s, peer GB/s, host GB a GPU, other names
    GpuModel("B200", (10, 0), 180, 2250, 8000, PCIE5, 900, 256, ("B200-180GB",)),
    GpuModel("H200", (9, 0), 141, 989, 4800, PCIE5, 450, 256, ("H200-141GB", "H200-SXM")),
    GpuModel("H100-80GB", (9, 0), 80, 989, 3350, PCIE5, 450, 256,
             ("H100", "H100-SXM", "H100-SXM5-80GB", "H100-80GB-HBM3")),
    GpuModel("H100-PCIe", (9, 0), 80, 756, 2000, PCIE5, 300, 128, ("H100-PCIe-80GB", "H100-80GB-PCIe")),
    GpuModel("H100-NVL", (9, 0), 94, 835, 3900, PCIE5, 300, 128, ("H100-NVL-94GB",)),
    GpuModel("A100-80GB", (8, 0), 80, 312, 2039, PCIE4, 300, 128, ("A100-SXM4-80GB", "A100-SXM-80GB")),
    GpuModel("A100-40GB", (8, 0), 40, 312, 1555, PCIE4, 300, 128, ("A100-SXM4-40GB", "A100-SXM-40GB")),
    GpuModel("A100-PCIe-80GB", (8, 0), 80, 312, 1935, PCIE4, None, 128, ("A100-80GB-PCIe",)),
    GpuModel("A100-PCIe-40GB", (8, 0), 40, 312, 1555, PCIE4, None, 128, ("A100-40GB-PCIe",)),
    GpuModel("A30", (8, 0), 24, 165, 933, PCIE4, 100, 64, ("A30-24GB",)),
    GpuModel("L40S", (8, 9), 48, 362, 864, PCIE4, None, 128, ("L40S-48GB",), ecc=True),
    GpuModel("L40", (8, 9), 48, 181, 864, PCIE4, None, 128, ("L40-48GB",), ecc=True),
    GpuModel("L4", (8, 9), 24, 121, 300, PCIE4, None, 48, ("L4-24GB",), ecc=True),
    GpuModel("A10", (8, 6), 24, 125, 600, PCIE4, None, 64, ("A10-24GB",), ecc=True),
    GpuModel("A10G", (8, 6), 24, 70, 600, PCIE4, None, 64, ("A10G-24GB",), ecc=True),
    GpuModel("A40", (8, 6), 48, 149.7, 696, PCIE4, 56, 128, ("A40-48GB",), ecc=True),
    GpuModel("V100-32GB", (7, 0), 32, 125, 900, PCIE3, 150, 64, ("V100-SXM2-32GB",)),
    GpuModel("V100-16GB", (7, 0), 16, 125, 900, PCIE3, 150, 64, ("V100-SXM2-16GB",)),
    GpuModel("V100-PCIe-32GB", (7, 0), 32, 112, 900, PCIE3, None, 64, ("V100-32GB-PCIe",)),
    GpuModel("V100-PCIe-16GB", (7, 0), 16, 112, 900, PCIE3, None, 64, ("V100-16GB-PCIe",)),
    GpuModel("P100", (6, 0), 16, 10.6, 732, PCIE3, 80, 64, ("P100-16GB", "P100-SXM2-16GB", "P100-PCIe-16GB")),
    GpuModel("T4", (7, 5), 16, 65, 320, PCIE3, None, 32, ("T4-16GB",), ecc=True),
    GpuModel("RTX A6000", (8, 6), 48, 154.8, 768, PCIE4, 56, 128, ("A6000-48GB",), desktop=True),
    GpuModel("RTX A5000", (8, 6), 24, 111.1, 768, PCIE4, 56, 64, ("A5000-24GB",), desktop=True),
    GpuModel("RTX 6000 Ada", (8, 9), 48, 364, 960, PCIE4, None, 128, ("6000-Ada-48GB",), desktop=True),
    GpuModel("RTX PRO 6000", (12, 0), 96, 503, 1792, PCIE5, None, 128, ("PRO 6000 Blackwell", "PRO-6000-96GB",
             "RTX PRO 6000 Blackwell Workstation Edition", "RTX PRO 6000 Blackwell Server Edition"), desktop=True),
    GpuModel("RTX 2080 Ti", (7, 5), 11, 53.8, 616, PCIE3, None, 64, ("2080-Ti-11GB",), desktop=True),
    GpuModel("RTX 3060 12GB", (8, 6), 12, 25.5, 360, PCIE4, None, 64, ("3060",), desktop=True),
    GpuModel("RTX 3080", (8, 6), 10, 59.5, 760, PCIE4, None, 64, ("3080-10GB",), desktop=True),
    GpuModel("RTX 3090", (8, 6), 24, 71, 936, PCIE4, None, 64, ("3090-24GB",), desktop=True),
    GpuModel("RTX 4060 Ti 16GB", (8, 9), 16, 44.1, 288, PCIE4 / 2, None, 64, desktop=True),
    GpuModel("RTX 4060 Ti 8GB", (8, 9), 8, 44.1, 288, PCIE4 / 2, None, 64, desktop=True),
    GpuModel("RTX 4070 Ti", (8, 9), 12, 80.2, 504, PCIE4, None, 64, ("4070-Ti-12GB",), desktop=True),
    GpuModel("RTX 4080", (8, 9), 16, 97.5, 717, PCIE4, None, 64, ("4080-16GB",), desktop=True),
    GpuModel("RTX 4090", (8, 9), 24, 165.2, 1008, PCIE4, None, 64, ("4090-24GB",), desktop=True),
    GpuModel("RTX 5060 Ti 16GB", (12, 0), 16, 47.4, 448, PCIE5 / 2, None, 64, desktop=True),
    GpuModel("RTX 5060 Ti 8GB", (12, 0), 8, 47.4, 448, PCIE5 / 2, None, 64, desktop=True),
    GpuModel("RTX 5070 Ti", (12, 0), 16, 87.9, 896, PCIE5, None, 64, ("5070-Ti-16GB",), desktop=True),
    GpuModel("RTX 5080", (12, 0), 16, 112.6, 960, PCIE5, None, 64, ("5080-16GB",), desktop=True),
    GpuModel("RTX 5090", (12, 0), 32, 209.5, 1792, PCIE5, None, 64, ("5090-32GB",), desktop=True),
    GpuModel("MI210", (9, 0), 64, 181, 1638, PCIE4, 100, 128, ("MI210-64GB",)),
    GpuModel("MI250X", (9, 0), 64, 191.5, 1638, PCIE4, 100, 64, ("MI250X-64GB", "MI250X GCD")),  # one of its two dies
    GpuModel("MI300X", (9, 4), 192, 1307, 5300, PCIE5, 448, 256, ("MI300X-192GB",)),
    GpuModel("MI325X", (9, 4), 256, 1307, 6000, PCIE5, 448, 256, ("MI325X-256GB",)),
)
# fmt: on

CPU_FLOPS_PER_CORE = 50 * GB
"""fp32, of a core with AVX2: what a CPU that is not here is taken for."""


DEVICE_RESERVE = 2**29
"""What the driver takes of a GPU: torch sees 79.2 of an A100's 80 GiB, 23.6 of an RTX 4090's 24."""


USUAL_NETWORK = 12.5
"""GB/s between machines where nothing is said, 100 Gb/s: what an a2-highgpu-8g or a g5.48xlarge has. A p4d.24xlarge has
400 Gb/s, a DGX A100 1,600, a DGX H100 3,200."""
NETWORK_ASSUMED = f"{8 * USUAL_NETWORK:.0f} Gb/s from each machine to the others"


class Fleet(Record):
    """Hardware to plan for: this machine's, or some that is not here; several machines are alike."""

    name: str
    """For people: `8x A100-80GB, 1024 GB host`."""
    machine: Machine
    """One of them."""
    num_machines: int = 1
    network_gb_per_second: float = USUAL_NETWORK
    """From each machine to the others, one direction."""
    network_is_given: bool = False
    gpu_model: GpuModel | None = None
    """None on a CPU, or for a GPU that the table does not know: then no speed is foreseen."""
    disk_bytes: int | None = None
    """Free where the run folder lies, which all machines see; None: not known, so that it cannot be too little."""
    disk_at: str = ""
    """The folder on whose disk that is; empty: the recipe's output."""
    host_memory_gb_per_second: float = 60.0
    assumed: tuple[str, ...] = ()
    """What was not said and is a usual value."""
    host_is_given: bool = False
    """Its memory was said; it stays the same with more GPUs."""
    here: bool = False

    @property
    def num_devices(self) -> int:
        """GPUs of all machines; a CPU counts as one."""
        return self.num_machines * max(1, len(self.machine.gpus))


_VENDORS = r"nvidia|geforce|tesla|quadro|amd|instinct|radeon|rtx|gtx|generation|gpu"


def _key(name: str) -> str:
    """What two spellings of a GPU have in common: `NVIDIA GeForce RTX 4090` and `rtx-4090` are `4090`."""
    plain = re.sub(_VENDORS, "", name.lower())
    return re.sub(r"gi?b|[^a-z0-9]", "", plain)


_BY_KEY = {_key(name): model for model in GPUS for name in (model.name, *model.aliases)}


def gpu_model_of(name: str, memory_bytes: int | None = None) -> GpuModel | None:
    """The kind of GPU that a driver reports by this name, or None; its memory tells sizes apart, and where that is not
    known it is the largest."""
    key = _key(name)
    if key in _BY_KEY:
        return _BY_KEY[key]
    variants = _variants(key)
    if memory_bytes is None:
        return max(variants, key=lambda model: model.memory_gib, default=None)
    return min(variants, key=lambda model: abs(model.memory_bytes - memory_bytes), default=None)


def _variants(key: str) -> list[GpuModel]:
    """Those whose names are this one and a size."""
    return [model for model in GPUS if key and re.fullmatch(re.escape(key) + r"\d{1,3}", _key(model.name))]


def find(name: str) -> GpuModel:
    """A GPU by the name that a person gave.

    Raises:
        RecipeError: When no GPU, or more than one, has this name; near names are listed.
    """
    key = _key(name)
    if key in _BY_KEY:
        return _BY_KEY[key]
    variants = [model.name for model in _variants(key)]
    if len(variants) > 1:
        raise RecipeError(f"--for: '{name}' comes in several sizes; write {' or '.join(reversed(variants))}")
    near = list(dict.fromkeys(_BY_KEY[found].name for found in near_names(key, _BY_KEY, most=6, cutoff=0.5)))[:3]
    hint = f"did you mean {listed(near, 'or')}?" if near else f"known are {_known()}, or cpu"
    raise RecipeError(f"--for: unknown GPU '{name}'; {hint}")


def _known() -> str:
    return ", ".join(model.name for model in GPUS)


_TIMES = r"\s*(\d+)\s*[x×*]\s*"
_COUNT = re.compile(r"^\s*(?:(\d+)\s*[x×*]\s*)?(.+?)\s*$", re.IGNORECASE)
_SIZE = r"(\d+(?:\.\d+)?)\s*([MGT]i?B)"
_UNITS = {"mb": 10**6, "gb": GB, "tb": 10**12, "mib": 2**20, "gib": GIB, "tib": 2**40}


@dataclass(frozen=True)
class _Said:
    """Of hardware beside its GPUs; None: nothing was said."""

    host: int | None = None
    disk: int | None = None
    cores: int | None = None
    num_machines: int = 1
    network: float | None = None


_NETWORK = r"(?:(\d+)\s*[x×*]\s*)?(\d+(?:\.\d+)?)\s*([GT])(b(?:it)?|B)(?:/s|ps)?\s*(?:network|infiniband|ethernet)"
"""Of each machine: `100Gb network`, `8x 400 Gbit/s InfiniBand`, `50GB/s network`."""


def parse(text: str) -> Fleet:
    """Hardware as a person writes it: `8x A100-80GB`, `1x RTX 4090, 64GB host, 2TB disk`, `cpu, 16 cores, 64GB host`,
    `4x 8x A100-80GB, 400Gb network` for four machines of eight GPUs.

    Raises:
        RecipeError: Naming every part that cannot be read.
    """
    num_machines, text = machines_in(text)
    first, *rest = (part.strip() for part in text.split(","))
    said, problems = _details(rest, num_machines)
    found = _COUNT.match(first)
    count, name = found.groups() if found else (None, "")
    try:
        model = _named(first, count, name)
    except RecipeError as error:
        raise RecipeError([*error.problems, *problems]) from None
    if problems:
        raise RecipeError(problems)
    return _fleet(model, int(count or 1), said)


def machines_in(words: str) -> tuple[int, str]:
    """How many machines, and the words for one of them: a count before that of the GPUs; without it 1.

    Raises:
        RecipeError: When there are no machines, or three counts.
    """
    found = re.match(f"{_TIMES}(?={_TIMES})", words, re.IGNORECASE)
    if found is None:
        return 1, words
    first, rest = words.partition(",")[0].strip(), words[found.end() :]
    if re.match(f"{_TIMES}{_TIMES}", rest, re.IGNORECASE):
        raise RecipeError(f"--for: '{first}' has too many counts; write machines, then GPUs of each: 4x 8x A100-80GB")
    if int(found[1]) == 0:
        raise RecipeError(f"--for: '{first}' has no machine; write 1x or more")
    return int(found[1]), rest


def _details(parts: Sequence[str], num_machines: int) -> tuple[_Said, list[str]]:
    """What is said beside the GPUs, and what cannot be read."""
    problems: list[str] = []
    host, disk, cores, network = None, None, None, None
    for part in parts:
        if size := re.fullmatch(_SIZE + r"\s*(?:of\s+)?(host|ram|memory|disk)", part, re.IGNORECASE):
            amount = int(float(size[1]) * _UNITS[size[2].lower()])
            host, disk = (host, amount) if size[3].lower() == "disk" else (amount, disk)
        elif number := re.fullmatch(r"(\d+)\s*cores?", part, re.IGNORECASE):
            cores = int(number[1])
        elif speed := re.fullmatch(_NETWORK, part, re.IGNORECASE):
            network, problem = _network(part, speed, num_machines)
            problems += [problem] if problem else []
        else:
            others = "'2TB disk', '16 cores' or '400Gb network'" if num_machines > 1 else "'2TB disk' or '16 cores'"
            problems.append(f"--for: '{part}' cannot be read; write for example '64GB host', {others}")
    if 0 in (host, disk, cores, network):
        several = num_machines > 1
        names = "host, disk, cores and network" if several else "host, disk and cores"
        problems.append(f"--for: {names} must be more than 0; leave out what is not known")
    return _Said(host, disk, cores, num_machines, network), problems


def _network(part: str, found: re.Match[str], num_machines: int) -> tuple[float | None, str]:
    """GB/s of what a person said in bits or, with a second, in bytes; and what is wrong with it."""
    links, amount, unit, letter = found.groups()
    rate = float(amount) * (1000 if unit.upper() == "T" else 1) * int(links or 1)
    if num_machines == 1:
        return None, f"--for: '{part}' is between machines, but one is named; write how many: '4x 8x A100-80GB'"
    if letter != "B":
        return rate / 8, ""
    if not re.search("/s|ps", part, re.IGNORECASE):
        return (
            None,
            f"--for: '{part}' could be bits or bytes; write '{amount}{unit}b network' or '{amount}{unit}B/s network'",
        )
    return rate, ""


def _named(first: str, count: str | None, name: str) -> GpuModel | None:
    """The GPU of the first part; None for a CPU."""
    if not name:
        raise RecipeError(f"--for: no GPU is named; known are {_known()}, or cpu")
    if count is not None and int(count) == 0:
        raise RecipeError(f"--for: '{first}' has no GPU; write 1x or more, or cpu")
    if name.lower() != "cpu":
        return find(name)
    if count is not None and int(count) > 1:
        raise RecipeError(
            f"--for: '{first}': a CPU is one device; write cpu, and its cores if you know them, or {count}x 1x cpu for "
            f"{count} machines"
        )
    return None


def _fleet(model: GpuModel | None, count: int, said: _Said) -> Fleet:
    assumed = []
    host, disk, cores, machines = said.host, said.disk, said.cores, said.num_machines
    each_has = " in each machine" if machines > 1 else ""
    if host is None:
        each = model.usual_host_gb if model else 32
        host = each * GB * (count if model else 1)
        usual = f" ({each} GB a GPU is usual)" if model else ""
        assumed.append(f"{host / GB:,.0f} GB of host memory{each_has}{usual}")
    if cores is None:
        cores = 8 * count
        if model is None:
            assumed.append(f"{cores} cores{each_has}")
    if model is None:
        assumed.append(f"{CPU_FLOPS_PER_CORE / GB:.0f} GFLOP/s a core in fp32, no fast bf16")
    gpus: tuple[Gpu, ...] = ()
    if model is not None:
        free = model.memory_bytes - DEVICE_RESERVE
        gpus = (
            Gpu(name=model.name, memory_bytes=model.memory_bytes, capability=model.capability, free_bytes=free),
        ) * count
    if machines > 1:
        assumed += [] if said.network else [f"{NETWORK_ASSUMED} (--for takes '400Gb network')"]
    machine = Machine(
        cpu="not here",
        num_cores=cores,
        memory_bytes=host,
        memory_available_bytes=_left_by_others(host),
        cpu_bf16_speedup=1.0,
        gpus=gpus,
        cpu_flops=0.0 if model else float(cores * CPU_FLOPS_PER_CORE),
    )
    one = f"{count}x {model.name}" if model else f"CPU with {cores} cores"
    name = f"{one}, {host / GB:,.0f} GB host"
    if machines > 1:
        name = f"{machines} machines, each {name}"
        name += f", {8 * said.network:,.6g} Gb/s network" if said.network else ""
    name += f"{', on all' if machines > 1 else ','} {disk / GB:,.0f} GB disk" if disk else ""
    return Fleet(
        name=name,
        machine=machine,
        num_machines=machines,
        network_gb_per_second=said.network or USUAL_NETWORK,
        network_is_given=said.network is not None,
        gpu_model=model,
        disk_bytes=disk,
        host_memory_gb_per_second=model.host_memory_gb_per_second if model else 60.0,
        assumed=tuple(assumed),
        host_is_given=not any("host memory" in one for one in assumed),
    )


def with_count(fleet: Fleet, count: int) -> Fleet:
    """The same GPUs in one machine, more or fewer of them: in the host that was given, else in one of usual size for so
    many."""
    assert fleet.gpu_model is not None
    return _fleet(fleet.gpu_model, count, replace(_said(fleet), num_machines=1))


def with_machines(fleet: Fleet, num_machines: int) -> Fleet:
    """More or fewer such machines."""
    return _fleet(fleet.gpu_model, len(fleet.machine.gpus), replace(_said(fleet), num_machines=num_machines))


def with_host(fleet: Fleet, host_bytes: int) -> Fleet:
    """The same in a host, or hosts, with other memory."""
    return _fleet(fleet.gpu_model, len(fleet.machine.gpus), replace(_said(fleet), host=host_bytes))


def _said(fleet: Fleet) -> _Said:
    """What a person said of it; of its cores only where they compute."""
    return _Said(
        host=fleet.machine.memory_bytes if fleet.host_is_given else None,
        disk=fleet.disk_bytes,
        cores=None if fleet.machine.gpus else fleet.machine.num_cores,
        num_machines=fleet.num_machines,
        network=fleet.network_gb_per_second if fleet.network_is_given else None,
    )


def least_host(needed_bytes: int) -> int:
    """Memory of a host, in whole GB, that leaves so much beside the system and other programs."""
    sizes = itertools.count(max(5 * GB, needed_bytes // GB * GB), GB)
    return next(size for size in sizes if _left_by_others(size) >= needed_bytes)


def _left_by_others(host_bytes: int) -> int:
    return host_bytes - max(2 * GB, host_bytes // 20) if host_bytes > 4 * GB else host_bytes // 2


def asked(fleet: Fleet) -> str:
    """What `--for` has to say for it."""
    one = f"{len(fleet.machine.gpus)}x {fleet.gpu_model.name}" if fleet.gpu_model else "1x cpu"
    several = fleet.num_machines > 1
    words = [f"{fleet.num_machines}x {one}" if several else one]
    words += [] if fleet.gpu_model else [f"{fleet.machine.num_cores} cores"]
    words += [f"{fleet.machine.memory_bytes / GB:.6g}GB host"] if fleet.host_is_given else []
    words += [f"{fleet.disk_bytes / GB:.6g}GB disk"] if fleet.disk_bytes else []
    words += [f"{8 * fleet.network_gb_per_second:.6g}Gb network"] if several and fleet.network_is_given else []
    return ", ".join(words)


def here(machine: Machine, disk_free_bytes: int, num_machines: int = 1, disk_at: str = "") -> Fleet:
    """This machine (of several that are known the least of each: `hardware.weakest`), and as many like it as there are;
    `disk_at` is the run folder, or where it would lie."""
    model = gpu_model_of(machine.gpus[0].name, machine.gpus[0].memory_bytes) if machine.gpus else None
    kinds = Counter(gpu.name for gpu in machine.gpus)
    gpus = "".join(f"{count}x {name}, " for name, count in kinds.items())
    several, alike = num_machines > 1, "" if machine.differs else " like this one"
    named = f"{num_machines} machines{alike}, each" if several else "this machine:"
    return Fleet(
        name=f"{named} {gpus}{machine.num_cores} cores, {machine.memory_bytes / GIB:,.0f} GiB",
        machine=machine,
        num_machines=num_machines,
        assumed=(NETWORK_ASSUMED,) if several else (),
        gpu_model=model,
        disk_bytes=disk_free_bytes,
        disk_at=disk_at,
        host_memory_gb_per_second=machine.memory_bytes_per_second / 1e9 or (200.0 if machine.gpus else 20.0),
        here=True,
    )
