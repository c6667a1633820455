"""Where weights, gradients and optimizer state may lie, and what each way needs and gives.

Bytes per parameter (P parameters, N devices):

| way | on each device | on the host |
|---|---|---|
| all on each device | what `memory.need` says | - |
| ZeRO-2 | 2 P weights + (4 + 12) P / N | - |
| ZeRO-3 | 18 P / N + what is gathered | - |
| FSDP2 (weights, gradients and moments in fp32) | 16 P / N, with 8-bit AdamW 10 P / N, + what is gathered: see
  `plan.fsdp2` | - |
| ZeRO-2, optimizer on the host | 2 P | 16 P |
| ZeRO-3, all on the host | what is gathered | 18 P |
| FSDP2, all on the host | what is gathered | 16 P |
| ZeRO-3, all on disk | what is gathered | buffers; 18 P on disk |

18 = 2 (bf16 weights) + 4 (fp32 gradients) + 12 (fp32 weights and both moments): DeepSpeed's estimators
(docs/code-docs/source/memory.rst). Offloaded bytes are multiplied by 1.22 for pinned buffers: 176 GB were measured for
8.03 B parameters (SlideFormer's DeepSpeed baseline). Seconds of a step: see `plan.time`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fulltune.plan import disk, sharded, time
from fulltune.plan.choose import COMFORTABLE, candidates, fastest
from fulltune.plan.dotted import DEEPSPEED, OFFLOAD, PLACEMENT, WHERE, given, in_yaml, with_settings
from fulltune.plan.levers import plain_optim
from fulltune.plan.workload import NUM_MACHINES, NUM_PROCESSES, Basis, takes_pieces
from fulltune.recipe.training import NVME, NVME_FOLDER
from fulltune.records.plan import MemoryKind, MemorySettings
from fulltune.records.survey import Placement
from fulltune.system.deepspeed import nvme_path
from fulltune.system.sharing import Sharing
from fulltune.text import format_bytes

NOT_BUILT = "planned here; running it is not built yet"
NEEDS_PATH = f"with the folder of an NVMe disk in {OFFLOAD}"
_DEFAULTS = {
    NUM_PROCESSES: 1,
    NUM_MACHINES: 1,
    "model.weights_dtype": "fp32",
    "train.bf16_rounding": None,
    PLACEMENT: "auto",
    OFFLOAD: "none",
    DEEPSPEED: None,
}


@dataclass(frozen=True)
class _Layout:
    """A way to place things."""

    name: str
    settings: dict[str, Any]
    runs: bool = True
    weights_dtype: str = "fp32"
    optim: str = "adamw_torch_fused"
    shared: Sharing | None = None
    """None: each device holds everything."""
    per_parameter: tuple[int, int, int] = sharded.DEEPSPEED
    """Bytes of weights, gradients, optimizer and fp32 weights; with `shared` only."""
    needs: str = ""


def table(basis: Basis) -> tuple[Placement, ...]:
    """Every way that makes sense on this hardware, with what it needs and how fast it should be."""
    return tuple(_best(basis, layout) for layout in _layouts(basis))


def planned(basis: Basis, name: str, settings: MemorySettings) -> Placement:
    """The row of that name with a plan's own micro batch, checkpointing and eval batch."""
    layout = next(one for one in _layouts(basis) if one.name == name)
    own = _start(basis, layout)
    same = ("micro_batch_size", "gradient_accumulation_steps", "activation_checkpointing", "eval_batch_size")
    return _placed(basis, layout, own.changed(**{field: getattr(settings, field) for field in same}))


