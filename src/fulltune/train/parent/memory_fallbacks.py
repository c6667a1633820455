"""What can be changed when memory runs out, in which order, and what stands against it: pure functions.

What the recipe gives is kept, except batch sizes that change no result. The global batch is always kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fulltune.recipe.fields import Recipe
from fulltune.recipe.tasks import FACTS
from fulltune.records.plan import MemoryKind, MemoryNeed, Phase, Plan
from fulltune.system import deepspeed
from fulltune.text import in_words

Changes = dict[str, Any]
Need = Callable[[Plan], MemoryNeed | None]
"""The plan stage's arithmetic for a changed plan; None where it does not know."""
ADAMW = ("adamw_torch", "adamw_torch_fused", "adamw_bf16")
"""What `adamw_8bit` can take the place of, also in the middle of a run: it reads their checkpoints."""
ON_HOST = "{deepspeed: {zero_optimization: {stage: 2, offload_optimizer: {device: cpu}}}}"


@dataclass(frozen=True)
class Rung:
    """One thing that may be changed."""

    name: str
    changes: dict[str, Any] | None
    """Fields of the plan with their new values; None: not to be had."""
    text: str
    """What changes; or why it is not to be had."""
    setting: str = ""
    """The setting whose value changes."""
    same_result: bool = True


def rungs(recipe: Recipe, plan: Plan, phase: Phase | None, fits: Callable[[Changes], bool]) -> tuple[Rung, ...]:
    """What helps in this part of an attempt, the mildest first.

    Args:
        recipe: What it gives is kept.
        plan: The plan that ran out.
        phase: Where; None is taken for a step.
        fits: Whether the plan with these changes may be enough; the smallest micro batch is tried in any case.
    """
    match phase:
        case "loading":
            return ()
        case "evaluation":
            return _eval_batch(plan), _eight_bit(recipe, plan)
        case "saving" | "resuming":
            return (_eight_bit(recipe, plan),)
        case _:
            return (
                _micro_batch(recipe, plan, fits),
                _checkpointing(recipe, plan),
                _chunked(recipe, plan),
                _eight_bit(recipe, plan),
            )


