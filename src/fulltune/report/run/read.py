from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from fulltune.errors import SetupError
from fulltune.files import read_json_lines
from fulltune.footprint.records import FOOTPRINT, SHAPES
from fulltune.records.base import Record
from fulltune.records.comparison import Searched
from fulltune.records.data import SOURCES, DataSummary, RemoteSource, RemoteSources
from fulltune.records.events import (
    Answered,
    Evaluated,
    Event,
    JournalEntry,
    StepLogged,
    StepSkipped,
    parse_event,
)
from fulltune.records.forgetting import BUDGET_FILES, BudgetResult
from fulltune.records.plan import Plan
from fulltune.records.run import ACCESSES, Access, Environment
from fulltune.records.scores import Scores
from fulltune.records.training import Outcome
from fulltune.report.format import words
from fulltune.stats.curves import Point
from fulltune.system.parallel_layout import SETTINGS_FILE

AnyRecord = TypeVar("AnyRecord", bound=Record)
MetricSeries = dict[str, tuple[Point, ...]]
_TRAIN_SERIES = ("loss", "learning_rate", "grad_norm")
_MARKS_OF_A_RUN = ("recipe.yaml", "environment.json", "data/summary.json", "plan", "attempts", "scores")
_NOT_PLANS = (SHAPES, FOOTPRINT, "survey.json", "measured.json")
_KINDS = ("baseline", "untouched", "trained")


@dataclass(frozen=True)
class History:
    train: MetricSeries = field(default_factory=dict)
    evaluation: MetricSeries = field(default_factory=dict)
    restarts: tuple[int, ...] = ()
    """First logged step of every attempt after the first."""
    skipped: tuple[int, ...] = ()
    answers: tuple[Answered, ...] = ()


def after_start(points: Sequence[Point]) -> tuple[Point, ...]:
    return tuple(point for point in points if point[0] > 0)


def before_start(points: Sequence[Point]) -> float | None:
    return next((value for step, value in points if step == 0), None)


@dataclass(frozen=True)
class AttemptFiles:
    """Contents of one attempt folder. `outcome` is None if the process wrote none."""

    name: str
    trial: str
    outcome: Outcome | None
    events: tuple[Event, ...]
    first_step: int | None
    """Step of the checkpoint that the attempt resumed from, or None if unreadable."""
    journal: tuple[JournalEntry, ...]

    @property
    def steps(self) -> int:
        """Number of completed steps, from the outcome or else from the log."""
        logged = [event.step for event in self.events if isinstance(event, StepLogged | Evaluated)]
        return (self.outcome.steps if self.outcome else 0) or max(logged, default=0)


def join_attempts(attempts: Sequence[AttemptFiles]) -> History:
    """Join the curves of a trial's attempts. If steps were repeated, the last attempt's values are used."""
    events: dict[tuple[str, int], Event] = {}
    restarts: list[int] = []
    for attempt in attempts:
        logged = [one for one in attempt.events if isinstance(one, StepLogged | Evaluated | Answered | StepSkipped)]
        rows = [event for event in logged if isinstance(event, StepLogged | Evaluated)]
        if not rows:
            continue
        # An attempt that begins with an evaluation repeats that of its checkpoint.
        done = attempt.first_step
        first = rows[0].step + isinstance(rows[0], Evaluated) if done is None else done + 1
        if events:
            restarts = [*(step for step in restarts if step < first), first]
        events = {key: event for key, event in events.items() if key[1] < first}
        events |= {(event.kind, event.step): event for event in logged}
    all_events = events.values()
    steps = {each.step: each for each in all_events if isinstance(each, StepLogged)}
    return History(
        train=_points_by_metric(
            {at: {name: getattr(one, name) for name in _TRAIN_SERIES} for at, one in steps.items()}
        ),
        evaluation=_points_by_metric({one.step: one.metrics for one in all_events if isinstance(one, Evaluated)}),
        restarts=tuple(restarts),
        skipped=tuple(sorted(one.step for one in all_events if isinstance(one, StepSkipped))),
        answers=tuple(one for one in all_events if isinstance(one, Answered)),
    )


