from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fulltune.models.experts import why_no_deepspeed
from fulltune.plan.settings import OFFLOAD, PLACEMENT, recipe_value
from fulltune.recipe.fields import Recipe
from fulltune.recipe.tasks import FACTS
from fulltune.recipe.training import ENGINE_SETTINGS
from fulltune.records.plan import MemorySettings, Phase
from fulltune.system import parallel_layout
from fulltune.text import to_yaml

Changes = dict[str, Any]
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
    "packing": "data.packing",
    "group_by_length": "train.group_by_length",
}
NOT_OF_STREAMED = {
    "activation checkpointing": "a streamed model recomputes every block anyway",
    "8-bit AdamW states": "the optimizer state of a streamed model is on the disk",
    "offload": "the optimizer state of a streamed model is on the disk",
}
MIN_LENGTH = 128
ANYWHERE: tuple[Phase, ...] = ("loading", "step", "evaluation", "saving", "resuming")


@dataclass(frozen=True)
class MemorySaving:
    """A setting that saves memory at some cost."""

    name: str
    setting: str
    costs: str
    changes: Changes = field(default_factory=dict)
    options: Callable[[Recipe, MemorySettings], list[Changes]] | None = None
    """Returns the possible changes, the smallest first; replaces `changes`."""
    unless: Callable[[Recipe, MemorySettings], str | None] = lambda recipe, now: None
    """Returns why this setting is ruled out, or None."""
    done: str = ""
    """Template of the message after the change; its placeholders are the new values and the previous plan (`now`)."""
    same_result: bool = True
    is_automatic: bool = False
    is_proposed: bool = False
    fallback: tuple[Phase, ...] = ()
    """Phases in which a run changes this setting after running out of memory."""
    measured: str = ""
    also: str = ""
    """A second setting that changes as well."""
    respects_recipe: bool = True
    """False if the plan may replace the recipe's value because the result stays the same."""

    def apply(self, recipe: Recipe, now: MemorySettings) -> list[Changes]:
        return [dict(self.changes)] if self.options is None else self.options(recipe, now)

    def recipe_settings(self, recipe: Recipe, changes: Changes) -> dict[str, Any]:
        """Return the recipe settings (name to value) that these changes require."""
        named = {SETTING_OF[name]: value for name, value in changes.items() if "." in SETTING_OF[name]}
        return {
            name: value
            for name, value in named.items()
            if name in (self.setting, self.also) or recipe_value(recipe, name) not in (None, value)
        }

    def why_unusable(self, recipe: Recipe, now: MemorySettings) -> str | None:
        """Return why this setting cannot save memory in this run, or None if it can."""
        own = [name for name in self.changes if SETTING_OF[name] == self.setting]
        if own and all(getattr(now, name) == self.changes[name] for name in own):
            return "already on"
        if now.stream is not None and self.name in NOT_OF_STREAMED:
            return NOT_OF_STREAMED[self.name]
        if problem := self.unless(recipe, now):
            return problem
        return None if self.apply(recipe, now) else "already at its smallest value"

    def why_not_automatic(self, recipe: Recipe, now: MemorySettings) -> str | None:
        """Return why a plan may not use this setting automatically, or None if it may."""
        if problem := self.why_unusable(recipe, now):
            return problem
        if self.respects_recipe and (value := recipe_value(recipe, self.setting)) is not None:
            return f"the recipe sets {self.setting}: {to_yaml(value)}"
        return None


def plain_optim(weights_dtype: str, rounding: str | None) -> str:
    return "adamw_bf16" if weights_dtype == "bf16" and rounding != "nearest" else "adamw_torch_fused"


def why_loss_not_chunked(recipe: Recipe, plain_logits: bool, own_loss: bool = False) -> str | None:
    """Return why the loss cannot be computed in chunks, or None if it can; `plain_logits` means that the model does not
    scale its logits."""
    if not FACTS[recipe.task].writes:
        return f"{recipe.task} has no logits per token"
    if own_loss:
        return "your own loss (compute_loss) needs all logits at once"
    if recipe.train.zero_enabled_by:
        return "a chunked loss needs the whole head, which ZeRO shards in stage 3 (untested in stage 2)"
    return None if plain_logits else "this model scales or caps its logits after the head"


# ---- obstacles and changes of single savings ---------------------------------------------------------------------


def _smaller_batches(recipe: Recipe, now: MemorySettings) -> list[Changes]:
    """Return one change for each smaller micro batch that ZeRO's settings allow, the largest first."""
    size, smaller = now.micro_batch_size, []
    while size > 1:
        size //= next(number for number in range(2, size + 1) if size % number == 0)
        passes = now.gradient_accumulation_steps * now.micro_batch_size // size
        changes = {"micro_batch_size": size, "gradient_accumulation_steps": passes}
        if not parallel_layout.plan_conflicts(recipe, now.changed(**changes)):
            smaller.append(changes)
    return smaller


def _why_no_smaller_batch(recipe: Recipe, now: MemorySettings) -> str | None:
    if now.micro_batch_size == 1 or _smaller_batches(recipe, now):  # `why_unusable` reports a batch of one row
        return None
    return f"{ENGINE_SETTINGS} fixes the micro batch; write {parallel_layout.AUTO!r} instead"


