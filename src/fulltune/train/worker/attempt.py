"""What an attempt does, from the pretrained weights to the saved model; `worker` runs it and names its outcome."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.integrations.integration_utils import TensorBoardCallback

from fulltune import methods
from fulltune.errors import Diverged, GuardStop, InterruptedRun
from fulltune.inference.run import Share, logits_of, model_batch, run_rows
from fulltune.inference.store import load_split
from fulltune.models import dropout
from fulltune.models.checkpoint_head import Head
from fulltune.models.processors import opened
from fulltune.recipe.fields import Recipe
from fulltune.records.data import DataSummary
from fulltune.records.plan import Plan, TimeNeed
from fulltune.records.training import Check, Outcome
from fulltune.system import deepspeed
from fulltune.tasks import LossSettings, Target, Task, task_named
from fulltune.tasks.settings import class_weights
from fulltune.train import checkpoints
from fulltune.train.hooks import Hooks
from fulltune.train.journal import Journal
from fulltune.train.loop.arguments import training_arguments
from fulltune.train.loop.callbacks import (
    AtBegin,
    Phases,
    Recorder,
    Schedule,
    Seals,
    StaysTogether,
    StopWhenAsked,
    logged,
)
from fulltune.train.loop.guards import ended_high, nothing_learned, stopped_improving
from fulltune.train.loop.trainer import FullTrainer
from fulltune.train.request import Request
from fulltune.train.run_time import CHECKS
from fulltune.train.worker import distributed, extensions, weights
from fulltune.train.worker.checks import before_training, dry_run_in_engine, refuse_failed
from fulltune.train.worker.dry_run import dry_run
from fulltune.train.worker.forecast import num_evaluations, scoring
from fulltune.train.worker.loading import load_for_training
from fulltune.train.worker.observed import Seen

Event = dict[str, Any]


@dataclass
class Attempt:
    """What the parts of an attempt share."""

    request: Request
    hooks: Hooks
    journal: Journal
    recorder: Recorder
    stop: StopWhenAsked
    seen: Seen
    task: Task
    summary: DataSummary
    sharing: deepspeed.Zero | None
    """What DeepSpeed shares out; None without it."""
    trainer: FullTrainer = field(init=False)
    applied: methods.Applied = field(init=False)
    head: Head | None = None
    """What became of the head, for tasks that may need a new one."""
    checks: list[Check] = field(default_factory=list)

    @property
    def plan(self) -> Plan:
        return self.request.plan

    @property
    def recipe(self) -> Recipe:
        return self.request.recipe_as_planned

    @property
    def is_main(self) -> bool:
        """Whether this is the first process, which writes."""
        return self.journal.path is not None


def train(
    request: Request,
    hooks: Hooks,
    journal: Journal,
    stop: StopWhenAsked,
    listener: Callable[[Event], None] | None,
    seen: Seen,
) -> Outcome:
    """Load, check, train, keep the best weights, save; a probe ends after the checks.

    What is measured on the way is put into `seen`.

    Raises:
        GuardStop: A check or a guard said no.
        InterruptedRun: It was asked to stop; the step it stopped at is saved.
    """
    is_main = journal.path is not None
    recorder = Recorder(request.folder / "metrics.jsonl" if is_main else None, request.plan.total_steps, listener)
    summary = DataSummary.load(Path(request.run_folder) / "data" / "summary.json")
    sharing = deepspeed.zero_of(request.recipe)
    attempt = Attempt(request, hooks, journal, recorder, stop, seen, task_named(request.recipe.task), summary, sharing)
    rows, eval_rows = _make_trainer(attempt)
    # bf16 weights compute in bf16 without autocast, and then LoRA's layers need their own casts.
    autocast = request.plan.precision != "fp32" and request.plan.weights_dtype == "fp32"
    with methods.without_casts(attempt.applied, autocast):
        _check(attempt, rows, eval_rows)
        return _probed(attempt) if request.probe else _trained(attempt)


def _trained(attempt: Attempt) -> Outcome:
    """Train after the checks, keep the best weights, save."""
    request, recorder, journal, sharing = attempt.request, attempt.recorder, attempt.journal, attempt.sharing
    initial = None
    journal.at("saving")
    if attempt.is_main or sharing is not None:
        initial = weights.InitialWeights(attempt.trainer.model, request.initial_weights if attempt.is_main else None)
    state, optimizer = _fit(attempt)
    _judge_end(attempt, state)
    journal.at("saving")
    if initial is None:  # the first process saves and reports
        return _nothing_to_report(attempt)
    trainer = attempt.trainer
    moved = initial.moved(trainer.model, optimizer, trainer.tensors_with_gradient)
    if sharing is not None:
        moved = distributed.from_first(moved)
    assert moved is not None, "the first process compares"
    verdict = nothing_learned(moved, bool(trainer.tensors_with_gradient), trainer.largest_grad_norm)
    if verdict.action == "stop":
        raise GuardStop(verdict.reason)
    best, best_metric = _keep_best(attempt, state)
    recorder.phase("saving the model")
    whole_state = weights.whole_state(attempt.trainer)
    if not attempt.is_main:
        return _nothing_to_report(attempt)
    weights.save_model(attempt.applied, attempt.trainer.processing_class, request, attempt.summary, whole_state)
    attempt.seen.disk(request.checkpoints, request.initial_weights, request.model_folder)
    return Outcome(
        status="done",
        reason="early stopping" if state.global_step < attempt.plan.total_steps else "all steps done",
        trial=attempt.plan.trial,
        attempt=request.attempt,
        steps=state.global_step,
        best_step=best or state.global_step,
        best_metric=best_metric,
        moved=moved,
        checks=tuple(attempt.checks),
        tokens_per_second=round(recorder.tokens_per_second, 1),
        model_folder=str(request.model_folder.relative_to(request.run_folder)),
    )


def _nothing_to_report(attempt: Attempt) -> Outcome:
    return Outcome(status="done", reason="", trial=attempt.plan.trial, attempt=attempt.request.attempt)


def _probed(attempt: Attempt) -> Outcome:
    forecast = attempt.seen.forecast
    return Outcome(
        status="done",
        reason="probed",
        trial=attempt.plan.trial,
        attempt=attempt.request.attempt,
        checks=tuple(attempt.checks),
        tokens_per_second=forecast.tokens_per_second if forecast else 0.0,
    )


def _make_trainer(attempt: Attempt) -> tuple[Any, Any]:
    """Load the model and the rows, and put the trainer together; returns the train and the eval rows."""
    plan, recipe, task = attempt.plan, attempt.recipe, attempt.task
    attempt.recorder.phase("loading the model")
    transformers.logging.disable_progress_bar()
    if attempt.sharing is not None and attempt.is_main:
        build = extensions.build
        build(plan.device == "cpu", attempt.sharing.offload_optimizer, attempt.recorder.phase, attempt.journal.write)
    # Before the model: with DeepSpeed's stage 3 its weights are shared out while they are read.
    arguments = training_arguments(recipe, plan, attempt.request.checkpoints)
    if attempt.sharing is not None:
        distributed.start_deepspeed(arguments)
    transformers.set_seed(plan.seed)
    target = Target.of(attempt.summary)
    begin = partial(attempt.seen.measure, plan.device, target.problem_type)
    attempt.applied, tokenizer = load_for_training(recipe, task, target, begin, partial(setattr, attempt, "head"))
    model = attempt.applied.model
    if plan.device == "cpu":
        dropout.install(model)
    data_folder = Path(attempt.request.run_folder) / "data"
    rows, eval_rows = (opened(load_split(data_folder / split), tokenizer) for split in ("train", "eval"))
    settings = LossSettings(recipe.train.label_smoothing_factor, class_weights(recipe, attempt.summary))

    def collate(features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return model_batch(model, task, features, tokenizer.pad_token_id)

    def compute_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        summed = task.loss(logits_of(outputs), labels, target, settings)
        return summed / (num_items_in_batch if num_items_in_batch is not None else 1)

    train, journal = recipe.train, attempt.journal
    attempt.trainer = FullTrainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        eval_dataset=eval_rows,
        data_collator=collate,
        processing_class=tokenizer,
        compute_loss_func=attempt.hooks.compute_loss or compute_loss,
        lengths=rows["length"],
        global_batch_size=plan.global_batch_size,
        group_by_length=plan.group_by_length,
        plan=plan,
        score=lambda: _score(attempt, eval_rows),
        count_items=task.count_items,
        trained_only=recipe.method.kind != "full",
        callbacks=[
            attempt.recorder,
            # A loss of the user's own may rise for good reasons.
            *([StaysTogether(lambda: attempt.seen.dry_run_loss)] if attempt.hooks.compute_loss is None else []),
            Schedule(
                plan.metric,
                plan.greater_is_better,
                train.early_stopping_patience,
                train.early_stopping_threshold,
                lambda reason: journal.write("early stop", reason),
            ),
            Seals(
                attempt.request.checkpoints,
                train.save_total_limit,
                lambda: attempt.seen.disk(attempt.request.checkpoints, attempt.request.initial_weights),
            ),
            attempt.stop,
            Phases(journal.at),
        ],
    )
    attempt.trainer.remove_callback(transformers.PrinterCallback)
    _keep_tensorboard(attempt)
    attempt.recorder.tokens = lambda: float(attempt.trainer.tokens_seen)
    return rows, eval_rows


def _keep_tensorboard(attempt: Attempt) -> None:
    """Have TensorBoard's files beside the checkpoints' folder, which is deleted; TENSORBOARD_LOGGING_DIR goes first."""
    for callback in attempt.trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = str(attempt.request.tensorboard)


def _score(attempt: Attempt, rows: Any) -> Mapping[str, float]:
    """The eval metrics of the current weights; several processes share the rows."""
    trainer, plan, target = attempt.trainer, attempt.plan, Target.of(attempt.summary)
    several, mine, count = trainer.args.world_size > 1, rows, len(rows)
    if several:
        rank, processes = trainer.args.process_index, trainer.args.world_size
        mine, count = distributed.my_share(rows, plan.eval_batch_size, rank, processes)
    kept = _reduced(attempt, mine)
    return attempt.task.metrics(distributed.put_together(kept, mine, count) if several else kept, target)


def _reduced(attempt: Attempt, rows: Any) -> Any:
    """These rows through the current model, a few numbers each."""
    trainer, plan = attempt.trainer, attempt.plan
    tokenizer: Any = trainer.processing_class
    # Weights that are shared out are put together by DeepSpeed's engine.
    model: Any = trainer.model_wrapped if trainer.is_deepspeed_enabled else trainer.model
    with attempt.journal.during("evaluation"):
        return run_rows(
            model,
            rows,
            attempt.task,
            Target.of(attempt.summary),
            tokenizer.pad_token_id,
            batch_size=plan.eval_batch_size,
            precision=plan.precision,
            head=trainer.head,
        )


def _check(attempt: Attempt, rows: Any, eval_rows: Any) -> None:
    """Run the checks before step 1 and the dry run, with DeepSpeed inside its engine; refuse when one failed."""
    trainer, plan, summary = attempt.trainer, attempt.plan, attempt.summary
    attempt.recorder.phase(CHECKS)
    attempt.journal.at("step")
    attempt.checks = before_training(
        trainer,
        trainer.processing_class,
        rows,
        summary,
        attempt.task,
        Target.of(summary),
        plan,
        own_loss=attempt.hooks.compute_loss is not None,
        pieces_asked=attempt.recipe.train.chunked_loss is True,
        head=attempt.head,
    )
    passed = all(check.passed for check in attempt.checks)
    if attempt.sharing is None and passed and attempt.request.dry_run:
        _dry_run(attempt, rows, eval_rows)
    if attempt.sharing is None or not passed:
        refuse_failed(attempt.checks, attempt.recorder)
        return

    def try_engine() -> None:
        attempt.checks.append(dry_run_in_engine(trainer, rows, plan))
        refuse_failed(attempt.checks, attempt.recorder)

    trainer.add_callback(AtBegin(try_engine))


def _dry_run(attempt: Attempt, rows: Any, eval_rows: Any) -> None:
    request, seen = attempt.request, attempt.seen

    def evaluate(positions: Sequence[int]) -> object:
        attempt.journal.at("evaluation")
        return _reduced(attempt, Share(eval_rows, positions))

    found = dry_run(
        attempt.trainer,
        rows,
        attempt.plan,
        evaluate=evaluate,
        eval_lengths=eval_rows["length"],
        first_step=0 if request.checkpoint is None else checkpoints.step_of(Path(request.checkpoint)),
        folder=request.checkpoints if attempt.is_main and not request.probe else None,
    )
    attempt.checks.append(found.check)
    if attempt.plan.num_frozen_parameters:
        unreached = found.without_gradient
        attempt.checks.append(
            Check(
                name="trained tensors that the loss reaches",
                result=f"all but {unreached[0]} ({len(unreached)} such tensors)" if unreached else "all",
                passed=not unreached,
            )
        )
    seen.dry_run_loss, seen.forecast = found.loss, _with_scoring(attempt, found.forecast)
    if seen.meter is not None:
        seen.dry_run_growth_bytes = seen.meter.growth_bytes()
    if seen.forecast is not None:
        peak = {"peak_memory_bytes": seen.dry_run_growth_bytes}
        total = {"total_seconds": seen.forecast.total_seconds}
        attempt.recorder.write({"kind": "forecast", **seen.forecast.model_dump(), **total, **peak})


def _with_scoring(attempt: Attempt, need: TimeNeed | None) -> TimeNeed | None:
    """The forecast with what comes after the training and runs at the speed of its evaluations."""
    if need is None:
        return None
    plan, splits = attempt.plan, attempt.summary.splits
    checkpoint = attempt.request.checkpoint
    done = 0 if checkpoint is None else checkpoints.step_of(Path(checkpoint))
    times = num_evaluations(done, plan.total_steps, plan.eval_steps)
    part = scoring(need, times, splits["eval"].tokens, splits["test"].tokens)
    return need if part is None else need.model_copy(update={"around": (part,)})


def _fit(attempt: Attempt) -> tuple[Any, Any]:
    """Train, from the checkpoint if there is one; returns the trainer's state and the optimizer."""
    trainer, request = attempt.trainer, attempt.request
    checkpoint = None if request.checkpoint is None else Path(request.checkpoint)
    attempt.journal.at("step" if checkpoint is None else "resuming")
    if checkpoint is not None and _is_finished(checkpoint, request):
        attempt.journal.write("resume", f"{checkpoint.name} was the last one: nothing is left to train")
        return weights.load_finished(trainer, checkpoint, attempt.plan.total_steps)
    if checkpoint is not None:
        if attempt.is_main:
            checkpoints.drop_after(request.checkpoints, checkpoints.step_of(checkpoint))
        attempt.journal.write("resume", f"from {checkpoint.name}")
    trainer.train(resume_from_checkpoint=request.checkpoint)
    if attempt.stop.asked:
        raise InterruptedRun(f"stopped on request after step {trainer.state.global_step}, which is saved")
    return trainer.state, trainer.optimizer


