"""What can be changed when memory runs out, in which order, and what stands against it: pure functions.

What the recipe gives is kept, except batch sizes that change no result. The global batch is always kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fulltune.plan.levers import LEVERS, Changes, Lever
from fulltune.recipe.fields import Recipe
from fulltune.records.plan import MemoryNeed, Phase, Plan
from fulltune.text import format_bytes

Need = Callable[[Plan], MemoryNeed | None]
"""The plan stage's arithmetic for a changed plan; None where it does not know."""


@dataclass(frozen=True)
class Fallback:
    """One thing that may be changed."""

    name: str
    changes: dict[str, Any] | None
    """Fields of the plan with their new values; None: not to be had."""
    text: str
    """What changes; or why it is not to be had."""


def fallbacks(recipe: Recipe, plan: Plan, phase: Phase | None, fits: Callable[[Changes], bool]) -> tuple[Fallback, ...]:
    """What helps in this part of an attempt, the mildest first.

    Args:
        recipe: What it gives is kept.
        plan: The plan that ran out.
        phase: Where; None is taken for a step.
        fits: Whether the plan with these changes may be enough; the smallest micro batch is tried in any case.
    """
    return tuple(_fallback(lever, recipe, plan, fits) for lever in LEVERS if (phase or "step") in lever.fallback)


def _fallback(lever: Lever, recipe: Recipe, plan: Plan, fits: Callable[[Changes], bool]) -> Fallback:
    if refusal := lever.refusal(recipe, plan):
        return Fallback(lever.name, None, refusal)
    options = [_with_eval_batch(plan, changes) for changes in lever.apply(recipe, plan)]
    changes = next((one for one in options if fits(one)), options[-1])
    return Fallback(lever.name, changes, lever.done.format(now=plan, **changes))


def _with_eval_batch(plan: Plan, changes: Changes) -> Changes:
    """The eval batch falls with the micro batch: it is twice as large by default."""
    size = changes.get("micro_batch_size")
    if size is None:
        return changes
    return {**changes, "eval_batch_size": max(1, plan.eval_batch_size * size // plan.micro_batch_size)}


def freed(before: MemoryNeed | None, after: MemoryNeed | None) -> str:
    """`frees about 1.2 GiB (activations 1.0 GiB, logits 0.2 GiB)`; empty when the arithmetic does not say."""
    if before is None or after is None:
        return ""
    parts = {kind: size - after.kinds.get(kind, 0) for kind, size in before.kinds.items()}
    named = [
        f"{kind} {format_bytes(size)}" for kind, size in sorted(parts.items(), key=lambda p: -p[1]) if size >= 2**19
    ]
    less = before.phases["step"] - after.phases["step"]
    return f"frees about {format_bytes(less)} of a step ({', '.join(named)})" if less >= 2**19 and named else ""