def _points_by_metric(rows_by_step: Mapping[int, Mapping[str, Any]]) -> MetricSeries:
    series: dict[str, list[Point]] = defaultdict(list)
    for step, row in sorted(rows_by_step.items()):
        for name, value in row.items():
            if isinstance(value, int | float):
                series[name].append((step, float(value)))
    return {name: tuple(points) for name, points in series.items()}


@dataclass(frozen=True)
class RunView:
    """Contents of a run folder, for a run or one trial of a comparison."""

    folder: Path
    model: str
    task: str
    trial: str
    """Method and seed, such as `full-seed42`, or empty if unknown."""
    recipe_text: str | None
    environment: Environment | None
    summary: DataSummary | None
    plan: Plan | None
    attempts: tuple[AttemptFiles, ...]
    scores: tuple[Scores, ...]
    """Baselines first, then the pretrained and the trained model."""
    missing: tuple[tuple[str, str], ...] = ()
    searched: Searched | None = None
    budget: BudgetResult | None = None
    remote: tuple[RemoteSource, ...] = ()
    accesses: tuple[Access, ...] = ()
    """All scorings of these test rows, including those by neighbouring runs."""

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def trained(self) -> Scores | None:
        return trained_row(self.scores)

    @property
    def outcome(self) -> Outcome | None:
        return self.attempts[-1].outcome if self.attempts else None

    @property
    def kept_step(self) -> int | None:
        # Interpolated weights belong to no step.
        return self.outcome.best_step if self.outcome and not (self.budget and self.budget.weights_reason) else None

    @property
    def answer_metric(self) -> str | None:
        """The run's metric if it compares generated answers, or else the first measured one that does."""
        names = [self.plan.metric, *self.history.evaluation] if self.plan and self.history.answers else []
        return next((name for name in names if name in words.OF_ANSWERS or ":" in names[0] == name), None)

    @property
    def num_choosing_answers(self) -> int:
        """Number of generated answers that the run's metric was measured on, or 0 if it needs none."""
        return self.history.answers[-1].rows if self.plan and self.plan.metric == self.answer_metric else 0

    @cached_property
    def history(self) -> History:
        return join_attempts(self.attempts)

    @property
    def model_folder(self) -> str | None:
        """Path of the trained model, or None if there is none."""
        named = (self.outcome.model_folder if self.outcome else None) or (
            self.plan.model_folder if self.plan else "models/full"
        )
        return named if self.trial and (self.folder / named).is_dir() else None


def trained_row(scores: Sequence[Scores]) -> Scores | None:
    return next((row for row in scores if row.kind == "trained"), None)


