"""What else could be done: other hardware, other placements, and ways out when nothing fits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from fulltune.plan import cards, placement, sharded, ways_out
from fulltune.plan.cards import Fleet
from fulltune.plan.load import Task, load_of
from fulltune.plan.memory import Levers
from fulltune.recipe import Recipe
from fulltune.records import Alternative, MemoryNeed, Placement, Plan, WayOut
from fulltune.units import in_words

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
    devices = recipe.train.num_processes
    micro = load.micro_batch_size or 1
    kept = recipe.train.optim or load.levers.bf16_rounding == "nearest" or load.shared is not None
    least = replace(
        load.levers,
        micro_batch_size=micro,
        accumulation=max(1, load.global_batch_size // devices // micro),
        activation_checkpointing=load.checkpointing[-1],
        optim=load.levers.optim if kept else "adamw_8bit",
        chunked_loss=load.levers.chunked_loss and load.shared is None,
    )
    need = _need(load, devices)
    ways = ways_out.of_memory(recipe, least, load.available_bytes, need, placements)
    now = need(least).peak
    if host := _larger_host(load, fleet, devices):
        larger = WayOut(
            change=f"a host with {in_words(host.host_bytes)} free, {host.name}",
            frees_bytes=max(0, now - host.device_bytes),
            where="device",
            enough=True,
            costs="more memory of the host",
        )
        ways = (larger, *ways)
    more = enough_devices(load, fleet)
    if more is None:
        return ways[: ways_out.MOST]
    extra = WayOut(
        change=f"{more[0]}x {fleet.card.name if fleet.card else ''}, {more[1].name}",
        frees_bytes=max(0, now - more[1].device_bytes),
        where="device",
        enough=True,
        costs="more devices",
    )
    return (extra, *ways)[: ways_out.MOST]


def _need(load: placement.Load, devices: int) -> Callable[[Levers], MemoryNeed]:
    """What the recipe as it is needs on a device."""
    shared = load.shared
    if shared is None:
        return load.need

    def need(levers: Levers) -> MemoryNeed:
        kinds = sharded.kinds(shared, sharded.DEEPSPEED, load.shapes, devices, load.passing(levers))
        return MemoryNeed(kinds=kinds, phases={"step": sum(kinds.values())})

    return need


def enough_devices(load: placement.Load, fleet: Fleet) -> tuple[int, Placement] | None:
    """The fewest devices of the same kind, a power of two, on which a placement fits that fulltune can run."""
    if fleet.card is None or fleet.here:
        return None
    for count in (2, 4, MOST_DEVICES):
        if count <= fleet.num_devices or load.global_batch_size % count:
            continue
        if fitting := _fitting(load, cards.with_count(fleet, count), count):
            return count, fitting[0]
    return None


def _larger_host(load: placement.Load, fleet: Fleet, count: int) -> Placement | None:
    """The best placement that only the host is too small for."""
    if fleet.card is None:
        return None
    larger = cards.with_host(fleet, 2**50)
    now = {one.name for one in placement.table(load, fleet, count) if one.fits}
    fitting = [one for one in _fitting(load, larger, count) if one.name not in now and one.host_bytes]
    return fitting[0] if fitting else None


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
    host = _larger_host(load, fleet, plan.num_processes)
    if host is not None and (host.tokens_per_second or 0.0) > 1.03 * speed:
        gain = (host.tokens_per_second or 0.0) / speed
        words = f"a host with {in_words(host.host_bytes)} free, {host.name}"
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
        fitting = _fitting(load, cards.with_count(fleet, count), count)
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
        fleet = cards.parse(words)
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
