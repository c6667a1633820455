from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from transformers import TrainerState

from fulltune import methods
from fulltune.errors import GuardStop, InterruptedRun, SetupError
from fulltune.models.experts import expert_modules
from fulltune.records.events import Forecast
from fulltune.records.training import Check
from fulltune.train import checkpoints
from fulltune.train.forgetting.generic import DriftMonitor, create_replay
from fulltune.train.forgetting.within_budget import keep_within_budget
from fulltune.train.journal import CHECKS, SCORING
from fulltune.train.loop.callbacks import Checkpoints, Progress, UpdateMeter
from fulltune.train.loop.inputs import AttemptInputs
from fulltune.train.loop.parts import ExpertLoad
from fulltune.train.loop.step_guard import judge_parameter_changes, short_notice_warning
from fulltune.train.loop.trackers import close_trackers, guard_trackers
from fulltune.train.loop.trainer import FullTrainer
from fulltune.train.worker import distributed, loading, streamed, weights
from fulltune.train.worker.answers import AnswerScorer
from fulltune.train.worker.best import Fields, load_best_weights
from fulltune.train.worker.checks import dry_run_in_engine, run_checks, stop_if_check_failed
from fulltune.train.worker.dry_run import dry_run
from fulltune.train.worker.evaluation import Evaluator
from fulltune.train.worker.loading import LoadedModel


@dataclass(frozen=True)
class Training:
    inputs: AttemptInputs
    loaded: LoadedModel
    trainer: FullTrainer
    evaluator: Evaluator
    answers: AnswerScorer | None
    monitor: DriftMonitor
    checkpoints: Checkpoints
    checks: list[Check]


def train_attempt(inputs: AttemptInputs) -> Fields:
    """Load, check and train the model and save its final weights. Returns fields of `Outcome`, or {} on ranks other
    than 0."""
    plan = inputs.plan
    loaded = loading.load_for_training(inputs)
    trainer = loading.make_trainer(inputs, loaded)
    head_is_new = loaded.head is not None and loaded.head.has_new_rows
    target, sample = loaded.objective.target, plan.answers
    training = Training(
        inputs=inputs,
        loaded=loaded,
        trainer=trainer,
        evaluator=Evaluator(inputs, trainer, target, head_is_new),
        answers=None if sample is None else AnswerScorer(inputs, trainer, target, sample),
        monitor=DriftMonitor(inputs, trainer),
        checkpoints=Checkpoints(inputs.request, inputs.journal, inputs.usage),
        checks=[],
    )
    guard_trackers(trainer, inputs.warn)
    trainer.experts = ExpertLoad(inputs, trainer, loaded.applied.model) if expert_modules(trainer.model) else None
    trainer.add_parts(
        [
            Progress(
                trainer,
                trainer.sampler,
                inputs.recorder,
                inputs.journal,
                inputs.usage,
                lambda: _before_first_step(training),
            ),
            *([] if inputs.in_engine or inputs.is_streamed else [UpdateMeter(trainer, inputs.plan, inputs.recorder)]),
            training.evaluator,
            *([] if training.answers is None else [training.answers]),
            training.monitor,
            *create_replay(inputs, training.monitor),
            *([] if trainer.experts is None else [trainer.experts]),
            training.checkpoints,
            inputs.stop,
        ]
    )
    # bf16 weights compute in bf16 without autocast; LoRA's layers then need their own casts.
    autocast = plan.precision != "fp32" and plan.weights_dtype == "fp32"
    with methods.without_lora_input_casts(loaded.applied, autocast):
        _run_checks(training)
        if not inputs.request.probe:
            try:
                return _train_and_save(training)
            finally:
                close_trackers(trainer)
    if forecast := inputs.usage.forecast:
        inputs.usage.tokens_per_second = forecast.tokens_per_second
    return {"reason": "probed", "checks": tuple(training.checks)}


