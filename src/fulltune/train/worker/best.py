"""Which weights are kept: the last ones where the rate falls to 0, unless they are worse by more than two standard
errors, or those of the best step (docs/quality.md), from a checkpoint that is whole. With a budget for forgetting they
are moved back after that (`train/forgetting/within_budget.py`)."""

from __future__ import annotations

from typing import Any

from fulltune import files
from fulltune.stats.curves import BEYOND_CHANCE, error_of_share
from fulltune.text import counted
from fulltune.train.loop.inputs import AttemptInputs

FALLING = ("linear", "cosine", "polynomial")
"""Schedules that end near 0."""


def keep_best(inputs: AttemptInputs, trainer: Any, state: Any) -> dict[str, Any]:
    """Put the best weights into the model, unless the last ones are as good; returns what an `Outcome` says of them."""
    best, best_metric = state.best_global_step, state.best_metric
    if not inputs.recipe.train.load_best_model_at_end:
        return _at_end(inputs, state)
    if best is None or best == state.global_step:
        return {"best_step": state.global_step, "best_metric": best_metric}
    if as_good := _last(inputs, state):
        return as_good
    folder = inputs.request.checkpoints / f"checkpoint-{best}"
    problem = trainer.agreed(files.flaw(folder) if inputs.is_main else None)
    if problem is not None:
        warning = f"the best weights (step {best}) are lost ({problem}); the last ones are kept"
        inputs.journal.write("best weights lost", warning)
        inputs.recorder.warn(warning)
        return _at_end(inputs, state)
    trainer.load_weights(folder)
    return {"best_step": best, "best_metric": best_metric}


def _at_end(inputs: AttemptInputs, state: Any) -> dict[str, Any]:
    """The last weights, with their metric where the eval rows were scored at the last step."""
    name = f"eval_{inputs.plan.metric}"
    scored = [one[name] for one in state.log_history if name in one and one["step"] == state.global_step]
    return {"best_step": state.global_step, "best_metric": scored[-1] if scored else None}


def _last(inputs: AttemptInputs, state: Any) -> dict[str, Any] | None:
    """The last weights, when they are as good as the best ones for all that the eval rows can tell."""
    plan, rows = inputs.plan, inputs.summary.splits["eval"].rows
    if plan.metric not in inputs.summary.form.row_shares:
        return None
    name = f"eval_{plan.metric}"
    step, last = next((one["step"], one[name]) for one in reversed(state.log_history) if name in one)
    whole = step == state.global_step >= plan.total_steps
    errors = BEYOND_CHANCE * error_of_share(state.best_metric, rows)
    if not whole or plan.lr_scheduler_type not in FALLING or last < state.best_metric - errors:
        return None
    why = (
        f"the best {plan.metric} was {state.best_metric:.1%} at step {state.best_global_step:,}, above by less than "
        f"two standard errors of a share of {counted(rows, 'eval row')} ({100 * errors:.1f} points)"
    )
    return {"best_step": step, "best_metric": last, "weights_reason": why if last < state.best_metric else None}
