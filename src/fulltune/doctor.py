from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fulltune.errors import SetupError
from fulltune.records.plan import Plan
from fulltune.records.training import Outcome
from fulltune.report.format import words
from fulltune.report.run.about_training import collect_curves
from fulltune.report.run.read import after_start, before_start, read_run
from fulltune.stats.curves import (
    MIN_CHANGED_SHARE,
    MIN_EVALUATIONS,
    MIN_FOR_SHAPE,
    Curves,
    Point,
    check_divergence,
    is_flat,
    judge_curves,
    judge_final_loss,
    without_cause,
)
from fulltune.text import counted, format_number, format_share
from fulltune.train.loop.step_guard import learning_rate_factor
from fulltune.train.request import number_in

STATE = "trainer_state.json"
_GREATER_IS_BETTER = (
    *("accuracy", "f1", "mcc", "matthews", "precision", "recall", "auc", "rouge", "bleu", "meteor", "exact_match"),
    *("pearson", "spearman"),
)
Diagnosis = tuple[str, str, str]
"""Name, evidence and advice; the advice may be empty."""


@dataclass(frozen=True)
class Log:
    where: Path
    curves: Curves
    steps: int
    grad_norm: tuple[Point, ...] = ()
    rate: float = 0.0
    plan: Plan | None = None
    outcome: Outcome | None = None
    skipped: tuple[int, ...] = ()


def read_log(source: Path) -> Log:
    """Read the log in a run folder, a Trainer's state or a TensorBoard folder; raise `SetupError` if there is none."""
    if not source.exists():
        raise SetupError(f"{source}: no such file or folder; expected a run folder, {STATE}, or a TensorBoard folder")
    if source.is_dir() and any((source / name).exists() for name in ("attempts", "plan", "data/summary.json")):
        return _read_run_log(source)
    below = [path for path in source.glob(f"*/{STATE}") if path.parent.name.rpartition("-")[2].isdigit()]
    states = [*sorted(below, key=lambda path: number_in(path.parent)), *source.glob(STATE)]
    if states or (source.is_file() and source.suffix == ".json"):
        return _read_trainer_state(states[-1] if states else source)
    if events := sorted(source.rglob("events.out.tfevents.*")):
        return _read_tensorboard(source, events)
    raise SetupError(
        f"{source}: no log in a known format; expected a run folder of fulltune, transformers' {STATE} (in a "
        "checkpoint or a folder of checkpoints), or a folder with TensorBoard events"
    )


def _read_run_log(folder: Path) -> Log:
    """Read the curves, plan and outcome of a fulltune run; raise `SetupError` if no step is logged."""
    view = read_run(folder)
    plan, history = view.plan, view.history
    if plan is None or not (history.train or history.evaluation):
        raise SetupError(
            f"{folder}: this run has no logged step yet; train it, or see why it ended with 'fulltune report {folder}'"
        )
    curves, norms = collect_curves(view, plan), history.train.get("grad_norm", ())
    steps = max((step for step, _ in curves.train_loss), default=0)
    return Log(folder, curves, steps, norms, plan.learning_rate, plan, view.outcome, history.skipped)


def _read_trainer_state(path: Path) -> Log:
    """Read the log history in a `trainer_state.json`, or raise `SetupError`."""
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        series: dict[str, dict[int, float]] = defaultdict(dict)
        for line in state["log_history"]:
            for name, value in line.items():
                if name != "step":
                    series[name][int(line["step"])] = _finite_or_nan(value)
        best_step = state.get("best_global_step")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
        raise SetupError(
            f"{path}: is not the state of a Trainer: expected JSON with 'log_history', a list of entries with a 'step'"
        ) from None
    return _log_from_series(path, series, best_step if isinstance(best_step, int) else None)


def _finite_or_nan(value: Any) -> float:
    """Return a logged value as a float, or NaN if it is huge or not a number."""
    try:
        return float(value) if abs(float(value)) < 1e100 else math.nan
    except (TypeError, ValueError):
        return math.nan


