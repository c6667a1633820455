"""What else could be done: other hardware, other placements, and ways out when nothing fits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from fulltune.plan import gpus, placement, sharded, ways_out
from fulltune.plan import levers as choosing
from fulltune.plan.budget import Room
from fulltune.plan.gpus import Fleet
from fulltune.plan.memory import Levers, state_of
from fulltune.plan.workload import Task, load_of
from fulltune.recipe.fields import Recipe
from fulltune.records.plan import MemoryNeed, Plan
from fulltune.records.survey import Alternative, Placement, WayOut

MOST_DEVICES = 8
"""Of one machine: several machines are not planned."""
FASTER_THAN_A_CPU = ("1x L4", "1x RTX 4090", "1x H100-80GB")


def preference(one: Placement) -> tuple[bool, float]:
    """Those that compute as AdamW in fp32 does come first, then the faster ones."""
    other_numbers = one.settings.get("model.weights_dtype") == "bf16" or one.settings.get("train.optim") == "adamw_8bit"
    return other_numbers, -(one.tokens_per_second or 0.0)


def automatic(one: Placement) -> bool:
    """It fits, can be run, and needs nothing that only a person can say."""
    return one.fits and one.runs and not one.needs


def that_fit(recipe: Recipe, fleet: Fleet, load: placement.Load, placements: Sequence[Placement]) -> tuple[WayOut, ...]:
    """Ways out of too little memory: other settings, other placements, more devices."""
    devices, needs_least = recipe.train.num_processes, least(recipe, load)
    ways = ways_out.of_memory(recipe, needs_least.levers, load.available_bytes, _need(load, devices), placements)
    now = needs_least.memory.peak
    found = [_on(fleet, one, now, words) for fleet, one, words in _other_hardware(load, fleet, devices)]
    return (*found, *ways)[: ways_out.MOST]


def least(recipe: Recipe, load: placement.Load) -> choosing.Chosen:
    """The recipe as it is with the settings that need least, which ways out are held against."""
    devices = recipe.train.num_processes
    share = max(1, load.global_batch_size // devices)
    need = _need(load, devices)
    room = Room(load.available_bytes, "", need, lambda levers: state_of(load.shapes.num_parameters, levers))
    return choosing.smallest(recipe, load.levers, share, room)


def _other_hardware(
    load: placement.Load, fleet: Fleet, devices: int
) -> Iterator[tuple[Fleet, Placement, tuple[str, str]]]:
    """More devices, and a larger host, on which something fits; each with its name and what it costs."""
    if more := enough_devices(load, fleet):
        other, one = more
        assert other.card is not None
        yield other, one, (f"{other.num_devices}x {other.card.name}, {one.name}", "more devices")
    if larger := _larger_host(load, fleet, devices):
        other, one = larger
        yield other, one, (f"{_host(other)}, {one.name}", "more memory of the host")


def _host(fleet: Fleet) -> str:
    """By its whole memory, as it is sold and as `--for` takes it."""
    return f"a host with {fleet.machine.memory_bytes / gpus.GB:,.0f} GB"


def _on(fleet: Fleet, one: Placement, now: int, words: tuple[str, str]) -> WayOut:
    """That placement on that hardware."""
    change, costs = words
    return WayOut(
        change=change,
        frees_bytes=max(0, now - one.device_bytes),
        where="device",
        enough=True,
        costs=costs,
        hardware=gpus.asked(fleet),
    )


def _need(load: placement.Load, devices: int) -> Callable[[Levers], MemoryNeed]:
    """What the recipe as it is needs on a device."""
    shared = load.shared
    if shared is None:
        return load.need

    def need(levers: Levers) -> MemoryNeed:
        kinds = sharded.kinds(shared, sharded.DEEPSPEED, load.shapes, devices, load.passing(levers))
        return MemoryNeed(kinds=kinds, phases={"step": sum(kinds.values())})

    return need


def enough_devices(load: placement.Load, fleet: Fleet) -> tuple[Fleet, Placement] | None:
    """The fewest devices of the same kind, a power of two, on which a placement fits that fulltune can run."""
    if fleet.card is None or fleet.here:
        return None
    for count in (2, 4, MOST_DEVICES):
        if count <= fleet.num_devices or load.global_batch_size % count:
            continue
        more = gpus.with_count(fleet, count)
        if fitting := _fitting(load, more, count):
            return more, fitting[0]
    return None


def _larger_host(load: placement.Load, fleet: Fleet, count: int) -> tuple[Fleet, Placement] | None:
    """The smallest host for the best placement that only the host is too small for."""
    if fleet.card is None:
        return None
    now = {one.name for one in placement.table(load, fleet, count) if one.fits}
    fitting = _fitting(load, gpus.with_host(fleet, 2**50), count)
    best = next((one for one in fitting if one.name not in now and one.host_bytes), None)
    if best is None:
        return None
    return gpus.with_host(fleet, gpus.least_host(best.host_bytes)), best


def _fitting(load: placement.Load, fleet: Fleet, count: int) -> list[Placement]:
    """What fits and can be run, the preferred one first."""
    table = placement.table(load, fleet, count)
    return sorted((one for one in table if automatic(one)), key=preference)


def instead(
    task: Task, load: placement.Load, fleet: Fleet, placements: Sequence[Placement], name: str, plan: Plan
) -> Iterator[Alternative]:
    """The next faster and the next cheaper plan, each against the chosen one."""
    chosen = next((one for one in placements if one.name == name), None)
    if chosen is None or not chosen.tokens_per_second:
        return
    speed = chosen.tokens_per_second
    others = sorted((one for one in placements if automatic(one) and one.name != name), key=preference)
    faster = [one for one in others if (one.tokens_per_second or 0.0) > 1.03 * speed]
    if faster:
        gain = (faster[0].tokens_per_second or 0.0) / speed
        words = f"{faster[0].name} ({faster[0].how})"
        yield Alternative(kind="faster", change=words, effect=f"{gain:.2f} times as fast")
    larger, host = _larger_host(load, fleet, plan.num_processes) or (fleet, None)
    if host is not None and (host.tokens_per_second or 0.0) > 1.03 * speed:
        gain = (host.tokens_per_second or 0.0) / speed
        words = f"{_host(larger)}, {host.name}"
        yield Alternative(kind="faster", change=words, effect=f"{gain:.2f} times as fast")
    if fleet.card is None and not fleet.machine.gpus:
        yield from _with_a_card(task, plan)
        return
    if fleet.card is None or fleet.here:
        return
    now = plan.num_processes
    for kind, count in (("faster", 2 * now), ("cheaper", now // 2)):
        if count < 1 or (kind == "faster" and count > MOST_DEVICES) or load.global_batch_size % count:
            continue
        fitting = _fitting(load, gpus.with_count(fleet, count), count)
        if not fitting:
            continue
        best = fitting[0]
        ratio = speed / (best.tokens_per_second or 1.0)
        money = ratio * count / now
        if (kind == "faster" and ratio > 0.95) or (kind == "cheaper" and money > 0.97):
            continue
        yield Alternative(
            kind="faster" if kind == "faster" else "cheaper",
            change=f"{count}x {fleet.card.name}, {best.name}",
            effect=f"{_times(ratio)} the time, {_times(money)} the device hours",
        )


def _with_a_card(task: Task, plan: Plan) -> Iterator[Alternative]:
    """What one card would make of a run on a CPU."""
    if plan.time is None:
        return
    for words in FASTER_THAN_A_CPU:
        fleet = gpus.parse(words)
        device = task.recipe.train.model_copy(update={"device": "auto", "num_processes": 1, "precision": "auto"})
        moved = replace(task, recipe=task.recipe.model_copy(update={"train": device}))
        fitting = _fitting(load_of(moved, fleet, plan), fleet, 1)
        if not fitting:
            continue
        best = fitting[0]
        ratio = (best.tokens_per_second or 0.0) / plan.time.tokens_per_second
        if ratio > 1.2:
            yield Alternative(
                kind="faster", change=f'--for "{words}" ({best.name})', effect=f"about {ratio:,.0f} times as fast"
            )
            return


def _times(ratio: float) -> str:
    return f"{ratio:.2f} x"
