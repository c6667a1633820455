"""Everything that `fulltune plan` shows beside the plan: placements, time, money, alternatives, ways out, advice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from fulltune import zero
from fulltune.errors import DoesNotFitError
from fulltune.footprint import Footprint
from fulltune.hardware import Machine
from fulltune.model import Shapes
from fulltune.plan import advise, alternatives, cards, placement, time, ways_out
from fulltune.plan.cards import Fleet
from fulltune.plan.fit import fit
from fulltune.plan.load import Task, load_of
from fulltune.recipe import Recipe
from fulltune.records import DataSummary, Placement, Plan, Setting, Survey, WayOut

UNKNOWN_DISK_BYTES = 2**62


@dataclass(frozen=True)
class Wishes:
    """What the data cannot tell."""

    price: time.Price | None = None
    tasks: int = 1
    preserve: bool = False
    goal: advise.Goal | None = None


def survey(task: Task, fleet: Fleet, wishes: Wishes, planned: Plan | None = None) -> tuple[Survey, Plan | None]:
    """Look at everything that could be done on this hardware.

    Args:
        task: Recipe (see `spread_over`), model and data.
        fleet: The hardware.
        wishes: Price, number of tasks, goal.
        planned: The plan, when it is made already.

    Returns:
        The survey, and a plan for the recipe's own placement, else for the best other one; None when nothing fits.
    """
    load = load_of(task, fleet, planned)
    placements = placement.table(load, fleet, task.recipe.train.num_processes)
    if planned is None:
        planned, name, problem = _plan(task, fleet, placements)
        if planned is None:
            found = _found(task, fleet, wishes, load, placements)
            ways = _ways_out(task, fleet, load, placements)
            return found.model_copy(update={"ways_out": ways, "notes": problem.problems[:1] if problem else ()}), None
    else:
        name = ""
    name = name or _own(task.recipe, planned, placements)
    placements = _as_planned(load, fleet, planned, placements, name)
    planned = _with_time(planned, task.summary, load, fleet, placements, name)
    others = tuple(alternatives.instead(task, load, fleet, placements, name, planned))
    update = {"fits": True, "placement": name, "time": planned.time, "alternatives": others}
    if wishes.price and planned.time:
        update["price"] = wishes.price.of(fleet.num_devices, planned.time.total_seconds)
    return _found(task, fleet, wishes, load, placements, fits=True).model_copy(update=update), planned


def _found(
    task: Task,
    fleet: Fleet,
    wishes: Wishes,
    load: placement.Load,
    placements: tuple[Placement, ...],
    fits: bool = False,
) -> Survey:
    """What is known whether or not there is a plan."""
    splits, shapes = task.summary.splits, task.shapes
    situation = advise.Situation(
        train_rows=splits["train"].rows,
        num_parameters=shapes.num_parameters,
        is_decoder=shapes.is_decoder,
        fits=fits,
        tasks=wishes.tasks,
        preserve=wishes.preserve,
        goal=wishes.goal,
    )
    return Survey(
        hardware=fleet.name,
        assumed=fleet.assumed,
        num_devices=task.recipe.train.num_processes,
        num_parameters=shapes.num_parameters,
        model_type=shapes.model_type,
        train_rows=splits["train"].rows,
        eval_rows=splits["eval"].rows if "eval" in splits else 0,
        length_percentiles=splits["train"].length_percentiles,
        max_length=task.summary.max_length,
        fits=fits,
        placements=placements,
        disk_free_bytes=fleet.disk_bytes,
        host_free_bytes=fleet.machine.memory_available_bytes,
        device_free_bytes=load.available_bytes,
        currency=wishes.price.currency if wishes.price else "",
        advice=advise.advise(situation),
    )


# ---- the plan --------------------------------------------------------------------------------------------------


def _plan(task: Task, fleet: Fleet, placements: Sequence[Placement]) -> tuple[Plan | None, str, DoesNotFitError | None]:
    """The recipe as it is; if that does not fit, with the best placement that does and that fulltune can run."""
    try:
        return _fitted(task, task.recipe, fleet), "", None
    except DoesNotFitError as error:
        problem = error
    for one in sorted(placements, key=alternatives.preference):
        if not (one.fits and one.runs):
            continue
        try:
            plan = _fitted(task, with_settings(task.recipe, one.settings), fleet)
        except DoesNotFitError:
            continue
        names = {"train.extra" if name == "train.extra.deepspeed" else name for name in one.settings}
        return _explained(plan, names, f"placement: {one.name}"), one.name, None
    return None, "", problem


def _explained(plan: Plan, names: set[str], reason: str) -> Plan:
    """The plan with another reason for some settings, which the recipe did not give."""
    settings: tuple[Setting, ...] = tuple(
        one.model_copy(update={"chosen": True, "reason": reason}) if one.name in names else one for one in plan.settings
    )
    return plan.model_copy(update={"settings": settings})


def _ways_out(task: Task, fleet: Fleet, load: placement.Load, placements: Sequence[Placement]) -> tuple[WayOut, ...]:
    """Of the disk, when a larger one would do, else of memory."""
    on_larger_disk, _, _ = _plan(task, fleet.model_copy(update={"disk_bytes": None}), placements)
    if on_larger_disk is not None and on_larger_disk.disk is not None and fleet.disk_bytes is not None:
        kept = task.recipe.train.save_total_limit
        return ways_out.of_disk(on_larger_disk.disk, fleet.disk_bytes, kept, task.recipe.output)
    return alternatives.that_fit(task.recipe, fleet, load, placements)


def _fitted(task: Task, recipe: Recipe, fleet: Fleet) -> Plan:
    disk = fleet.disk_bytes if fleet.disk_bytes is not None else UNKNOWN_DISK_BYTES
    footprint = task.footprint(recipe.model.weights_dtype)
    plan = fit(recipe, task.shapes, footprint, task.summary, fleet.machine, disk)
    return _explained(plan, {"train.num_processes"}, "one for each device") if task.spread else plan


def with_settings(recipe: Recipe, settings: dict[str, Any]) -> Recipe:
    """The recipe with other values for some dotted names."""
    for name, value in settings.items():
        block, _, field = name.partition(".")
        values = getattr(recipe, block)
        if field == "extra.deepspeed":
            field, value = "extra", {**values.extra, "deepspeed": value}
        recipe = recipe.model_copy(update={block: values.model_copy(update={field: value})})
    return recipe


def _own(recipe: Recipe, plan: Plan, placements: Sequence[Placement]) -> str:
    """Name of the placement that a plan has; empty for one that the table does not list."""
    shared = zero.zero_of(recipe)
    for one in placements:
        block = one.settings.get("train.extra.deepspeed")
        if one.runs and (block is None) != (shared is None):
            continue
        if not one.runs or (shared is not None and zero.zero_of(with_settings(recipe, one.settings)) != shared):
            continue
        optim = one.settings.get("train.optim", recipe.train.optim or "adamw_torch_fused")
        dtype = one.settings.get("model.weights_dtype", recipe.model.weights_dtype)
        if shared is not None or (optim == plan.optim and dtype == plan.weights_dtype):
            return one.name
    return ""


def _as_planned(
    load: placement.Load, fleet: Fleet, plan: Plan, placements: Sequence[Placement], name: str
) -> tuple[Placement, ...]:
    """The table with the plan's own micro batch and checkpointing in its row."""
    exact = replace(
        load,
        micro_batch_size=plan.micro_batch_size,
        checkpointing=(plan.activation_checkpointing,),
        levers=replace(load.levers, eval_batch_size=plan.eval_batch_size, chunked_loss=plan.chunked_loss),
    )
    own = {one.name: one for one in placement.table(exact, fleet, plan.num_processes)}
    return tuple(own[one.name] if one.name == name else one for one in placements)


