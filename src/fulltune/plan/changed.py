"""A plan whose settings were changed after it was made: by measurement, because memory ran out, or because the run
goes on with another placement or another number of processes or machines.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fulltune.errors import RecipeError
from fulltune.plan import budget, memory, ways_out
from fulltune.plan.levers import SETTING_OF
from fulltune.recipe.fields import Recipe, with_placement
from fulltune.recipe.training import OWN_OPTIMIZERS
from fulltune.records.plan import MemoryNeed, Plan
from fulltune.system import sharing

if TYPE_CHECKING:
    from fulltune.footprint.trace import PlannedModel


_PLACING = (
    *(
        "num_processes",
        "num_machines",
        "placement",
        "offload",
        "device",
        "micro_batch_size",
        "gradient_accumulation_steps",
    ),
    *("eval_batch_size", "activation_checkpointing", "chunked_loss", "available_bytes", "memory", "state"),
    *("sent_bytes_per_micro_batch", "sent_bytes_per_update"),
    *("disk", "time", "loader_workers", "fast_bf16"),
)
"""What follows from where things lie, and changes no result."""


def is_placed_as(plan: Plan, recipe: Recipe) -> bool:
    """Whether a run can go on by this plan: the recipe asks for no other placement or offload, nor for other numbers
    of processes or machines."""
    train = recipe.train
    same = all(getattr(plan, name) == getattr(train, name) for name in ("num_processes", "num_machines", "offload"))
    return same and train.placed_as in ("auto", plan.placement)


def as_begun(recipe: Recipe, plan: Plan) -> Recipe:
    """The recipe of a run that goes on elsewhere: its steps have the rows that they had until now.

    Left open, a global batch follows from the number of processes, precision and optimizer from what fits.

    Raises:
        RecipeError: When so many processes cannot share such a step, or not this optimizer.
    """
    train, rows = recipe.train, plan.global_batch_size
    problems = []
    if rows % ((train.micro_batch_size or 1) * train.num_processes):
        micro = f" in micro batches of {train.micro_batch_size}" if (train.micro_batch_size or 1) > 1 else ""
        problems.append(
            f"train.num_processes: {train.num_processes}: the run was begun with {rows} rows a step, which so many "
            f"processes cannot share{micro}; take a number that divides them"
        )
    if plan.optim in OWN_OPTIMIZERS and train.engine_by:
        problems.append(
            f"{train.engine_by}: the run was begun with {plan.optim}, which cannot run inside ZeRO; take "
            "another placement, or start a new run (--fresh)"
        )
    if problems:
        raise RecipeError(problems)
    same: dict[str, Any] = {"global_batch_size": rows, "precision": plan.precision}
    if plan.optim in OWN_OPTIMIZERS:  # the others are the recipe's, or what is usual
        same["optim"] = plan.optim
    return recipe.model_copy(update={"train": train.model_copy(update=same)})


def placed_anew(plan: Plan, anew: Plan) -> Plan:
    """A begun run's plan with the placement of one that was made anew of the recipe; all that shapes the result
    stays."""
    names = {SETTING_OF.get(name, f"train.{name}") for name in _PLACING} | {"train.oversubscribe"}
    settings = {setting.name: setting for setting in plan.settings}
    settings |= {setting.name: setting for setting in anew.settings if setting.name in names}
    placing = {name: getattr(anew, name) for name in _PLACING}
    return plan.model_copy(update={**placing, "settings": tuple(settings.values())})


def need_of(changed: Plan, recipe: Recipe, model: PlannedModel) -> MemoryNeed:
    """The memory that a changed plan needs, whose precision may be another than the recipe's."""
    traced = model.footprint(recipe, changed.device, changed.precision)
    return budget.need(model.shapes, traced, changed, sharing.of(with_placement(recipe, changed.placement)))


def on_disk(recipe: Recipe, plan: Plan, free_bytes: int, place: str) -> Plan:
    """The plan with the state and the disk that its settings need now.

    Raises:
        DoesNotFitError: When the disk is too small for them.
    """
    recipe = with_placement(recipe, plan.placement)
    found = ways_out.refuse_full_disk(recipe, plan.num_parameters, plan, free_bytes, place)
    return plan.model_copy(update={"disk": found, "state": memory.state_of(plan.num_parameters, plan)})
