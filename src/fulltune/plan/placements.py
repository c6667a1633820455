from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from fulltune.plan import budget, choose
from fulltune.plan.savings import plain_optim
from fulltune.plan.settings import OFFLOAD, PLACEMENT, WHERE, recipe_value, with_settings
from fulltune.plan.stream import start_of, why_not_stream
from fulltune.plan.workload import Basis, is_loss_chunked
from fulltune.recipe.training import ENGINE_SETTINGS
from fulltune.records.plan import MemoryNeed, MemorySettings, PlacementOption
from fulltune.system import parallel_layout
from fulltune.system.parallel_layout import ParallelLayout
from fulltune.text import format_bytes

_DEFAULTS = {
    "model.weights_dtype": "fp32",
    "train.bf16_rounding": None,
    PLACEMENT: "auto",
    OFFLOAD: "none",
    ENGINE_SETTINGS: None,
}


def placement_table(basis: Basis) -> tuple[PlacementOption, ...]:
    """Return every sensible placement, each with its memory and speed."""
    return tuple(_best_option(basis, settings) for settings in _placements_to_compare(basis))


def _placements_to_compare(basis: Basis) -> Iterator[dict[str, Any]]:
    """Yield the recipe settings of each combination of placement, weight type and optimizer in the table."""
    train = basis.recipe.train
    many = train.num_processes > 1
    plain = _DEFAULTS | {"train.optim": "adamw_torch_fused"}
    if train.placement == ("ddp" if many else "single"):  # what auto means here
        plain[PLACEMENT] = train.placement
    small = {"train.optim": "adamw_8bit"}
    yield plain
    yield plain | small
    if basis.start.precision != "fp16" and basis.start.fast_bf16:
        narrow = {name: value for name, value in plain.items() if name != "train.bf16_rounding"}
        narrow |= {"model.weights_dtype": "bf16", "train.optim": plain_optim("bf16", train.bf16_rounding)}
        narrow |= {"train.precision": "bf16"} if train.precision == "fp32" else {}
        yield narrow
        yield narrow | small
    if why_not_stream(basis.shapes, with_settings(basis.recipe, {PLACEMENT: "auto"})) is None:
        yield plain | {PLACEMENT: "stream"}
    if basis.start.num_trainable is not None or basis.recipe.model.new_tokens:  # sharding is planned for plain full
        return
    # Combinations that the recipe's own rules refuse are not listed.
    if many and basis.shapes.units is not None and not train.use_liger_kernel:
        yield plain | {PLACEMENT: "fsdp2"}
        yield plain | {PLACEMENT: "fsdp2"} | small
    if not basis.fleet.machine.gpus or train.use_liger_kernel or train.torch_compile or basis.shapes.has_experts:
        return
    unchunked = {"train.chunked_loss": None} if train.chunked_loss else {}  # ZeRO cannot chunk the loss
    on_devices = (("zero2", "none"), ("zero3", "none")) if many else ()
    for placement, offload in (*on_devices, ("zero2", "optimizer"), ("zero3", "all")):
        yield plain | unchunked | {PLACEMENT: placement, OFFLOAD: offload}


def _best_option(basis: Basis, settings: dict[str, Any]) -> PlacementOption:
    """Return a placement's table row with the fastest settings that fit, or else those with the lowest memory."""
    recipe, narrow = with_settings(basis.recipe, settings), settings["model.weights_dtype"] == "bf16"
    start = basis.start.changed(
        weights_dtype=settings["model.weights_dtype"],
        precision="bf16" if narrow else basis.start.precision,
        optim=settings["train.optim"],
        bf16_rounding=(recipe.train.bf16_rounding or "stochastic") if narrow else None,
        chunked_loss=is_loss_chunked(recipe, basis.start.plain_logits),
        stream=start_of(recipe, basis.shapes, basis.fleet, settings["train.optim"]),
    )
    free, where = budget.usable_memory(recipe, basis.fleet.machine, start.device)
    layout = parallel_layout.layout_of(recipe)
    placed = replace(basis, start=start, layout=layout, available_bytes=free, where=where)
    option = choose.fastest_fitting_settings(placed) or choose.lowest_memory_settings(placed, same_result=True)
    current = _DEFAULTS | {
        "train.optim": plain_optim(settings["model.weights_dtype"], basis.recipe.train.bf16_rounding)
    }
    current |= {name: value for name in settings if (value := recipe_value(basis.recipe, name)) is not None}
    if placed.layout is not None and placed.layout == basis.layout:  # perhaps by the user's own ZeRO settings
        current |= {name: settings.get(name) for name in WHERE}
    changed = {name: value for name, value in settings.items() if current.get(name) != value}
    return table_row(placed, option.settings, option.memory, changed)


def table_row(basis: Basis, settings: MemorySettings, memory: MemoryNeed, changes: dict[str, Any]) -> PlacementOption:
    """Return a placement as a row of the plan's table; `changes` are the settings that differ from the recipe's."""
    kinds, layout = dict(memory.kinds), basis.layout
    # Evaluation, saving or resuming may have the higher peak.
    kinds["buffers"] = kinds.get("buffers", 0) + memory.peak - sum(kinds.values())
    host = memory.host * settings.processes_per_machine
    seconds = basis.step_seconds(settings)
    missing = {"device": memory.peak - basis.available_bytes}
    if host:
        missing["host"] = host - basis.fleet.machine.memory_available_bytes
    return PlacementOption(
        name=placement_name(layout, settings),
        kinds=kinds,
        device_bytes=memory.peak,
        host_bytes=host,
        micro_batch_size=settings.micro_batch_size,
        activation_checkpointing=settings.activation_checkpointing,
        shortage=", ".join(f"{name} +{format_bytes(size)}" for name, size in missing.items() if size > 0) or None,
        tokens_per_second=basis.tokens_per_second(settings),
        bound_by=max(seconds, key=lambda name: seconds[name]) if seconds else "",
        settings=changes,
    )


def placement_name(layout: ParallelLayout | None, settings: MemorySettings) -> str:
    small = settings.optim == "adamw_8bit"
    if layout is None:
        each = f"{settings.num_processes} copies" if settings.num_processes > 1 else "one device"
        each = "stream" if settings.stream is not None else each
        plain = {"adamw_torch_fused": "AdamW fp32", "adamw_8bit": "8-bit AdamW"}.get(settings.optim, settings.optim)
        narrow = "bf16 + 8-bit" if small else "bf16 weights"
        return f"{each}, {plain if settings.weights_dtype == 'fp32' else narrow}"
    if layout.engine == "fsdp2":
        return "FSDP2, 8-bit AdamW" if small else "FSDP2"
    weights, optimizer = layout.tier_of("weights"), layout.tier_of("optimizer")
    where = f", all on {weights}" if weights != "device" else f", optimizer on {optimizer}"
    return f"ZeRO-{layout.stage}" + (where if optimizer != "device" else "")
