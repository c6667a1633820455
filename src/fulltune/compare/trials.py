"""One trial of a comparison, through the train stage; what it gives for each row is kept."""

from __future__ import annotations

import contextlib
import math
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fulltune import evaluate
from fulltune.compare.context import FOLDER, OPEN, SEALED, Line
from fulltune.errors import Diverged
from fulltune.evaluate import outputs
from fulltune.records.comparison import Trial, TrialResult
from fulltune.records.events import AttemptFailed, Listener, Resumed, StepLogged, Warned
from fulltune.records.plan import Plan
from fulltune.records.training import Outcome
from fulltune.train.hooks import Hooks
from fulltune.train.parent.retry import train
from fulltune.train.run_time import run_seconds


def trained(line: Line, trial: Trial) -> tuple[Plan, Outcome, TrialResult]:
    """Train one trial through the train stage, under its guards."""
    recipe = line.trial_recipe(trial)
    made = line.trial_plan(trial, recipe)
    made.save(line.folder / made.file)
    planned = Plan.load(line.folder / made.file)
    with line.clocked(trial.name):
        listener, dry_run = _without_tables(line.job.listener), trial.arm not in line.passed
        outcome = train(recipe, made, line.folder, Hooks(), listener, start=line.start, dry_run=dry_run)
    made = Plan.load(line.folder / made.file)  # changed when memory ran out
    if made == planned:
        line.passed.add(trial.arm)
    else:
        line.keep_smaller(trial.arm, made)
    model_folder = line.folder / str(outcome.model_folder)
    room = line.room(trial.arm)
    rows, tokens = _seen(line, trial, outcome)
    return (
        made,
        outcome,
        TrialResult(
            trial=trial,
            metric=math.nan if outcome.best_metric is None else outcome.best_metric,
            steps=outcome.steps,
            best_step=outcome.best_step or outcome.steps,
            train_seconds=run_seconds(line.folder, trial.name),
            tokens_per_second=outcome.tokens_per_second,
            peak_memory_bytes=outcome.peak_memory_bytes,
            memory_growth_bytes=outcome.memory_growth_bytes,
            num_parameters=made.num_parameters,
            num_trainable=made.num_trainable_parameters,
            tokens=tokens,
            # A prompt's virtual tokens stand before each text, and cost as much as others.
            train_flops=room.traced.train_flops_per_token * (tokens + rows * _virtual_tokens(room.arm)),
            saved_bytes=_weights_bytes(model_folder),
            device=made.device,
            precision=made.precision,
            weights_dtype=made.weights_dtype,
            bf16_rounding=made.bf16_rounding,
            side_by_side=line.side_by_side,
        ),
    )


def failed(line: Line, trial: Trial, seconds: float, problems: Sequence[str]) -> TrialResult:
    """The result of a trial that diverged after so long, kept."""
    made = line.room(trial.arm).plan
    result = TrialResult(
        trial=trial,
        metric=math.nan,
        steps=0,
        best_step=0,
        train_seconds=seconds,
        tokens_per_second=0.0,
        peak_memory_bytes=0,
        memory_growth_bytes=0,
        num_parameters=made.num_parameters,
        num_trainable=made.num_trainable_parameters,
        tokens=0,
        train_flops=0.0,
        saved_bytes=0,
        device=made.device,
        precision=made.precision,
        weights_dtype=made.weights_dtype,
        problems=tuple(problems),
    )
    result.save(line.folder / FOLDER / "trials" / f"{trial.name}.json")
    clear(line, trial)
    return result


def clear(line: Line, trial: Trial) -> None:
    """Delete weights of a trial that came to nothing."""
    for folder in ("models", "checkpoints"):
        shutil.rmtree(line.folder / folder / trial.name, ignore_errors=True)
    for initial in (line.folder / "attempts").glob(f"{trial.name}-*/initial.safetensors"):
        initial.unlink()


def _seen(line: Line, trial: Trial, outcome: Outcome) -> tuple[int, int]:
    """Rows and tokens of all steps, padding left out: each takes a global batch of rows of the mean length."""
    split = line.summary.splits["train"]
    rows = outcome.steps * min(line.room(trial.arm).plan.global_batch_size, split.rows)
    return rows, round(rows * split.tokens / max(1, split.rows))