def _with_time(
    plan: Plan, summary: DataSummary, load: placement.Load, fleet: Fleet, placements: Sequence[Placement], name: str
) -> Plan:
    """The plan with its time at the speed of its placement, or of the plain one for an optimizer of another kind."""
    like = next((one for one in placements if one.name == name), placements[0])
    speed, rate = like.tokens_per_second, time.device_flops(fleet, plan.precision, load.shapes.hidden_size)
    if plan.time is not None or not speed or rate is None:
        return plan
    seconds = plan.global_batch_size * load.work.tokens_per_row / speed
    together = rate * (plan.num_processes if fleet.machine.gpus else 1)
    return plan.model_copy(update={"time": time.foresee(plan, summary, load.work, seconds, together)})


def with_time(
    plan: Plan, recipe: Recipe, shapes: Shapes, footprint: Footprint, summary: DataSummary, machine: Machine
) -> Plan:
    """A plan for this machine with its time; without, where the speed of the hardware is not known."""
    fleet = cards.here(machine, UNKNOWN_DISK_BYTES)
    task = Task(recipe, shapes, lambda weights_dtype: footprint, summary)
    load = load_of(task, fleet, plan)
    placements = placement.table(load, fleet, plan.num_processes)
    name = _own(recipe, plan, placements)
    return _with_time(plan, summary, load, fleet, _as_planned(load, fleet, plan, placements, name), name)
