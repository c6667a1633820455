from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache

from fulltune.errors import DoesNotFitError, RecipeError
from fulltune.footprint.records import BYTES
from fulltune.models.shapes import Shapes
from fulltune.plan import alternatives, budget, choose, memory, resolve, stream, time, watching
from fulltune.plan.answers import generation_seconds, plan_answers
from fulltune.plan.gpus import Fleet
from fulltune.plan.settings import PLACEMENT, Reasons
from fulltune.plan.workload import Basis, Workload, make_basis
from fulltune.recipe.fields import Recipe, with_placement
from fulltune.recipe.tasks import FACTS, greater_is_better
from fulltune.recipe.training import SHARDABLE_OPTIMIZERS, Placement
from fulltune.records.data import DataSummary
from fulltune.records.plan import BASELINES, DRY_RUN, PROBE, STARTING, TRAINED, DiskNeed, Plan, StreamPlan, TimeNeed
from fulltune.system import parallel_layout
from fulltune.system.hardware import Machine
from fulltune.text import format_bytes, parse_bytes

ALONE = "one process"


def make_plan(workload: Workload, fleet: Fleet, own_loss: bool = False, startup_seconds: float | None = None) -> Plan:
    """Make the plan of a trial, with a reason for each setting; `own_loss` is True if the user passed `compute_loss`.

    `startup_seconds` replaces the assumed start-up time. Raises `RecipeError` for contradictory settings, and
    `DoesNotFitError` if memory or disk is too small.
    """
    shapes, summary, reasons = workload.shapes, workload.summary, Reasons()
    own_loss = own_loss or workload.recipe.train.loss is not None
    workload = replace(workload, footprint=cache(workload.footprint))
    recipe, why = choose_placement(workload, fleet, own_loss)
    train, basis = recipe.train, make_basis(replace(workload, recipe=recipe), fleet, reasons, own_loss)
    steps, placement = basis.steps, train.placed_as
    assert placement != "auto", "choose_placement replaces auto"
    if train.engine_settings is None:
        reasons.add("train.placement", None if why else placement, placement, why)
    metric = resolve.choose_metric(recipe, summary, reasons)
    rate = resolve.choose_learning_rate(recipe, shapes, reasons)
    warmup = resolve.choose_warmup_steps(recipe, shapes, steps.total, reasons)
    try:
        option, on_disk = _fitting_option(basis, own_loss, reasons)
    except DoesNotFitError as error:
        first, *ways = error.problems
        chose = f" ({PLACEMENT}: {why})" if why not in ("", ALONE) else ""
        raise DoesNotFitError([first + chose, *ways]) from None
    reasons.add("train.eval_steps", train.eval_steps, steps.between_evaluations, "once per epoch")
    reasons.add("data.max_length", recipe.data.max_length, summary.max_length, summary.max_length_reason)
    often = "every step, because the run is short" if steps.total < 400 else "about 200 log lines"
    logging_steps = reasons.add("train.logging_steps", train.logging_steps, max(1, steps.total // 200), often)
    answers, need = plan_answers(basis, option.settings, option.memory, summary, metric, reasons)
    generic = watching.plan_generic_texts(recipe, summary, basis.global_batch_size, steps, reasons)
    resolve.record_parts(recipe, shapes, summary, reasons)
    resolve.record_other_settings(recipe, reasons)
    reasons.settings += resolve.memory_caveats(basis.footprint, bool(train.torch_compile))
    used = option.settings
    each_pass, each_step = time.communication_bytes(shapes, used, basis.layout)
    plan = Plan(
        **dict(used) | {"plain_logits": shapes.plain_logits, "offload": train.offload, "seed": train.seed},
        generic=generic,
        answers=answers,
        trial=f"{recipe.method.label}-seed{train.seed}",
        data_fingerprint=summary.fingerprint,
        method=recipe.method.label,
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
        loader_workers=resolve.choose_loader_workers(recipe, fleet.machine, used.device, reasons),
        group_by_length=basis.group_by_length,
        packing=basis.packing,
        eval_steps=steps.between_evaluations,
        eval_on_start=train.eval_on_start,
        save_steps=steps.between_saves,
        logging_steps=logging_steps,
        metric=metric,
        greater_is_better=greater_is_better(metric, recipe.evaluate.greater_is_better),
        num_parameters=shapes.num_parameters,
        state=memory.state_bytes(shapes.num_parameters, used),
        memory_limit_bytes=min(map(parse_bytes, budget.memory_limits(recipe, used.device).values()), default=None),
        available_bytes=basis.available_bytes,
        memory=need,
        sent_bytes_per_micro_batch=each_pass,
        sent_bytes_per_update=each_step,
        disk=on_disk,
        settings=tuple(reasons.settings),
    )
    return with_time_estimate(plan, basis, summary, startup_seconds)


def _fitting_option(basis: Basis, own_loss: bool, reasons: Reasons) -> tuple[choose.SettingsOption, DiskNeed]:
    """Return the settings that fit in memory, and the disk need; raise `DoesNotFitError` if nothing fits."""
    recipe, shapes, fleet = basis.recipe, basis.shapes, basis.fleet
    budget.check_offload_fits(recipe, shapes, fleet.machine)
    option = choose.choose_settings(basis)
    choose.record_choice(basis, option, own_loss, reasons)
    if option.settings.stream is not None:
        option = with_cache(basis, option, option.settings.stream)
    used = option.settings
    if problems := parallel_layout.plan_conflicts(recipe, used):
        raise RecipeError(problems)
    return option, alternatives.check_disk_space(recipe, shapes.num_parameters, used, fleet.disk_bytes, fleet.disk_at)


def with_cache(basis: Basis, option: choose.SettingsOption, tiers: StreamPlan) -> choose.SettingsOption:
    """Return a streamed run's settings with a cache for weights in the host memory that is left; raise
    `DoesNotFitError` if a GPU's host has too little."""
    used, need, limit = option.settings, option.memory, tiers.limits["host_memory"]
    left, host = choose.COMFORTABLE * basis.available_bytes - need.peak, need.host + budget.LIBRARIES_BYTES
    if used.device == "cuda":
        free = min(basis.fleet.machine.memory_available_bytes, parse_bytes(limit or "1000TB"))
        left = free - host if limit else 0
        if free < host:
            raise DoesNotFitError(
                f"{basis.recipe.model.name}: {PLACEMENT}: stream needs {format_bytes(1.01 * host)} of host memory, but "
                f"{format_bytes(free)} {'is train.stream.host_memory' if limit else 'is free'}; {tiers.unit_in_words}"
            )
    cached = max(0, min(int(left), BYTES[used.weights_dtype] * basis.shapes.num_parameters))
    used = used.changed(stream=tiers.model_copy(update={"cache_bytes": cached}))
    return replace(option, settings=used, memory=basis.memory_need(used))


# ---- where the training state is stored ------------------------------------------------------------------------


def choose_placement(workload: Workload, fleet: Fleet, own_loss: bool = False) -> tuple[Recipe, str]:
    """Return the recipe with a placement, and the reason, which is empty if the recipe sets the placement.

    One process streams the model from disk if nothing else fits. Several processes use ddp if it fits, because ddp
    sends the least data, and otherwise fsdp2. ZeRO is never chosen automatically, because it computes in other data
    types.
    """
    recipe = workload.recipe
    if recipe.train.placement != "auto" or recipe.train.engine_settings is not None:
        return recipe, ""

    def memory_with(placement: Placement) -> tuple[int, int, int]:
        """Return three numbers of bytes per process: free memory, and the need without and with savings that change the
        result."""
        own = with_placement(recipe, placement)
        basis = make_basis(replace(workload, recipe=own), fleet, own_loss=own_loss)
        exact, changed = (choose.lowest_memory_settings(basis, same_result=same).memory.peak for same in (True, False))
        return basis.available_bytes, exact, changed

    if recipe.train.num_processes == 1:
        free, _, single = memory_with("single")
        if single <= free:
            return with_placement(recipe, "single"), ALONE
        why = f"a whole copy needs {format_bytes(single)}, but only {format_bytes(free)} is free"
        if fleet.machine.gpus and recipe.train.device != "cpu":
            return with_placement(recipe, "single"), f"{ALONE}; stream, untested on GPUs, must be set there"
        if against := stream.why_not_stream(workload.shapes, recipe, workload.may_stream):
            return with_placement(recipe, "single"), f"{ALONE}; stream is not possible: {against}"
        free, needed, _ = memory_with("stream")
        if needed <= free:
            return with_placement(recipe, "stream"), why
        return with_placement(recipe, "single"), f"{ALONE}; stream needs {format_bytes(needed)}"

    free, ddp, ddp_with_others = memory_with("ddp")
    if ddp <= free:
        return with_placement(recipe, "ddp"), "a full copy fits in each process"
    why = f"ddp needs {format_bytes(ddp)} in each process, but only {format_bytes(free)} is free"
    if against := why_not_fsdp2(recipe, workload.shapes, fleet.machine):
        return with_placement(recipe, "ddp"), f"{why}; fsdp2 is not possible: {against}"
    _, fsdp2, _ = memory_with("fsdp2")
    if fsdp2 <= free:
        return with_placement(recipe, "fsdp2"), why
    why += f", fsdp2 needs {format_bytes(fsdp2)}"
    if ddp_with_others <= free:
        return with_placement(recipe, "ddp"), f"{why}; ddp fits with settings that change the result"
    return with_placement(recipe, "fsdp2" if fsdp2 < ddp_with_others else "ddp"), why


def why_not_fsdp2(recipe: Recipe, shapes: Shapes, machine: Machine) -> str | None:
    """Return why FSDP2 cannot be chosen automatically, or None if it can."""
    train = recipe.train
    if train.device == "cpu" and machine.gpus:
        return "fsdp2 would use the GPUs"
    if train.optim not in (None, *SHARDABLE_OPTIMIZERS):
        return f"{train.optim} needs whole tensors"
    if recipe.model.new_tokens:
        return "model.new_tokens extends whole embeddings"
    if train.use_liger_kernel:
        return "Liger's kernels are untested with fsdp2"
    if shapes.num_trainable is not None:
        return "fsdp2's memory can be planned only if every parameter is trained"
    return None if shapes.units is not None else "this model has no repeated blocks"


# ---- the time of the whole command -------------------------------------------------------------------------------

DISK_BYTES_PER_SECOND = 10**9
START_SECONDS, LOADS = 20.0, 3
"""Start-up time of two processes with torch (12 to 25 s on two cores), and how many times the model is loaded."""
CHECKS_SECONDS, SCORING_SECONDS, BASELINE_LINES = 0.5, 0.4, 3
"""Fixed seconds for the checks and for scoring one model, and the number of baselines."""
LONGEST_PASSES = 2


def with_time_estimate(plan: Plan, basis: Basis, summary: DataSummary, startup_seconds: float | None = None) -> Plan:
    """Return the plan with its estimated time, or unchanged if the hardware's speed is unknown."""
    fleet, work = basis.fleet, basis.work
    flops = time.device_flops(fleet, plan.precision, basis.shapes.hidden_size)
    if flops is None:
        return plan
    devices = plan.num_processes if fleet.machine.gpus else plan.num_machines
    evaluations = time.count_interval_steps(plan.total_steps, plan.eval_steps) + plan.eval_on_start
    parts = basis.step_seconds(plan)
    step, tokens = time.step_duration(parts), plan.global_batch_size * work.tokens_per_row
    training, eval_rows = plan.total_steps * step, summary.splits["eval"].rows
    passing = work.forward_flops(eval_rows) / (flops * devices)
    passing = max(passing, -(-eval_rows // plan.eval_batch_size) * stream.pass_seconds(plan, plan.state["weights"]))
    saved = plan.disk.checkpoint_bytes
    if plan.stream is not None:  # the state is the checkpoint; only the best weights are copied
        saved = plan.state["weights"] * basis.recipe.train.load_best_model_at_end
        plan = plan.changed(stream=plan.stream.model_copy(update={"step_seconds": parts}))
    answering = (plan.answers and plan.answers.seconds) or 0.0
    need = TimeNeed(
        train_seconds=training,
        eval_seconds=evaluations * passing + answering,
        answers_seconds=answering,
        save_seconds=(plan.num_saves or 0) * saved / DISK_BYTES_PER_SECOND,
        tokens=round(plan.total_steps * tokens),
        tokens_per_second=tokens / step,
        source="arithmetic",
        overhead_seconds=dict(_stage_seconds(plan, basis, summary, training, flops, startup_seconds)),
    )
    return plan.model_copy(update={"time": need, "busy": fleet.machine.busy_warning if plan.device == "cpu" else ""})


def _stage_seconds(
    plan: Plan, basis: Basis, summary: DataSummary, train_seconds: float, flops: float, startup_seconds: float | None
) -> Iterator[tuple[str, float]]:
    """Yield the name and estimated seconds of each stage before and after training. `flops` is one device's FLOP/s."""
    work, recipe = basis.work, basis.recipe
    # Minimum time of a forward pass: calling the layers, or launching their kernels on a GPU.
    pass_seconds = time.LAUNCH_SECONDS / 3 * basis.shapes.num_layers + stream.pass_seconds(plan, plan.state["weights"])

    def forward(rows: int) -> float:
        return max(work.forward_flops(rows) / flops, -(-rows // plan.eval_batch_size) * pass_seconds)

    spent = START_SECONDS if startup_seconds is None else startup_seconds
    spent += plan.stream.state_bytes / plan.stream.written_per_second if plan.stream else 0.0
    yield STARTING, spent + LOADS * plan.state["weights"] / DISK_BYTES_PER_SECOND
    probed_rows, _, probing = time.linear_probe_cost(summary, basis.shapes.hidden_size)
    if plan.head_init == "probe":
        yield PROBE, forward(probed_rows) + probing
    if added := recipe.data.hard_negatives:
        yield "hard negatives", forward(round(basis.train_rows * (1 - added / basis.footprint.sequences_per_row)))
    # Passes of the longest micro batch, and further ones if they take a small part of the training time.
    dry = plan.placement != "stream"
    tokens = plan.micro_batch_size * (plan.processes_per_machine if plan.device == "cpu" else 1) * plan.longest_tokens
    passes = LONGEST_PASSES * (1 + work.backward + plan.activation_checkpointing)
    computing = passes * work.flops_of(tokens, plan.longest_tokens) / flops
    yield DRY_RUN, CHECKS_SECONDS + dry * (computing + time.dry_run_extra_seconds(train_seconds))
    if "test" not in summary.splits:
        return
    test = summary.splits["test"].rows
    # A classifier's temperature is fitted on the eval rows.
    scored = test + (summary.splits["eval"].rows if summary.form.is_calibrated else 0)
    answered = min(recipe.evaluate.generate_rows, test) if summary.form.writes_answers else 0
    most, batches = recipe.evaluate.max_new_tokens, -(-answered // plan.eval_batch_size)
    answers = batches * generation_seconds(basis, plan, plan.eval_batch_size, work.tokens_per_row, most, flops)
    if recipe.evaluate.baselines:
        pretrained_rows = test  # rows through the pretrained model, for a classifier on embeddings
        if FACTS[summary.task].head_is_new:
            pretrained_rows = time.probe_passes(summary) * test if not summary.form.has_windows else 0
            pretrained_rows += probed_rows if plan.head_init != "probe" else 0
            pretrained_rows += scored if plan.head_init is not None else 0  # with the probe as head
        # Without a baseline that uses the model, no answers are generated.
        passing = forward(pretrained_rows) + answers if pretrained_rows else 0.0
        yield BASELINES, BASELINE_LINES * SCORING_SECONDS + passing
    yield TRAINED, SCORING_SECONDS + forward(scored) + answers