def _micro_batch(recipe: Recipe, plan: Plan, fits: Callable[[Changes], bool]) -> Rung:
    name, micro = "smaller micro batch", plan.micro_batch_size
    if micro == 1:
        return Rung(name, None, "it is 1 already")
    if plan.optimizer_in_backward:
        return Rung(name, None, "train.optimizer_in_backward needs each step's rows in one pass")
    sizes = [size for size in _smaller(micro) if not _disagreement(recipe, plan, size)]
    if not sizes:
        return Rung(name, None, f"train.extra.deepspeed gives the micro batch; write {deepspeed.AUTO!r} there")
    tried = [
        {
            "micro_batch_size": size,
            "gradient_accumulation_steps": plan.gradient_accumulation_steps * micro // size,
            "eval_batch_size": max(1, plan.eval_batch_size * size // micro),
        }
        for size in sizes
    ]
    changes = next((changes for changes in tried if fits(changes)), tried[-1])
    size = changes["micro_batch_size"]
    text = f"micro batch {size} instead of {micro}, the same global batch of {plan.global_batch_size}"
    return Rung(name, changes, text, "train.micro_batch_size")


def _smaller(size: int) -> list[int]:
    """Half of it (or its largest divisor), half of that, down to 1: each divides the one before."""
    found = []
    while size > 1:
        size //= next(number for number in range(2, size + 1) if size % number == 0)
        found.append(size)
    return found


def _disagreement(recipe: Recipe, plan: Plan, size: int) -> bool:
    accumulation = plan.gradient_accumulation_steps * plan.micro_batch_size // size
    return bool(deepspeed.disagreements(recipe, size, accumulation, plan.num_processes, plan.precision))


def _eval_batch(plan: Plan) -> Rung:
    name, size = "smaller eval batch", plan.eval_batch_size
    if size == 1:
        return Rung(name, None, "it is 1 already")
    text = f"eval batch {size // 2} instead of {size}"
    return Rung(name, {"eval_batch_size": size // 2}, text, "evaluate.batch_size")


def _checkpointing(recipe: Recipe, plan: Plan) -> Rung:
    name = "activation checkpointing"
    if plan.activation_checkpointing:
        return Rung(name, None, "it is on already")
    if not plan.can_recompute:
        return Rung(name, None, "this model cannot recompute its activations")
    if recipe.train.activation_checkpointing is False:
        return Rung(name, None, "the recipe says train.activation_checkpointing: false")
    return Rung(name, {"activation_checkpointing": True}, f"{name} on", "train.activation_checkpointing")


def _chunked(recipe: Recipe, plan: Plan) -> Rung:
    name = "chunked loss"
    if not FACTS[recipe.task].writes:
        return Rung(name, None, f"{recipe.task} has no logits of tokens")
    if plan.chunked_loss:
        return Rung(name, None, "it is on already")
    if recipe.train.chunked_loss is False:
        return Rung(name, None, "the recipe says train.chunked_loss: false")
    if plan.torch_compile or recipe.train.extra.get("torch_compile"):
        return Rung(name, None, "a compiled model has no hooks")
    if not plan.plain_logits:
        return Rung(name, None, "this model changes logits after its head")
    if deepspeed.wanted(recipe):
        return Rung(name, None, "DeepSpeed shares out the model")
    return Rung(name, {"chunked_loss": True}, f"{name} on", "train.chunked_loss")


def _eight_bit(recipe: Recipe, plan: Plan) -> Rung:
    name = "8-bit AdamW states"
    if plan.optim == "adamw_8bit":
        return Rung(name, None, "they are 8-bit already")
    if recipe.train.optim is not None:
        return Rung(name, None, f"the recipe says train.optim: {recipe.train.optim}")
    if plan.optim not in ADAMW:
        return Rung(name, None, f"{plan.optim} has no such states")
    if deepspeed.wanted(recipe):
        return Rung(name, None, "DeepSpeed shares out the optimizer")
    text = "AdamW's states in 8 bits (train.optim: adamw_8bit), which changes the result a little"
    return Rung(name, {"optim": "adamw_8bit"}, text, "train.optim", same_result=False)


def offload(recipe: Recipe, plan: Plan) -> str:
    """Why the optimizer's states were not moved to the host, and how to do it."""
    if plan.device == "cpu":
        return "without a GPU everything is in the host's memory"
    if deepspeed.wanted(recipe):
        return "set offload_optimizer and offload_param in train.extra.deepspeed yourself"
    return f"not done by itself; set train.extra: {ON_HOST} yourself (pip install 'fulltune[deepspeed]')"


def lever(recipe: Recipe, plan: Plan, kind: MemoryKind) -> str:
    """The setting that frees most of a kind of tensors, of those that are still to be had."""
    bf16 = "model.weights_dtype: bf16" if plan.weights_dtype == "fp32" and not deepspeed.wanted(recipe) else ""
    in_backward = "train.optimizer_in_backward: true (with train.max_grad_norm: 0 and no accumulation)"
    eight = "train.optim: adamw_8bit" if plan.optim != "adamw_8bit" and not deepspeed.wanted(recipe) else ""
    kept = plan.can_recompute and not plan.activation_checkpointing
    recompute = "train.activation_checkpointing: true" if kept else ""
    chunks = "train.chunked_loss: true" if FACTS[recipe.task].writes and not plan.chunked_loss else ""
    shorter = "a smaller data.max_length" if FACTS[recipe.task].reads == "text" else "smaller images"
    match kind:
        case "weights":
            return bf16 or "a smaller model"
        case "gradients":
            return bf16 or (in_backward if not plan.optimizer_in_backward else "a smaller model")
        case "optimizer":
            return eight or bf16 or "a smaller model"
        case "activations":
            return recompute or shorter
        case "logits":
            return chunks or shorter
        case "buffers":
            return shorter


def freed(before: MemoryNeed | None, after: MemoryNeed | None) -> str:
    """`frees about 1.2 GiB (activations 1.0 GiB, logits 0.2 GiB)`; empty when the arithmetic does not say."""
    if before is None or after is None:
        return ""
    parts = {kind: size - after.kinds.get(kind, 0) for kind, size in before.kinds.items()}
    named = [f"{kind} {in_words(size)}" for kind, size in sorted(parts.items(), key=lambda p: -p[1]) if size >= 2**19]
    less = before.phases["step"] - after.phases["step"]
    return f"frees about {in_words(less)} of a step ({', '.join(named)})" if less >= 2**19 and named else ""
