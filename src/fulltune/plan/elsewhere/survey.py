"""Everything that `fulltune plan` shows beside the plan: placements, time, money, alternatives, ways out, advice."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from fulltune.errors import DoesNotFitError
from fulltune.plan import choose, disk, gpus, resolve, time, ways_out
from fulltune.plan.dotted import DEEPSPEED, given, with_settings
from fulltune.plan.elsewhere import advise, placement
from fulltune.plan.fit import fit, with_time
from fulltune.plan.gpus import Fleet
from fulltune.plan.reasons import Reasons
from fulltune.plan.workload import NUM_MACHINES, NUM_PROCESSES, SPREAD, Basis, Workload, basis_of
from fulltune.recipe.fields import Recipe, with_placement
from fulltune.records.plan import Plan, Setting
from fulltune.records.survey import Placement, Survey, WayOut
from fulltune.system import sharing

MUCH_FASTER = 1.25
"""From here on a placement with DeepSpeed, which has to be installed and computes in other types, is taken instead of
one that fits without it; below it is named."""
NO_SHARING = "sharing out and offloading are planned for full fine-tuning alone"
Other = Callable[[str], Workload | None]
"""From a method's kind to the same workload by it, with its usual settings; None where it cannot be."""


@dataclass(frozen=True)
class Wishes:
    """What the data cannot tell."""

    price: time.Price | None = None
    tasks: int = 1
    preserve: bool = False
    goal: advise.Goal | None = None


@dataclass(frozen=True)
class _PlacedPlan:
    """A plan, and what it has that the recipe has not."""

    plan: Plan
    placement: str = ""
    """Name of the other placement that it has; empty for the recipe's own."""
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Methods:
    """Which methods fit into the hardware."""

    full_fits: bool
    lora_fits: bool | None
    """None: not asked."""
    lora: _PlacedPlan | None = None
    """Its plan, where the recipe's own method does not fit."""


def survey(
    workload: Workload, fleet: Fleet, wishes: Wishes, planned: Plan | None = None, other: Other = lambda kind: None
) -> tuple[Survey, Plan | None]:
    """Look at everything that could be done on this hardware.

    Args:
        workload: Recipe (see `spread_over`), model and data.
        fleet: The hardware.
        wishes: Price, number of tasks, goal.
        planned: The plan, when it is made already.
        other: Gives the workload of another method, for the advice: asked only where the plan does not tell.

    Returns:
        The survey, and a plan for the recipe's own placement, else for the best other one; None when nothing fits.
    """
    reasons = Reasons()
    basis = basis_of(workload, fleet, reasons)
    placements = placement.table(basis)
    found = _planned(workload, fleet, placements) if planned is None else _PlacedPlan(planned)
    methods = _methods(workload, fleet, not isinstance(found, DoesNotFitError), other)
    seen = _seen(workload, basis, wishes, placements, methods)
    if isinstance(found, DoesNotFitError):
        problem, ways = _ways_out(workload, basis, placements, found.problems[0], methods.lora)
        notes = (problem, *resolve.notes(basis.needs.footprint))
        [computes] = [f"{one.value}: {one.reason}" for one in reasons.settings if one.name == "train.precision"]
        return seen.model_copy(update={"ways_out": ways, "notes": notes, "computes": computes}), None
    plan, settings = found.plan, found.settings
    numbers = {NUM_PROCESSES: plan.num_processes, NUM_MACHINES: plan.num_machines}
    settings = {**{name: numbers[name] for name in workload.spread}, **settings}
    name = found.placement or _own(workload.recipe, plan, placements)
    placements = tuple(_as_planned(basis, one, plan) if one.name == name else one for one in placements)
    if plan.time is None:  # it was changed when memory ran out
        plan = with_time(plan, basis, workload.summary)
    update = {
        "fits": True,
        "placements": placements,
        "device_free_bytes": plan.available_bytes or basis.budget.available_bytes,
        "placement": name,
        "settings": settings,
        "time": plan.time,
        "alternatives": tuple(placement.instead(workload, basis, placements, name, plan)),
    }
    if wishes.price and plan.time:
        update["price"] = wishes.price.of(seen.num_devices, plan.time.whole_seconds)
    return seen.model_copy(update=update), plan


