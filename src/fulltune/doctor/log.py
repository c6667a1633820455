"""A training's log as series over its steps: of a run folder, of transformers' `trainer_state.json`, of TensorBoard."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fulltune.errors import SetupError
from fulltune.records.training import Outcome
from fulltune.report.format.plots import Point
from fulltune.report.run.about_forgetting import held_back
from fulltune.report.run.history import after_start, before_start
from fulltune.report.run.read import read_run
from fulltune.text import counted
from fulltune.train.request import number_in

STATE = "trainer_state.json"
_EVENTS = "events.out.tfevents.*"
_EVAL = "eval_"
_GREATER_IS_BETTER = (
    *("accuracy", "f1", "mcc", "matthews", "precision", "recall", "auc", "rouge", "bleu", "meteor", "exact_match"),
    *("pearson", "spearman"),
)
"""Parts of the names of metrics that are known to be better when larger; of others the eval loss judges."""
_TOO_LARGE = 1e100


@dataclass(frozen=True)
class Log:
    """What was written down while training, by series, in order of steps."""

    where: Path
    train_loss: tuple[Point, ...]
    grad_norm: tuple[Point, ...] = ()
    learning_rate: tuple[Point, ...] = ()
    eval_loss: tuple[Point, ...] = ()
    metric: tuple[Point, ...] = ()
    """What the best step was chosen by, as far as it is known."""
    metric_name: str = "loss"
    greater_is_better: bool = False
    steps: int = 0
    """That were done."""
    total_steps: int = 0
    """That were wanted; 0: not known."""
    epochs: float = 0.0
    eval_rows: int = 0
    """0: not known."""
    kept_step: int | None = None
    before: float | None = None
    """The metric before step 1."""
    skipped: tuple[int, ...] = ()
    rollbacks: tuple[int, ...] = ()
    outcome: Outcome | None = None
    """Of a run folder's last attempt."""
    held_back: tuple[str, str] = ("", "")
    """What a budget for forgetting has kept its model from, and what helps."""
    rate: float | None = None
    """Of a run folder, as planned; None: another program's."""


def read_log(place: Path) -> Log:
    """The log at a place.

    Args:
        place: A run folder, a `trainer_state.json`, a folder with one or with checkpoints, or one of TensorBoard's.

    Raises:
        SetupError: There is none, or it is of a form that is not known.
    """
    if not place.exists():
        raise SetupError(f"{place}: no such file or folder; expected a run folder, {STATE}, or TensorBoard's folder")
    if place.is_dir() and any((place / name).exists() for name in ("attempts", "plan", "data/summary.json")):
        return _of_run(place)
    if states := _states_in(place):
        return _of_states(states)
    if place.is_dir() and (events := sorted(place.rglob(_EVENTS))):
        return _of_events(place, events)
    raise SetupError(
        f"{place}: no log that is known; expected a run folder of fulltune, transformers' {STATE} (in a checkpoint's "
        "folder, or one with checkpoints), or a folder with TensorBoard's events"
    )


def _of_run(folder: Path) -> Log:
    view = read_run(folder)
    trial = view.main_trial
    plan, outcome, history = view.plan_of(trial), view.outcome_of(trial), view.history_of(trial)
    if plan is None or not history.has_points:
        raise SetupError(
            f"{folder}: this run has no logged step yet; train it, or see with 'fulltune report {folder}' why it ended"
        )
    rows = view.summary.splits["eval"].rows if view.summary and "eval" in view.summary.splits else 0
    train = history.train.get("loss", ())
    return Log(
        where=folder,
        train_loss=train,
        grad_norm=history.train.get("grad_norm", ()),
        learning_rate=history.train.get("learning_rate", ()),
        eval_loss=after_start(history.evaluation.get("loss", ())),
        metric=after_start(history.evaluation.get(plan.metric, ())),
        before=before_start(history.evaluation.get(plan.metric, ())),
        metric_name=plan.metric,
        greater_is_better=plan.greater_is_better,
        steps=max((step for step, _ in train), default=0),
        total_steps=plan.total_steps,
        epochs=plan.num_train_epochs,
        eval_rows=rows,
        kept_step=outcome.best_step if outcome else None,
        skipped=history.skipped,
        rollbacks=plan.rollbacks,
        outcome=outcome,
        held_back=held_back(view.preserved.get(trial)),
        rate=plan.learning_rate,
    )