def _before_first_step(training: Training) -> None:
    """Run ZeRO's dry run, which needs the prepared engine, and the evaluation before step 1."""
    inputs, trainer = training.inputs, training.trainer
    trainer.lower_rates()
    if inputs.in_engine:
        training.checks.append(dry_run_in_engine(trainer, training.loaded.rows, inputs.plan))
        stop_if_check_failed(training.checks, inputs.recorder)
    inputs.journal.set_phase("step")
    if trainer.state.global_step == 0 and inputs.plan.eval_on_start:
        inputs.recorder.phase(SCORING)
        trainer.evaluate()
    elif trainer.state.global_step == 0:
        training.monitor.measure_drift()
    _stop_before_training(inputs)  # a signal may have come while the eval rows were scored


def _train_and_save(training: Training) -> Fields:
    """Train, check that parameters changed, and save final weights. Returns fields of `Outcome`, or {} on ranks other
    than 0."""
    inputs, loaded, trainer = training.inputs, training.loaded, training.trainer
    request, recorder, journal, usage = inputs.request, inputs.recorder, inputs.journal, inputs.usage
    plan, is_sharded = inputs.plan, inputs.layout is not None
    initial: weights.InitialWeights | streamed.SampledWeights | None = None
    journal.set_phase("saving")
    if inputs.is_streamed:
        initial = streamed.SampledWeights(trainer.model)
    elif inputs.is_main or is_sharded:
        file = request.initial_weights(trainer.args.process_index)
        initial = weights.InitialWeights(trainer.model, file, is_sharded)
    state, optimizer = _run_trainer(training)
    journal.remove_heartbeat()
    if plan.num_processes > 1 and usage.meter is not None:
        usage.memory_growth_per_process = tuple(distributed.all_gather(usage.growth_bytes()))
    training.evaluator.judge_end(state)
    journal.set_phase("saving")
    if initial is None:  # rank 0 saves and reports
        return {}
    changes = initial.count_changes(trainer.model, optimizer, trainer.tensors_with_gradient)
    decision = judge_parameter_changes(changes, bool(trainer.tensors_with_gradient), trainer.largest_grad_norm)
    if decision.action == "stop":
        raise GuardStop(decision.reason)
    # Vectors that were made to be compared may be the best that few rows can give. A random head is no such start, and
    # an engine's weights are spread over other tensors than the saved ones.
    has_start = loaded.head_start is not None and loaded.head_start.head is not None and not inputs.in_engine
    has_start = (has_start or inputs.task.FACTS.contrasts) and inputs.task.FACTS.reads_texts_apart
    start = initial if has_start and isinstance(initial, weights.InitialWeights) else None
    best = load_best_weights(inputs, trainer, state, start)
    if training.answers is not None and (why := training.answers.reason_for(best["best_step"])):
        best["weights_reason"] = why
    # Unless the weights are sharded, only rank 0 is left: it scores all rows.
    budget = keep_within_budget(inputs, trainer, training.monitor, training.evaluator.metric_of)
    recorder.phase("saving the model")
    if loaded.scaled is not None:
        loaded.scaled.restore_units(trainer.model)
    weights.save_model(
        *(loaded.applied, loaded.tokenizer, request.model_folder, request.recipe),
        *(inputs.summary, inputs.is_main),
    )
    if not inputs.is_main:
        return {}
    state_here = Path(request.run_folder, "state")  # of a streamed run, unless it is on another disk
    usage.update_peak_disk(request.checkpoints, *request.all_initial_weights, request.model_folder, state_here)
    if budget is not None:
        best |= {"best_metric": budget.choice.metric, "weights_reason": budget.weights_reason}
    trainer.log({f"eval_final_{plan.metric}": best["best_metric"]})
    return {
        "reason": "early stopping" if state.global_step < plan.total_steps else "all steps done",
        "steps": state.global_step,
        **best,
        "tokens_by_source": trainer.sampler.tokens_by_source(state.global_step) if inputs.summary.mixed else (),
        "parameter_changes": changes,
        "expert_tokens": trainer.experts.tokens.tolist() if trainer.experts else (),
        "checks": tuple(training.checks),
        "model_folder": str(request.model_folder.relative_to(request.run_folder)),
    }


