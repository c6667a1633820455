from __future__ import annotations

import os
import shutil
import textwrap
from collections.abc import Sequence

from fulltune import methods
from fulltune.errors import DoesNotFitError, InterruptedRun, SetupError
from fulltune.models.kernels import missing_compiler
from fulltune.plan.savings import MEMORY_SAVINGS, Changes, plain_optim
from fulltune.recipe.fields import Recipe
from fulltune.records.data import DataSummary
from fulltune.records.events import PhaseBegan
from fulltune.records.plan import Plan
from fulltune.records.training import MeasuredSetting, Measurements, Outcome
from fulltune.text import format_bytes
from fulltune.train.parent import child
from fulltune.train.parent.next_attempt import settings_with_reasons
from fulltune.train.parent.retry import PlannedTrial
from fulltune.train.request import Request

MARGIN = 0.03
"""Relative difference in run time that counts as noise."""
MIN_SECONDS_TO_COMPILE = 600.0
_DERIVED = ("gradient accumulation", "evaluate.batch_size")


# ---- what is measured, and the choice: pure functions ------------------------------------------------------------


def speedups_to_measure(recipe: Recipe, plan: Plan) -> list[MeasuredSetting]:
    """Return the settings to measure, first without optional speedups, then adding one at a time."""
    measured = [(saving, saving.apply(recipe, plan)[-1]) for saving in MEMORY_SAVINGS if saving.measured]
    plain = {"precision": "fp32", "optim": plain_optim(plan.weights_dtype, plan.bf16_rounding)}
    now: Changes = {}
    for saving, changes in measured:
        off = {name: plain.get(name, False) for name in changes}
        if not saving.why_not_automatic(recipe, plan.model_copy(update=off)):
            now |= off
    name = f"{now.get('precision', plan.precision)}, no speedups"
    rows = [MeasuredSetting(name=name, kind="lever", changes=dict(now))]
    for saving, changes in measured:
        if not saving.why_not_automatic(recipe, plan.model_copy(update=now)):
            now |= changes
            rows.append(MeasuredSetting(name=f"+ {saving.measured.format(**changes)}", kind="lever", changes=dict(now)))
    return rows


def micro_batches_to_measure(recipe: Recipe, plan: Plan, best: Changes) -> list[MeasuredSetting]:
    """Return settings with the next two smaller and larger micro batch sizes that divide a rank's batch."""
    if recipe.train.micro_batch_size is not None:
        return []
    share = plan.global_batch_size // plan.num_processes
    sizes = [size for size in range(1, share + 1) if share % size == 0]
    smaller = [size for size in sizes if size < plan.micro_batch_size][-2:]
    larger = [size for size in sizes if size > plan.micro_batch_size][:2]
    return [
        MeasuredSetting(
            name=f"micro batch {size}",
            kind="micro batch",
            changes={
                **best,
                "micro_batch_size": size,
                "gradient_accumulation_steps": share // size,
                "eval_batch_size": recipe.evaluate.batch_size or 2 * size,
            },
        )
        for size in (*reversed(smaller), *larger)
    ]


def packing_to_measure(recipe: Recipe, summary: DataSummary, best: MeasuredSetting) -> list[MeasuredSetting]:
    """Return the best setting with packing, and without grouping by length unless the recipe sets that, or [] if
    packing cannot be chosen."""
    decided = recipe.data.packing is not None or recipe.task != "causal-lm" or summary.form.is_raw_text
    if decided or recipe.train.loss is not None or methods.max_virtual_tokens(recipe):
        return []
    grouping = {"group_by_length": False} if recipe.train.group_by_length is None else {}
    return [MeasuredSetting(name="packing", kind="packing", changes={**best.changes, "packing": True, **grouping})]


def compilation_to_measure(recipe: Recipe, best: MeasuredSetting, missing_tool: str | None) -> list[MeasuredSetting]:
    """Return the best setting with torch.compile, with its `problem` if any, or [] if the recipe decides."""
    train = recipe.train
    if train.torch_compile is not None or train.zero_enabled_by or train.use_liger_kernel:
        return []
    problem = None
    if missing_tool:
        problem = f"not tried: no {missing_tool} was found"
    elif best.train_seconds < MIN_SECONDS_TO_COMPILE:
        problem = f"not tried: the run takes {best.train_seconds:,.0f} s, and compiling takes a minute or two"
    changes = {**best.changes, "torch_compile": True}
    return [MeasuredSetting(name="torch.compile", kind="compile", changes=changes, problem=problem)]


def find_fastest(rows: Sequence[MeasuredSetting]) -> MeasuredSetting | None:
    """Return the first setting that fits and takes at most `MARGIN` longer than the fastest, or None if none fits."""
    fitting = [row for row in rows if not row.problem]
    least = min((row.train_seconds for row in fitting), default=0.0)
    return next((row for row in fitting if row.train_seconds <= least * (1 + MARGIN)), None)


# ---- measured ----------------------------------------------------------------------------------------------------


