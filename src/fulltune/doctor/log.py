"""A training's log as series over its steps: of a run folder, of transformers' `trainer_state.json`, of TensorBoard."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fulltune.errors import SetupError
from fulltune.records.training import Outcome
from fulltune.report.format.plots import Point
from fulltune.report.run.read import read_run
from fulltune.text import counted

STATE = "trainer_state.json"
_EVENTS = "events.out.tfevents.*"
_SMALLER_IS_BETTER = ("loss", "perplexity", "wer", "cer", "mae", "mse", "rmse", "error")
_NO_METRIC = ("runtime", "samples_per_second", "steps_per_second", "epoch", "model_preparation_time")


@dataclass(frozen=True)
class Log:
    """What was written down while training, by series, in order of steps."""

    where: Path
    train_loss: tuple[Point, ...]
    grad_norm: tuple[Point, ...] = ()
    learning_rate: tuple[Point, ...] = ()
    eval_loss: tuple[Point, ...] = ()
    metric: tuple[Point, ...] = ()
    """What the best step is chosen by, or else the first eval metric that is no loss."""
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
    skipped: tuple[int, ...] = ()
    rollbacks: tuple[int, ...] = ()
    outcome: Outcome | None = None
    """Of a run folder's last attempt."""
    command: str = ""
    """What trains it again; empty: it is another program's."""


def read_log(place: Path) -> Log:
    """The log at a place.

    Args:
        place: A run folder, a `trainer_state.json`, a folder with one or with checkpoints, or one of TensorBoard's.

    Raises:
        SetupError: There is none, or it is of a form that is not known.
    """
    if not place.exists():
        raise SetupError(f"{place}: no such file or folder; expected a run folder, {STATE}, or TensorBoard's folder")
    if place.is_dir() and (place / "attempts").is_dir():
        return _of_run(place)
    if (state := _state_in(place)) is not None:
        return _of_state(state)
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
        raise SetupError(f"{folder}: no optimizer step was logged; 'fulltune report {folder}' says why it ended")
    rows = view.summary.splits["eval"].rows if view.summary and "eval" in view.summary.splits else 0
    train = history.train.get("loss", ())
    return Log(
        where=folder,
        train_loss=train,
        grad_norm=history.train.get("grad_norm", ()),
        learning_rate=history.train.get("learning_rate", ()),
        eval_loss=history.evaluation.get("loss", ()),
        metric=history.evaluation.get(plan.metric, ()),
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
        command=f"fulltune run {folder / 'recipe.yaml'}",
    )


def _state_in(place: Path) -> Path | None:
    """The newest state of a Trainer here, or in a checkpoint below."""
    if place.is_file():
        return place if place.name.endswith(".json") else None
    found = [*place.glob(STATE), *place.glob(f"*/{STATE}")]
    return max(found, key=lambda path: (path.stat().st_mtime, path.name), default=None)


def _of_state(path: Path) -> Log:
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        lines = state["log_history"]
        series: dict[str, dict[int, float]] = defaultdict(dict)
        for line in lines:
            for name, value in line.items():
                if isinstance(value, (int, float)) and name != "step":
                    series[name][int(line["step"])] = float(value)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        said = f"{type(error).__name__}: {error}"
        raise SetupError(f"{path}: is not the state of a Trainer, which has a 'log_history' ({said})") from None
    chosen = str(state.get("metric_for_best_model") or "")
    kept = state.get("best_global_step")
    return _log(path, series, "eval_", chosen, kept, int(state.get("max_steps") or 0))


def _of_events(folder: Path, files: list[Path]) -> Log:
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError:
        raise SetupError(
            f"{folder}: TensorBoard's events are read by its own package; pip install 'fulltune[tensorboard]'"
        ) from None
    series: dict[str, dict[int, float]] = defaultdict(dict)
    for file in files:
        read = EventAccumulator(str(file), size_guidance={"scalars": 0})
        read.Reload()
        for tag in read.Tags()["scalars"]:
            name = tag.removeprefix("train/").replace("eval/", "eval_")
            series[name] |= {event.step: float(event.value) for event in read.Scalars(tag)}
    return _log(folder, series, "eval_", "", None, 0)


def _log(
    where: Path, series: Mapping[str, Mapping[int, float]], prefix: str, chosen: str, kept: int | None, total: int
) -> Log:
    """Series by transformers' names as a log.

    Raises:
        SetupError: No train loss is among them.
    """
    points = {name: tuple(sorted(values.items())) for name, values in series.items()}
    if "loss" not in points:
        names = ", ".join(sorted(points)[:6]) or "nothing"
        raise SetupError(f"{where}: no train loss is in it, a series 'loss'; found {names}")
    metrics = [name for name in points if name.startswith(prefix) and not name.endswith(_NO_METRIC)]
    wanted = chosen if chosen.startswith(prefix) else prefix + chosen
    others = [name for name in metrics if name != f"{prefix}loss"]
    name = wanted if wanted in points else next(iter(others), f"{prefix}loss")
    short = name.removeprefix(prefix)
    steps = max(step for step, _ in points["loss"])
    epochs = points.get("epoch", ())
    return Log(
        where=where,
        train_loss=points["loss"],
        grad_norm=points.get("grad_norm", ()),
        learning_rate=points.get("learning_rate", ()),
        eval_loss=points.get(f"{prefix}loss", ()),
        metric=points.get(name, ()),
        metric_name=short,
        greater_is_better=not short.endswith(_SMALLER_IS_BETTER),
        steps=steps,
        total_steps=total,
        epochs=epochs[-1][1] if epochs and math.isfinite(epochs[-1][1]) else 0.0,
        kept_step=kept,
    )


def in_words(log: Log) -> str:
    """What was read."""
    evaluations = len(log.metric or log.eval_loss)
    return f"{log.where}: {counted(log.steps, 'step')}, {counted(evaluations, 'evaluation')}"
