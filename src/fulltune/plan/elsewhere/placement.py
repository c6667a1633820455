"""Where weights, gradients and optimizer state may lie, what each way needs and gives (docs/scale.md), and what other
hardware would make of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from fulltune.plan import disk, gpus, sharded, time
from fulltune.plan.choose import COMFORTABLE, candidates, fastest
from fulltune.plan.dotted import DEEPSPEED, OFFLOAD, PLACEMENT, WHERE, given, in_yaml, with_settings
from fulltune.plan.gpus import Fleet
from fulltune.plan.levers import plain_optim
from fulltune.plan.workload import NUM_MACHINES, NUM_PROCESSES, Basis, Workload, basis_of, takes_pieces
from fulltune.recipe.training import NVME, NVME_FOLDER
from fulltune.records.plan import MemoryKind, MemorySettings, Plan
from fulltune.records.survey import Alternative, Placement
from fulltune.system.deepspeed import nvme_path
from fulltune.system.sharing import Sharing
from fulltune.text import format_bytes

NEEDS_PATH = f"with the folder of an NVMe disk in {OFFLOAD}"
MOST_DEVICES, MOST_MACHINES = 8, 8
"""That are proposed: of one machine, and machines where fewer are too small."""
FASTER_THAN_A_CPU = ("1x L4", "1x RTX 4090", "1x H100-80GB")
_NOTABLY_FASTER = 1.03
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
    weights_dtype: str = "fp32"
    optim: str = "adamw_torch_fused"
    shared: Sharing | None = None
    """None: each device holds everything."""
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
    cards, many = basis.fleet.machine.gpus, basis.num_devices > 1
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
    if cards and not (train.use_liger_kernel or train.torch_compile):
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
    shared, parameters = layout.shared, basis.shapes.num_parameters
    need = basis.needs.of(settings, shared)
    kinds = dict(need.kinds)
    # Evaluation, saving or resuming may have the higher peak.
    kinds["buffers"] += max(0, need.peak - sum(kinds.values()))
    on_hosts = sharded.host_bytes(shared, parameters, basis.num_devices) if shared else 0
    host = -(-on_hosts // basis.num_machines)
    on_disk = sharded.disk_bytes(shared, parameters)
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
        settings=changes,
        how=how,
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


# ---- which is taken ----------------------------------------------------------------------------------------------


def computes_otherwise(one: Placement) -> bool:
    """Whether its numbers are not those of AdamW in fp32."""
    return one.settings.get("model.weights_dtype") == "bf16" or one.settings.get("train.optim") == "adamw_8bit"


def speed(one: Placement) -> float:
    return one.tokens_per_second or 0.0


def ranked(placements: Sequence[Placement]) -> list[Placement]:
    """Those that fit and need nothing that only a person can say: first the ones that compute as AdamW in
    fp32 does, then the faster ones."""
    automatic = (one for one in placements if one.fits and not one.needs)
    return sorted(automatic, key=lambda one: (computes_otherwise(one), -speed(one)))


def installs(one: Placement) -> str:
    """What it needs beside fulltune."""
    return "; install fulltune[deepspeed]" if one.name.startswith("ZeRO") else ""


# ---- on other hardware -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class There:
    """Other hardware, and the best placement on it."""

    fleet: Fleet
    placement: Placement
    words: str
    """Both, for people: `8x A100-80GB, FSDP2`, `a host with 256 GB, ZeRO-3, all on host`."""

    @property
    def speed(self) -> float:
        return speed(self.placement)


def _on(basis: Basis, fleet: Fleet) -> There | None:
    """The best placement on all devices of other hardware; None when nothing fits, or they cannot share a batch."""
    if basis.global_batch_size % fleet.num_devices:
        return None
    found = ranked(table(basis.on(fleet, fleet.num_devices)))
    return There(fleet, found[0], f"{gpus.asked(fleet).partition(',')[0]}, {found[0].name}") if found else None


def _on_larger_host(basis: Basis) -> There | None:
    """The smallest host for the best placement that only the host is too small for; of several machines each."""
    fleet = basis.fleet
    if fleet.gpu_model is None:
        return None
    now = {one.name for one in table(basis) if one.fits}
    anything = ranked(table(basis.on(gpus.with_host(fleet, 2**50), basis.num_devices)))
    found = next((one for one in anything if one.name not in now and one.host_bytes), None)
    if found is None:
        return None
    larger = gpus.with_host(fleet, gpus.least_host(found.host_bytes))
    size = f"{larger.machine.memory_bytes / gpus.GB:,.0f} GB"
    host = f"hosts with {size} each" if fleet.num_machines > 1 else f"a host with {size}"
    return There(larger, found, f"{host}, {found.name}")


def larger(basis: Basis) -> Iterator[tuple[There, str]]:
    """The next larger number of devices or machines, and the next larger host, on which something fits, each with what
    it costs."""
    fleet, more = basis.fleet, list[Fleet]()
    if fleet.gpu_model is not None and not fleet.here:
        whole = fleet
        if fleet.num_machines == 1:  # up to eight GPUs in one machine, then more machines
            more = [gpus.with_count(fleet, count) for count in (2, 4, MOST_DEVICES) if count > fleet.num_devices]
            whole = gpus.with_count(fleet, max(MOST_DEVICES, fleet.num_devices))
        more += [gpus.with_machines(whole, count) for count in (2, 4, MOST_MACHINES) if count > fleet.num_machines]
    if there := next(filter(None, (_on(basis, one) for one in more)), None):
        yield there, "more devices" if there.fleet.num_machines == fleet.num_machines else "more machines"
    if there := _on_larger_host(basis):
        yield there, "more memory of the host"


def instead(
    workload: Workload, basis: Basis, placements: Sequence[Placement], name: str, plan: Plan
) -> Iterator[Alternative]:
    """The next faster and the next cheaper plan, each against the chosen one."""
    fleet, chosen = basis.fleet, next((one for one in placements if one.name == name), None)
    if chosen is None or not (now := speed(chosen)):
        return
    others = [one for one in ranked(placements) if one.name != name]
    fastest = now
    if faster := next((one for one in others if speed(one) > _NOTABLY_FASTER * now), None):
        fastest = speed(faster)
        words = f"{faster.name} ({faster.how}{installs(faster)})"
        yield Alternative(kind="faster", change=words, effect=f"{fastest / now:.2f} times as fast")
    if (there := _on_larger_host(basis)) and there.speed > _NOTABLY_FASTER * now:
        yield Alternative(kind="faster", change=there.words, effect=f"{there.speed / now:.2f} times as fast")
    if not fleet.machine.gpus:
        yield from _with_a_gpu(workload, plan)
    elif fleet.gpu_model is not None and not fleet.here:
        yield from _with_other_counts(basis, now, fastest)


def _with_other_counts(basis: Basis, now: float, fastest: float) -> Iterator[Alternative]:
    """Twice as many devices, where they pay in time; fewer, where they pay in money: the fastest of them, of those as
    fast the largest step down.

    Args:
        basis: What the chosen plan is judged by.
        now: Tokens a second of that plan.
        fastest: Of the fastest one on the same devices, beside which others have to pay.
    """
    fewer = sorted(filter(None, (_on(basis, one) for one in _fewer(basis))), key=lambda one: -round(one.speed / now, 2))
    twice = _twice(basis)
    more = None if twice is None else _on(basis, twice)
    for there in filter(None, (more, *fewer[:1])):
        count, ratio = there.fleet.num_devices, now / (there.speed or 1.0)
        hours = ratio * count / basis.num_devices
        is_more = count > basis.num_devices
        if fastest / now * (ratio if is_more else hours) <= (0.95 if is_more else 0.97):
            effect = f"{ratio:.2f} x the time, {hours:.2f} x the device hours"
            less: Literal["cheaper", "cheaper and faster"] = "cheaper" if ratio > 0.95 else "cheaper and faster"
            yield Alternative(kind="faster" if is_more else less, change=there.words, effect=effect)


def _twice(basis: Basis) -> Fleet | None:
    """Twice as many devices as are used: in one machine as long as it has room for them, else in twice the machines."""
    fleet, count = basis.fleet, 2 * basis.num_devices
    if fleet.num_machines == 1 and count <= MOST_DEVICES:
        return gpus.with_count(fleet, count)
    if basis.num_devices < fleet.num_devices or 2 * fleet.num_machines > MOST_MACHINES:
        return None
    return gpus.with_machines(fleet, 2 * fleet.num_machines)


def _fewer(basis: Basis) -> Iterator[Fleet]:
    """Half as many; of several machines one, two ... up to half of them: between machines the network is slow."""
    fleet = basis.fleet
    if fleet.num_machines == 1 and basis.num_devices > 1:
        yield gpus.with_count(fleet, basis.num_devices // 2)
    elif basis.num_devices == fleet.num_devices:
        yield from (gpus.with_machines(fleet, 2**power) for power in range((fleet.num_machines // 2).bit_length()))


def _with_a_gpu(workload: Workload, plan: Plan) -> Iterator[Alternative]:
    """What one GPU would make of a run on a CPU."""
    if plan.time is None:
        return
    anywhere = {"train.device": "auto", NUM_PROCESSES: 1, NUM_MACHINES: 1, "train.precision": "auto"}
    moved = replace(workload, recipe=with_settings(workload.recipe, anywhere))
    for words in FASTER_THAN_A_CPU:
        fleet = gpus.parse(words)
        there = _on(basis_of(moved, fleet), fleet)
        ratio = there.speed / plan.time.tokens_per_second if there else 0.0
        if there and ratio > 1.2:
            effect = f"about {ratio:,.0f} times as fast"
            yield Alternative(kind="faster", change=f'--for "{words}" ({there.placement.name})', effect=effect)
            return
