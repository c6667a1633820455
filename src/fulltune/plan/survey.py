from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from fulltune.errors import DoesNotFitError
from fulltune.models.shapes import Shapes
from fulltune.plan import alternatives, budget, choose, gpus, placements, resolve
from fulltune.plan.fit import make_plan, with_time_estimate
from fulltune.plan.gpus import Fleet
from fulltune.plan.settings import PLACEMENT, recipe_value, with_settings
from fulltune.plan.time import DevicePrice
from fulltune.plan.workload import NUM_MACHINES, NUM_PROCESSES, SPREAD, Basis, Workload, make_basis
from fulltune.recipe.fields import Recipe, with_placement
from fulltune.recipe.training import ENGINE_SETTINGS
from fulltune.records.plan import Advice, Alternative, PlacementOption, Plan, Survey
from fulltune.system import parallel_layout
from fulltune.system.parallel_layout import ParallelLayout

MUCH_FASTER = 1.25
"""Minimum speed-up at which ZeRO replaces a placement that fits, because ZeRO must be installed separately."""
FEW_ROWS, MANY_ROWS = 10_000, 100_000
SMALL_ENCODER, LARGE = 500_000_000, 10**10
MORE, HOSTS = (2, 4, 8), (64, 128, 192, 256, 384, 512, 768, 1024, 2048)
WithMethod = Callable[[str], Workload | None]
"""Returns the workload with another kind of method, or None if impossible."""
PlannedSettings = tuple[Plan, dict[str, Any]]
"""A plan, and its settings that differ from the recipe's."""


def survey_placements(
    workload: Workload,
    fleet: Fleet,
    price: DevicePrice | None = None,
    existing_plan: Plan | None = None,
    with_method: WithMethod = lambda kind: None,
) -> tuple[Survey, Plan | None]:
    """Compare the placements possible on this hardware. Also return a plan, or None if nothing fits.

    `existing_plan` is used instead of a new one. `with_method` returns the workload with another method, for advice on
    methods.
    """
    basis, kind = make_basis(workload, fleet), workload.recipe.method.kind
    table = placements.placement_table(basis)
    outcome = _plan_or_error(workload, fleet, table) if existing_plan is None else (existing_plan, {})
    fits = not isinstance(outcome, DoesNotFitError)
    trains_all = workload.recipe.method.trains_all
    full_fits = fits if trains_all else _plan_or_none(with_method("full"), fleet, any_placement=True) is not None
    by_lora = with_method("lora") if kind != "lora" and not full_fits else None
    lora = _plan_or_none(by_lora, fleet, any_placement=True)
    lora_fits = fits if kind == "lora" else None if by_lora is None else lora is not None
    facts = _survey_without_plan(workload, basis, table, full_fits, lora_fits)
    if isinstance(outcome, DoesNotFitError):
        problem, ways = _propose_alternatives(workload, basis, table, outcome.problems[0], lora)
        notes = (f"{one.name}: {one.value}: {one.reason}" for one in resolve.memory_caveats(basis.footprint))
        return facts.model_copy(update={"ways_out": ways, "notes": (problem, *notes)}), None
    plan, settings = outcome
    if plan.time is None:  # the plan was changed when memory ran out
        plan = with_time_estimate(plan, basis, workload.summary)
    if plan.memory is not None:
        placed = replace(basis, layout=_layout_of(workload.recipe, outcome))
        row = placements.table_row(placed, plan, plan.memory, settings)
        rows = tuple(row if one.name == row.name else one for one in table)
        rows = rows if row in rows else (row, *rows)
        facts = facts.model_copy(update={"placement": row.name, "placements": rows})
    update: dict[str, Any] = {
        "fits": True,
        "device_free_bytes": plan.available_bytes or basis.available_bytes,
        "settings": {name: recipe_value(workload.recipe, name) for name in workload.spread} | settings,
    }
    if price and plan.time:
        hours = facts.num_devices * plan.time.whole_seconds / 3600
        update |= {"price": price[0] * hours, "currency": price[1]}
    return facts.model_copy(update=update), plan


def _layout_of(recipe: Recipe, planned: PlannedSettings) -> ParallelLayout | None:
    plan, settings = planned
    return parallel_layout.layout_of(with_placement(with_settings(recipe, settings), plan.placement))


