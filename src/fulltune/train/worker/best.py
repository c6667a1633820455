from __future__ import annotations

from typing import Any

from transformers import TrainerState

from fulltune import files
from fulltune.stats.curves import CHANCE_STANDARD_ERRORS, standard_error_of_share
from fulltune.text import counted
from fulltune.train.loop.inputs import AttemptInputs
from fulltune.train.loop.trainer import FullTrainer
from fulltune.train.worker.weights import InitialWeights

Fields = dict[str, Any]
SCHEDULES_ENDING_NEAR_ZERO = ("linear", "cosine", "polynomial")


def load_best_weights(
    inputs: AttemptInputs, trainer: FullTrainer, state: TrainerState, start: InitialWeights | None = None
) -> Fields:
    """Load the best checkpoint's weights unless the last are as good; return the choice as fields of `Outcome`. With
    `start`, the weights before step 1 are kept unless later ones are better."""
    if not inputs.recipe.train.load_best_model_at_end:
        return _fields(state.global_step, inputs, state)
    best, chooser = state.best_global_step, str(trainer.args.metric_for_best_model)
    why = None if chooser == inputs.plan.metric else f"the {chooser} on the eval rows was lowest"
    at_start = None if start is None else _metric_at(0, chooser, state)
    if start is not None and at_start is not None and state.best_metric is not None:
        sign = 1 if trainer.args.greater_is_better else -1
        if sign * at_start >= sign * state.best_metric:
            start.restore(trainer.model)
            return _fields(0, inputs, state) | {"weights_reason": why or "no later weights were better"}
    if best is None:
        return {"best_step": state.global_step, "best_metric": None}
    if best == state.global_step:
        return _fields(best, inputs, state) | {"weights_reason": why}
    if why is None and (as_good := _keep_last_if_as_good(inputs, state, at_start)):
        return as_good
    folder = inputs.request.checkpoints / f"checkpoint-{best}"
    problem = trainer.agreed(files.find_damage(folder) if inputs.is_main else None)
    if problem is not None:
        warning = f"the best checkpoint (step {best}) cannot be used ({problem}); the last weights are saved instead"
        inputs.journal.write("best weights lost", warning)
        inputs.recorder.warn(warning)
        return _fields(state.global_step, inputs, state)
    trainer.load_weights(folder)
    return _fields(best, inputs, state) | {"weights_reason": why}


def _fields(step: int, inputs: AttemptInputs, state: TrainerState) -> Fields:
    """Return a step and its metric as fields of `Outcome`."""
    return {"best_step": step, "best_metric": _metric_at(step, inputs.plan.metric, state)}


def _metric_at(step: int, metric: str, state: TrainerState) -> float | None:
    name = f"eval_{metric}"
    return next((entry[name] for entry in reversed(state.log_history) if name in entry and entry["step"] == step), None)


def _keep_last_if_as_good(inputs: AttemptInputs, state: TrainerState, at_least: float | None) -> Fields | None:
    """Return fields of `Outcome` for the last weights if the learning rate decayed to almost 0 and their metric is
    within two standard errors of the best and not below `at_least`, else None."""
    plan, rows = inputs.plan, inputs.summary.splits["eval"].rows
    if plan.metric not in inputs.summary.form.row_shares:
        return None
    name, best = f"eval_{plan.metric}", float(state.best_metric or 0.0)
    step, last = next((entry["step"], entry[name]) for entry in reversed(state.log_history) if name in entry)
    is_complete = step == state.global_step >= plan.total_steps
    errors = CHANCE_STANDARD_ERRORS * standard_error_of_share(best, rows)
    lowest = best - errors if at_least is None else max(at_least, best - errors)
    if not is_complete or plan.lr_scheduler_type not in SCHEDULES_ENDING_NEAR_ZERO or last < lowest:
        return None
    why = (
        f"the best {plan.metric} was {best:.1%} at step {state.best_global_step:,}, but the difference is less than "
        f"two standard errors ({100 * errors:.1f} points with {counted(rows, 'eval row')})"
    )
    return {"best_step": step, "best_metric": last, "weights_reason": why if last < best else None}
