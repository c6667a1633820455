"""What `fulltune plan --measure` tries, and which of it is taken: pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fulltune.plan.levers import LEVERS, SETTING_OF, Changes, plain_optim
from fulltune.recipe.fields import Recipe
from fulltune.recipe.tasks import FACTS
from fulltune.records.plan import Plan, Setting
from fulltune.records.training import Measured
from fulltune.text import format_bytes

MARGIN = 0.03
"""Less than this is no difference: a pass takes a little longer or shorter each time."""
LEAST_SECONDS_TO_COMPILE = 600.0
"""Compiling takes a minute or two: a run that is shorter than this does not win it back."""


@dataclass(frozen=True)
class Candidate:
    """Settings to try."""

    name: str
    kind: Literal["lever", "micro batch", "attention", "compile"]
    changes: dict[str, Any]
    """Fields of the plan and their values."""
    problem: str = ""
    """Why it is not tried; empty: it is."""


def levers(recipe: Recipe, plan: Plan) -> list[Candidate]:
    """One lever more in each row, as far as the recipe leaves them open; those without an effect are left out."""
    measured = [(lever, lever.apply(recipe, plan)[-1]) for lever in LEVERS if lever.measured]
    now: Changes = {}
    for lever, changes in measured:
        off = {name: _off(name, plan) for name in changes}
        if not lever.refusal(recipe, plan.model_copy(update=off)):
            now |= off
    rows = [Candidate(f"{now.get('precision', plan.precision)}, as it is", "lever", dict(now))]
    for lever, changes in measured:
        if not lever.refusal(recipe, plan.model_copy(update=now)):
            now |= changes
            rows.append(Candidate(f"+ {lever.measured.format(**changes)}", "lever", dict(now)))
    return rows


def _off(field: str, plan: Plan) -> Any:
    """What a plan has where no lever is taken."""
    match field:
        case "precision":
            return "fp32"
        case "optim":
            return plain_optim(plan.weights_dtype, plan.bf16_rounding)
        case _:
            return False


def micro_batches(recipe: Recipe, plan: Plan, best: Changes) -> list[Candidate]:
    """The two next smaller and the two next larger divisors of a process's share of the global batch."""
    if recipe.train.micro_batch_size is not None:
        return []
    share = plan.global_batch_size // plan.num_processes
    sizes = [size for size in range(1, share + 1) if share % size == 0]
    smaller = [size for size in sizes if size < plan.micro_batch_size][-2:]
    larger = [size for size in sizes if size > plan.micro_batch_size][:2]
    return [
        Candidate(
            f"micro batch {size}",
            "micro batch",
            {
                **best,
                "micro_batch_size": size,
                "gradient_accumulation_steps": share // size,
                "eval_batch_size": recipe.evaluate.batch_size or 2 * size,
            },
        )
        for size in (*reversed(smaller), *larger)
    ]


def attentions(recipe: Recipe, best: Changes, packed: bool, flash: Sequence[str]) -> list[Candidate]:
    """Attention other than sdpa, transformers' own choice, where neither the recipe nor packed rows settle it."""
    if recipe.model.attn_implementation is not None or packed or FACTS[recipe.task].reads == "image":
        return []
    return [
        Candidate(f"attention {name}", "attention", {**best, "attn_implementation": name}) for name in ("eager", *flash)
    ]


def compilations(recipe: Recipe, best: Measured, lacking: str) -> list[Candidate]:
    """torch.compile, where the recipe leaves it open and it can pay; `lacking` says what is missing here."""
    train = recipe.train
    if train.torch_compile is not None or train.deepspeed_by or train.use_liger_kernel or train.activation_offloading:
        return []
    problem = ""
    if lacking:
        problem = f"not tried: there is no {lacking} here"
    elif best.train_seconds < LEAST_SECONDS_TO_COMPILE:
        problem = f"not tried: the run takes {best.train_seconds:,.0f} s, and compiling costs a minute or two"
    return [Candidate("torch.compile", "compile", {**best.changes, "torch_compile": True}, problem)]


def fastest(rows: Sequence[Measured]) -> Measured | None:
    """The first row that is as fast as the fastest one; None when none ran and fits."""
    fitting = [row for row in rows if not row.problem]
    least = min((row.train_seconds for row in fitting), default=0.0)
    return next((row for row in fitting if row.train_seconds <= least * (1 + MARGIN)), None)


def why(best: Measured, rows: Sequence[Measured], available_bytes: int) -> str:
    """The reason that settings chosen by measurement carry."""
    tried = sum(not row.problem for row in rows)
    peak = f"{format_bytes(best.peak_memory_bytes)} of {format_bytes(available_bytes)}"
    return f"measured: the fastest of {tried} that fit, {best.tokens_per_second:,.0f} tokens/s, {peak}"


def noted(settings: Sequence[Setting], plan: Plan, changes: Changes, reason: str) -> tuple[Setting, ...]:
    """The settings with the measured values; what the recipe gave is not among the changes."""
    new = {SETTING_OF[field]: value for field, value in changes.items()}
    derived = {"gradient accumulation", "evaluate.batch_size"}
    known = {setting.name for setting in settings}
    kept = tuple(
        Setting(name=setting.name, value=new[setting.name], reason=reason, chosen=True)
        if setting.name in new and setting.name not in derived
        else setting.model_copy(update={"value": new.get(setting.name, setting.value)})
        for setting in settings
    )
    defaults = {SETTING_OF[field]: getattr(plan, field) for field in changes}
    # A field that the plan did not settle and that stays as it was needs no line.
    added = [name for name, value in new.items() if name not in known and value != defaults[name]]
    return (*kept, *(Setting(name=name, value=new[name], reason=reason, chosen=True) for name in added))