def _seen(
    workload: Workload, basis: Basis, wishes: Wishes, placements: tuple[Placement, ...], methods: _Methods
) -> Survey:
    """What is known whether or not there is a plan."""
    splits, shapes, fleet = workload.summary.splits, workload.shapes, basis.fleet
    situation = advise.Situation(
        train_rows=splits["train"].rows,
        num_parameters=shapes.num_parameters,
        is_decoder=shapes.is_decoder,
        fits=methods.full_fits,
        lora_fits=methods.lora_fits,
        own=workload.recipe.method.kind,
        tasks=wishes.tasks,
        preserve=wishes.preserve,
        goal=wishes.goal,
        frozen_fits=2 * shapes.num_parameters <= basis.budget.available_bytes,
    )
    return Survey(
        hardware=fleet.name,
        assumed=fleet.assumed,
        # The processes of a CPU share one device.
        num_devices=basis.num_devices if fleet.machine.gpus else basis.num_machines,
        num_machines=basis.num_machines,
        num_parameters=shapes.num_parameters,
        model_type=shapes.model_type,
        train_rows=splits["train"].rows,
        mixed_rows=workload.summary.rows_per_epoch - splits["train"].rows,
        eval_rows=splits["eval"].rows if "eval" in splits else 0,
        asked_eval_rows=splits["eval"].asked_rows if "eval" in splits else None,
        length_percentiles=splits["train"].length_percentiles,
        max_length=workload.summary.max_length,
        fits=False,
        full_fits=methods.full_fits,
        placements=placements,
        no_sharing="" if shapes.num_trained is None or not fleet.machine.gpus else NO_SHARING,
        disk_free_bytes=fleet.disk_bytes,
        host_free_bytes=fleet.machine.memory_available_bytes,
        device_free_bytes=basis.budget.available_bytes,
        on_cpu=not fleet.machine.gpus,
        currency=wishes.price.currency if wishes.price else "",
        advice=advise.advise(situation),
    )


# ---- the plan --------------------------------------------------------------------------------------------------


def _planned(workload: Workload, fleet: Fleet, placements: Sequence[Placement]) -> _PlacedPlan | DoesNotFitError:
    """The recipe as it is; on hardware that is not here also with the best other placement that fulltune can run.

    On this machine the plan is what `fulltune run` would do: other placements are ways out.
    """
    try:
        own = _fitted(workload, workload.recipe, fleet)
    except DoesNotFitError as error:
        return error if fleet.here else _elsewhere(workload, fleet, placements) or error
    if fleet.here or own.num_processes == 1:
        return _PlacedPlan(own)
    exact = [one for one in placements if not (placement.computes_otherwise(one) or one.host_bytes or one.disk_bytes)]
    if workload.recipe.train.optim is None and own.optim == "adamw_8bit":
        # Sharing out the state of several devices leaves the arithmetic as it is; 8-bit moments do not.
        return _elsewhere(workload, fleet, exact) or _PlacedPlan(own)
    speed = own.time.tokens_per_second if own.time else math.inf
    faster = [one for one in exact if placement.speed(one) > MUCH_FASTER * speed]
    why = f", much faster than {own.placement}, which fits as well"
    return _elsewhere(workload, fleet, faster, why) or _PlacedPlan(own)


def _elsewhere(workload: Workload, fleet: Fleet, placements: Sequence[Placement], why: str = "") -> _PlacedPlan | None:
    """With the best of these placements, and why it is not the recipe's own."""
    for one in placement.ranked(placements):
        if not one.settings or _overrides(workload.recipe, one.settings):
            continue
        try:
            plan = _fitted(workload, with_settings(workload.recipe, one.settings), fleet)
        except DoesNotFitError:  # of the ways that fit by the table, the next one
            continue
        names = {"train.extra" if name == DEEPSPEED else name for name in one.settings}
        reason = f"placement: {one.name}{why}{placement.installs(one)}"
        return _PlacedPlan(_explained(plan, names, reason), one.name, one.settings)
    return None


