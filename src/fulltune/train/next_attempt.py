"""What to try after an attempt that failed: a pure function."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fulltune.records import Outcome, Plan

MOST_KILLS = 4


@dataclass(frozen=True)
class Change:
    """The next attempt: its plan, whether it continues from the last whole checkpoint, and why."""

    plan: Plan
    resume: bool
    reason: str = ""


def next_attempt(plan: Plan, history: Sequence[Outcome]) -> Change | None:
    """Choose the remedy for the last outcome, or None when there is none.

    Out of memory: half the micro batch (or its next smaller divisor) with the same global batch, down to 1, then
    activation checkpointing; the result stays the same. Killed without a word: tried once as it was, then treated as
    memory, which it most often is.

    Args:
        plan: The plan of the last attempt.
        history: Outcomes of this command's attempts, oldest first.
    """
    last = history[-1]
    if last.status not in ("out_of_memory", "killed"):
        return None
    kills = sum(outcome.status == "killed" for outcome in history)
    if last.status == "killed" and kills == 1:
        return Change(plan, resume=True, reason="the process was killed; going on from the last whole checkpoint")
    if kills > MOST_KILLS:
        return None
    micro = plan.micro_batch_size
    if micro > 1:
        parts = next(number for number in range(2, micro + 1) if micro % number == 0)
        smaller = plan.model_copy(
            update={
                "micro_batch_size": micro // parts,
                "gradient_accumulation_steps": plan.gradient_accumulation_steps * parts,
                "eval_batch_size": max(1, plan.eval_batch_size // parts),
            }
        )
        return Change(smaller, True, f"memory ran out; micro batch {micro // parts}, the same global batch")
    if not plan.activation_checkpointing:
        recompute = plan.model_copy(update={"activation_checkpointing": True})
        return Change(recompute, True, "memory ran out; activation checkpointing on")
    return None
