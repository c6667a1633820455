"""What `fulltune plan --measure` tries, and which of it is taken: pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fulltune import methods
from fulltune.recipe.fields import Recipe
from fulltune.recipe.tasks import FACTS
from fulltune.records.plan import Plan, Setting
from fulltune.records.training import Measured
from fulltune.text import in_words

MARGIN = 0.03
"""Less than this is no difference: a pass takes a little longer or shorter each time."""
LEAST_SECONDS_TO_COMPILE = 600.0
"""Compiling takes a minute or two: a run that is shorter than this does not win it back."""
NAMES = {
    "precision": "train.precision",
    "chunked_loss": "train.chunked_loss",
    "activation_checkpointing": "train.activation_checkpointing",
    "optim": "train.optim",
    "optimizer_in_backward": "train.optimizer_in_backward",
    "micro_batch_size": "train.micro_batch_size",
    "gradient_accumulation_steps": "gradient accumulation",
    "eval_batch_size": "evaluate.batch_size",
    "attn_implementation": "model.attn_implementation",
    "torch_compile": "train.extra.torch_compile",
}
"""Field of the plan to the setting that it is."""
Changes = Mapping[str, Any]


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
    start, rows = _without_levers(recipe, plan), []
    now = dict(start)
    precision = now.get("precision", plan.precision)
    rows.append(Candidate(f"{precision}, as it is", "lever", dict(now)))
    for name, change in _lever_changes(recipe, plan, start):
        now |= change
        rows.append(Candidate(f"+ {name}", "lever", dict(now)))
    return rows


def _without_levers(recipe: Recipe, plan: Plan) -> dict[str, Any]:
    """Everything off that the recipe leaves open."""
    train = recipe.train
    start: dict[str, Any] = {}
    if train.precision == "auto" and plan.weights_dtype == "fp32":
        start["precision"] = "fp32"
    if train.chunked_loss is None and FACTS[recipe.task].writes:
        start["chunked_loss"] = False
    if train.activation_checkpointing is None and plan.can_recompute:
        start["activation_checkpointing"] = False
    if train.optim is None:
        start["optim"] = "adamw_torch_fused" if plan.weights_dtype == "fp32" else "adamw_bf16"
    if "optimizer_in_backward" not in train.model_fields_set and train.max_grad_norm == 0:
        start["optimizer_in_backward"] = False
    return start


def _lever_changes(recipe: Recipe, plan: Plan, start: Changes) -> list[tuple[str, dict[str, Any]]]:
    half = "fp16" if plan.precision == "fp16" else "bf16"
    single = plan.gradient_accumulation_steps == 1 and plan.num_processes == 1 and half == "bf16"
    found: list[tuple[str, dict[str, Any]]] = []
    if "precision" in start:
        found.append((f"{half} computations", {"precision": half}))
    if "chunked_loss" in start and not recipe.train.extra.get("torch_compile"):
        found.append(("chunked loss", {"chunked_loss": True}))
    if "activation_checkpointing" in start:
        found.append(("activation checkpointing", {"activation_checkpointing": True}))
    if "optim" in start and plan.bf16_rounding != "nearest":
        found.append(("8-bit AdamW", {"optim": "adamw_8bit"}))
    if "optimizer_in_backward" in start and single:
        found.append(("optimizer in backward", {"optimizer_in_backward": True}))
    return found


def micro_batches(recipe: Recipe, plan: Plan, best: Changes) -> list[Candidate]:
    """The two next smaller and the two next larger divisors of a process's share of the global batch."""
    if recipe.train.micro_batch_size is not None or best.get("optimizer_in_backward", plan.optimizer_in_backward):
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


def attentions(recipe: Recipe, best: Changes, packed: bool, flash: bool) -> list[Candidate]:
    """Other implementations of attention than transformers' own choice, sdpa.

    Args:
        recipe: One that names an implementation keeps it.
        best: The best so far.
        packed: Texts share rows: they were packed for this implementation.
        flash: flash_attention_2 can be had.
    """
    if recipe.model.attn_implementation is not None or packed or FACTS[recipe.task].reads == "image":
        return []
    names = ("eager", *(("flash_attention_2",) if flash else ()))
    return [Candidate(f"attention {name}", "attention", {**best, "attn_implementation": name}) for name in names]


def compilations(recipe: Recipe, best: Measured, compiler: bool) -> list[Candidate]:
    """torch.compile, where it can be had and can pay."""
    if "torch_compile" in recipe.train.extra or recipe.method.kind in methods.BY_HOOKS:
        return []
    problem = ""
    if not compiler:
        problem = "not tried: there is no compiler here (g++ or clang++ on a CPU, triton on a GPU)"
    elif best.train_seconds < LEAST_SECONDS_TO_COMPILE:
        problem = f"not tried: the run takes {best.train_seconds:,.0f} s, and compiling costs a minute or two"
    # A compiled model has no hooks: see `checks.py`.
    whole = {"chunked_loss": False} if "chunked_loss" in best.changes else {}
    return [Candidate("torch.compile", "compile", {**best.changes, **whole, "torch_compile": True}, problem)]


def fastest(rows: Sequence[Measured]) -> Measured | None:
    """The first row that is as fast as the fastest one; None when none ran and fits."""
    fitting = [row for row in rows if not row.problem]
    least = min((row.train_seconds for row in fitting), default=0.0)
    return next((row for row in fitting if row.train_seconds <= least * (1 + MARGIN)), None)


def why(best: Measured, rows: Sequence[Measured], available_bytes: int) -> str:
    """The reason that settings chosen by measurement carry."""
    tried = sum(not row.problem for row in rows)
    peak = f"{in_words(best.peak_memory_bytes)} of {in_words(available_bytes)}"
    return f"measured: the fastest of {tried} that fit, {best.tokens_per_second:,.0f} tokens/s, {peak}"


def noted(settings: Sequence[Setting], plan: Plan, changes: Changes, reason: str) -> tuple[Setting, ...]:
    """The settings with the measured values; what the recipe gave is not among the changes.

    Args:
        settings: Of the plan before.
        plan: The plan before.
        changes: Fields and their values.
        reason: For all of them.
    """
    new = {NAMES[field]: value for field, value in changes.items()}
    derived = {"gradient accumulation", "evaluate.batch_size"}
    known = {setting.name for setting in settings}
    kept = tuple(
        Setting(name=setting.name, value=new[setting.name], reason=reason, chosen=True)
        if setting.name in new and setting.name not in derived
        else setting.model_copy(update={"value": new.get(setting.name, setting.value)})
        for setting in settings
    )
    defaults = {NAMES[field]: getattr(plan, field) for field in changes}
    # A field that the plan did not settle and that stays as it was needs no line.
    added = [name for name, value in new.items() if name not in known and value != defaults[name]]
    return (*kept, *(Setting(name=name, value=new[name], reason=reason, chosen=True) for name in added))
