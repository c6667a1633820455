"""What an attempt does, from the pretrained weights to the saved model; `main` runs it and names its outcome."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import TrainerState

from fulltune import methods
from fulltune.errors import Diverged, GuardStop, InterruptedRun, SetupError
from fulltune.inference.run import Share
from fulltune.recipe.training import NVME
from fulltune.records.data import DataSummary
from fulltune.records.events import Forecast, Listener
from fulltune.records.training import Check
from fulltune.stats.curves import ended_high, ended_worse
from fulltune.train import checkpoints
from fulltune.train.hooks import Hooks
from fulltune.train.journal import Journal
from fulltune.train.loop.callbacks import Recorder, StopWhenAsked, logged
from fulltune.train.loop.guards import nothing_learned, too_short
from fulltune.train.loop.step_guard import StepMemory
from fulltune.train.request import Request
from fulltune.train.run_time import CHECKS
from fulltune.train.worker import distributed, weights
from fulltune.train.worker.best import keep_best
from fulltune.train.worker.checks import before_training, dry_run_in_engine, refuse_failed
from fulltune.train.worker.context import AttemptContext
from fulltune.train.worker.dry_run import dry_run
from fulltune.train.worker.loading import make_trainer
from fulltune.train.worker.observed import Observed
from fulltune.train.worker.within_budget import keep_within


def train(
    request: Request,
    hooks: Hooks,
    journal: Journal,
    stop: StopWhenAsked,
    listener: Listener | None,
    observed: Observed,
) -> dict[str, Any]:
    """Load, check, train, keep the best weights, save; returns the outcome's fields, in the first process alone."""
    events = request.folder / "metrics.jsonl" if journal.path is not None else None
    recorder = Recorder(events, request.plan.total_steps, listener)
    summary = DataSummary.of_run(Path(request.run_folder))
    attempt = AttemptContext(request, hooks, journal, recorder, stop, observed, summary)
    rows, eval_rows = make_trainer(attempt)
    # bf16 weights compute in bf16 without autocast, and then LoRA's layers need their own casts.
    autocast = request.plan.precision != "fp32" and request.plan.weights_dtype == "fp32"
    with methods.without_casts(attempt.applied, autocast):
        _check(attempt, rows, eval_rows)
        if not request.probe:
            return _trained(attempt)
    speed = observed.forecast.tokens_per_second if observed.forecast else 0.0
    return {"reason": "probed", "checks": tuple(attempt.checks), "tokens_per_second": speed}


def _trained(attempt: AttemptContext) -> dict[str, Any]:
    """Train after the checks, keep the best weights, save."""
    request, recorder, journal, sharing = attempt.request, attempt.recorder, attempt.journal, attempt.sharing
    if request.plan.offload.startswith(NVME):
        said = "DeepSpeed cannot read back an optimizer that lies on a disk: a run that is stopped is lost"
        recorder.warn(f"train.offload: {said}")
    initial = None
    journal.at("saving")
    if attempt.is_main or sharing is not None:
        initial = weights.InitialWeights(attempt.trainer.model, attempt.initial_weights, sharing is not None)
    state, optimizer = _fit(attempt)
    journal.at_rest()
    observed = attempt.observed
    if request.plan.num_processes > 1 and observed.meter is not None:
        observed.growth_of_processes = distributed.gathered(observed.meter.growth_bytes())
    _judge_end(attempt, state)
    journal.at("saving")
    if initial is None:  # the first process saves and reports
        return {}
    trainer = attempt.trainer
    moved = initial.moved(trainer.model, optimizer, trainer.tensors_with_gradient)
    decision = nothing_learned(moved, bool(trainer.tensors_with_gradient), trainer.largest_grad_norm)
    if decision.action == "stop":
        raise GuardStop(decision.reason)
    kept = keep_best(attempt, state)
    preserved = keep_within(attempt)
    recorder.phase("saving the model")
    if attempt.scaled is not None:
        attempt.scaled.fold(trainer.model)
    weights.save_model(
        *(attempt.applied, trainer.processing_class, request.model_folder, request.recipe),
        *(attempt.summary, attempt.is_main),
    )
    if not attempt.is_main:
        return {}
    attempt.observed.disk(request.checkpoints, *request.all_initial_weights, request.model_folder)
    return {
        "reason": "early stopping" if state.global_step < attempt.plan.total_steps else "all steps done",
        "steps": state.global_step,
        "best_step": kept.step or state.global_step,
        "best_metric": kept.metric if preserved is None else preserved.chosen.metric,
        "kept_because": kept.why if preserved is None else preserved.why,
        "tokens_by_source": trainer.sampler.tokens_by_source(state.global_step) if attempt.summary.mixed else (),
        "moved": moved,
        "checks": tuple(attempt.checks),
        "tokens_per_second": round(recorder.tokens_per_second, 1),
        "model_folder": str(request.model_folder.relative_to(request.run_folder)),
    }


def _check(attempt: AttemptContext, rows: Any, eval_rows: Any) -> None:
    """Run the checks before step 1 and the dry run, with DeepSpeed inside its engine; refuse when one failed."""
    trainer = attempt.trainer
    _stop_before_training(attempt)
    attempt.recorder.phase(CHECKS)
    attempt.journal.at("step")
    attempt.checks = before_training(attempt, rows)
    passed = all(check.passed for check in attempt.checks)
    if not attempt.in_deepspeed and passed and attempt.request.dry_run:
        _dry_run(attempt, rows, eval_rows)
    if not attempt.in_deepspeed or not passed:
        refuse_failed(attempt.checks, attempt.recorder)
        return

    def try_engine() -> None:
        attempt.checks.append(dry_run_in_engine(trainer, rows, attempt.plan))
        refuse_failed(attempt.checks, attempt.recorder)

    attempt.at_begin.insert(0, try_engine)


