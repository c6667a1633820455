"""Fill in what the recipe left open, check that it can run, and write down why each value is what it is."""

from __future__ import annotations

from dataclasses import replace

from fulltune.errors import RecipeError
from fulltune.footprint.records import Footprint
from fulltune.models.shapes import Shapes
from fulltune.plan import budget, defaults, disk, levers, memory, placement
from fulltune.plan import resolve as settle
from fulltune.plan.gpus import Fleet
from fulltune.plan.reasons import Ledger
from fulltune.plan.workload import Task, load_of
from fulltune.recipe.fields import Recipe
from fulltune.recipe.tasks import greater_is_better
from fulltune.records.data import DataSummary
from fulltune.records.plan import Plan
from fulltune.system import deepspeed
from fulltune.text import parse_bytes


def fit(
    recipe: Recipe,
    shapes: Shapes,
    footprint: Footprint,
    summary: DataSummary,
    fleet: Fleet,
    own_loss: bool = False,
) -> Plan:
    """Decide every number of the trial.

    Args:
        recipe: The checked recipe.
        shapes: The model's sizes.
        footprint: The model's memory, traced.
        summary: The data stage's summary.
        fleet: What is here, or what is planned for.
        own_loss: The user gave `compute_loss`, which needs whole logits.

    Returns:
        The plan; `settings` holds each value with its reason. `survey.with_time` adds its time.

    Raises:
        RecipeError: When settings contradict each other or the machine.
        DoesNotFitError: When memory or disk are too small, with ways out.
    """
    recipe, machine = levers.possible(recipe, shapes), fleet.machine
    train, ledger = recipe.train, Ledger()
    device = settle.device(recipe, machine, ledger)
    precision = settle.precision(recipe, machine, device, ledger)
    metric = settle.metric(recipe, summary, ledger)
    optim, rounding = settle.optimizer(recipe, ledger)
    rate, why = defaults.learning_rate_of(recipe.method, shapes.num_parameters, shapes.is_decoder)
    rate = ledger.settle("method.learning_rate", recipe.method.learning_rate, rate, why)
    global_batch = settle.global_batch(recipe, summary, ledger)
    rows = summary.splits["train"].rows
    steps = settle.steps(recipe, rows, global_batch, ledger)
    warmup = settle.warmup(recipe, shapes, steps.total, ledger)
    pieces = levers.chunked_loss(recipe, shapes, own_loss)
    start = levers.before_choosing(recipe, shapes, summary, precision, optim, rounding, pieces)
    start = replace(start, num_saves=steps.num_saves)
    per_process = max(1, global_batch // train.num_processes)
    room = budget.of(recipe, shapes, footprint, machine, device).for_rows(rows)
    speed = placement.own_speed(load_of(Task(recipe, shapes, lambda dtype: footprint, summary), fleet, None), fleet)
    chosen = levers.choose(recipe, start, per_process, room, speed)
    whole = levers.needs_whole_logits(recipe, shapes, own_loss)
    levers.settle(recipe, chosen, per_process, room, optim, whole, ledger)
    used = chosen.levers
    problems = deepspeed.disagreements(recipe, used.micro_batch_size, used.accumulation, train.num_processes, precision)
    problems += settle.in_backward_problems(recipe, used.micro_batch_size, used.accumulation, precision)
    if problems:
        raise RecipeError(problems)
    on_disk = disk.need(recipe, shapes.num_parameters, used)
    if fleet.disk_bytes is not None:
        disk.refuse_what_cannot_fit(recipe, shapes.num_parameters, used, fleet.disk_bytes)
    ledger.settle("train.eval_steps", train.eval_steps, steps.between_evaluations, "once per epoch")
    ledger.settle("data.max_length", recipe.data.max_length, summary.max_length, summary.max_length_reason)
    logging_steps = max(1, steps.total // 200)
    why = "about 200 log lines" if logging_steps > 1 else "every step of a short run"
    logging_steps = ledger.settle("train.logging_steps", train.logging_steps, logging_steps, why)
    grouped, why = defaults.group_by_length(summary.length_explained)
    grouped = ledger.settle("train.group_by_length", train.group_by_length, grouped, why)
    settle.everything_else(recipe, ledger)
    settle.caveats(footprint, ledger)
    return Plan(
        trial=f"{recipe.method.arm}-seed{train.seed}",
        data_fingerprint=summary.fingerprint,
        method=recipe.method.arm,
        seed=train.seed,
        learning_rate=rate,
        layerwise_lr_decay=recipe.method.layerwise_lr_decay if recipe.method.kind == "full" else 1.0,
        num_train_epochs=steps.epochs,
        total_steps=steps.total,
        warmup_steps=warmup,
        lr_scheduler_type=train.lr_scheduler_type,
        global_batch_size=global_batch,
        micro_batch_size=used.micro_batch_size,
        gradient_accumulation_steps=used.accumulation,
        num_processes=train.num_processes,
        eval_batch_size=used.eval_batch_size,
        device=device,
        precision=precision,
        weights_dtype=recipe.model.weights_dtype,
        activation_checkpointing=used.activation_checkpointing,
        can_recompute=shapes.can_recompute,
        plain_logits=shapes.plain_logits,
        group_by_length=grouped,
        eval_steps=steps.between_evaluations,
        save_steps=steps.between_saves,
        logging_steps=logging_steps,
        metric=metric,
        greater_is_better=greater_is_better(metric),
        num_parameters=shapes.num_parameters,
        num_trainable_parameters=memory.num_trained(shapes.num_parameters, used),
        num_frozen_parameters=0 if used.num_trained is None else (used.num_held or 0) - used.num_trained,
        state=memory.state_of(shapes.num_parameters, used),
        optim=used.optim,
        bf16_rounding=rounding,
        optimizer_in_backward=used.optimizer_in_backward,
        chunked_loss=used.chunked_loss,
        memory_limit_bytes=parse_bytes(train.memory_limit) if train.memory_limit else None,
        available_bytes=room.available_bytes,
        memory=chosen.memory,
        disk=on_disk,
        settings=tuple(ledger.settings),
    )