def _overrides(recipe: Recipe, settings: dict[str, Any]) -> bool:
    """Whether one of them has another value in the recipe: what is given is kept, and is then a way out."""
    names = settings.keys() - set(SPREAD)
    return any(given(recipe, name) not in (None, settings[name]) for name in names)


def _fitted(workload: Workload, recipe: Recipe, fleet: Fleet) -> Plan:
    plan = fit(recipe, workload.shapes, workload.footprint(recipe.model.weights_dtype), workload.summary, fleet)
    for name in workload.spread:
        plan = _explained(plan, {name}, "one for each device" if name == NUM_PROCESSES else "from --for")
    return plan


def _explained(plan: Plan, names: set[str], reason: str) -> Plan:
    """The plan with another reason for some settings, which the recipe did not give."""
    settings: tuple[Setting, ...] = tuple(
        one.model_copy(update={"chosen": True, "reason": reason}) if one.name in names else one for one in plan.settings
    )
    return plan.model_copy(update={"settings": settings})


def _own(recipe: Recipe, plan: Plan, placements: Sequence[Placement]) -> str:
    """Name of the placement that a plan has; empty for one that the table does not list."""
    shared = sharing.of(with_placement(recipe, plan.placement))
    for one in placements:
        changed = with_settings(recipe, one.settings)
        if sharing.of(changed) != shared:
            continue
        optim, _ = resolve.optimizer(changed, Reasons())
        in_deepspeed = shared is not None and shared.engine == "deepspeed"
        if in_deepspeed or (optim == plan.optim and changed.model.weights_dtype == plan.weights_dtype):
            return one.name
    return ""


def _as_planned(basis: Basis, one: Placement, plan: Plan) -> Placement:
    """The row with the plan's own micro batch and checkpointing, and with its memory, which the table knows only
    roughly for other types of weights than the recipe's."""
    row = placement.planned(basis, one.name, plan)
    if plan.memory is None:
        return row
    return row.model_copy(update={"kinds": plan.memory.kinds, "device_bytes": plan.memory.peak})


# ---- other methods ---------------------------------------------------------------------------------------------


def _methods(workload: Workload, fleet: Fleet, fits: bool, other: Other) -> _Methods:
    """What the advice needs to know; `fits`: the recipe's own method does."""
    kind = workload.recipe.method.kind
    full_fits = fits if kind == "full" else _alone(other("full"), fleet) is not None
    if full_fits or kind == "lora":
        return _Methods(full_fits, fits if kind == "lora" else None)
    lora = other("lora")
    plan = _alone(lora, fleet)
    return _Methods(full_fits, None if lora is None else plan is not None, None if fits else plan)


def _alone(workload: Workload | None, fleet: Fleet) -> _PlacedPlan | None:
    """The plan of another method, with whatever placement fits; None when none does."""
    if workload is None:
        return None
    settings: dict[str, Any] = {}
    if _needs_narrow_weights(workload, fleet):  # tracing these at once saves the seconds of tracing the others
        settings = {"model.weights_dtype": "bf16"}
        workload = replace(workload, recipe=with_settings(workload.recipe, settings))
    placements = placement.table(basis_of(workload, fleet))
    plan = _planned(workload, fleet, placements)
    found = _elsewhere(workload, fleet, placements) if isinstance(plan, DoesNotFitError) else plan
    return None if found is None else replace(found, settings={**settings, **found.settings})


def _needs_narrow_weights(workload: Workload, fleet: Fleet) -> bool:
    """The weights of a method that nothing shares out are too large as fp32, and may be bf16 here."""
    recipe, devices = workload.recipe, fleet.machine.gpus
    if workload.shapes.num_trained is None or given(recipe, "model.weights_dtype") is not None:
        return False
    if recipe.train.precision not in ("auto", "bf16") or not devices:
        return False
    too_large = 4 * workload.shapes.num_parameters > devices[0].available_bytes
    return too_large and resolve.oldest_gpu(recipe, fleet.machine).bf16


