"""Where weights, gradients and optimizer state may lie, and what each way needs and gives.

Bytes per parameter (P parameters, N devices):

| way | on each device | on the host |
|---|---|---|
| all on each device | what `memory.need` says | - |
| ZeRO-2 | 2 P weights + (4 + 12) P / N | - |
| ZeRO-3 | 18 P / N + what is gathered | - |
| FSDP2 (accelerate keeps weights, gradients and moments in fp32) | 16 P / N + what is gathered | - |
| ZeRO-2, optimizer on the host | 2 P | 16 P |
| ZeRO-3, all on the host | what is gathered | 18 P |
| FSDP2, all on the host | what is gathered | 16 P |
| ZeRO-3, all on disk | what is gathered | buffers; 18 P on disk |

18 = 2 (bf16 weights) + 4 (fp32 gradients) + 12 (fp32 weights and both moments): DeepSpeed's estimators
(docs/code-docs/source/memory.rst). Offloaded bytes are multiplied by 1.22 for pinned buffers: 176 GB were measured for
8.03 B parameters (SlideFormer's DeepSpeed baseline).

Seconds of a step: the longest of three that overlap, and two that follow:

- computing: operations / (N x rate), on a GPU at least 2 ms for each layer and pass, which launching its kernels takes,
  and 5 ms a step for the loop around it (usual figures, not measured by us);
- the link to the host: bf16 weights in, once forward and once backward for each micro batch, gradients out: each
  device moves its share;
- the other devices: (N - 1) / N x bytes of each collective; all-reduce counts twice, weights that are shared out are
  gathered forward and backward for each micro batch;
- then the optimizer: 36 bytes a parameter in the device's memory, or on the host 28 (fp32 moments and weights, bf16
  gradients and weights) at the bandwidth of its memory; a fixed 5.8 s a step was measured for 8.03 B parameters on a
  desktop, 28 x 8.03 GB / 5.8 s = 39 GB/s;
- and the disk: 12 bytes a parameter read at 5 GB/s and written at 3.5 GB/s.

Links are taken at 0.8 of the data sheet (25 of 32 GB/s were measured on PCIe 4, 53 of 64 on PCIe 5).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fulltune.models.shapes import Shapes
from fulltune.plan import sharded, time
from fulltune.plan.gpus import Fleet
from fulltune.plan.levers import COMFORTABLE, fastest
from fulltune.plan.memory import Levers
from fulltune.plan.ways_out import in_yaml
from fulltune.records.plan import MemoryKind, MemoryNeed
from fulltune.records.survey import Placement
from fulltune.system import deepspeed as zero

LINK_SHARE = 0.8
HOST_UPDATE_BYTES = 28
LAUNCH_SECONDS, LOOP_SECONDS = 0.002, 0.005
HOST_SHARE = 0.65
"""Of the host's bandwidth that a CPU optimizer reaches: 39 of 60 GB/s."""
DISK_READ, DISK_WRITE = 5e9, 3.5e9
"""Bytes a second of one NVMe disk."""
NOT_BUILT = "planned here; running it is not built yet"
NEEDS_PATH = "with the folder of an NVMe disk as nvme_path"


@dataclass(frozen=True)
class Load:
    """What is to be trained, in numbers."""

    shapes: Shapes
    global_batch_size: int
    levers: Levers
    """As the recipe has them; micro batch and checkpointing are chosen for each way."""
    checkpointing: tuple[bool, ...]
    """Possible values: both, or the recipe's."""
    micro_batch_size: int | None
    """The recipe's; None: any divisor of a device's share of the global batch."""
    need: Callable[[Levers], MemoryNeed]
    """Of a process that holds everything."""
    passing: Callable[[Levers], Mapping[MemoryKind, int]]
    """Activations and logits of a micro batch at their highest."""
    work: time.Work
    available_bytes: int
    """What one process may take on its device, beyond the libraries' own."""
    given: Mapping[str, Any] = field(default_factory=dict)
    """Dotted name to the recipe's value, of the settings that a placement may change."""
    shared: zero.Zero | None = None
    """What the recipe itself shares out."""
    nvme_path: str | None = None
    """The recipe's."""
    bf16_rounding: str = "stochastic"
    """Of bf16 weights: the recipe's, or what a plan takes."""
    checkpoints_bytes: int = 0
    """Of the run on disk, beside what DeepSpeed offloads there."""

    @property
    def num_trained(self) -> int:
        """Parameters that have gradients: only they are sent to other devices and updated."""
        return self.shapes.num_parameters if self.shapes.num_trained is None else self.shapes.num_trained


