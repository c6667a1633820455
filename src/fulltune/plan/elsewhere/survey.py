"""Everything that `fulltune plan` shows beside the plan: placements, time, money, alternatives, ways out, advice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from fulltune.errors import DoesNotFitError
from fulltune.footprint.records import Footprint
from fulltune.models.shapes import Shapes
from fulltune.plan import disk, placement, time
from fulltune.plan import gpus as cards
from fulltune.plan import resolve as settle
from fulltune.plan.changed import levers_of
from fulltune.plan.elsewhere import advise, alternatives, whole
from fulltune.plan.fit import fit
from fulltune.plan.gpus import Fleet
from fulltune.plan.reasons import Ledger
from fulltune.plan.workload import Task, load_of
from fulltune.recipe.fields import Recipe
from fulltune.records.data import DataSummary
from fulltune.records.plan import Plan, Setting
from fulltune.records.survey import Placement, Survey, WayOut
from fulltune.system import deepspeed

NO_SHARING = "sharing out and offloading are for full fine-tuning only"


@dataclass(frozen=True)
class Wishes:
    """What the data cannot tell."""

    price: time.Price | None = None
    tasks: int = 1
    preserve: bool = False
    goal: advise.Goal | None = None


def survey(
    task: Task, fleet: Fleet, wishes: Wishes, planned: Plan | None = None, other: Other = lambda kind: None
) -> tuple[Survey, Plan | None]:
    """Look at everything that could be done on this hardware.

    Args:
        task: Recipe (see `spread_over`), model and data.
        fleet: The hardware.
        wishes: Price, number of tasks, goal.
        planned: The plan, when it is made already.
        other: Gives the task of another method, for the advice: asked only where the plan does not tell.

    Returns:
        The survey, and a plan for the recipe's own placement, else for the best other one; None when nothing fits.
    """
    load = load_of(task, fleet, planned)
    placements = placement.table(load, fleet, task.recipe.train.num_processes)
    name, settings = "", dict[str, Any]()
    if planned is None:
        made = _plan(task, fleet, placements)
        if isinstance(made, DoesNotFitError):
            methods = _methods(task, fleet, False, other)
            found = _found(task, fleet, wishes, load, placements, methods)
            problem, ways = _ways_out(task, fleet, load, placements, made.problems[0], methods.lora)
            notes = (problem, *settle.notes(task.footprint(task.recipe.model.weights_dtype)))
            return found.model_copy(update={"ways_out": ways, "notes": notes}), None
        planned, name, settings = made.plan, made.name, made.settings
    if task.spread:
        settings = {"train.num_processes": planned.num_processes, **settings}
    name = name or _own(task.recipe, planned, placements)
    placements = _as_planned(load, fleet, planned, placements, name)
    planned = _with_time(planned, task.recipe, task.summary, load, fleet, placements, name)
    others = tuple(alternatives.instead(task, load, fleet, placements, name, planned))
    update = {
        "fits": True,
        "device_free_bytes": planned.available_bytes or load.available_bytes,
        "placement": name,
        "settings": settings,
        "time": planned.time,
        "alternatives": others,
    }
    if wishes.price and planned.time:
        update["price"] = wishes.price.of(_working(task.recipe, fleet), planned.time.whole_seconds)
    found = _found(task, fleet, wishes, load, placements, _methods(task, fleet, True, other))
    return found.model_copy(update=update), planned


def _working(recipe: Recipe, fleet: Fleet) -> int:
    """Devices that the run works on; the processes of a CPU share one."""
    return recipe.train.num_processes if fleet.machine.gpus else 1


def _found(
    task: Task,
    fleet: Fleet,
    wishes: Wishes,
    load: placement.Load,
    placements: tuple[Placement, ...],
    methods: _Methods,
) -> Survey:
    """What is known whether or not there is a plan."""
    splits, shapes = task.summary.splits, task.shapes
    situation = advise.Situation(
        train_rows=splits["train"].rows,
        num_parameters=shapes.num_parameters,
        is_decoder=shapes.is_decoder,
        fits=methods.full_fits,
        lora_fits=methods.lora_fits,
        own=task.recipe.method.kind,
        tasks=wishes.tasks,
        preserve=wishes.preserve,
        goal=wishes.goal,
        frozen_fits=2 * shapes.num_parameters <= load.available_bytes,
    )
    return Survey(
        hardware=fleet.name,
        assumed=fleet.assumed,
        num_devices=_working(task.recipe, fleet),
        num_parameters=shapes.num_parameters,
        model_type=shapes.model_type,
        train_rows=splits["train"].rows,
        eval_rows=splits["eval"].rows if "eval" in splits else 0,
        asked_eval_rows=splits["eval"].asked_rows if "eval" in splits else None,
        length_percentiles=splits["train"].length_percentiles,
        max_length=task.summary.max_length,
        fits=False,
        full_fits=methods.full_fits,
        placements=placements,
        no_sharing="" if shapes.num_trained is None or not fleet.machine.gpus else NO_SHARING,
        disk_free_bytes=fleet.disk_bytes,
        host_free_bytes=fleet.machine.memory_available_bytes,
        device_free_bytes=load.available_bytes,
        on_cpu=not fleet.machine.gpus,
        currency=wishes.price.currency if wishes.price else "",
        advice=advise.advise(situation),
    )


# ---- other methods ---------------------------------------------------------------------------------------------


Other = Callable[[str], Task | None]
"""From a method's kind to the same task by it, with its usual settings; None where it cannot be."""