def _survey_without_plan(
    workload: Workload, basis: Basis, table: tuple[PlacementOption, ...], full_fits: bool, lora_fits: bool | None
) -> Survey:
    summary, shapes, fleet, train = workload.summary, workload.shapes, basis.fleet, workload.recipe.train
    splits = summary.splits
    return Survey(
        hardware=fleet.name,
        assumptions=fleet.assumed,
        # The processes of a CPU share one device.
        num_devices=train.num_processes if fleet.machine.gpus else train.num_machines,
        num_machines=train.num_machines,
        num_parameters=shapes.num_parameters,
        model_type=shapes.model_type,
        train_rows=summary.rows_per_epoch,
        eval_rows=splits["eval"].rows,
        length_percentiles=splits["train"].length_percentiles,
        max_length=summary.max_length,
        fits=False,
        full_fits=full_fits,
        placements=table,
        disk_free_bytes=fleet.disk_bytes,
        host_free_bytes=fleet.machine.memory_available_bytes,
        device_free_bytes=basis.available_bytes,
        advice=advise_on_methods(splits["train"].rows, shapes, full_fits, lora_fits, basis.available_bytes),
    )


# ---- the plan ----------------------------------------------------------------------------------------------------


def _plan_or_error(
    workload: Workload, fleet: Fleet, table: Sequence[PlacementOption]
) -> PlannedSettings | DoesNotFitError:
    """Return the recipe's plan or, with `--for`, a better placement's plan. If nothing fits, return (not raise) the
    error."""
    try:
        own = _plan_for_recipe(workload, workload.recipe, fleet)
    except DoesNotFitError as error:
        return error if fleet.here else _plan_with_placement(workload, fleet, table) or error
    if own.stream is not None and recipe_value(workload.recipe, PLACEMENT) is None and not fleet.here:
        others = [one for one in table if one.settings.get(PLACEMENT) != "stream"]
        return _plan_with_placement(workload, fleet, others) or (own, {})
    if fleet.here or own.num_processes == 1:
        return own, {}
    exact = [one for one in table if not (_changes_arithmetic(one) or one.host_bytes)]
    if workload.recipe.train.optim is None and own.optim == "adamw_8bit":
        # Sharding does not change the arithmetic, but 8-bit moments do.
        return _plan_with_placement(workload, fleet, exact) or (own, {})
    speed = own.time.tokens_per_second if own.time else math.inf
    faster = [one for one in exact if (one.tokens_per_second or 0.0) > MUCH_FASTER * speed]
    why = f", much faster than {own.placement}, which fits as well"
    return _plan_with_placement(workload, fleet, faster, why) or (own, {})


def rank_fitting_placements(table: Sequence[PlacementOption]) -> list[PlacementOption]:
    """Return the placements that fit, the fastest first; those with bf16 weights or 8-bit AdamW come last."""
    fitting = (one for one in table if one.fits)
    return sorted(fitting, key=lambda option: (_changes_arithmetic(option), -(option.tokens_per_second or 0.0)))


def _changes_arithmetic(option: PlacementOption) -> bool:
    return option.settings.get("model.weights_dtype") == "bf16" or option.settings.get("train.optim") == "adamw_8bit"


def _plan_with_placement(
    workload: Workload, fleet: Fleet, table: Sequence[PlacementOption], extra_reason: str = ""
) -> PlannedSettings | None:
    """Return the plan of the best placement that fits without contradicting the recipe, or None."""
    for option in rank_fitting_placements(table):
        conflicts = (
            recipe_value(workload.recipe, name) not in (None, value) for name, value in option.settings.items()
        )
        if not option.settings or any(conflicts):  # the same as the recipe, or contradicts it
            continue
        try:
            plan = _plan_for_recipe(workload, with_settings(workload.recipe, option.settings), fleet)
        except DoesNotFitError:
            continue
        names = {"train.extra" if name == ENGINE_SETTINGS else name for name in option.settings}
        installs = f"; {parallel_layout.INSTALL}" if option.name.startswith("ZeRO") else ""
        reason = f"placement: {option.name}{extra_reason}{installs}"
        return _with_reason_for_settings(plan, names, reason), option.settings
    return None