def _run_checks(training: Training) -> None:
    """Run and record the checks and the dry run; raise `GuardStop` if one fails."""
    inputs, usage, checks = training.inputs, training.inputs.usage, training.checks
    _stop_before_training(inputs)
    inputs.recorder.phase("checking" if inputs.is_streamed else CHECKS)
    inputs.journal.set_phase("step")
    checks += run_checks(inputs, training.loaded, training.trainer)
    passed = all(check.passed for check in checks)
    if passed and inputs.in_engine:
        return  # `_before_first_step` runs the dry run, once the engine exists
    if passed and inputs.request.dry_run and not inputs.is_streamed:  # a step may take hours
        answer = None if training.answers is None else training.answers.answer_batch
        checks += dry_run(inputs, training.trainer, training.evaluator.predict_rows, answer)
        usage.dry_run_growth_bytes = usage.growth_bytes()
        if (forecast := usage.forecast) is not None:
            if warning := short_notice_warning(inputs.recipe.train.notice, forecast.stop_seconds):
                inputs.recorder.warn(warning)
            inputs.recorder.write(Forecast(time=forecast, peak_memory_bytes=usage.dry_run_growth_bytes))
    stop_if_check_failed(checks, inputs.recorder)


def _run_trainer(training: Training) -> tuple[TrainerState, torch.optim.Optimizer]:
    """Train from the start or from the request's checkpoint; return the Trainer's final state and the optimizer."""
    inputs, trainer, request = training.inputs, training.trainer, training.inputs.request
    inputs.journal.set_phase("step" if request.checkpoint is None else "resuming")
    if request.checkpoint is not None:
        checkpoint = Path(request.checkpoint)
        saved = checkpoints.load_guard_state(checkpoint, trainer.guard_state())
        if len({saved["base_weights"], training.loaded.base_digest} - {None}) > 1:
            raise SetupError(
                f"model: {inputs.recipe.model.name}: its weights changed since this run began; restore them, "
                "or start a new run (--fresh)"
            )
        trainer.restore_guard_state(saved)
        state = TrainerState.load_from_json(str(checkpoint / checkpoints.STATE))
        if state.global_step >= inputs.plan.total_steps or training.checkpoints.should_stop_early(state):
            inputs.journal.write("resume", f"{checkpoint.name} was the last one, so nothing is left to train")
            optimizer = weights.load_finished_checkpoint(trainer, checkpoint, inputs.plan.total_steps)
            trainer.state = state
            return state, optimizer
        if inputs.is_main:
            checkpoints.delete_checkpoints_after(request.checkpoints, request.first_step)
        inputs.journal.write("resume", f"from {checkpoint.name}")
    trainer.usual_loss = next(reversed(trainer.guard_history.losses), training.evaluator.untrained_loss or 0.0)
    _stop_before_training(inputs)
    trainer.train(resume_from_checkpoint=request.checkpoint)  # transformers' loop
    if inputs.stop.is_requested:
        raise InterruptedRun(f"stopped on request after step {trainer.state.global_step:,}, which is saved")
    return trainer.state, cast("torch.optim.Optimizer", trainer.optimizer)


def _stop_before_training(inputs: AttemptInputs) -> None:
    """With one process, raise `InterruptedRun` if a stop signal came before training. Several processes agree on
    stopping only after a step."""
    if inputs.stop.is_requested and inputs.plan.num_processes == 1:
        step = inputs.request.first_step
        raise InterruptedRun(
            f"stopped on request {f'after step {step:,}, which is saved' if step else 'before step 1'}"
        )