def _dry_run(attempt: AttemptContext, rows: Any, eval_rows: Any) -> None:
    request, observed, splits = attempt.request, attempt.observed, attempt.summary.splits

    def evaluate(positions: Sequence[int]) -> object:
        attempt.journal.at("evaluation")
        return attempt.reduced(Share(eval_rows, positions))

    result = dry_run(
        attempt.trainer,
        rows,
        attempt.plan,
        evaluate=evaluate,
        eval_lengths=eval_rows["length"],
        first_step=request.first_step,
        test_share=splits["test"].tokens / splits["eval"].tokens if splits["eval"].tokens else 0.0,
        folder=request.checkpoints if attempt.is_main and not request.probe else None,
    )
    attempt.checks.append(result.check)
    if attempt.plan.num_frozen_parameters:
        unreached = result.without_gradient
        said = f"all but {unreached[0]} ({len(unreached)} such tensors)" if unreached else "all"
        attempt.checks.append(Check(name="trained tensors that the loss reaches", result=said, passed=not unreached))
    observed.dry_run_loss, observed.forecast = result.loss, result.forecast
    if observed.meter is not None:
        observed.dry_run_growth_bytes = observed.meter.growth_bytes()
    if (need := observed.forecast) is not None:
        peak = observed.dry_run_growth_bytes
        if said := too_short(attempt.recipe.train.notice, need.stop_seconds):
            attempt.recorder.warn(said)
        attempt.recorder.write(Forecast(**need.model_dump(), total_seconds=need.total_seconds, peak_memory_bytes=peak))


def _fit(attempt: AttemptContext) -> tuple[Any, Any]:
    """Train, from the checkpoint if there is one; returns the trainer's state and the optimizer."""
    trainer, request = attempt.trainer, attempt.request
    attempt.journal.at("step" if request.checkpoint is None else "resuming")
    if request.checkpoint is not None:
        checkpoint = Path(request.checkpoint)
        _put_back(attempt, checkpoint)
        state = TrainerState.load_from_json(str(checkpoint / checkpoints.STATE))
        if state.global_step >= attempt.plan.total_steps or attempt.early_stopping.is_over(state):
            attempt.journal.write("resume", f"{checkpoint.name} was the last one: nothing is left to train")
            optimizer = weights.load_finished(trainer, checkpoint, attempt.plan.total_steps)
            trainer.state = state
            return state, optimizer
        if attempt.is_main:
            checkpoints.drop_after(request.checkpoints, request.first_step)
        attempt.journal.write("resume", f"from {checkpoint.name}")
    trainer.usual_loss = next(reversed(trainer.seen.losses), attempt.untrained_loss or 0.0)
    _stop_before_training(attempt)
    attempt.at_begin.append(lambda: _stop_before_training(attempt))  # asked while the eval rows were scored
    trainer.train(resume_from_checkpoint=request.checkpoint)  # transformers' loop
    if attempt.stop.asked:
        raise InterruptedRun(f"stopped on request after step {trainer.state.global_step:,}, which is saved")
    return trainer.state, trainer.optimizer


def _stop_before_training(attempt: AttemptContext) -> None:
    """Stop where it was asked for while the model was loaded or checked; several processes agree only after a step."""
    if attempt.stop.asked and attempt.plan.num_processes == 1:
        step = attempt.request.first_step
        raise InterruptedRun(
            f"stopped on request {f'after step {step:,}, which is saved' if step else 'before step 1'}"
        )


def _put_back(attempt: AttemptContext, checkpoint: Path) -> None:
    """Give the trainer what its guards had when the checkpoint was saved."""
    trainer: Any = attempt.trainer
    remembered = checkpoints.guard_state(checkpoint)
    trainer.seen = StepMemory.from_json(remembered)
    if remembered["base_weights"] not in (None, attempt.base_weights) and attempt.base_weights is not None:
        raise SetupError(
            f"model: {attempt.recipe.model.name}: its weights are not those that this run began with; put them "
            "back, or start a new run (--fresh)"
        )
    attempt.drifting.refuse_others(remembered["generic_texts"])
    if trainer.replay is not None:
        trainer.replay.weight = remembered["replay_weight"]
    for name, kept in (("start", checkpoints.START), ("generic_start", checkpoints.GENERIC)):
        if (file := checkpoint / kept).exists():
            setattr(trainer, name, np.load(file, allow_pickle=False))


def _judge_end(attempt: AttemptContext, state: Any) -> None:
    """Stop or warn when the loss ended high, or what is kept is worse than before step 1; not with an own loss."""
    if attempt.hooks.compute_loss is not None:
        return
    losses, eval_losses = logged(state, "loss"), logged(state, "eval_loss")
    decision = ended_high(losses, eval_losses, attempt.highest_rate, attempt.untrained_loss)
    # One that had to go back, and ended above where it began all the same, did not come through.
    if decision.action == "stop" or (decision.action == "warn" and attempt.plan.rollbacks):
        raise Diverged(decision.reason)
    seen = attempt.trainer.seen
    keeps_good = seen.level and attempt.recipe.train.load_best_model_at_end
    # Within a budget for forgetting the untouched model is kept then.
    if seen.behind and not keeps_good and attempt.recipe.preserve.limit is None:
        decision = ended_worse(seen.behind_by, losses, attempt.highest_rate, attempt.untrained_loss)
        if decision.action == "stop":
            raise Diverged(decision.reason)
    if decision.action == "warn":
        attempt.journal.write("warning", decision.reason)
        attempt.recorder.warn(decision.reason)
