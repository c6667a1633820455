"""Fill in what the recipe left open, check that it can run, and write down why each value is what it is."""

from __future__ import annotations

from dataclasses import replace

from fulltune.errors import RecipeError
from fulltune.footprint.records import Footprint
from fulltune.models.shapes import Shapes
from fulltune.plan import (
    budget,
    choose,
    disk,
    memory,
    placing,
    resolve,
    time,
    watching,
)
from fulltune.plan.gpus import Fleet
from fulltune.plan.reasons import Reasons
from fulltune.plan.workload import Basis, Workload, basis_of
from fulltune.recipe.fields import Recipe
from fulltune.recipe.tasks import greater_is_better
from fulltune.records.data import DataSummary
from fulltune.records.plan import DiskNeed, Plan
from fulltune.system import sharing
from fulltune.text import parse_bytes


def fit(
    recipe: Recipe,
    shapes: Shapes,
    footprint: Footprint,
    summary: DataSummary,
    fleet: Fleet,
    own_loss: bool = False,
    started_seconds: float | None = None,
) -> Plan:
    """Decide every number of the trial.

    Args:
        recipe: The checked recipe.
        shapes: The model's sizes.
        footprint: The model's memory, traced.
        summary: The data stage's summary.
        fleet: What is here, or what is planned for.
        own_loss: The user gave `compute_loss`, which needs whole logits.
        started_seconds: What the command has taken until now; None: nobody waits for a whole command.

    Returns:
        The plan; `settings` holds each value with its reason, `time` is None where the hardware's speed is not known.

    Raises:
        RecipeError: When settings contradict each other or the machine.
        DoesNotFitError: When memory or disk are too small, with ways out.
    """
    workload, reasons = Workload(recipe, shapes, lambda dtype: footprint, summary), Reasons()
    recipe, why = placing.settle(workload, fleet, own_loss)
    train, basis = recipe.train, basis_of(replace(workload, recipe=recipe), fleet, reasons, own_loss)
    steps, placement = basis.steps, resolve.placement(recipe, why, reasons)
    metric = resolve.metric(recipe, summary, reasons)
    rate = resolve.rate(recipe, shapes, reasons)
    warmup = resolve.warmup(recipe, shapes, steps.total, reasons)
    with placing.explaining(workload, fleet, own_loss, why):
        chosen, on_disk = _fitting(basis, summary, own_loss, reasons)
    reasons.add("train.eval_steps", train.eval_steps, steps.between_evaluations, "once per epoch")
    reasons.add("data.max_length", recipe.data.max_length, summary.max_length, summary.max_length_reason)
    logging_steps = resolve.logging_steps(recipe, steps, reasons)
    watched = watching.settle(recipe, summary, basis.global_batch_size, steps, reasons)
    resolve.everything_else(recipe, reasons)
    resolve.caveats(footprint, reasons, bool(train.torch_compile))
    used = chosen.settings
    plan = Plan(
        **dict(used) | watched | {"plain_logits": shapes.plain_logits, "offload": train.offload, "seed": train.seed},
        trial=f"{recipe.method.arm}-seed{train.seed}",
        data_fingerprint=summary.fingerprint,
        method=recipe.method.arm,
        learning_rate=rate,
        head_learning_rate=recipe.method.head_learning_rate,
        head_init=basis.head_init,
        layerwise_lr_decay=recipe.method.layerwise_lr_decay if recipe.method.kind == "full" else 1.0,
        num_train_epochs=steps.epochs,
        total_steps=steps.total,
        warmup_steps=warmup,
        lr_scheduler_type=train.lr_scheduler_type,
        global_batch_size=basis.global_batch_size,
        placement=placement,
        loader_workers=resolve.loader_workers(recipe, fleet.machine, basis.needs.device, reasons),
        group_by_length=basis.group_by_length,
        eval_steps=steps.between_evaluations,
        eval_on_start=train.eval_on_start,
        save_steps=steps.between_saves,
        logging_steps=logging_steps,
        metric=metric,
        greater_is_better=greater_is_better(metric),
        num_parameters=shapes.num_parameters,
        state=memory.state_of(shapes.num_parameters, used),
        memory_limit_bytes=parse_bytes(train.memory_limit) if train.memory_limit else None,
        available_bytes=basis.budget.available_bytes,
        memory=chosen.memory,
        traffic=time.traffic(shapes, used, basis.shared) if used.num_processes > 1 else None,
        disk=on_disk,
        settings=tuple(reasons.settings),
    )
    return with_time(plan, basis, summary, started_seconds)


def _fitting(basis: Basis, summary: DataSummary, own_loss: bool, reasons: Reasons) -> tuple[choose.Option, DiskNeed]:
    """The fastest settings that fit into memory, if what they need fits on the disk as well."""
    recipe, shapes, fleet = basis.recipe, basis.shapes, basis.fleet
    budget.refuse_offload(recipe, shapes, fleet.machine)
    limits = basis.budget.for_rows(summary.rows_per_epoch)
    chosen = choose.choose(
        recipe, basis.start, basis.rows_per_process, limits, lambda settings: basis.speed(settings, basis.shared)
    )
    choose.note(recipe, chosen, basis.rows_per_process, limits, own_loss, reasons)
    used = chosen.settings
    batches = (used.micro_batch_size, used.gradient_accumulation_steps)
    problems = sharing.disagreements(recipe, *batches, used.num_processes, used.precision)
    if problems:
        raise RecipeError(problems)
    if fleet.disk_bytes is not None:
        disk.refuse_what_cannot_fit(recipe, shapes.num_parameters, used, fleet.disk_bytes, fleet.disk_at)
    return chosen, disk.need(recipe, shapes.num_parameters, used)


def with_time(plan: Plan, basis: Basis, summary: DataSummary, started_seconds: float | None = None) -> Plan:
    """The plan with its time; without, where the speed of the hardware is not known."""
    fleet, shapes, work, gpu = basis.fleet, basis.shapes, basis.work, basis.fleet.gpu_model
    flops = time.device_flops(fleet, plan.precision, shapes.hidden_size)
    if flops is None:
        return plan
    expected = time.CommandTime(
        recipe=basis.recipe,
        plan=plan,
        summary=summary,
        work=work,
        hidden_size=shapes.hidden_size,
        step_seconds=time.together(basis.seconds(plan, basis.shared)),
        flops=flops,
        devices=plan.num_processes if fleet.machine.gpus else plan.num_machines,
        bytes_per_second=1e9 * (gpu.memory_gb_per_second if gpu else fleet.host_memory_gb_per_second),
        pass_seconds=time.LAUNCH_SECONDS / 3 * shapes.num_layers,  # a step has three passes
        started_seconds=started_seconds,
    )
    busy = fleet.machine.busy if plan.device == "cpu" else ""
    return plan.model_copy(update={"time": expected.need(), "busy": busy})