@dataclass(frozen=True)
class _Methods:
    """Which methods fit into the hardware."""

    full_fits: bool
    lora_fits: bool | None
    """None: not asked."""
    lora: _Made | None = None
    """Its plan, where the recipe's own method does not fit."""


def _methods(task: Task, fleet: Fleet, fits: bool, other: Other) -> _Methods:
    """What the advice needs to know.

    Args:
        task: The recipe's own.
        fleet: The hardware.
        fits: The recipe's own method does.
        other: See `survey`.
    """
    kind = task.recipe.method.kind
    full_fits = fits if kind == "full" else _alone(other("full"), fleet) is not None
    if full_fits or kind == "lora":
        return _Methods(full_fits, fits if kind == "lora" else None)
    lora = other("lora")
    made = _alone(lora, fleet)
    return _Methods(full_fits, None if lora is None else made is not None, None if fits else made)


def _alone(task: Task | None, fleet: Fleet) -> _Made | None:
    """The plan of another method, with whatever placement fits; None when none does."""
    if task is None:
        return None
    settings: dict[str, Any] = {}
    if _needs_narrow_weights(task, fleet):  # tracing these at once saves the seconds of tracing the others
        settings = {"model.weights_dtype": "bf16"}
        task = replace(task, recipe=with_settings(task.recipe, settings))
    placements = placement.table(load_of(task, fleet, None), fleet, task.recipe.train.num_processes)
    made = _plan(task, fleet, placements)
    found = _elsewhere(task, fleet, placements) if isinstance(made, DoesNotFitError) else made
    return None if found is None else replace(found, settings={**settings, **found.settings})


def _needs_narrow_weights(task: Task, fleet: Fleet) -> bool:
    """The weights of a method that nothing shares out are too large as fp32, and may be bf16 here."""
    recipe, gpus = task.recipe, fleet.machine.gpus
    if task.shapes.num_trained is None or "weights_dtype" in recipe.model.model_fields_set:
        return False
    may_be = recipe.train.precision in ("auto", "bf16") and bool(gpus) and gpus[0].bf16
    return may_be and 4 * task.shapes.num_parameters > gpus[0].available_bytes


def _as_way_out(lora: _Made, where: Literal["device", "disk"], now_bytes: int) -> WayOut:
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


# ---- the plan --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Made:
    """A plan, and what it has that the recipe has not."""

    plan: Plan
    name: str = ""
    """Of the other placement that it has; empty for the recipe's own."""
    settings: dict[str, Any] = field(default_factory=dict)


def _plan(task: Task, fleet: Fleet, placements: Sequence[Placement]) -> _Made | DoesNotFitError:
    """The recipe as it is; on hardware that is not here also with the best other placement that fulltune can run.

    On this machine the plan is what `fulltune run` would do: other placements are ways out.
    """
    try:
        own = _fitted(task, task.recipe, fleet)
    except DoesNotFitError as error:
        return error if fleet.here else _elsewhere(task, fleet, placements) or error
    if fleet.here or task.recipe.train.optim is not None or own.optim != "adamw_8bit" or own.num_processes == 1:
        return _Made(own)
    # Sharing out the state of several devices leaves the arithmetic as it is; 8-bit moments do not.
    exact = [one for one in placements if not (alternatives.preference(one)[0] or one.host_bytes or one.disk_bytes)]
    return _elsewhere(task, fleet, exact) or _Made(own)