def _read_tensorboard(folder: Path, files: list[Path]) -> Log:
    """Read the newest folder with TensorBoard events, or raise `SetupError`."""
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError:
        raise SetupError(
            f"{folder}: TensorBoard events need the package 'tensorboard'; pip install 'fulltune[tensorboard]'"
        ) from None
    series: dict[str, dict[int, float]] = defaultdict(dict)
    # Each start writes into its own folder; only the newest is read, because steps repeat between starts.
    newest = max(files, key=lambda file: file.stat().st_mtime).parent
    for file in (file for file in files if file.parent == newest):
        read = EventAccumulator(str(file), size_guidance={"scalars": 0})
        read.Reload()
        for tag in read.Tags()["scalars"]:
            name = tag.removeprefix("train/").replace("eval/", "eval_")
            series[name] |= {event.step: float(event.value) for event in read.Scalars(tag)}
    return _log_from_series(newest, series)


def _log_from_series(source: Path, series: Mapping[str, Mapping[int, float]], best_step: int | None = None) -> Log:
    """Build another Trainer's log from values by name and step; raise `SetupError` without a train loss."""
    points = {name: tuple(sorted(values.items())) for name, values in series.items()}
    if "loss" not in points:
        names = ", ".join(sorted(points)[:6]) or "nothing"
        raise SetupError(f"{source}: expected a train loss (a series named 'loss'), found {names}")
    judged = [name for name in points if name.startswith("eval_") and any(part in name for part in _GREATER_IS_BETTER)]
    name, steps = next(iter(judged), "eval_loss"), max(step for values in points.values() for step, _ in values)
    epochs = [value for _, value in points.get("epoch", ()) if math.isfinite(value)]
    curves = Curves(
        train_loss=points["loss"],
        eval_loss=after_start(points.get("eval_loss", ())),
        metric=after_start(points.get(name, ())),
        metric_name=name.removeprefix("eval_"),
        greater_is_better=name in judged,
        eval_rows=0,
        epochs_per_step=epochs[-1] / steps if epochs and steps else 0.0,
        kept_step=best_step,
        before=before_start(points.get(name, ())),
    )
    rates = [value for _, value in points.get("learning_rate", ()) if math.isfinite(value)]
    return Log(source, curves, steps, points.get("grad_norm", ()), max(rates, default=0.0))


def summarise_log(log: Log) -> str:
    """Summarise a log on one line: source, number of steps and evaluations, and metric."""
    curves = log.curves
    evaluations = len(curves.metric or curves.eval_loss)
    by = f", judged by {curves.metric_name} and loss" if curves.metric and curves.metric_name != "loss" else ""
    return f"{log.where}: {counted(log.steps, 'step')}, {counted(evaluations, 'evaluation')}{by}"


def diagnose(log: Log) -> tuple[Diagnosis, ...]:
    """Return one or more diagnoses (name, evidence, advice), the most serious first."""
    # A guard's judgement goes first, because it is based on more than the curves. A diverged loss explains the rest.
    diverged_by_guard = log.outcome is not None and log.outcome.status in ("diverged", "spiked")
    diagnoses = (
        *_diagnose_unfinished_or_failed(log),
        *([] if diverged_by_guard else [*_diagnose_divergence(log)] or [*_diagnose_fit(log)]),
        *_diagnose_bad_steps(log),
    )
    readings, evaluations = len(log.curves.train_loss), len(log.curves.eval_loss)
    unseen = "" if evaluations >= MIN_EVALUATIONS else ", but so few evaluations cannot show overfitting"
    sound = ("sound", f"the curves show no problem{unseen}", "")
    if readings < MIN_FOR_SHAPE:
        sound = ("too little to tell", f"only {counted(readings, 'logged value')} of the train loss", "")
    return diagnoses or (sound,)