def _layouts(basis: Basis) -> Iterator[_Layout]:
    gpus, many = basis.fleet.machine.gpus, basis.num_devices > 1
    each = f"{basis.num_devices} copies" if many else "one device"
    spread = {NUM_PROCESSES: basis.num_devices, NUM_MACHINES: basis.num_machines}
    plain = _DEFAULTS | spread | {"train.optim": "adamw_torch_fused"}
    if basis.recipe.train.placement == ("ddp" if many else "single"):  # the same by its name
        plain[PLACEMENT] = basis.recipe.train.placement
    small = {"train.optim": "adamw_8bit"}
    yield _Layout(f"{each}, AdamW fp32", plain)
    yield _Layout(f"{each}, 8-bit AdamW", plain | small, optim="adamw_8bit")
    if basis.start.precision != "fp16" and basis.start.fast_bf16:
        optim = plain_optim("bf16", _rounding(basis))
        narrow = {name: value for name, value in plain.items() if name != "train.bf16_rounding"}
        narrow |= {"model.weights_dtype": "bf16", "train.optim": optim}
        if basis.recipe.train.precision == "fp32":
            narrow["train.precision"] = "bf16"
        yield _Layout(f"{each}, bf16 weights", narrow, weights_dtype="bf16", optim=optim)
        yield _Layout(f"{each}, bf16 + 8-bit", narrow | small, weights_dtype="bf16", optim="adamw_8bit")
    if basis.start.num_trained is not None:  # sharing out is planned for full fine-tuning only
        return
    train = basis.recipe.train  # what no placement may be taken with is refused by the recipe's own rules
    if many and basis.shapes.units is not None and not train.use_liger_kernel:
        parts, shared = plain | {PLACEMENT: "fsdp2"}, Sharing(3, False, False, engine="fsdp2")
        yield _Layout("FSDP2", parts, shared=shared)
        yield _Layout("FSDP2, 8-bit AdamW", parts | small, optim="adamw_8bit", shared=shared)
    if gpus and not (train.use_liger_kernel or train.torch_compile):
        yield from _shared_layouts(basis, plain, many)


def _shared_layouts(basis: Basis, plain: dict[str, Any], many: bool) -> Iterator[_Layout]:
    """With DeepSpeed, or in the host's memory."""
    plain = plain | {PLACEMENT: "auto"}  # DeepSpeed needs whole logits
    if basis.recipe.train.chunked_loss:
        plain |= {"train.chunked_loss": None}

    def zero(stage: int, offload: str = "none") -> dict[str, Any]:
        return plain | {PLACEMENT: f"zero{stage}", OFFLOAD: offload}

    path = nvme_path(basis.recipe)
    if many:
        yield _Layout("ZeRO-2", zero(2), shared=Sharing(2, False, False))
        yield _Layout("ZeRO-3", zero(3), shared=Sharing(3, False, False))
    yield _Layout("ZeRO-2, optimizer on host", zero(2, "optimizer"), shared=Sharing(2, True, False))
    yield _Layout("FSDP2, all on host", {}, runs=False, shared=Sharing(3, True, True), per_parameter=sharded.FSDP2)
    yield _Layout("ZeRO-3, all on host", zero(3, "all"), shared=Sharing(3, True, True))
    if basis.num_machines > 1:  # whose disks differ: the recipe refuses it
        return
    on_disk, needs = zero(3, NVME + (path or NVME_FOLDER)), "" if path else NEEDS_PATH
    yield _Layout("ZeRO-3, all on disk", on_disk, shared=Sharing(3, True, True, True, True), needs=needs)


def _rounding(basis: Basis) -> str:
    """Of bf16 weights."""
    return basis.recipe.train.bf16_rounding or "stochastic"


def _best(basis: Basis, layout: _Layout) -> Placement:
    """The fastest micro batch and checkpointing that fit, with some memory to spare if possible; when none does, the
    smallest."""
    settings = candidates(basis.recipe, _start(basis, layout), basis.rows_per_process)
    tried = [_placed(basis, layout, one) for one in settings]
    fitting = [one for one in tried if one.fits]
    if not fitting:
        return min(tried, key=lambda one: one.device_bytes)
    comfortable = [one for one in fitting if one.device_bytes <= COMFORTABLE * basis.budget.available_bytes]
    options = comfortable or fitting
    return fastest(options, [one.tokens_per_second for one in options])