@dataclass(frozen=True)
class _Way:
    """A way to place things."""

    name: str
    settings: dict[str, Any]
    runs: bool = True
    weights_dtype: str = "fp32"
    optim: str = "adamw_torch_fused"
    shared: zero.Zero | None = None
    """None: each device holds everything."""
    per_parameter: tuple[int, int, int] = sharded.DEEPSPEED
    """Bytes of weights, gradients, optimizer and fp32 weights; with `shared` only."""
    needs: str = ""


def table(load: Load, fleet: Fleet, num_devices: int) -> tuple[Placement, ...]:
    """Every way that makes sense on this hardware, with what it needs and how fast it should be.

    Args:
        load: What is to be trained.
        fleet: Where.
        num_devices: Processes, one per device.
    """
    return tuple(_best(load, fleet, num_devices, way) for way in _ways(load, fleet, num_devices))


_DEFAULTS = {
    "train.num_processes": 1,
    "model.weights_dtype": "fp32",
    "train.bf16_rounding": None,
    "train.optimizer_in_backward": False,
    "train.extra.deepspeed": None,
}


def _ways(load: Load, fleet: Fleet, num_devices: int) -> Iterator[_Way]:
    gpus, many = fleet.machine.gpus, num_devices > 1
    each = f"{num_devices} copies" if many else "one device"
    plain = _DEFAULTS | {"train.num_processes": num_devices, "train.optim": "adamw_torch_fused"}
    if not many and load.levers.optimizer_in_backward:
        plain.pop("train.optimizer_in_backward")
    small = {"train.optim": "adamw_8bit"}
    yield _Way(f"{each}, AdamW fp32", plain)
    yield _Way(f"{each}, 8-bit AdamW", plain | small, optim="adamw_8bit")
    if load.levers.precision != "fp16" and (not gpus or gpus[0].bf16):
        optim = _plain_optim("bf16", load.bf16_rounding)
        narrow = {name: value for name, value in plain.items() if name != "train.bf16_rounding"}
        narrow |= {"model.weights_dtype": "bf16", "train.optim": optim}
        if load.given.get("train.precision") == "fp32":
            narrow["train.precision"] = "bf16"
        yield _Way(f"{each}, bf16 weights", narrow, weights_dtype="bf16", optim=optim)
        yield _Way(f"{each}, bf16 + 8-bit", narrow | small, weights_dtype="bf16", optim="adamw_8bit")
    if gpus and load.levers.num_trained is None:  # DeepSpeed is there for full fine-tuning only
        yield from _shared_ways(load, plain, many)


def _shared_ways(load: Load, plain: dict[str, Any], many: bool) -> Iterator[_Way]:
    """With DeepSpeed or FSDP2."""
    # DeepSpeed updates by itself, and needs whole logits.
    plain = plain | {"train.optimizer_in_backward": False}
    if load.given.get("train.chunked_loss"):
        plain |= {"train.chunked_loss": None}

    def deepspeed(stage: int, **offload: Any) -> dict[str, Any]:
        return plain | {"train.extra.deepspeed": {"zero_optimization": {"stage": stage, **offload}}}

    host, disk = {"device": "cpu"}, {"device": "nvme", "nvme_path": load.nvme_path or zero.NVME_FOLDER}
    if many:
        yield _Way("ZeRO-2", deepspeed(2), shared=zero.Zero(2, False, False))
        yield _Way("ZeRO-3", deepspeed(3), shared=zero.Zero(3, False, False))
        yield _Way("FSDP2", {}, runs=False, shared=zero.Zero(3, False, False), per_parameter=sharded.FSDP2)
    yield _Way("ZeRO-2, optimizer on host", deepspeed(2, offload_optimizer=host), shared=zero.Zero(2, True, False))
    yield _Way("FSDP2, all on host", {}, runs=False, shared=zero.Zero(3, True, True), per_parameter=sharded.FSDP2)
    both = deepspeed(3, offload_optimizer=host, offload_param=host)
    yield _Way("ZeRO-3, all on host", both, shared=zero.Zero(3, True, True))
    both = deepspeed(3, offload_optimizer=disk, offload_param=disk)
    needs = "" if load.nvme_path else NEEDS_PATH
    yield _Way("ZeRO-3, all on disk", both, shared=zero.Zero(3, True, True, True, True), needs=needs)