def _plan_for_recipe(workload: Workload, recipe: Recipe, fleet: Fleet) -> Plan:
    return _with_reason_for_settings(
        make_plan(replace(workload, recipe=recipe), fleet), set(workload.spread), "from --for"
    )


def _with_reason_for_settings(plan: Plan, names: set[str], reason: str) -> Plan:
    settings = (
        setting.model_copy(update={"is_automatic": True, "reason": reason}) if setting.name in names else setting
        for setting in plan.settings
    )
    return plan.model_copy(update={"settings": tuple(settings)})


def _plan_or_none(workload: Workload | None, fleet: Fleet, any_placement: bool = False) -> PlannedSettings | None:
    """Return the plan, or None if nothing fits or `workload` is None; `any_placement` also tries placements that are
    never chosen automatically."""
    if workload is None:
        return None
    table = placements.placement_table(make_basis(workload, fleet))
    outcome = _plan_or_error(workload, fleet, table)
    if not isinstance(outcome, DoesNotFitError):
        return outcome
    return _plan_with_placement(workload, fleet, table) if any_placement else None


# ---- alternatives -------------------------------------------------------------------------------------------------


def _propose_alternatives(
    workload: Workload, basis: Basis, table: Sequence[PlacementOption], problem: str, lora: PlannedSettings | None
) -> tuple[str, tuple[Alternative, ...]]:
    """Return the problem and the alternatives. They are about the disk if only the disk is too small, else about
    memory. The LoRA plan `lora` is proposed too."""
    fleet = basis.fleet
    outcome = _plan_or_error(workload, fleet.model_copy(update={"disk_bytes": None}), table)
    if isinstance(outcome, DoesNotFitError) or fleet.disk_bytes is None:
        least, is_full = choose.lowest_memory_settings(basis), False
        now = least.memory.peak
        ways = [
            *_propose_larger_hardware(workload, fleet, now),
            *alternatives.propose_for_memory(basis, least.settings, table),
        ]
        ways = [_check_alternative(workload, fleet, way) for way in ways[: alternatives.MAX_ALTERNATIVES]]
    else:
        plan, settings = outcome
        recipe, is_full = with_settings(workload.recipe, settings), True
        needed = budget.disk_need(recipe, plan.num_parameters, plan)
        now = needed.total
        problem = budget.disk_full_message(recipe, needed, fleet.disk_bytes, fleet.disk_at)
        ways = [*alternatives.propose_for_disk(recipe, plan.num_parameters, plan, fleet.disk_bytes, fleet.disk_at)]
    if lora is not None:
        plan, settings = lora
        need_of_lora = plan.disk.total if is_full else plan.memory.peak if plan.memory else 0
        share = plan.num_trainable_parameters / (plan.num_trainable_parameters + plan.num_frozen_parameters)
        costs = f"another method, which trains {100 * share:.2g} % of the parameters"
        frees, changed = max(0, now - need_of_lora), {"method": "lora", **settings}
        if workload.recipe.methods:
            changed["methods"] = []
        if workload.recipe.compare.budget is not None:  # only comparisons and searches have one
            changed["compare.budget"] = None
        ways.append(alternatives.make_alternative(changed, frees, True, costs, "method: lora"))
    return problem, tuple(sorted(ways, key=lambda way: not way.enough))


def _propose_larger_hardware(workload: Workload, fleet: Fleet, peak_now: int) -> Iterator[Alternative]:
    """Yield the smallest hardware on which the run fits: one with more devices or machines, and one with more host
    memory."""
    named = fleet.named
    if named.gpu is None or fleet.here:
        return
    alone = named.machines == 1
    devices = [replace(named, count=count) for count in MORE if alone and count > named.count]
    full = replace(named, count=max(MORE[-1], named.count)) if alone else named
    devices += [replace(full, machines=count) for count in MORE if count > named.machines]
    sizes = [size * gpus.GB for size in HOSTS if size * gpus.GB > fleet.machine.memory_bytes]
    hosts = [replace(named, host_bytes=size) for size in sizes]
    for larger, costs in ((devices, "more devices"), (hosts, "more host memory")):
        for hardware in larger:
            if planned := _plan_on_hardware(workload, gpus.complete_hardware(hardware)):
                plan = planned[0]
                frees = max(0, peak_now - (plan.memory.peak if plan.memory else 0))
                words = f"{hardware}, {placements.placement_name(_layout_of(workload.recipe, planned), plan)}"
                yield alternatives.make_alternative({}, frees, True, costs, words).model_copy(
                    update={"hardware": str(hardware)}
                )
                break