# ---- ways out --------------------------------------------------------------------------------------------------


def _ways_out(
    workload: Workload, basis: Basis, placements: Sequence[Placement], problem: str, lora: _PlacedPlan | None
) -> tuple[str, tuple[WayOut, ...]]:
    """What is short, with the ways out: of the disk, when a larger one would do, else of memory; LoRA where it fits."""
    fleet = basis.fleet
    found = _planned(workload, fleet.model_copy(update={"disk_bytes": None}), placements)
    if isinstance(found, DoesNotFitError) or fleet.disk_bytes is None:
        least = choose.smallest(basis.recipe, basis.start, basis.rows_per_process, basis.budget)
        ways = [_tried(workload, fleet, way) for way in _of_memory(basis, placements, least)]
        if lora is not None:
            ways.append(_as_way_out(lora, "device", least.memory.peak))
    else:
        recipe, plan = with_settings(workload.recipe, found.settings), found.plan
        needed = disk.need(recipe, plan.num_parameters, plan)
        problem = disk.short_by(recipe, needed, fleet.disk_bytes, fleet.disk_at)
        ways = [*disk.ways(recipe, plan.num_parameters, plan, fleet.disk_bytes, fleet.disk_at)]
        if lora is not None:
            ways.append(_as_way_out(lora, "disk", needed.total))
    return problem, tuple(sorted(ways, key=lambda way: not way.enough))


def _of_memory(basis: Basis, placements: Sequence[Placement], least: choose.Option) -> Sequence[WayOut]:
    """More devices, a larger host, other settings, other placements; `least` is the recipe with the settings that need
    least."""
    ways = [
        WayOut(
            change=there.words,
            frees_bytes=max(0, least.memory.peak - there.placement.device_bytes),
            where="device",
            enough=True,
            costs=costs,
            hardware=gpus.asked(there.fleet),
        )
        for there, costs in placement.larger(basis)
    ]
    ways += ways_out.of_memory(
        basis.recipe, least.settings, basis.budget.available_bytes, basis.budget.need, placements
    )
    return ways[: ways_out.MOST]


def _tried(workload: Workload, fleet: Fleet, way: WayOut) -> WayOut:
    """The way out as the plan finds it when it is followed: memory is not all that can be short."""
    if not way.enough or not (way.hardware or way.settings) or "data.max_length" in way.settings:
        return way
    there = gpus.parse(way.hardware) if way.hardware else fleet
    recipe = with_settings(workload.recipe, way.settings)
    if way.hardware:
        numbers = {NUM_PROCESSES: there.num_devices, NUM_MACHINES: there.num_machines}
        left_open = {name for name in SPREAD if name in workload.spread or given(recipe, name) is None}
        recipe = with_settings(recipe, {name: numbers[name] for name in left_open})
    other = replace(workload, recipe=recipe)
    placements = placement.table(basis_of(other, there))
    if not isinstance(_planned(other, there, placements), DoesNotFitError):
        return way
    found = _planned(other, there.model_copy(update={"disk_bytes": None}), placements)
    short = "other things are short as well" if isinstance(found, DoesNotFitError) else "the disk is too small as well"
    return way.model_copy(update={"enough": False, "costs": f"{way.costs}; {short}"})


def _as_way_out(lora: _PlacedPlan, where: Literal["device", "disk"], now_bytes: int) -> WayOut:
    """In place of the recipe's method, which needs so much of what is short."""
    plan = lora.plan
    need = (plan.disk.total if plan.disk else 0) if where == "disk" else (plan.memory.peak if plan.memory else 0)
    share = plan.num_trainable_parameters / (plan.num_trainable_parameters + plan.num_frozen_parameters)
    return WayOut(
        change="method: lora",
        frees_bytes=max(0, now_bytes - need),
        where=where,
        enough=True,
        costs=f"another method, which trains {100 * share:.2g} % of the parameters",
        settings={"method": "lora", **lora.settings},
    )