def _elsewhere(task: Task, fleet: Fleet, placements: Sequence[Placement]) -> _Made | None:
    """With the best of these placements."""
    for one in sorted(placements, key=alternatives.preference):
        if not (alternatives.automatic(one) and one.settings) or _overrides(task.recipe, one.settings):
            continue
        try:
            plan = _fitted(task, with_settings(task.recipe, one.settings), fleet)
        except DoesNotFitError:  # of the ways that fit by the table, the next one
            continue
        names = {"train.extra" if name == "train.extra.deepspeed" else name for name in one.settings}
        return _Made(_explained(plan, names, f"placement: {one.name}"), one.name, one.settings)
    return None


def _overrides(recipe: Recipe, settings: dict[str, Any]) -> bool:
    """Whether one of them has another value in the recipe: what is given is kept, and is then a way out."""
    for name, value in settings.items():
        block, _, field = name.partition(".")
        values = getattr(recipe, block)
        if name == "train.extra.deepspeed":
            if deepspeed.wanted(recipe) and values.extra["deepspeed"] != value:
                return True
        elif field in values.model_fields_set and name != "train.num_processes" and getattr(values, field) != value:
            return True
    return False


def _explained(plan: Plan, names: set[str], reason: str) -> Plan:
    """The plan with another reason for some settings, which the recipe did not give."""
    settings: tuple[Setting, ...] = tuple(
        one.model_copy(update={"chosen": True, "reason": reason}) if one.name in names else one for one in plan.settings
    )
    return plan.model_copy(update={"settings": settings})


def _ways_out(
    task: Task,
    fleet: Fleet,
    load: placement.Load,
    placements: Sequence[Placement],
    problem: str,
    lora: _Made | None,
) -> tuple[str, tuple[WayOut, ...]]:
    """What is short, with the ways out: of the disk, when a larger one would do, else of memory; LoRA where it fits."""
    made = _plan(task, fleet.model_copy(update={"disk_bytes": None}), placements)
    if isinstance(made, DoesNotFitError) or fleet.disk_bytes is None:
        ways = [_tried(task, fleet, way) for way in alternatives.that_fit(task.recipe, fleet, load, placements)]
        if lora is not None:
            ways.append(_as_way_out(lora, "device", alternatives.least(task.recipe, load).memory.peak))
    else:
        recipe, plan = with_settings(task.recipe, made.settings), made.plan
        levers = levers_of(recipe, plan, task.summary)
        needed = disk.need(recipe, plan.num_parameters, levers)
        problem = disk.short_by(recipe, needed, fleet.disk_bytes)
        ways = [*disk.ways(recipe, plan.num_parameters, levers, fleet.disk_bytes)]
        if lora is not None:
            ways.append(_as_way_out(lora, "disk", needed.total))
    return problem, tuple(sorted(ways, key=lambda way: not way.enough))


def _tried(task: Task, fleet: Fleet, way: WayOut) -> WayOut:
    """The way out as the plan finds it when it is followed: memory is not all that can be short."""
    if not way.enough or not (way.hardware or way.settings) or "data.max_length" in way.settings:
        return way
    there = cards.parse(way.hardware) if way.hardware else fleet
    recipe = with_settings(task.recipe, way.settings)
    if way.hardware and (task.spread or "num_processes" not in recipe.train.model_fields_set):
        train = recipe.train.model_copy(update={"num_processes": there.num_devices})
        recipe = recipe.model_copy(update={"train": train})
    other = replace(task, recipe=recipe)
    placements = placement.table(load_of(other, there, None), there, recipe.train.num_processes)
    if not isinstance(_plan(other, there, placements), DoesNotFitError):
        return way
    made = _plan(other, there.model_copy(update={"disk_bytes": None}), placements)
    short = "other things are short as well" if isinstance(made, DoesNotFitError) else "the disk is too small as well"
    return way.model_copy(update={"enough": False, "costs": f"{way.costs}; {short}"})


def _fitted(task: Task, recipe: Recipe, fleet: Fleet) -> Plan:
    footprint = task.footprint(recipe.model.weights_dtype)
    plan = fit(recipe, task.shapes, footprint, task.summary, fleet)
    return _explained(plan, {"train.num_processes"}, "one for each device") if task.spread else plan


