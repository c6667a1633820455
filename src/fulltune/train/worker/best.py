"""Which weights are kept: transformers chose the step, here its checkpoint is put back into the model.

transformers compares `metric_for_best_model` at each evaluation (`Trainer._determine_best_metric`) and keeps
`best_global_step` and `best_metric` in the Trainer's state. Its own `load_best_model_at_end` is off: it takes a
checkpoint without looking whether it is whole.
"""

from __future__ import annotations

from typing import Any

from fulltune.train import checkpoints
from fulltune.train.worker.context import AttemptContext


def keep_best(attempt: AttemptContext, state: Any) -> tuple[int | None, float | None]:
    """Put the best weights into the model, when they are not the last ones; returns their step and metric."""
    best, best_metric = state.best_global_step, state.best_metric
    if not attempt.recipe.train.load_best_model_at_end:
        return None, None
    if best is None or best == state.global_step:
        return best, best_metric
    folder = attempt.request.checkpoints / f"checkpoint-{best}"
    problem = checkpoints.flaw(folder)
    if problem is not None:
        warning = f"the best weights (step {best}) are lost ({problem}); the last ones are kept"
        attempt.journal.write("best weights lost", warning)
        attempt.recorder.warn(warning)
        return None, None
    trainer: Any = attempt.trainer
    if trainer.is_deepspeed_enabled:
        from transformers.integrations.deepspeed import deepspeed_load_checkpoint

        deepspeed_load_checkpoint(trainer.model_wrapped, str(folder))
    else:
        checkpoints.load_weights(trainer.model, folder, trainer.trained_only)
    return best, best_metric
