"""One trial of a comparison, through the train stage; what it gives for each row is kept."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Mapping, Sequence

from fulltune import evaluate
from fulltune.compare.context import GENERIC, OPEN, SEALED, Context
from fulltune.errors import Diverged
from fulltune.evaluate.scoring import outputs, save_outputs
from fulltune.records.comparison import Trial, TrialResult
from fulltune.records.events import without_tables
from fulltune.records.plan import Plan
from fulltune.records.training import Outcome
from fulltune.system import run_folder
from fulltune.tasks import Predictions
from fulltune.train.hooks import Hooks
from fulltune.train.journal import run_seconds
from fulltune.train.parent import retry


def is_done(context: Context, trial: Trial) -> bool:
    """Whether this trial, with this rate, has a result."""
    path = context.result_path(trial.name)
    return path.exists() and TrialResult.load(path).trial == trial


def run_trial(context: Context, trial: Trial) -> TrialResult:
    """A trial's result, trained if it is not there; a whole run keeps its model, of a comparison its outputs as well,
    those of test sealed."""
    path = context.result_path(trial.name)
    if is_done(context, trial):
        result = TrialResult.load(path)
    else:
        began = time.monotonic()
        try:
            made, outcome, result = trained(context, trial)
            if trial.searches:
                shutil.rmtree(context.folder / str(outcome.model_folder), ignore_errors=True)
            elif context.scores_runs:
                result = result.model_copy(update={"seconds_per_row": keep_rows(context, trial, made, outcome)})
        except Diverged as stop:
            seconds, problems = time.monotonic() - began, tuple(stop.problems)
            result = TrialResult(trial=trial, metric=math.nan, train_seconds=seconds, problems=problems)
            clear(context, trial)
        result.save(path)
    for problem in result.problems[:1]:
        context.say(f"{trial.name}: {problem}")
    return result


def trained(context: Context, trial: Trial) -> tuple[Plan, Outcome, TrialResult]:
    """Train one trial through the train stage, under its guards; raises Diverged."""
    recipe = context.trial_recipe(trial)
    made = context.trial_plan(trial, recipe)
    run_folder.save_plan(context.folder, recipe, made)
    planned = Plan.load(context.folder / made.file)
    with context.timed(trial.name):
        listener, dry_run = without_tables(context.job.listener), trial.method not in context.passed
        # A rate that is too high for a method is what a comparison wants to know.
        planned_trial = retry.PlannedTrial(recipe, made, context.folder, Hooks(), listener)
        outcome = retry.train(planned_trial, context.start, dry_run, most_rollbacks=0)
    made = Plan.load(context.folder / made.file)  # changed when memory ran out
    if made == planned:
        context.passed.add(trial.method)
    setup, summary = context.setup(trial.method), context.summary
    # Rows and tokens of all steps, padding left out: each takes a global batch of rows of the mean length.
    rows = outcome.steps * min(setup.plan.global_batch_size, summary.rows_per_epoch)
    tokens = round(rows * summary.tokens_per_epoch / max(1, summary.rows_per_epoch))
    # A prompt's virtual tokens stand before each text, and cost as much as others.
    virtual = rows * setup.method.num_virtual_tokens if setup.method.kind == "prompt" else 0
    saved = (context.folder / str(outcome.model_folder)).glob("*.safetensors")
    result = TrialResult(
        trial=trial,
        metric=math.nan if outcome.best_metric is None else outcome.best_metric,
        train_seconds=run_seconds(context.folder, trial.name),
        tokens_per_second=outcome.tokens_per_second,
        peak_memory_bytes=outcome.peak_memory_bytes,
        memory_growth_bytes=outcome.memory_growth_bytes,
        num_trainable=made.num_trainable_parameters,
        tokens=tokens,
        train_flops=setup.traced.train_flops_per_token * (tokens + virtual),
        saved_bytes=sum(path.stat().st_size for path in saved),
    )
    return made, outcome, result


def keep_rows(context: Context, trial: Trial, made: Plan, outcome: Outcome) -> float:
    """Run a trained model over its rows and keep what it gives; returns the seconds that a row takes."""
    model_folder = context.folder / str(outcome.model_folder)
    with context.timed(f"{trial.name}: rows"):
        scoring = evaluate.scoring_of(
            context.trial_recipe(trial), made, context.summary, context.folder, context.job.base
        )
        kept, seconds_per_row = outputs(scoring, model_folder, context.texts[0], context.most_tokens)
        keep(context, trial.name, kept)
        evaluate.keep_temperature(scoring, model_folder, kept["eval"])
    return seconds_per_row


def keep(context: Context, name: str, kept: Mapping[str, Predictions]) -> None:
    """Write what a model gave for each row, the test rows' part where only the verdict looks."""
    for part, place in (("eval", OPEN), ("test", SEALED), ("generic", GENERIC)):
        if part in kept:
            save_outputs(context.folder / place / f"{name}.npz", kept[part])


def clear(context: Context, trial: Trial) -> None:
    """Delete weights of a trial that came to nothing."""
    for folder in ("models", "checkpoints"):
        shutil.rmtree(context.folder / folder / trial.name, ignore_errors=True)
    for initial in (context.folder / "attempts").glob(f"{trial.name}-*/initial*.safetensors"):
        initial.unlink()


def best_seed(context: Context, results: Sequence[TrialResult]) -> TrialResult:
    """Of a method's seeds the one with the best eval metric, whose model is kept."""
    return max(results, key=lambda one: (context.measure.sign * one.metric, -one.trial.seed))


def keep_best_model(context: Context, results: Sequence[TrialResult]) -> None:
    """Of a method's seeds the model with the best eval metric becomes `models/<method>`; the others are deleted."""
    best = best_seed(context, results).trial
    models = context.folder / "models"
    if (models / best.name).exists():
        shutil.rmtree(models / best.method, ignore_errors=True)
        (models / best.name).rename(models / best.method)
    for one in results:
        shutil.rmtree(models / one.trial.name, ignore_errors=True)