def with_settings(recipe: Recipe, settings: dict[str, Any]) -> Recipe:
    """The recipe with other values for some dotted names; without DeepSpeed for None."""
    for name, value in settings.items():
        block, _, inner = name.partition(".")
        values = getattr(recipe, block)
        if inner == "extra.deepspeed":
            extra = {key: kept for key, kept in values.extra.items() if key != "deepspeed"}
            inner, value = "extra", extra if value is None else {**extra, "deepspeed": value}
        recipe = recipe.model_copy(update={block: values.model_copy(update={inner: value})})
    return recipe


def _own(recipe: Recipe, plan: Plan, placements: Sequence[Placement]) -> str:
    """Name of the placement that a plan has; empty for one that the table does not list."""
    shared = deepspeed.zero_of(recipe)
    for one in placements:
        if not one.runs:
            continue
        changed = with_settings(recipe, one.settings)
        if deepspeed.zero_of(changed) != shared:
            continue
        optim, _ = settle.optimizer(changed, Ledger())
        if shared is not None or (optim == plan.optim and changed.model.weights_dtype == plan.weights_dtype):
            return one.name
    return ""


def _as_planned(
    load: placement.Load, fleet: Fleet, plan: Plan, placements: Sequence[Placement], name: str
) -> tuple[Placement, ...]:
    """The table with the plan's own micro batch, checkpointing and memory in its row."""
    exact = replace(
        load,
        micro_batch_size=plan.micro_batch_size,
        checkpointing=(plan.activation_checkpointing,),
        levers=replace(load.levers, eval_batch_size=plan.eval_batch_size, chunked_loss=plan.chunked_loss),
    )
    own = {one.name: one for one in placement.table(exact, fleet, plan.num_processes)}
    return tuple(_with_memory(own[one.name], plan) if one.name == name else one for one in placements)


def _with_memory(one: Placement, plan: Plan) -> Placement:
    """The table knows other types of weights than the recipe's by a rougher sum than the plan."""
    if plan.memory is None:
        return one
    return one.model_copy(update={"kinds": plan.memory.kinds, "device_bytes": plan.memory.peak})


def _with_time(
    plan: Plan,
    recipe: Recipe,
    summary: DataSummary,
    load: placement.Load,
    fleet: Fleet,
    placements: Sequence[Placement],
    name: str,
    started_seconds: float | None = None,
) -> Plan:
    """The plan with its time at the speed of its placement, or of the plain one for an optimizer of another kind."""
    like = next((one for one in placements if one.name == name), placements[0])
    speed, rate = like.tokens_per_second, time.device_flops(fleet, plan.precision, load.shapes.hidden_size)
    if plan.time is not None or not speed or rate is None:
        return plan
    seconds = plan.global_batch_size * load.work.tokens_per_row / speed
    together = rate * (plan.num_processes if fleet.machine.gpus else 1)
    plan = plan.model_copy(update={"time": time.foresee(plan, summary, load.work, seconds, together)})
    assert plan.time is not None
    memory = fleet.card.memory_gb_per_second if fleet.card else fleet.host_memory_gb_per_second
    launching = placement.LAUNCH_SECONDS / 3 * load.shapes.num_layers  # a step has three passes
    rates = whole.Rates(rate, memory * 1e9, launching, started_seconds)
    around = whole.around(recipe, plan, summary, load.work, rates)
    return plan.model_copy(update={"time": plan.time.model_copy(update={"around": around})})


def with_time(
    plan: Plan,
    recipe: Recipe,
    shapes: Shapes,
    footprint: Footprint,
    summary: DataSummary,
    fleet: Fleet,
    started_seconds: float | None = None,
) -> Plan:
    """A plan for this machine with its time; without, where the speed of the hardware is not known.

    Args:
        plan: The settled numbers.
        recipe: What they were settled for.
        shapes: The model's.
        footprint: Its memory and work.
        summary: The data stage's.
        fleet: This machine.
        started_seconds: What the command has taken until now; None: nobody waits for a whole command.
    """
    task = Task(recipe, shapes, lambda weights_dtype: footprint, summary)
    load = load_of(task, fleet, plan)
    placements = placement.table(load, fleet, plan.num_processes)
    name = _own(recipe, plan, placements)
    placed = _as_planned(load, fleet, plan, placements, name)
    return _with_time(plan, recipe, summary, load, fleet, placed, name, started_seconds)
