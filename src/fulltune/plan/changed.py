"""A plan whose settings were changed after it was made: by measurement, or because memory ran out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fulltune.plan import budget, disk, memory, time
from fulltune.plan.budget import Room
from fulltune.plan.memory import Levers
from fulltune.recipe.fields import Recipe, with_attention
from fulltune.records.data import DataSummary
from fulltune.records.plan import MemoryNeed, Plan
from fulltune.system.hardware import Machine

if TYPE_CHECKING:
    from fulltune.footprint.trace import PlannedModel


def room_of(changed: Plan, recipe: Recipe, model: PlannedModel, machine: Machine) -> Room:
    """The room of a plan whose precision or attention may be another than the recipe's."""
    block = recipe.train.model_copy(update={"precision": changed.precision})
    same = with_attention(recipe.model_copy(update={"train": block}), changed.attn_implementation)
    traced = model.footprint(same, changed.device, changed.precision)
    return budget.of(same, model.shapes, traced, machine, changed.device)


def need_of(changed: Plan, recipe: Recipe, model: PlannedModel, machine: Machine, summary: DataSummary) -> MemoryNeed:
    """The memory that a changed plan needs."""
    return room_of(changed, recipe, model, machine).need(levers_of(recipe, changed, summary))


def on_disk(recipe: Recipe, plan: Plan, summary: DataSummary, free_bytes: int) -> Plan:
    """The plan with the state and the disk that its settings need now.

    Raises:
        DoesNotFitError: When the disk is too small for them.
    """
    levers = levers_of(recipe, plan, summary)
    found = disk.need(recipe, plan.num_parameters, levers)
    disk.refuse_what_cannot_fit(recipe, plan.num_parameters, levers, free_bytes)
    state = memory.state_of(plan.num_parameters, levers)
    return plan.model_copy(update={"disk": found, "state": state})


def levers_of(recipe: Recipe, plan: Plan, summary: DataSummary) -> Levers:
    """What a plan settled about its memory."""
    return Levers(
        micro_batch_size=plan.micro_batch_size,
        longest_tokens=summary.max_length,
        accumulation=plan.gradient_accumulation_steps,
        precision=plan.precision,
        weights_dtype=plan.weights_dtype,
        optim=plan.optim,
        bf16_rounding=plan.bf16_rounding,
        activation_checkpointing=plan.activation_checkpointing,
        can_recompute=plan.can_recompute,
        chunked_loss=plan.chunked_loss,
        optimizer_in_backward=plan.optimizer_in_backward,
        eval_batch_size=plan.eval_batch_size,
        max_grad_norm=recipe.train.max_grad_norm,
        num_processes=plan.num_processes,
        num_held=plan.num_trainable_parameters + plan.num_frozen_parameters if plan.num_frozen_parameters else None,
        num_trained=plan.num_trainable_parameters if plan.num_frozen_parameters else None,
        num_saves=time.occasions(plan.total_steps, plan.eval_steps, plan.save_steps),
    )