def choose_fastest_plan(trial: PlannedTrial, summary: DataSummary, available_bytes: int) -> Plan:
    """Measure settings, save all measurements, and return the plan with the fastest settings that fit."""
    recipe, plan, folder = trial.recipe, trial.plan, trial.folder
    if trial.hooks.needs_this_process:
        raise SetupError("plan --measure: your compute_loss cannot run in the measuring processes; omit --measure")
    if any((folder / "attempts").glob("*")):
        raise SetupError(f"{folder}: training with these settings has begun; measure in a new run (--fresh)")
    if recipe.train.zero_enabled_by:
        raise SetupError("plan --measure: a model that ZeRO shards cannot be measured; omit --measure")
    rows: list[MeasuredSetting] = []

    def measure_all(candidates: Sequence[MeasuredSetting]) -> list[MeasuredSetting]:
        results = [_measure_setting(trial, candidate, tokens, available_bytes) for candidate in candidates]
        rows.extend(results)
        return results

    shutil.rmtree(folder / "plan" / "probes", ignore_errors=True)
    tokens = summary.tokens_per_epoch * plan.num_train_epochs
    saving_rows = measure_all(speedups_to_measure(recipe, plan))
    best = find_fastest(saving_rows)
    # If nothing fits, smaller micro batches with all memory savings may.
    batches = micro_batches_to_measure(recipe, plan, best.changes if best else saving_rows[-1].changes)
    if best is None:
        batches = [row for row in batches if row.changes["micro_batch_size"] < plan.micro_batch_size]
    best = find_fastest([*([best] if best else []), *measure_all(batches)])
    if best is None:
        raise DoesNotFitError([f"measured: {row.name}: {row.problem}" for row in rows])
    best = find_fastest([best, *measure_all(packing_to_measure(recipe, summary, best))]) or best
    compiled = measure_all(compilation_to_measure(recipe, best, missing_compiler(plan.device)))
    best = find_fastest([best, *compiled]) or best
    marked = tuple(row.model_copy(update={"is_best": row is best}) for row in rows)
    Measurements(available_bytes=available_bytes, rows=marked).save(folder / "plan" / "measured.json")
    ran = sum(not row.problem for row in rows)
    peak = f"{format_bytes(best.peak_memory_bytes)} of {format_bytes(available_bytes)}"
    why = f"measured: the fastest of {ran} that fit, {best.tokens_per_second:,.0f} tokens/s, {peak}"
    packed = next((row for row in rows if row.kind == "packing"), best)
    if packed is not best and not best.changes.get("packing"):
        lost = packed.problem or f"{packed.tokens_per_second:,.0f} tokens/s, but {best.tokens_per_second:,.0f} without"
        lost = f"one sequence per row; measured with packing: {lost}"
        plan = plan.model_copy(update={"settings": settings_with_reasons(plan, {"packing": False}, lambda old: lost)})
    settings = settings_with_reasons(plan, best.changes, lambda old: old.reason if old.name in _DERIVED else why)
    changed = plan.model_copy(update={**best.changes, "settings": settings})
    time = None
    if plan.time is not None:
        speeds = {"train_seconds": best.train_seconds, "tokens_per_second": best.tokens_per_second}
        time = plan.time.model_copy(update={**speeds, "source": "measured"})
    return changed.model_copy(update={"memory": trial.estimate_memory(changed), "time": time})


def with_measurements(row: MeasuredSetting, outcome: Outcome, tokens: float, available_bytes: int) -> MeasuredSetting:
    """Return the setting with an attempt's measurements or its problem. `tokens` counts the whole training's."""
    forecast, problem = outcome.forecast, textwrap.shorten(outcome.reason, 120)
    if outcome.status == "out_of_memory":
        problem = f"memory ran out: {problem}"
    if outcome.status != "done" or forecast is None:
        return row.model_copy(update={"problem": problem})
    peak = outcome.dry_run_growth_bytes
    return row.model_copy(
        update={
            "peak_memory_bytes": peak,
            "train_seconds": forecast.train_seconds,
            "tokens_per_second": round(tokens / forecast.train_seconds, 1),
            "loss": outcome.dry_run_loss,
            "problem": None if peak <= available_bytes else f"does not fit into {format_bytes(available_bytes)}",
        }
    )


def _measure_setting(trial: PlannedTrial, row: MeasuredSetting, tokens: float, available_bytes: int) -> MeasuredSetting:
    """Return the setting with the results of an attempt that stops after the dry run."""
    if row.problem:
        return row
    trial.listener(PhaseBegan(name=f"measuring: {row.name}"))
    request = Request(
        run_folder=str(trial.folder),
        recipe=trial.recipe,
        plan=trial.plan.model_copy(update=row.changes),
        attempt=1 + len(list((trial.folder / "plan" / "probes").glob("*"))),
        checkpoint=None,
        parent_pid=os.getpid(),
        probe=True,
    )
    request.folder.mkdir(parents=True)
    request.save(request.folder / "request.json")
    outcome = child.run_worker(request, lambda event: None)
    if outcome.status == "interrupted":
        raise InterruptedRun("interrupted while measuring; run the same command to measure again")
    return with_measurements(row, outcome, tokens, available_bytes)
