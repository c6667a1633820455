from __future__ import annotations

import math
import shutil
import time
from collections.abc import Mapping, Sequence

from fulltune import evaluate
from fulltune.compare.context import EVAL_OUTPUTS, GENERIC, TEST_OUTPUTS, Context
from fulltune.errors import Diverged
from fulltune.evaluate.scoring import compute_outputs, save_outputs
from fulltune.records.comparison import Trial, TrialResult
from fulltune.records.events import only_steps_and_warnings
from fulltune.records.plan import Plan
from fulltune.records.training import Outcome
from fulltune.system import run_folder
from fulltune.tasks import Predictions
from fulltune.train.hooks import Hooks
from fulltune.train.journal import trial_seconds
from fulltune.train.parent import retry


def is_done(context: Context, trial: Trial) -> bool:
    path = context.result_path(trial.name)
    return path.exists() and TrialResult.load(path).trial == trial


def run_trial(context: Context, trial: Trial) -> TrialResult:
    """Load a trial's result, or train the trial and save its result. In a comparison, whole runs also save their model
    and outputs."""
    path = context.result_path(trial.name)
    if is_done(context, trial):
        result = TrialResult.load(path)
    else:
        began = time.monotonic()
        try:
            planned, outcome, result = train_trial(context, trial)
            if trial.searches:
                shutil.rmtree(context.folder / str(outcome.model_folder), ignore_errors=True)
            elif context.scores_runs:
                result = result.model_copy(
                    update={"seconds_per_row": save_run_outputs(context, trial, planned, outcome)}
                )
        except Diverged as stop:
            seconds, problems = time.monotonic() - began, tuple(stop.problems)
            result = TrialResult(trial=trial, metric=math.nan, train_seconds=seconds, problems=problems)
            delete_trial_files(context, trial)
        result.save(path)
    for problem in result.problems[:1]:
        context.say(f"{trial.name}: {problem}")
    return result


def train_trial(context: Context, trial: Trial) -> tuple[Plan, Outcome, TrialResult]:
    """Train a trial, and return its plan, outcome and result. Raise `Diverged` if a guard stops it."""
    recipe = context.trial_recipe(trial)
    planned = context.trial_plan(trial, recipe)
    run_folder.save_plan(context.folder, recipe, planned)
    before = Plan.load(context.folder / planned.file)
    with context.log_duration(trial.name):
        listener, dry_run = only_steps_and_warnings(context.job.listener), trial.method not in context.passed_dry_run
        # No rollbacks: a comparison wants to know which rates are too high for a method.
        planned_trial = retry.PlannedTrial(recipe, planned, context.folder, Hooks(), listener)
        outcome = retry.train_in_attempts(planned_trial, context.start, dry_run, max_rollbacks=0)
    planned = Plan.load(context.folder / planned.file)  # changed if memory ran out
    if planned == before:
        context.passed_dry_run.add(trial.method)
    setup, summary = context.method_setup(trial.method), context.summary
    # Rows and tokens of all steps without padding: each step takes a global batch of rows of mean length.
    rows = outcome.steps * min(setup.plan.global_batch_size, summary.rows_per_epoch)
    tokens = round(rows * summary.tokens_per_epoch / max(1, summary.rows_per_epoch))
    # A prompt's virtual tokens are prepended to each text and cost as much as others.
    virtual = rows * setup.method.num_virtual_tokens if setup.method.kind == "prompt" else 0
    saved = (context.folder / str(outcome.model_folder)).glob("*.safetensors")
    result = TrialResult(
        trial=trial,
        metric=math.nan if outcome.best_metric is None else outcome.best_metric,
        train_seconds=trial_seconds(context.folder, trial.name),
        tokens_per_second=outcome.tokens_per_second,
        peak_memory_bytes=outcome.peak_memory_bytes,
        memory_growth_bytes=outcome.memory_growth_bytes,
        num_trainable=planned.num_trainable_parameters,
        tokens=tokens,
        train_flops=setup.traced.train_flops_per_token * (tokens + virtual),
        saved_bytes=sum(path.stat().st_size for path in saved),
    )
    return planned, outcome, result


def save_run_outputs(context: Context, trial: Trial, planned: Plan, outcome: Outcome) -> float:
    """Save a trained model's outputs and temperature, and return the scoring seconds per row."""
    model_folder = context.folder / str(outcome.model_folder)
    with context.log_duration(f"{trial.name}: rows"):
        scoring = evaluate.make_scoring(
            context.trial_recipe(trial), planned, context.summary, context.folder, context.job.base
        )
        predictions, seconds_per_row = compute_outputs(scoring, model_folder, context.texts[0], context.most_tokens)
        save_outputs_by_split(context, trial.name, predictions)
        evaluate.fit_and_save_temperature(scoring, model_folder, predictions["eval"])
    return seconds_per_row


def save_outputs_by_split(context: Context, name: str, predictions: Mapping[str, Predictions]) -> None:
    """Save a model's outputs as one file `NAME.npz` per split."""
    for part, subfolder in (("eval", EVAL_OUTPUTS), ("test", TEST_OUTPUTS), ("generic", GENERIC)):
        if part in predictions:
            save_outputs(context.folder / subfolder / f"{name}.npz", predictions[part])


def delete_trial_files(context: Context, trial: Trial) -> None:
    """Delete a trial's model, checkpoints and initial weights."""
    for folder in ("models", "checkpoints"):
        shutil.rmtree(context.folder / folder / trial.name, ignore_errors=True)
    for initial in (context.folder / "attempts").glob(f"{trial.name}-*/initial*.safetensors"):
        initial.unlink()


def best_seed(context: Context, results: Sequence[TrialResult]) -> TrialResult:
    return max(results, key=lambda result: (context.resamplable_metric.sign * result.metric, -result.trial.seed))


def keep_best_model(context: Context, results: Sequence[TrialResult]) -> None:
    """Move the model of a method's best seed to `models/<method>`, and delete the other seeds' models."""
    best = best_seed(context, results).trial
    models = context.folder / "models"
    if (models / best.name).exists():
        shutil.rmtree(models / best.method, ignore_errors=True)
        (models / best.name).rename(models / best.method)
    for result in results:
        shutil.rmtree(models / result.trial.name, ignore_errors=True)
