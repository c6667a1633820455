from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fulltune.errors import RecipeError
from fulltune.plan import alternatives, budget, memory
from fulltune.plan.savings import SETTING_OF
from fulltune.recipe.fields import Recipe, with_placement
from fulltune.recipe.training import OWN_OPTIMIZERS, StreamBlock
from fulltune.records.plan import MemoryNeed, Plan
from fulltune.system import parallel_layout

if TYPE_CHECKING:
    from fulltune.footprint.trace import PlannedModel


_PLACING = (
    *("num_processes", "num_machines", "placement", "offload", "device", "micro_batch_size", "eval_batch_size"),
    *("gradient_accumulation_steps", "activation_checkpointing", "chunked_loss", "available_bytes", "memory", "state"),
    *("sent_bytes_per_micro_batch", "sent_bytes_per_update", "stream", "memory_limit_bytes"),
    *("disk", "time", "loader_workers", "fast_bf16"),
)
"""Plan fields that depend on the placement and do not change the result."""


def has_same_placement(plan: Plan, recipe: Recipe) -> bool:
    """Return whether the recipe allows the plan's placement, with the same offloading, processes and machines."""
    train = recipe.train
    same = all(getattr(plan, name) == getattr(train, name) for name in ("num_processes", "num_machines", "offload"))
    block = train.stream or StreamBlock()
    if plan.stream is not None and plan.stream.limits != {name: getattr(block, name) for name in plan.stream.limits}:
        return False
    return same and train.placed_as in ("auto", plan.placement)


def plan_to_continue(plan: Plan, recipe: Recipe, has_checkpoints: bool) -> Plan | None:
    """Return the plan, or None if the recipe streams otherwise and has no checkpoint yet; with one, raise
    `RecipeError`."""
    wanted, before = recipe.train.placement, f"placement: {plan.placement}"
    folder, is_same = (recipe.train.stream or StreamBlock()).disk or "", wanted != "stream"
    if plan.stream is not None:
        before += f" and its state in {plan.stream.disk or 'the run folder'}"
        is_same = wanted in ("stream", "auto") and folder == plan.stream.disk
    if is_same or not has_checkpoints:
        return plan if is_same else None
    raise RecipeError(
        f"train.placement: {wanted}{f', stream.disk: {folder}' if folder else ''}: this run started with {before}, and "
        "its training state cannot be read otherwise; set these again, or start a new run (--fresh)"
    )


def recipe_for_resuming(recipe: Recipe, plan: Plan) -> Recipe:
    """Return the recipe with the started run's global batch size, precision and optimizer.

    Raises `RecipeError` if the batch cannot be divided among the new processes, or if ZeRO does not support the
    optimizer.
    """
    train, rows = recipe.train, plan.global_batch_size
    problems = []
    if rows % ((train.micro_batch_size or 1) * train.num_processes):
        micro = f" in micro batches of {train.micro_batch_size}" if (train.micro_batch_size or 1) > 1 else ""
        problems.append(
            f"train.num_processes: {train.num_processes}: the run started with {rows} rows per step, which cannot be "
            f"divided among {train.num_processes} processes{micro}; set a number that divides {rows}"
        )
    if plan.optim in OWN_OPTIMIZERS and train.zero_enabled_by:
        problems.append(
            f"{train.zero_enabled_by}: the run started with {plan.optim}, which ZeRO does not support; set "
            "another placement, or start a new run (--fresh)"
        )
    if problems:
        raise RecipeError(problems)
    same: dict[str, Any] = {"global_batch_size": rows, "precision": plan.precision}
    if plan.stream is not None:
        same["placement"] = plan.placement
    if plan.optim in OWN_OPTIMIZERS:  # other optimizers come from the recipe or the defaults
        same["optim"] = plan.optim
    return recipe.model_copy(update={"train": train.model_copy(update=same)})


def with_new_placement(plan: Plan, replanned: Plan) -> Plan:
    """Return a started run's plan with the placement-dependent fields and settings of `replanned`."""
    names = {SETTING_OF.get(name, f"train.{name}") for name in _PLACING} | {"train.oversubscribe"}
    settings = {setting.name: setting for setting in plan.settings}
    settings |= {setting.name: setting for setting in replanned.settings if setting.name in names}
    placing = {name: getattr(replanned, name) for name in _PLACING}
    return plan.model_copy(update={**placing, "settings": tuple(settings.values())})


def memory_need_of_plan(changed: Plan, recipe: Recipe, model: PlannedModel) -> MemoryNeed:
    """Compute the memory of one process for a changed plan, whose precision may differ from the recipe's."""
    traced = model.footprint(recipe, changed.device, changed.precision)
    return budget.memory_need(
        model.shapes, traced, changed, parallel_layout.layout_of(with_placement(recipe, changed.placement))
    )


def with_disk_need(recipe: Recipe, plan: Plan, free_bytes: int, folder: str) -> Plan:
    """Return the plan with its state and required disk space recomputed; raise `DoesNotFitError` if the disk is too
    small."""
    recipe = with_placement(recipe, plan.placement)
    disk = alternatives.check_disk_space(recipe, plan.num_parameters, plan, free_bytes, folder)
    return plan.model_copy(update={"disk": disk, "state": memory.state_bytes(plan.num_parameters, plan)})