def _virtual_tokens(method: Any) -> int:
    return method.num_virtual_tokens if method.kind == "prompt" else 0


def _weights_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _without_tables(listener: Listener) -> Listener:
    """Of a trial only what moves: the tables of all trials would hide the comparison."""
    shown = (StepLogged, Warned, Resumed, AttemptFailed)
    return lambda event: listener(event) if isinstance(event, shown) else None


def result_of(line: Line, trial: Trial) -> TrialResult:
    """What was kept of a trial that was settled."""
    return TrialResult.load(line.folder / FOLDER / "trials" / f"{trial.name}.json")


def tried(line: Line, trial: Trial) -> float:
    """The eval metric of a short trial; NaN when it came to nothing. Its model is not kept."""
    path = line.folder / FOLDER / "trials" / f"{trial.name}.json"
    if path.exists():
        known = TrialResult.load(path)
        for problem in known.problems[:1]:
            line.say(f"{trial.name}: {problem}")
        return known.metric
    began = time.monotonic()
    try:
        _, outcome, result = trained(line, trial)
    except Diverged as stop:
        line.say(f"{trial.name}: {stop.problems[0]}")
        return failed(line, trial, time.monotonic() - began, stop.problems).metric
    shutil.rmtree(line.folder / str(outcome.model_folder), ignore_errors=True)
    result.save(path)
    return result.metric


def settle(line: Line, trial: Trial) -> None:
    """Train it, so that the line finds its result; that it diverged is one."""
    if trial.searches:
        tried(line, trial)
        return
    with contextlib.suppress(Diverged):
        final(line, trial)


def is_done(line: Line, trial: Trial) -> bool:
    """Whether this trial, with this rate, has a result."""
    path = line.folder / FOLDER / "trials" / f"{trial.name}.json"
    return path.exists() and TrialResult.load(path).trial == trial


def final(line: Line, trial: Trial) -> TrialResult:
    """A whole run of an arm; what it gives for eval and test rows is kept, the test rows' part sealed.

    Raises:
        Diverged: It did, now or when it was first asked for.
    """
    path = line.folder / FOLDER / "trials" / f"{trial.name}.json"
    if is_done(line, trial):
        known = TrialResult.load(path)
        if known.problems:
            raise Diverged(known.problems)
        return known
    began = time.monotonic()
    try:
        made, outcome, result = trained(line, trial)
    except Diverged as stop:
        failed(line, trial, time.monotonic() - began, stop.problems)
        raise
    with line.clocked(f"{trial.name}: rows"):
        scoring = evaluate.scoring_of(line.trial_recipe(trial), made, line.summary, line.folder, line.job.base)
        given = outputs.outputs(scoring, line.folder / str(outcome.model_folder), line.texts[0], line.most_tokens)
        keep(line, trial.name, given)
        evaluate.keep_temperature(scoring, line.folder / str(outcome.model_folder), given.kept["eval"])
    result = result.model_copy(update={"seconds_per_row": given.seconds_per_row})
    result.save(path)
    return result


def keep(line: Line, name: str, found: outputs.Outputs) -> None:
    for split, place in (("eval", OPEN), ("test", SEALED)):
        if split in found.kept:
            outputs.save(line.folder / place / f"{name}.npz", found.kept[split])
    if found.generic is not None:
        outputs.save(line.folder / "predictions" / "generic" / f"{name}.npz", {"generic": found.generic})


def best_seed(line: Line, results: Sequence[TrialResult]) -> TrialResult:
    """Of an arm's seeds the one with the best eval metric, whose model is kept."""
    greater = line.measure.greater_is_better
    return max(results, key=lambda one: (one.metric if greater else -one.metric, -one.trial.seed))


def keep_best_model(line: Line, results: Sequence[TrialResult]) -> None:
    """Of an arm's seeds the model with the best eval metric becomes `models/<arm>`; the others are deleted."""
    best = best_seed(line, results)
    models, arm = line.folder / "models", best.trial.arm
    mine = models / best.trial.name
    if mine.exists():
        shutil.rmtree(models / arm, ignore_errors=True)
        mine.rename(models / arm)
    for one in results:
        shutil.rmtree(models / one.trial.name, ignore_errors=True)
