"""What saves memory: one table of what each lever needs, changes and costs.

Five filter and order it: the search of a plan (`choose`), the ways out of what does not fit (`ways_out`), what is tried
after memory ran out (`train.parent.next_attempt`), what its message proposes, and what `plan --measure` tries
(`train.parent.measure`). A new lever is one entry of `LEVERS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fulltune.plan.settings import OFFLOAD, PLACEMENT, given, in_yaml
from fulltune.recipe.fields import Recipe
from fulltune.recipe.tasks import FACTS
from fulltune.recipe.training import ENGINE_SETTINGS
from fulltune.records.plan import MemorySettings, Phase
from fulltune.system import sharing

Changes = dict[str, Any]
"""Fields of memory settings (or of a plan, which has them) and their new values."""
SETTING_OF = {
    "precision": "train.precision",
    "weights_dtype": "model.weights_dtype",
    "bf16_rounding": "train.bf16_rounding",
    "optim": "train.optim",
    "chunked_loss": "train.chunked_loss",
    "activation_checkpointing": "train.activation_checkpointing",
    "micro_batch_size": "train.micro_batch_size",
    "gradient_accumulation_steps": "gradient accumulation",
    "eval_batch_size": "evaluate.batch_size",
    "longest_tokens": "data.max_length",
    "torch_compile": "train.torch_compile",
}
"""Field of a plan to the setting that it is."""
SHORTEST = 128
"""Rows are not cut below so many tokens."""
ANYWHERE: tuple[Phase, ...] = ("loading", "step", "evaluation", "saving", "resuming")


@dataclass(frozen=True)
class Lever:
    """One thing that saves memory."""

    name: str
    setting: str
    costs: str
    """What is lost by it."""
    changes: Changes = field(default_factory=dict)
    options: Callable[[Recipe, MemorySettings], list[Changes]] | None = None
    """In place of `changes` where they depend on what is: the mildest first."""
    unless: Callable[[Recipe, MemorySettings], str] = lambda recipe, now: ""
    """Reason the lever is unavailable, beyond those that hold for all levers; empty: it is available."""
    done: str = ""
    """What is said when it was taken: `now` is the plan before, and fields of the changes have their new values."""
    same_result: bool = True
    searched: bool = False
    """The search of a plan may take it."""
    way_out: bool = False
    """Proposed where nothing fits."""
    fallback: tuple[Phase, ...] = ()
    """Tried when memory ran out there."""
    measured: str = ""
    """Its name in the table of `plan --measure`; empty: not measured."""
    also: str = ""
    """A second setting that it has."""
    kept: bool = True
    """What the recipe gives is not changed without asking; batch sizes are, because they change no result."""

    def apply(self, recipe: Recipe, now: MemorySettings) -> list[Changes]:
        """The changes that it makes, the mildest first."""
        return [dict(self.changes)] if self.options is None else self.options(recipe, now)

    def settings(self, recipe: Recipe, changes: Changes) -> dict[str, Any]:
        """What the recipe has to say for them: its own settings, and others that the recipe gives otherwise."""
        named = {SETTING_OF[name]: value for name, value in changes.items() if "." in SETTING_OF[name]}
        return {
            name: value
            for name, value in named.items()
            if name in (self.setting, self.also) or given(recipe, name) not in (None, value)
        }

    def obstacle(self, recipe: Recipe, now: MemorySettings) -> str:
        """Why it cannot be had, whatever the recipe's own value of its setting; empty when it can."""
        own = [name for name in self.changes if SETTING_OF[name] == self.setting]
        if own and all(getattr(now, name) == self.changes[name] for name in own):
            return "already on"
        if problem := self.unless(recipe, now):
            return problem
        return "" if self.apply(recipe, now) else "it is the smallest already"

    def refusal(self, recipe: Recipe, now: MemorySettings) -> str:
        """Why it is not taken without asking; empty when it may be."""
        if problem := self.obstacle(recipe, now):
            return problem
        if self.kept and (value := given(recipe, self.setting)) is not None:
            return f"the recipe says {self.setting}: {in_yaml(value)}"
        return ""


def plain_optim(weights_dtype: str, rounding: str | None) -> str:
    """What a plan takes when the recipe names no optimizer."""
    return "adamw_bf16" if weights_dtype == "bf16" and rounding != "nearest" else "adamw_torch_fused"


def whole_logits(recipe: Recipe, plain_logits: bool, own_loss: bool = False) -> str:
    """What keeps a loss from being computed in pieces; empty: nothing does."""
    if not FACTS[recipe.task].writes:
        return f"{recipe.task} has no logits of tokens"
    if own_loss:
        return "your own loss (compute_loss) needs the logits as a whole"
    if recipe.train.engine_by:
        return "ZeRO shards the head in stage 3, and a loss in pieces needs it whole (untried in stage 2)"
    return "" if plain_logits else "this model scales or caps its logits after the head"


# ---- what stands against each, and what it changes ---------------------------------------------------------------


def _smaller_batches(recipe: Recipe, now: MemorySettings) -> list[Changes]:
    """Half of the micro batch (or its largest divisor), half of that, down to 1, where an engine's settings agree."""
    size, found = now.micro_batch_size, []
    while size > 1:
        size //= next(number for number in range(2, size + 1) if size % number == 0)
        passes = now.gradient_accumulation_steps * now.micro_batch_size // size
        if not sharing.disagreements(recipe, size, passes, now.num_processes, now.precision):
            found.append({"micro_batch_size": size, "gradient_accumulation_steps": passes})
    return found