def _plan_on_hardware(workload: Workload, fleet: Fleet) -> PlannedSettings | None:
    """Return the plan on other hardware, or None if the run does not fit or its batch cannot be divided."""
    recipe, numbers = workload.recipe, {NUM_PROCESSES: fleet.num_devices, NUM_MACHINES: fleet.num_machines}
    left_open = {name for name in SPREAD if name in workload.spread or recipe_value(recipe, name) is None}
    recipe = with_settings(recipe, {name: numbers[name] for name in left_open})
    train = recipe.train
    rows = (train.micro_batch_size or 1) * train.num_processes
    if train.num_processes % fleet.num_machines or (train.global_batch_size or rows) % rows:
        return None
    return _plan_or_none(replace(workload, recipe=recipe), fleet)


def _check_alternative(workload: Workload, fleet: Fleet, way: Alternative) -> Alternative:
    """Return the alternative, marked as not `enough` if no plan fits with its settings."""
    if not way.enough or not way.settings or "data.max_length" in way.settings:
        return way
    if _plan_or_none(replace(workload, recipe=with_settings(workload.recipe, way.settings)), fleet) is not None:
        return way
    return way.model_copy(update={"enough": False, "costs": f"{way.costs}; memory is not the only problem"})


# ---- advice ------------------------------------------------------------------------------------------------------


def advise_on_methods(
    train_rows: int, shapes: Shapes, full_fits: bool, lora_fits: bool | None, device_bytes: int
) -> tuple[Advice, ...]:
    """Rate each method for this model and data, the best first (docs/evidence.md); `lora_fits` is None if unknown."""
    few, small = train_rows < FEW_ROWS, not shapes.is_decoder and shapes.num_parameters < SMALL_ENCODER
    size, where = 2 * shapes.num_parameters / 2**30, " on one device" if full_fits else " either"
    unsure = "" if lora_fits else ", if the activations fit as well"
    rules: dict[str, tuple[tuple[bool, str, str], ...]] = {
        "full fine-tuning": (
            (not full_fits, "leave", "does not fit on this hardware"),
            (small and few, "try", "cheap for a small encoder, but few rows need several seeds"),
            (small, "take", "cheap for a small encoder"),
            (train_rows >= MANY_ROWS, "take", "fits, and there are 100,000 rows or more"),
            (few, "try", "few rows: train longer than usual, at a low rate, with three seeds or more"),
            (True, "try", "between 10,000 and 100,000 rows, full fine-tuning and LoRA give similar results"),
        ),
        "LoRA": (
            (
                2 * shapes.num_parameters > device_bytes,  # only full fine-tuning can be sharded
                "leave",
                f"the frozen weights alone take about {size:,.1f} GiB in 16 bits, which does not fit{where}",
            ),
            (lora_fits is False, "leave", "does not fit on this hardware either; see the alternatives"),
            (
                not full_fits,
                "take",
                f"fits where full fine-tuning does not{unsure}: {size:,.1f} GiB of weights stay frozen",
            ),
            (shapes.is_decoder and few, "take", "fewer than 10,000 rows"),
            (True, "try", "two thirds of the operations, far less state; adapt all layers and tune the rate"),
        ),
        "adapters": (
            (True, "leave", "worthwhile if five tasks or more share a model, because each needs only a small file"),
        ),
        "prompt tuning": (
            (shapes.num_parameters >= LARGE, "try", "as good as full fine-tuning at about 11 B parameters"),
            (True, "leave", "far worse than full fine-tuning below 1 B parameters, but as good at about 11 B"),
        ),
    }
    advice = []
    for method, lines in rules.items():
        verdict, rule = next((verdict, rule) for holds, verdict, rule in lines if holds)
        advice.append(Advice.model_validate({"method": method, "verdict": verdict, "rule": rule}))
    return tuple(sorted(advice, key=lambda each: ("take", "try", "leave").index(each.verdict)))