def _diagnose_unfinished_or_failed(log: Log) -> Iterator[Diagnosis]:
    if log.plan is None:
        return
    if log.outcome is None:
        evidence = (
            f"{log.steps:,} of {log.plan.total_steps:,} steps and no outcome; the run is in progress or was killed"
        )
        yield "unfinished", evidence, "if the run was killed, run the same command to resume"
    elif (name := words.readable_status(log.outcome.status)) != "done":
        lower = f"try a lower rate: {_advised_rate(log, learning_rate_factor(log.plan.rollbacks) / 10)}"
        advice = {"diverged": lower, "interrupted": "run the same command to resume"}.get(name, "")
        yield name, without_cause(log.outcome.reason), advice


def _diagnose_divergence(log: Log) -> Iterator[Diagnosis]:
    """Yield a diagnosis if a loss or gradient norm is non-finite or the loss diverged."""
    lower = f"try a lower rate: {_advised_rate(log, 1 / 10)}"
    last = log.grad_norm[-MIN_FOR_SHAPE:]
    # Occasional non-finite norms are normal with fp16: its loss scaler skips such updates.
    norms = log.grad_norm if sum(not math.isfinite(value) for _, value in last) * 2 > len(last) else ()
    series = {"train loss": log.curves.train_loss, "gradient norm": norms, "eval loss": log.curves.eval_loss}
    for name, points in series.items():
        if lost := [step for step, value in points if not math.isfinite(value)]:
            evidence = f"the {name} is not finite in {counted(len(lost), 'logged value')}, first at step {lost[0]:,}"
            yield "diverged", evidence, f"inspect the rows of that step, or {lower}"
            return
    losses, evals = log.curves.losses, [value for _, value in log.curves.eval_loss]
    for judged in (check_divergence(losses, log.rate), judge_final_loss(losses, evals, log.rate)):
        if judged.action != "go on":
            yield "diverged", without_cause(judged.reason), lower
            return


def _diagnose_fit(log: Log) -> Iterator[Diagnosis]:
    """Yield a diagnosis if the curves show overfitting, underfitting or a plateau."""
    judged, losses = judge_curves(log.curves), log.curves.losses
    evidence = f"{judged.evidence}. {judged.details}".rstrip(". ")
    if judged.kind == "got worse":
        yield judged.kind, evidence, f"{judged.helps}: {_advised_rate(log, 1 / 10 if judged.turn == 0 else 1 / 3)}"
    elif is_flat(losses):
        stayed = f"the train loss stayed at about {format_number(statistics.median(losses))} from start to end"
        yield "plateau", stayed, f"try a higher rate: {_advised_rate(log, 3)}; check that the labels match the rows"
    elif judged.kind not in ("sound", "not known"):
        calibrate = "'fulltune run' calibrates the probabilities; more eval rows measure the metric more precisely"
        yield judged.kind, evidence, judged.helps or calibrate


def _diagnose_bad_steps(log: Log) -> Iterator[Diagnosis]:
    """Yield diagnoses for skipped steps, rollbacks, and updates that were lost to rounding."""
    rollbacks = log.plan.rollbacks if log.plan else ()
    if log.skipped or rollbacks:
        evidence = f"{counted(len(log.skipped), 'step')} skipped, {counted(len(rollbacks), 'rollback')}"
        yield "bad steps", evidence, "inspect the rows listed in the report's journal"
    changes = log.outcome.parameter_changes if log.outcome else None
    if changes is not None and changes.share < MIN_CHANGED_SHARE:
        evidence = f"only {format_share(changes.share)} of the values that received a gradient changed"
        advice = "set fp32 weights (--set model.weights_dtype=fp32) or --set train.bf16_rounding=stochastic"
        yield "lost updates", evidence, advice


def _advised_rate(log: Log, factor: float) -> str:
    rate = f"{float(f'{factor * log.rate:.2g}'):g}" if log.rate else f"{factor:.2g} times the rate"
    return f"--set method.learning_rate={rate}" if log.plan else rate