def read_run(folder: Path, scores: Scores | None = None) -> RunView:
    """Read the folder of a run or comparison; any other folder, or a damaged file, raises `SetupError`. Files may be
    missing. For a comparison's trial, pass its `scores`."""
    folder = Path(folder)
    if not folder.is_dir():
        raise SetupError(f"{folder}: there is no such run folder")
    if not any((folder / mark).exists() for mark in _MARKS_OF_A_RUN):
        raise SetupError(f"{folder}: is not a run folder, because it contains none of {', '.join(_MARKS_OF_A_RUN)}")

    others = {*_NOT_PLANS, *(one.name for one in folder.glob(f"plan/*{SETTINGS_FILE}"))}
    plans = [Plan.load(one) for one in sorted(folder.glob("plan/*.json")) if one.name not in others]
    attempts = list(_read_attempts(folder))
    rows = [Scores.load(path) for path in sorted(folder.glob("scores/*.json"))]
    trained = [scores] if scores else [row for row in rows if row.kind == "trained"]
    started = sorted({one.trial for one in plans} | {one.trial for one in attempts})
    trial = next(iter([*(row.name for row in trained), *started]), "")
    rows = [row for row in rows if row.kind != "trained"] + [row for row in trained if row.name == trial]
    plan = next((plan for plan in plans if plan.trial == trial), None)
    settings = {setting.name: setting.value for setting in plan.settings} if plan else {}
    summary = _load(DataSummary, folder / "data" / "summary.json")
    remote = _load(RemoteSources, folder / SOURCES)
    recipe = folder / "recipe.yaml"
    recipe_text = recipe.read_text(encoding="utf-8", errors="replace") if recipe.is_file() else None
    view = RunView(
        folder=folder,
        model=str(settings.get("model.name", "unknown model")),
        task=summary.task if summary else str(settings.get("task", "unknown task")),
        trial=trial,
        recipe_text=recipe_text,
        environment=_load(Environment, folder / "environment.json"),
        summary=summary,
        plan=plan,
        attempts=tuple(one for one in attempts if one.trial == trial),
        scores=tuple(sorted(rows, key=lambda row: (_KINDS.index(row.kind), row.name))),
        searched=_load(Searched, folder / "search.json"),
        budget=next((one for one in map(BudgetResult.load, folder.glob(BUDGET_FILES)) if one.trial == trial), None),
        remote=remote.sources if remote else (),
    )
    missing = [*_unavailable_parts(view)]
    try:
        view = replace(view, accesses=Access.load_for_same_rows(folder))
    except OSError:
        missing.append((f"{ACCESSES}, beside the run folder", "it cannot be opened"))
    return replace(view, missing=tuple(missing))


def _load(kind: type[AnyRecord], path: Path) -> AnyRecord | None:
    return kind.load(path) if path.is_file() else None


def _read_attempts(folder: Path) -> Iterator[AttemptFiles]:
    named = ((path, re.fullmatch(r"(.+)-(\d+)", path.name)) for path in folder.glob("attempts/*"))
    numbered = [(match[1], int(match[2]), path) for path, match in named if match and path.is_dir()]
    for trial, _, path in sorted(numbered):
        outcome = _load(Outcome, path / "outcome.json")
        events = tuple(filter(None, map(parse_event, read_json_lines(path / "metrics.jsonl"))))
        journal = tuple(map(JournalEntry.model_validate, read_json_lines(path / "journal.jsonl")))
        first_step = _resumed_checkpoint_step(path / "request.json")
        yield AttemptFiles(path.name, trial, outcome, events, first_step, journal)


def _unavailable_parts(view: RunView) -> Iterator[tuple[str, str]]:
    """Yield (part, reason) for each part of the report that cannot be shown."""
    row, last = f"the test scores of {view.trial or 'a trained model'}", view.attempts[-1:]
    for present, what, why in (
        (view.summary, "the data summary", "the run ended before its data was prepared."),
        (view.plan, "the plan with its settings", "the run ended before it was planned."),
        (
            view.history.train or view.history.evaluation,
            "the learning curves",
            "no readable step was logged.",
        ),
        *((one.outcome, f"the outcome of {one.name}", "its process is still running or was killed.") for one in last),
        (view.trained, row, _explain_missing_scores(view)),
    ):
        if not present:
            yield what, why


def _explain_missing_scores(view: RunView) -> str:
    if not view.attempts:
        return "the run folder contains no training attempt." if view.trial else "no trial was planned or started."
    if view.outcome is None:
        return "training has no recorded end, so there was nothing to score."
    if view.outcome.status == "done":
        return "training is done, but the model was not scored on the test rows."
    return f"training ended as '{words.readable_status(view.outcome.status)}': {view.outcome.reason.rstrip('.')}."


def _resumed_checkpoint_step(path: Path) -> int | None:
    """Return the step of the checkpoint that an attempt resumed from (0 for a new start), or None if unreadable."""
    try:
        checkpoint = json.loads(path.read_text(encoding="utf-8"))["checkpoint"]
        return 0 if checkpoint is None else int(checkpoint.rpartition("-")[2])
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return None