def _states_in(place: Path) -> list[Path]:
    """States of a Trainer here, or in checkpoints below, the latest first: a folder's own is written last."""
    if place.is_file():
        return [place] if place.name.endswith(".json") else []
    below = [path for path in place.glob(f"*/{STATE}") if path.parent.name.rpartition("-")[2].isdigit()]
    return [*place.glob(STATE), *sorted(below, key=lambda path: number_in(path.parent), reverse=True)]


def _of_states(paths: Sequence[Path]) -> Log:
    """The latest state that can be read."""
    problems: list[str] = []
    for path in paths:
        try:
            return _of_state(path)
        except SetupError as error:
            problems += error.problems
    raise SetupError(problems[:1])


def _of_state(path: Path) -> Log:
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        series: dict[str, dict[int, float]] = defaultdict(dict)
        for line in state["log_history"]:
            for name, value in line.items():
                if name != "step":
                    series[name][int(line["step"])] = _number(value)
        total, kept = int(state.get("max_steps") or 0), state.get("best_global_step")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
        raise SetupError(
            f"{path}: is not the state of a Trainer: expected JSON with 'log_history', a list of lines with a 'step'"
        ) from None
    return _log(path, series, state.get("best_metric"), kept if isinstance(kept, int) else None, total)


def _number(value: Any) -> float:
    """A logged value; what is no number, such as null, is what became of one that was not finite."""
    try:
        found = float(value)
    except (TypeError, ValueError):
        return math.nan
    return found if abs(found) < _TOO_LARGE else math.nan


def _of_events(folder: Path, files: list[Path]) -> Log:
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError:
        raise SetupError(
            f"{folder}: TensorBoard's events are read by its own package; pip install 'fulltune[tensorboard]'"
        ) from None
    series: dict[str, dict[int, float]] = defaultdict(dict)
    # Each launch writes into a folder of its own: the steps of one are not another's.
    newest = max(files, key=lambda file: file.stat().st_mtime).parent
    for file in (file for file in files if file.parent == newest):
        read = EventAccumulator(str(file), size_guidance={"scalars": 0})
        read.Reload()
        for tag in read.Tags()["scalars"]:
            name = tag.removeprefix("train/").replace("eval/", "eval_")
            series[name] |= {event.step: float(event.value) for event in read.Scalars(tag)}
    return _log(newest, series, None, None, 0)


def _log(where: Path, series: Mapping[str, Mapping[int, float]], best: Any, kept: int | None, total: int) -> Log:
    """Series by transformers' names as a log.

    Args:
        where: It comes from.
        series: Name to step to value.
        best: The best value of the metric that chose a step; None: none did.
        kept: That step.
        total: Steps that were wanted.

    Raises:
        SetupError: No train loss is among them.
    """
    points = {name: tuple(sorted(values.items())) for name, values in series.items()}
    if "loss" not in points:
        names = ", ".join(sorted(points)[:6]) or "nothing"
        raise SetupError(f"{where}: no train loss is in it, a series 'loss'; found {names}")
    name = _metric_of(points, best, kept)
    short = name.removeprefix(_EVAL)
    epochs = [value for _, value in points.get("epoch", ()) if math.isfinite(value)]
    return Log(
        where=where,
        train_loss=points["loss"],
        grad_norm=points.get("grad_norm", ()),
        learning_rate=points.get("learning_rate", ()),
        eval_loss=after_start(points.get(f"{_EVAL}loss", ())),
        metric=after_start(points.get(name, ())),
        before=before_start(points.get(name, ())),
        metric_name=short,
        greater_is_better=any(part in short for part in _GREATER_IS_BETTER),
        steps=max(step for values in points.values() for step, _ in values),
        total_steps=total,
        epochs=epochs[-1] if epochs else 0.0,
        kept_step=kept,
    )


def _metric_of(points: Mapping[str, Sequence[Point]], best: Any, kept: int | None) -> str:
    """The eval metric that chose the best step, which the state does not name; else one whose direction is known, and
    else the eval loss."""
    known = [name for name in points if name.startswith(_EVAL) and any(part in name for part in _GREATER_IS_BETTER)]
    values = {name: dict(points.get(name, ())).get(kept or -1) for name in (*known, f"{_EVAL}loss")}
    chose = [name for name, value in values.items() if value is not None and value == best]
    return next(iter([*chose, *known]), f"{_EVAL}loss")


def in_words(log: Log) -> str:
    """What was read."""
    evaluations = len(log.metric or log.eval_loss)
    by = f", judged by {log.metric_name} and loss" if log.metric and log.metric_name != "loss" else ""
    return f"{log.where}: {counted(log.steps, 'step')}, {counted(evaluations, 'evaluation')}{by}"