def _start(basis: Basis, layout: _Layout) -> MemorySettings:
    """The settings that the layout fixes; its micro batch and checkpointing are still to be chosen."""
    start, alone = basis.start, layout.shared is None
    plain = with_settings(basis.recipe, {name: _DEFAULTS[name] for name in WHERE})
    in_pieces = alone or (layout.shared is not None and layout.shared.engine == "fsdp2")
    narrow = layout.weights_dtype == "bf16"
    return start.changed(
        weights_dtype=layout.weights_dtype,
        precision="bf16" if narrow else start.precision,
        optim=layout.optim,
        bf16_rounding=_rounding(basis) if narrow else None,
        chunked_loss=in_pieces and takes_pieces(plain, start.plain_logits),
        num_processes=basis.num_devices,
        num_machines=basis.num_machines,
    )


def _placed(basis: Basis, layout: _Layout, settings: MemorySettings) -> Placement:
    shared, per_parameter, parameters = layout.shared, layout.per_parameter, basis.shapes.num_parameters
    need = basis.needs.of(settings, shared, per_parameter)
    kinds = dict(need.kinds)
    # Evaluation, saving or resuming may have the higher peak.
    kinds["buffers"] += max(0, need.peak - sum(kinds.values()))
    on_hosts = sharded.host_bytes(shared, parameters, basis.num_devices, per_parameter) if shared else 0
    host = -(-on_hosts // basis.num_machines)
    on_disk = sharded.disk_bytes(shared, parameters, per_parameter)
    short = _short(basis, kinds, host, on_disk)
    seconds = basis.seconds(settings, shared)
    tokens = basis.global_batch_size * basis.work.tokens_per_row
    changes = _changes(basis, layout)
    how = ", ".join(f"{name}: {in_yaml(value)}" for name, value in changes.items()) or "as the recipe is"
    return Placement(
        name=layout.name,
        kinds=kinds,
        device_bytes=sum(kinds.values()),
        host_bytes=host,
        disk_bytes=on_disk,
        micro_batch_size=settings.micro_batch_size,
        activation_checkpointing=settings.activation_checkpointing,
        fits=not short,
        short=short,
        tokens_per_second=tokens / time.together(seconds) if seconds else None,
        bound_by=max(seconds, key=lambda name: seconds[name]) if seconds else "",
        runs=layout.runs,
        settings=changes,
        how=how if layout.runs else NOT_BUILT,
        needs=layout.needs,
    )


def _changes(basis: Basis, layout: _Layout) -> dict[str, Any]:
    """What the recipe has otherwise."""
    recipe = basis.recipe
    known = _DEFAULTS | {"train.optim": plain_optim(layout.weights_dtype, _rounding(basis))}
    known |= {name: value for name in layout.settings if (value := given(recipe, name)) is not None}
    if layout.shared is not None and layout.shared == basis.shared:  # be it by a file of the user's
        known |= {name: layout.settings.get(name) for name in WHERE}
    return {name: value for name, value in layout.settings.items() if known.get(name) != value}


def _short(basis: Basis, kinds: dict[MemoryKind, int], host: int, on_disk: int) -> str:
    """What is too little, and by how much; empty when everything fits."""
    fleet = basis.fleet
    missing = {"device": sum(kinds.values()) - basis.budget.available_bytes}
    if host:
        missing["host"] = host - fleet.machine.memory_available_bytes
    if on_disk and fleet.disk_bytes is not None:
        # DeepSpeed's own checkpoints and two models lie there as well.
        parameters = basis.shapes.num_parameters
        checkpoints = disk.need(basis.recipe, parameters, basis.start).num_checkpoints
        missing["disk"] = on_disk + (checkpoints * disk.DEEPSPEED_BYTES + 8) * parameters - fleet.disk_bytes
    return ", ".join(f"{name} +{format_bytes(size)}" for name, size in missing.items() if size > 0)