def _plain_optim(weights_dtype: str, rounding: str) -> str:
    """What a plan takes when the recipe names no optimizer."""
    return "adamw_bf16" if weights_dtype == "bf16" and rounding != "nearest" else "adamw_torch_fused"


def _best(load: Load, fleet: Fleet, num_devices: int, way: _Way) -> Placement:
    """The fastest micro batch and checkpointing that fit, with some memory to spare if possible; when none does, the
    smallest."""
    tried = [
        _placed(load, fleet, num_devices, way, micro, checkpointing)
        for checkpointing in load.checkpointing
        for micro in _micro_batches(load, num_devices, way)
    ]
    fitting = [one for one in tried if one.fits]
    comfortable = [one for one in fitting if one.device_bytes <= COMFORTABLE * load.available_bytes]
    if not fitting:
        return min(tried, key=lambda one: one.device_bytes)
    return fastest(comfortable or fitting, [one.tokens_per_second for one in comfortable or fitting])


def _micro_batches(load: Load, num_devices: int, way: _Way) -> list[int]:
    share = max(1, load.global_batch_size // num_devices)
    if load.micro_batch_size is not None:
        return [load.micro_batch_size]
    if _in_backward(load, num_devices, way):  # it cannot accumulate
        return [share]
    return [size for size in range(share, 0, -1) if share % size == 0]


def _in_backward(load: Load, num_devices: int, way: _Way) -> bool:
    return load.levers.optimizer_in_backward and num_devices == 1 and way.shared is None


def _placed(load: Load, fleet: Fleet, num_devices: int, way: _Way, micro: int, checkpointing: bool) -> Placement:
    accumulation = max(1, load.global_batch_size // (micro * num_devices))
    levers = replace(
        load.levers,
        micro_batch_size=micro,
        accumulation=accumulation,
        activation_checkpointing=checkpointing,
        weights_dtype=way.weights_dtype,
        precision="bf16" if way.weights_dtype == "bf16" else load.levers.precision,
        optim=way.optim,
        bf16_rounding=load.bf16_rounding if way.weights_dtype == "bf16" else None,
        chunked_loss=load.levers.chunked_loss and way.shared is None,
        optimizer_in_backward=_in_backward(load, num_devices, way),
        num_processes=num_devices,
    )
    kinds, host, disk = _bytes(load, num_devices, way, levers)
    device = sum(kinds.values())
    short = _short(load, fleet, device, host, disk)
    speed, bound_by = _speed(load, fleet, way.shared, levers)
    changes = _changes(load, way)
    return Placement(
        name=way.name,
        kinds=kinds,
        device_bytes=device,
        host_bytes=host,
        disk_bytes=disk,
        micro_batch_size=micro,
        activation_checkpointing=checkpointing,
        fits=not short,
        short=short,
        tokens_per_second=speed,
        bound_by=bound_by,
        runs=way.runs,
        settings=changes,
        how=_how(way, changes),
        needs=way.needs,
    )


def _changes(load: Load, way: _Way) -> dict[str, Any]:
    """What the recipe has otherwise."""
    known = {**_DEFAULTS, "train.optim": None, **load.given}
    known["train.optim"] = known["train.optim"] or _plain_optim(way.weights_dtype, load.bf16_rounding)
    if way.shared is not None and way.shared == load.shared:
        known["train.extra.deepspeed"] = way.settings.get("train.extra.deepspeed")
    return {name: value for name, value in way.settings.items() if known.get(name) != value}


def _how(way: _Way, changes: Mapping[str, Any]) -> str:
    if not way.runs:
        return NOT_BUILT
    return ", ".join(f"{name}: {in_yaml(value)}" for name, value in changes.items()) or "as the recipe is"


# ---- bytes -----------------------------------------------------------------------------------------------------


def _bytes(load: Load, num_devices: int, way: _Way, levers: Levers) -> tuple[dict[MemoryKind, int], int, int]:
    """Bytes by kind on each device, all bytes on the host, all bytes on disk."""
    if way.shared is None:
        need = load.need(levers)
        kinds = dict(need.kinds)
        # Evaluation, saving or resuming may have the higher peak.
        kinds["buffers"] = kinds.get("buffers", 0) + max(0, need.peak - sum(kinds.values()))
        return kinds, 0, 0
    kinds = sharded.kinds(way.shared, way.per_parameter, load.shapes, num_devices, load.passing(levers))
    parameters, per_parameter = load.shapes.num_parameters, way.per_parameter
    host = sharded.host_bytes(way.shared, parameters, num_devices, per_parameter)
    return kinds, host, sharded.disk_bytes(way.shared, parameters, per_parameter)


def _short(load: Load, fleet: Fleet, device: int, host: int, disk: int) -> str:
    """What is too little, and by how much; empty when everything fits."""
    missing = {
        "device": device - load.available_bytes,
        "host": host - fleet.machine.memory_available_bytes if host else 0,
        "disk": disk + load.checkpoints_bytes - fleet.disk_bytes if disk and fleet.disk_bytes is not None else 0,
    }
    return ", ".join(f"{name} +{size / 2**30:,.1f} GiB" for name, size in missing.items() if size > 0)


# ---- speed -----------------------------------------------------------------------------------------------------


def own_speed(load: Load, fleet: Fleet) -> Callable[[Levers], float | None]:
    """Tokens a second over all devices of the recipe's own placement; None where the hardware's speed is not known."""
    return lambda levers: _speed(load, fleet, load.shared, levers)[0]


def _speed(load: Load, fleet: Fleet, shared: zero.Zero | None, levers: Levers) -> tuple[float | None, str]:
    """Tokens a second over all devices, and what holds it back."""
    seconds = _step_seconds(load, fleet, shared, levers)
    if not seconds:
        return None, ""
    overlapped = max(seconds[name] for name in ("computing", "host link", "other devices"))
    total = overlapped + seconds["optimizer"] + seconds["disk"]
    return load.global_batch_size * load.work.tokens_per_row / total, max(seconds, key=lambda name: seconds[name])


def _step_seconds(load: Load, fleet: Fleet, shared: zero.Zero | None, levers: Levers) -> dict[str, float]:
    """Seconds of each part of a step; empty when the hardware's speed is not known."""
    rate = time.device_flops(fleet, levers.precision, load.shapes.hidden_size)
    if rate is None:
        return {}
    devices = levers.num_processes
    # Processes on a CPU share its cores.
    together = rate * (devices if fleet.machine.gpus else 1)
    parts = dict.fromkeys(("host link", "other devices", "disk"), 0.0)
    computing = load.work.step_flops(load.global_batch_size, levers.activation_checkpointing) / together
    launching = LAUNCH_SECONDS * load.shapes.num_layers * levers.accumulation if fleet.machine.gpus else 0.0
    parts["computing"] = max(computing, launching) + LOOP_SECONDS
    parts["optimizer"] = _optimizer_seconds(load, fleet, devices, shared)
    card = fleet.card
    if card is None:
        return parts
    parameters, accumulation = load.num_trained, levers.accumulation
    moved = parameters * (devices - 1) / devices
    peers, link = (rate * 1e9 * LINK_SHARE for rate in (card.peer_gb_per_second, card.link_gb_per_second))
    if shared is None or shared.stage == 2:
        width = 4 if shared is None and levers.weights_dtype == "fp32" else 2
        parts["other devices"] = 2 * width * moved / peers
    else:
        parts["other devices"] = (2 * 2 + 2) * moved * accumulation / peers
    if shared is not None and shared.offload_optimizer:
        weights_in = 2 * 2 * accumulation if shared.offload_weights else 2
        parts["host link"] = (weights_in + 2 * accumulation) * parameters / devices / link
    if shared is not None and shared.optimizer_on_disk:
        parts["disk"] = 12 * parameters * (1 / DISK_READ + 1 / DISK_WRITE)
    return parts


def _optimizer_seconds(load: Load, fleet: Fleet, devices: int, shared: zero.Zero | None) -> float:
    parameters, host = load.num_trained, fleet.host_memory_gb_per_second * 1e9
    if fleet.card is None:
        return time.UPDATE_BYTES * parameters / host
    if shared is not None and shared.offload_optimizer:
        return HOST_UPDATE_BYTES * parameters / (host * HOST_SHARE)
    held = parameters / devices if shared is not None else parameters
    return time.UPDATE_BYTES * held / (fleet.card.memory_gb_per_second * 1e9)
