"""What else could be done: other hardware, other placements, and ways out when nothing fits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal

from fulltune.plan import choose, gpus, ways_out
from fulltune.plan.choose import Option
from fulltune.plan.dotted import with_settings
from fulltune.plan.elsewhere import placement
from fulltune.plan.gpus import Fleet
from fulltune.plan.workload import NUM_MACHINES, NUM_PROCESSES, Basis, Workload, basis_of
from fulltune.records.plan import Plan
from fulltune.records.survey import Alternative, Placement, WayOut

MOST_DEVICES = 8
"""Of one machine."""
MOST_MACHINES = 8
"""That are proposed where fewer are too small."""
FASTER_THAN_A_CPU = ("1x L4", "1x RTX 4090", "1x H100-80GB")
_NOTABLY_FASTER = 1.03


def preference(one: Placement) -> tuple[bool, float]:
    """Those that compute as AdamW in fp32 does come first, then the faster ones."""
    other_numbers = one.settings.get("model.weights_dtype") == "bf16" or one.settings.get("train.optim") == "adamw_8bit"
    return other_numbers, -_speed(one)


def _speed(one: Placement) -> float:
    return one.tokens_per_second or 0.0


def installs(one: Placement) -> str:
    """What it needs beside fulltune."""
    return "; install fulltune[deepspeed]" if one.name.startswith("ZeRO") else ""


def automatic(one: Placement) -> bool:
    """It fits, can be run, and needs nothing that only a person can say."""
    return one.fits and one.runs and not one.needs


def least(basis: Basis) -> Option:
    """The recipe as it is with the settings that need least, which ways out are held against."""
    return choose.smallest(basis.recipe, basis.start, basis.rows_per_process, basis.budget)


def ways_out_of_memory(basis: Basis, placements: Sequence[Placement]) -> tuple[WayOut, ...]:
    """Other settings, other placements, more devices, a larger host."""
    now = least(basis)
    ways = ways_out.of_memory(basis.recipe, now.settings, basis.budget.available_bytes, basis.budget.need, placements)
    found = []
    for fleet, one, change, costs in _other_hardware(basis):
        freed = max(0, now.memory.peak - one.device_bytes)
        found.append(
            WayOut(
                change=change, frees_bytes=freed, where="device", enough=True, costs=costs, hardware=gpus.asked(fleet)
            )
        )
    return (*found, *ways)[: ways_out.MOST]


def _other_hardware(basis: Basis) -> Iterator[tuple[Fleet, Placement, str, str]]:
    """More devices, and a larger host, on which something fits; each with its name and what it costs."""
    fleet = basis.fleet
    if fleet.gpu_model is not None and not fleet.here:
        for more in _more_devices(fleet):
            if fitting := _fitting(basis, more, more.num_devices):
                costs = "more devices" if more.num_machines == fleet.num_machines else "more machines"
                yield more, fitting[0], f"{_devices(more)}, {fitting[0].name}", costs
                break
    if larger := _larger_host(basis):
        other, one = larger
        yield other, one, f"{_host(other)}, {one.name}", "more memory of the host"


def _more_devices(fleet: Fleet) -> Iterator[Fleet]:
    """Up to eight GPUs in one machine, then more machines."""
    if fleet.num_machines == 1:
        yield from (gpus.with_count(fleet, count) for count in (2, 4, MOST_DEVICES) if count > fleet.num_devices)
        fleet = gpus.with_count(fleet, max(MOST_DEVICES, fleet.num_devices))
    yield from (gpus.with_machines(fleet, count) for count in (2, 4, MOST_MACHINES) if count > fleet.num_machines)


def _devices(fleet: Fleet) -> str:
    """As `--for` has them: `8x A100-80GB`, `2x 8x A100-80GB`."""
    return gpus.asked(fleet).partition(",")[0]


def _host(fleet: Fleet) -> str:
    """By its whole memory, as it is sold and as `--for` takes it."""
    size = f"{fleet.machine.memory_bytes / gpus.GB:,.0f} GB"
    return f"hosts with {size} each" if fleet.num_machines > 1 else f"a host with {size}"


def _larger_host(basis: Basis) -> tuple[Fleet, Placement] | None:
    """The smallest host for the best placement that only the host is too small for; of several machines each."""
    fleet, count = basis.fleet, basis.num_devices
    if fleet.gpu_model is None:
        return None
    now = {one.name for one in placement.table(basis) if one.fits}
    fitting = _fitting(basis, gpus.with_host(fleet, 2**50), count)
    best = next((one for one in fitting if one.name not in now and one.host_bytes), None)
    return None if best is None else (gpus.with_host(fleet, gpus.least_host(best.host_bytes)), best)


def _fitting(basis: Basis, fleet: Fleet, count: int) -> list[Placement]:
    """What fits and can be run on so many devices, the preferred one first; nothing when they cannot share a batch."""
    if basis.global_batch_size % count:
        return []
    return sorted((one for one in placement.table(basis.on(fleet, count)) if automatic(one)), key=preference)


def instead(
    workload: Workload, basis: Basis, placements: Sequence[Placement], name: str, plan: Plan
) -> Iterator[Alternative]:
    """The next faster and the next cheaper plan, each against the chosen one."""
    fleet, chosen = basis.fleet, next((one for one in placements if one.name == name), None)
    if chosen is None or not chosen.tokens_per_second:
        return
    speed = best = chosen.tokens_per_second
    others = sorted((one for one in placements if automatic(one) and one.name != name), key=preference)
    faster = next((one for one in others if _speed(one) > _NOTABLY_FASTER * speed), None)
    if faster is not None:
        best = _speed(faster)
        effect = f"{best / speed:.2f} times as fast"
        yield Alternative(kind="faster", change=f"{faster.name} ({faster.how}{installs(faster)})", effect=effect)
    if larger := _larger_host(basis):
        host, one = larger
        if _speed(one) > _NOTABLY_FASTER * speed:
            effect = f"{_speed(one) / speed:.2f} times as fast"
            yield Alternative(kind="faster", change=f"{_host(host)}, {one.name}", effect=effect)
    if not fleet.machine.gpus:
        yield from _with_a_gpu(workload, plan)
    elif fleet.gpu_model is not None and not fleet.here:
        yield from _with_other_counts(basis, speed, best)


def _with_other_counts(basis: Basis, speed: float, best: float) -> Iterator[Alternative]:
    """Twice as many devices, where they pay in time; fewer, where they pay in money, first those that are faster too.

    Args:
        basis: What the chosen plan is judged by.
        speed: Of that plan.
        best: Of the fastest one on the same devices, beside which others have to pay.
    """
    now = basis.num_devices
    tried = [(other, fitting[0]) for other in _fewer(basis) if (fitting := _fitting(basis, other, other.num_devices))]
    # The fastest of fewer; of those as fast the largest step down.
    fewer = sorted(tried, key=lambda one: -round(_speed(one[1]) / speed, 2))[:1]
    twice = _twice(basis)
    more = _fitting(basis, twice, twice.num_devices)[:1] if twice else []
    for other, one in [*((twice, one) for one in more if twice), *fewer]:
        count, ratio = other.num_devices, speed / (one.tokens_per_second or 1.0)
        hours = ratio * count / now
        pays = best / speed * (hours if count < now else ratio)
        if pays <= (0.97 if count < now else 0.95):
            change = f"{_devices(other)}, {one.name}"
            effect = f"{ratio:.2f} x the time, {hours:.2f} x the device hours"
            less: Literal["cheaper", "cheaper and faster"] = "cheaper" if ratio > 0.95 else "cheaper and faster"
            yield Alternative(kind="faster" if count > now else less, change=change, effect=effect)


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
        fitting = _fitting(basis_of(moved, fleet), fleet, 1)
        if not fitting:
            continue
        ratio = _speed(fitting[0]) / plan.time.tokens_per_second
        if ratio > 1.2:
            effect = f"about {ratio:,.0f} times as fast"
            yield Alternative(kind="faster", change=f'--for "{words}" ({fitting[0].name})', effect=effect)
            return