def _judge_end(attempt: Attempt, state: Any) -> None:
    """Stop, or say, when the loss ended above where it began; a loss of the user's own may do so for good reasons."""
    if attempt.hooks.compute_loss is not None:
        return
    losses, eval_losses = logged(state, "loss"), logged(state, "eval_loss")
    verdict = ended_high(losses, eval_losses, attempt.plan.learning_rate, attempt.seen.dry_run_loss)
    if verdict.action == "stop":
        raise Diverged(verdict.reason)
    if verdict.action == "warn":
        attempt.journal.write("warning", verdict.reason)
        attempt.recorder.write({"kind": "warning", "text": verdict.reason})


def _keep_best(attempt: Attempt, state: Any) -> tuple[int | None, float | None]:
    """Put the best weights into the model, when they are not the last ones; returns their step and metric."""
    best, best_metric = state.best_global_step, state.best_metric
    if not attempt.recipe.train.load_best_model_at_end:
        return None, None
    if best is None or best == state.global_step:
        return best, best_metric
    folder = attempt.request.checkpoints / f"checkpoint-{best}"
    problem = checkpoints.flaw(folder)
    if problem is None:
        weights.load_best(attempt.trainer, folder)
        return best, best_metric
    warning = f"the best weights (step {best}) are lost ({problem}); the last ones are kept"
    attempt.journal.write("best weights lost", warning)
    attempt.recorder.write({"kind": "warning", "text": warning})
    return None, None


def _is_finished(checkpoint: Path, request: Request) -> bool:
    """True when the run that wrote this checkpoint had no step left, or had stopped early."""
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    plan, train = request.plan, request.recipe.train
    if state["global_step"] >= plan.total_steps:
        return True
    values = [entry[f"eval_{plan.metric}"] for entry in state["log_history"] if f"eval_{plan.metric}" in entry]
    return train.early_stopping_patience is not None and stopped_improving(
        values, plan.greater_is_better, train.early_stopping_patience, train.early_stopping_threshold
    )