def _no_smaller_batch(recipe: Recipe, now: MemorySettings) -> str:
    if now.micro_batch_size == 1 or _smaller_batches(recipe, now):  # the smallest is told as of every lever
        return ""
    return f"{ENGINE_SETTINGS} gives the micro batch; write {sharing.AUTO!r} there"


def _half_precision(recipe: Recipe, now: MemorySettings) -> list[Changes]:
    return [{"precision": "bf16" if now.fast_bf16 else "fp16"}]


def _no_narrow_weights(recipe: Recipe, now: MemorySettings) -> str:
    if recipe.train.engine_by:
        return "ZeRO keeps weights in fp32"
    return "" if now.fast_bf16 else "this GPU has no fast bf16"


def _half_length(recipe: Recipe, now: MemorySettings) -> list[Changes]:
    half = now.longest_tokens // 2
    return [{"longest_tokens": half}] if half >= SHORTEST else []


def _no_offloading(recipe: Recipe, now: MemorySettings) -> str:
    if now.device == "cpu":
        return "without a GPU everything is in the host's memory"
    if recipe.train.engine_by:
        return "already on" if recipe.train.offload != "none" else f"not done by itself; set {OFFLOAD} yourself"
    settings = f"{PLACEMENT}: zero2 and {OFFLOAD}: optimizer"
    return f"not done by itself; set {settings} yourself ({sharing.INSTALL})"


# ---- the table ---------------------------------------------------------------------------------------------------

_NARROW = {"weights_dtype": "bf16", "precision": "bf16", "optim": "adamw_bf16", "bf16_rounding": "stochastic"}
LEVERS = (
    Lever(
        name="computations in 16 bits",
        setting="train.precision",
        costs="rounding",
        options=_half_precision,
        unless=lambda _, now: "the weights are of 16 bits already" if now.weights_dtype != "fp32" else "",
        same_result=False,
        measured="{precision} computations",
    ),
    Lever(
        name="smaller micro batch",
        setting="train.micro_batch_size",
        costs="nothing but some speed",
        options=_smaller_batches,
        unless=_no_smaller_batch,
        done="micro batch {micro_batch_size} instead of {now.micro_batch_size}, the same global batch of "
        "{now.global_batch_size}",
        way_out=True,
        fallback=("step",),
        kept=False,
    ),
    Lever(
        name="smaller eval batch",
        setting="evaluate.batch_size",
        costs="nothing but some speed",
        options=lambda _, now: [{"eval_batch_size": now.eval_batch_size // 2}] if now.eval_batch_size > 1 else [],
        done="eval batch {eval_batch_size} instead of {now.eval_batch_size}",
        fallback=("evaluation",),
        kept=False,
    ),
    Lever(
        name="chunked loss",
        setting="train.chunked_loss",
        costs="nothing but some speed",
        changes={"chunked_loss": True},
        unless=lambda recipe, now: whole_logits(recipe, now.plain_logits),
        done="chunked loss on",
        way_out=True,
        fallback=("step",),
        measured="chunked loss",
    ),
    Lever(
        name="activation checkpointing",
        setting="train.activation_checkpointing",
        costs="a third more operations",
        changes={"activation_checkpointing": True},
        unless=lambda _, now: "" if now.can_recompute else "this model cannot recompute its activations",
        done="activation checkpointing on",
        searched=True,
        way_out=True,
        fallback=("step",),
        measured="activation checkpointing",
    ),
    Lever(
        name="8-bit AdamW states",
        setting="train.optim",
        costs="moments of 8 bits",
        changes={"optim": "adamw_8bit"},
        unless=lambda recipe, _: "ZeRO shares out the optimizer" if recipe.train.engine_by else "",
        done="AdamW's states in 8 bits (train.optim: adamw_8bit), which changes the result a little",
        same_result=False,
        searched=True,
        way_out=True,
        fallback=("step", "evaluation", "saving", "resuming"),
        measured="8-bit AdamW",
    ),
    Lever(
        name="bf16 weights",
        setting="model.weights_dtype",
        costs="weights of 16 bits, rounded at random",
        changes=_NARROW,
        unless=_no_narrow_weights,
        same_result=False,
        way_out=True,
    ),
    Lever(
        name="bf16 weights and 8-bit AdamW states",
        setting="model.weights_dtype",
        also="train.optim",
        costs="weights of 16 bits, moments of 8",
        changes=_NARROW | {"optim": "adamw_8bit"},
        unless=_no_narrow_weights,
        same_result=False,
        way_out=True,
    ),
    Lever(
        name="shorter rows",
        setting="data.max_length",
        costs="longer rows are cut",
        options=_half_length,
        same_result=False,
        way_out=True,
    ),
    Lever(
        name="offload",
        setting=OFFLOAD,
        costs="speed, and memory of the host",
        unless=_no_offloading,
        fallback=ANYWHERE,
    ),
)
"""The mildest first."""


def what_helps(recipe: Recipe, now: MemorySettings, phase: Phase) -> list[str]:
    """Settings with values that a person may give to save memory in a phase, the mildest first."""
    found: dict[str, str] = {}
    for lever in LEVERS:
        if lever.way_out and phase in (lever.fallback or ANYWHERE) and not lever.obstacle(recipe, now):
            changes = lever.apply(recipe, now)[-1]
            value = next(value for name, value in changes.items() if SETTING_OF[name] == lever.setting)
            found.setdefault(lever.setting, in_yaml(value))
    return [f"{setting}: {value}" for setting, value in found.items()]