def _why_no_bf16_weights(recipe: Recipe, now: MemorySettings) -> str | None:
    if recipe.train.zero_enabled_by:
        return "ZeRO keeps weights in fp32"
    return None if now.fast_bf16 else "this GPU has no fast bf16"


def _why_no_offloading(recipe: Recipe, now: MemorySettings) -> str:
    if now.device == "cpu":
        return "without a GPU, everything is already in host memory"
    if recipe.train.zero_enabled_by:
        return "already on" if recipe.train.offload != "none" else f"never used automatically; set {OFFLOAD} yourself"
    if now.has_experts:
        return why_no_deepspeed(now.num_processes)
    if FACTS[recipe.task].contrasts:
        return f"DeepSpeed is not supported for {recipe.task}; set {PLACEMENT}: fsdp2 with several GPUs"
    settings = f"{PLACEMENT}: zero2 and {OFFLOAD}: optimizer"
    return f"never used automatically; set {settings} yourself ({parallel_layout.INSTALL})"


# ---- the table ---------------------------------------------------------------------------------------------------

_NARROW = {"weights_dtype": "bf16", "precision": "bf16", "optim": "adamw_bf16", "bf16_rounding": "stochastic"}
MEMORY_SAVINGS = (
    MemorySaving(
        name="16-bit computations",
        setting="train.precision",
        costs="rounding",
        options=lambda _, now: [{"precision": "bf16" if now.fast_bf16 else "fp16"}],
        unless=lambda _, now: "the weights already have 16 bits" if now.weights_dtype != "fp32" else None,
        same_result=False,
        measured="{precision} computations",
    ),
    MemorySaving(
        name="smaller micro batch",
        setting="train.micro_batch_size",
        costs="some speed",
        options=_smaller_batches,
        unless=_why_no_smaller_batch,
        done="micro batch {micro_batch_size} instead of {now.micro_batch_size}, with the same global batch of "
        "{now.global_batch_size}",
        is_proposed=True,
        fallback=("step",),
        respects_recipe=False,
    ),
    MemorySaving(
        name="smaller eval batch",
        setting="evaluate.batch_size",
        costs="some speed",
        options=lambda _, now: [{"eval_batch_size": now.eval_batch_size // 2}] if now.eval_batch_size > 1 else [],
        done="eval batch {eval_batch_size} instead of {now.eval_batch_size}",
        fallback=("evaluation",),
        respects_recipe=False,
    ),
    MemorySaving(
        name="chunked loss",
        setting="train.chunked_loss",
        costs="some speed",
        changes={"chunked_loss": True},
        unless=lambda recipe, now: why_loss_not_chunked(recipe, now.plain_logits),
        done="chunked loss turned on",
        is_proposed=True,
        fallback=("step",),
        measured="chunked loss",
    ),
    MemorySaving(
        name="activation checkpointing",
        setting="train.activation_checkpointing",
        costs="a third more operations",
        changes={"activation_checkpointing": True},
        unless=lambda _, now: None if now.can_recompute else "this model does not support checkpointing",
        done="activation checkpointing turned on",
        is_automatic=True,
        is_proposed=True,
        fallback=("step",),
        measured="activation checkpointing",
    ),
    MemorySaving(
        name="8-bit AdamW states",
        setting="train.optim",
        costs="8-bit moments",
        changes={"optim": "adamw_8bit"},
        unless=lambda recipe, _: "ZeRO has its own optimizer" if recipe.train.zero_enabled_by else None,
        done="8-bit AdamW states (train.optim: adamw_8bit), which change the result slightly",
        same_result=False,
        is_automatic=True,
        is_proposed=True,
        fallback=("step", "evaluation", "saving", "resuming"),
        measured="8-bit AdamW",
    ),
    MemorySaving(
        name="bf16 weights",
        setting="model.weights_dtype",
        costs="16-bit weights with stochastic rounding",
        changes=_NARROW,
        unless=_why_no_bf16_weights,
        same_result=False,
        is_proposed=True,
    ),
    MemorySaving(
        name="bf16 weights and 8-bit AdamW states",
        setting="model.weights_dtype",
        also="train.optim",
        costs="16-bit weights, 8-bit moments",
        changes=_NARROW | {"optim": "adamw_8bit"},
        unless=_why_no_bf16_weights,
        same_result=False,
        is_proposed=True,
    ),
    MemorySaving(
        name="shorter rows",
        setting="data.max_length",
        costs="longer rows are truncated",
        options=lambda _, now: [{"longest_tokens": half}] if (half := now.longest_tokens // 2) >= MIN_LENGTH else [],
        same_result=False,
        is_proposed=True,
    ),
    MemorySaving(
        name="offload",
        setting=OFFLOAD,
        costs="speed and host memory",
        unless=_why_no_offloading,
        fallback=ANYWHERE,
    ),
)


def suggest_memory_savings(recipe: Recipe, now: MemorySettings, phase: Phase) -> list[str]:
    """List the settings that would save memory in a phase, each as `name: value`."""
    settings: dict[str, str] = {}
    for saving in MEMORY_SAVINGS:
        if saving.is_proposed and phase in (saving.fallback or ANYWHERE) and not saving.why_unusable(recipe, now):
            changes = saving.apply(recipe, now)[-1]
            value = next(value for name, value in changes.items() if SETTING_OF[name] == saving.setting)
            settings.setdefault(saving.setting, to_yaml(value))
    return [f"{setting}: {value}" for setting, value in settings.items()]
