"""Which weights are kept: transformers chose the step, here its checkpoint is put back into the model.

transformers compares `metric_for_best_model` at each evaluation (`Trainer._determine_best_metric`) and keeps
`best_global_step` and `best_metric` in the Trainer's state. Its own `load_best_model_at_end` is off: it takes a
checkpoint without looking whether it is whole.

The best of several evaluations is the best by luck, too, and the rate has not fallen to 0 yet where it stands in the
middle of a run. So the last weights of a whole run are kept unless the eval rows tell that they are worse: by more than
two standard errors of the best metric, where that is a share of rows (docs/quality.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fulltune.stats.row_scores import measure_of
from fulltune.text import counted
from fulltune.train import checkpoints
from fulltune.train.loop.guards import error_of_share
from fulltune.train.worker.context import AttemptContext

ERRORS = 2.0
"""Standard errors that the best metric must be ahead by."""


@dataclass(frozen=True)
class Kept:
    """Which weights the model has at the end."""

    step: int | None = None
    metric: float | None = None
    why: str = ""
    """Why they are not those of the best evaluation."""


def keep_best(attempt: AttemptContext, state: Any) -> Kept:
    """Put the best weights into the model, unless the last ones are as good."""
    best, best_metric = state.best_global_step, state.best_metric
    if not attempt.recipe.train.load_best_model_at_end:
        return Kept()
    if best is None or best == state.global_step:
        return Kept(best, best_metric)
    if as_good := _last(attempt, state):
        return as_good
    folder = attempt.request.checkpoints / f"checkpoint-{best}"
    problem = checkpoints.flaw(folder)
    if problem is not None:
        warning = f"the best weights (step {best}) are lost ({problem}); the last ones are kept"
        attempt.journal.write("best weights lost", warning)
        attempt.recorder.warn(warning)
        return Kept()
    trainer: Any = attempt.trainer
    if trainer.is_deepspeed_enabled:
        from transformers.integrations.deepspeed import deepspeed_load_checkpoint

        deepspeed_load_checkpoint(trainer.model_wrapped, str(folder))
    else:
        checkpoints.load_weights(trainer.model, folder, trainer.trained_only)
    return Kept(best, best_metric)


def _last(attempt: AttemptContext, state: Any) -> Kept | None:
    """The last weights, when they are as good as the best ones for all that the eval rows can tell."""
    metric, rows = attempt.plan.metric, attempt.summary.splits["eval"].rows
    bounds = measure_of(attempt.recipe.task, attempt.target, metric).bounds
    evaluated = [(entry["step"], entry[f"eval_{metric}"]) for entry in state.log_history if f"eval_{metric}" in entry]
    if bounds != (0.0, 1.0) or state.global_step < attempt.plan.total_steps or evaluated[-1][0] != state.global_step:
        return None
    last, errors = evaluated[-1][1], ERRORS * error_of_share(state.best_metric, rows)
    if last < state.best_metric - errors:
        return None
    why = (
        f"the best {metric} was {state.best_metric:.1%} at step {state.best_global_step:,}, where the rate had not "
        f"fallen to 0: {counted(rows, 'eval row')} tell no difference below {errors:.1%}"
    )
    return Kept(state.global_step, last, why)
