"""One frozen view of a run folder: every file that the report needs, and what is missing, with the reason."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from fulltune.errors import SetupError
from fulltune.files import entry_of
from fulltune.records.base import Record
from fulltune.records.comparison import Searched
from fulltune.records.data import DataSummary
from fulltune.records.events import Evaluated, Event, JournalEntry, StepLogged, StepSkipped, UpdatesMeasured, event_of
from fulltune.records.forgetting import Preserved
from fulltune.records.plan import Plan
from fulltune.records.run import ACCESSES, Access, Command, Environment, MachinesUsed
from fulltune.records.scores import Scores
from fulltune.records.training import Outcome
from fulltune.report.format import words
from fulltune.stats.curves import Point
from fulltune.text import first_few


@dataclass(frozen=True)
class History:
    """What was measured during training, by series name and in order of steps."""

    train: dict[str, tuple[Point, ...]]
    """`loss`, `learning_rate`, `grad_norm`, where they were logged."""
    evaluation: dict[str, tuple[Point, ...]]
    """One series per metric on the eval rows."""
    restarts: tuple[int, ...]
    """First logged step of every attempt after the first."""

    skipped: tuple[int, ...] = ()
    """Steps whose update was left out, and that were not done again."""

    updates: UpdatesMeasured | None = None
    """The last measurement."""

    @property
    def has_points(self) -> bool:
        return bool(self.train or self.evaluation)


def after_start(points: Sequence[Point]) -> tuple[Point, ...]:
    """Without the evaluation before step 1."""
    return tuple(point for point in points if point[0] > 0)


def before_start(points: Sequence[Point]) -> float | None:
    """What was measured before step 1."""
    return next((value for step, value in points if step == 0), None)


_TRAIN_SERIES = ("loss", "learning_rate", "grad_norm")


def merge(attempts: Sequence[tuple[int | None, Sequence[Event]]]) -> History:
    """Join a trial's attempts (steps done at its start, events) into one curve, without what a later attempt redid."""
    train: dict[int, Mapping[str, Any]] = {}
    evaluation: dict[int, Mapping[str, Any]] = {}
    restarts: list[int] = []
    updates = [event for _, events in attempts for event in events if isinstance(event, UpdatesMeasured)]
    measured = updates[-1] if updates else None
    skipped: set[int] = set()
    for done, events in attempts:
        rows = [event for event in events if isinstance(event, StepLogged | Evaluated)]
        if not rows:
            continue
        # One that begins with an evaluation does that of the step it goes on from.
        first = rows[0].step + isinstance(rows[0], Evaluated) if done is None else done + 1
        if train or evaluation:
            restarts = [*(step for step in restarts if step < first), first]
        train = {step: line for step, line in train.items() if step < first}
        skipped = {step for step in skipped if step < first} | {
            event.step for event in events if isinstance(event, StepSkipped)
        }
        evaluation = {step: line for step, line in evaluation.items() if step < first}
        for row in rows:
            if isinstance(row, Evaluated):
                evaluation[row.step] = row.metrics
            else:
                train[row.step] = {name: getattr(row, name) for name in _TRAIN_SERIES}
    names = dict.fromkeys(name for metrics in evaluation.values() for name in metrics)
    return History(
        _series(train, _TRAIN_SERIES), _series(evaluation, names), tuple(restarts), tuple(sorted(skipped)), measured
    )


def _series(rows: Mapping[int, Mapping[str, Any]], names: Iterable[str]) -> dict[str, tuple[Point, ...]]:
    found = {
        name: tuple(
            (step, float(row[name])) for step, row in sorted(rows.items()) if isinstance(row.get(name), int | float)
        )
        for name in names
    }
    return {name: points for name, points in found.items() if points}


_AnyRecord = TypeVar("_AnyRecord", bound=Record)
_MARKS_OF_A_RUN = ("recipe.yaml", "environment.json", "data/summary.json", "plan", "attempts", "scores")
_KINDS = ("baseline", "untouched", "trained")
DROPPED_SHOWN = 20
_CUT = "cannot be read: a process was stopped while writing it, or the file was damaged. The rest is used."


@dataclass(frozen=True)
class AttemptFiles:
    """One attempt folder; `outcome` is None when its process ended without writing one."""

    name: str
    trial: str
    outcome: Outcome | None
    events: tuple[Event, ...]
    """What `metrics.jsonl` holds, in order."""
    first_step: int | None
    """Steps that were done where it began; None: its request is gone."""
    journal: tuple[JournalEntry, ...]

    @property
    def steps(self) -> int:
        """Steps by the outcome; an attempt that failed before it could say has done those that it logged."""
        logged = [event.step for event in self.events if isinstance(event, StepLogged | Evaluated)]
        return (self.outcome.steps if self.outcome else 0) or max(logged, default=0)


@dataclass(frozen=True)
class Missing:
    """A part of the report that cannot be shown, and why."""

    what: str
    why: str


@dataclass(frozen=True)
class RunView:
    """All that is known about a run."""

    folder: Path
    name: str
    model: str
    """As the plan or else the recipe names it; `unknown model` when neither does."""
    task: str
    recipe_text: str | None
    environment: Environment | None
    summary: DataSummary | None
    dropped: tuple[dict[str, Any], ...]
    """The first rows that were dropped."""
    plans: tuple[Plan, ...]
    attempts: tuple[AttemptFiles, ...]
    scores: tuple[Scores, ...]
    """Baselines first, then the untouched model, then trained ones; by name within a kind."""
    missing: tuple[Missing, ...]
    command: Command | None = None
    """What the whole command took; None where it was not one command."""
    searched: Searched | None = None
    """How its settings were searched."""
    preserved: Mapping[str, Preserved] = field(default_factory=dict)
    """How each trial with a budget for forgetting kept it."""
    machines: MachinesUsed | None = None
    """Of a run over several machines."""
    accesses: tuple[Access, ...] = ()
    """Every time that its test rows were scored, also by other runs beside it."""

    @property
    def main_trial(self) -> str:
        """The trial that the headline is about: the first one scored, else the first one known; empty: none."""
        row = headline_row(self.scores)
        return row.name if row else next(iter(self.trials), "")

    @property
    def trained(self) -> tuple[Scores, ...]:
        return tuple(row for row in self.scores if row.kind == "trained")

    @property
    def trials(self) -> tuple[str, ...]:
        """Every trial that was planned, started or scored."""
        names = {plan.trial for plan in self.plans} | {attempt.trial for attempt in self.attempts}
        return tuple(sorted(names | {row.name for row in self.trained}))

    def attempts_of(self, trial: str) -> tuple[AttemptFiles, ...]:
        return tuple(attempt for attempt in self.attempts if attempt.trial == trial)

    def plan_of(self, trial: str) -> Plan | None:
        return next((plan for plan in self.plans if plan.trial == trial), None)

    def outcome_of(self, trial: str) -> Outcome | None:
        """How the trial ended: its last attempt's outcome, None when that one wrote none."""
        attempts = self.attempts_of(trial)
        return attempts[-1].outcome if attempts else None

    def history_of(self, trial: str) -> History:
        """The trial's metrics as one curve over all its attempts."""
        return merge([(attempt.first_step, attempt.events) for attempt in self.attempts_of(trial)])

    def model_folder_of(self, trial: str) -> str | None:
        """The trained model, relative to the run folder; None when it is not there."""
        outcome, plan = self.outcome_of(trial), self.plan_of(trial)
        named = (outcome.model_folder if outcome else None) or (plan.model_folder if plan else "models/full")
        return named if trial and (self.folder / named).is_dir() else None


def headline_row(scores: Sequence[Scores]) -> Scores | None:
    """The trained row of the headline: the first trial by name, since the best by its test score would be flattered."""
    return min((row for row in scores if row.kind == "trained"), key=lambda row: row.name, default=None)


def read_run(folder: Path) -> RunView:
    """Read a run folder, any of whose files may be missing; SetupError where nothing in it comes from a run."""
    folder = Path(folder)
    if not folder.is_dir():
        raise SetupError(f"{folder}: no such run folder")
    if not any((folder / mark).exists() for mark in _MARKS_OF_A_RUN):
        raise SetupError(f"{folder}: not a run folder; expected one of {', '.join(_MARKS_OF_A_RUN)} in it")

    files = _Files(folder)
    plans = files.records(Plan, filter(_may_be_a_plan, folder.glob("plan/*.json")))
    scores = files.records(Scores, folder.glob("scores/*.json"))
    summary = files.record(DataSummary, folder / "data" / "summary.json")
    recipe = folder / "recipe.yaml"
    recipe_text = recipe.read_text(encoding="utf-8", errors="replace") if recipe.is_file() else None
    settings = {setting.name: setting.value for plan in plans for setting in plan.settings}
    task = (summary and summary.task) or settings.get("task") or _from_recipe(recipe_text, "task")
    view = RunView(
        folder=folder,
        name=folder.resolve().name,
        model=str(settings.get("model.name") or _from_recipe(recipe_text, "model") or "unknown model"),
        task=str(task or "unknown task"),
        recipe_text=recipe_text,
        environment=files.record(Environment, folder / "environment.json"),
        summary=summary,
        dropped=tuple(islice(files.lines(folder / "data" / "dropped.jsonl"), DROPPED_SHOWN)),
        plans=tuple(sorted(plans, key=lambda plan: plan.trial)),
        attempts=tuple(files.attempts()),
        scores=tuple(sorted(scores, key=lambda row: (_KINDS.index(row.kind), row.name))),
        missing=(),
        command=files.record(Command, folder / "command.json"),
        machines=files.record(MachinesUsed, folder / "machines.json"),
        searched=files.record(Searched, folder / "search.json"),
        preserved={one.trial: one for one in files.records(Preserved, folder.glob("preserve/*.json"))},
        accesses=files.accesses(),
    )
    cut = [Missing(f"line {first_few(lines)} of {name}", _CUT) for name, lines in files.unreadable.items()]
    return replace(view, missing=(*files.damaged, *cut, *_what_is_missing(view)))


def _what_is_missing(view: RunView) -> Iterator[Missing]:
    """Say what cannot be shown; the reason is how the run ended, as far as the files tell."""
    for present, what, why in (
        (view.recipe_text is not None, "the recipe", "recipe.yaml is not in the run folder."),
        (view.environment, "the environment", "environment.json is not in the run folder or cannot be read."),
        (view.summary, "the data summary", "the run ended before the data were prepared."),
        (view.plans, "the plan with its settings", "the run ended before it was planned."),
        (view.attempts, "learning curves and training facts", "there is no attempt in the run's folder."),
        (view.trials, "the test scores of a trained model", "no trial was planned or started."),
    ):
        if not present:
            yield Missing(what, why)
    for trial in view.trials:
        attempts = view.attempts_of(trial)
        if attempts and attempts[-1].outcome is None:
            yield Missing(
                f"the outcome of {attempts[-1].name}",
                "its process has written no outcome.json: it is still running, or it was killed.",
            )
        if attempts and not view.history_of(trial).has_points:
            yield Missing(f"the learning curves of {trial}", "no optimizer step was logged.")
        if trial not in {row.name for row in view.trained}:
            yield Missing(f"the test scores of {trial}", _why_unscored(view, trial))
    if not any(row.kind != "trained" for row in view.scores):
        yield Missing(
            "baselines to compare with",
            "none was scored: the run ended earlier, or the recipe says 'evaluate.baselines: false'.",
        )


def _why_unscored(view: RunView, trial: str) -> str:
    attempts = view.attempts_of(trial)
    if not attempts:
        return "no attempt to train it is in the run's folder."
    outcome = attempts[-1].outcome
    if outcome is None:
        return "training has no recorded end, so there was nothing to score."
    if outcome.status == "done":
        return "training is done, but the model was not scored on the test rows."
    return f"training ended as '{words.status(outcome.status)}': {outcome.reason.rstrip('.')}."


class _Files:
    """Reads a run folder's files and notes which of them, and how many lines, cannot be read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.damaged: list[Missing] = []
        self.unreadable: dict[str, list[str]] = {}
        """By file, the numbers of lines that are not JSON, usually the last one of a killed process."""

    def record(self, kind: type[_AnyRecord], path: Path) -> _AnyRecord | None:
        """A record; None where there is none or it cannot be read."""
        try:
            return kind.load(path) if path.is_file() else None
        except (OSError, SetupError):
            name = path.relative_to(self.folder).as_posix()
            self.damaged.append(Missing(name, "damaged, or of another version of fulltune"))
            return None

    def records(self, kind: type[_AnyRecord], paths: Iterable[Path]) -> list[_AnyRecord]:
        """All of these that can be read, by name."""
        found = (self.record(kind, path) for path in sorted(paths))
        return [record for record in found if record is not None]

    def lines(self, path: Path) -> Iterator[dict[str, Any]]:
        """The objects of a jsonl file."""
        if not path.is_file():
            return
        # A process killed in mid-write can cut a character in two: replace it rather than fail.
        with path.open(encoding="utf-8", errors="replace") as file:
            for number, line in enumerate(file, 1):
                if (entry := entry_of(line)) is not None:
                    yield entry
                elif line.strip():
                    self.unreadable.setdefault(path.relative_to(self.folder).as_posix(), []).append(str(number))

    def accesses(self) -> tuple[Access, ...]:
        """From the only file that lies beside the folder, for all runs there."""
        try:
            return Access.of_same_rows(self.folder)
        except OSError:
            self.damaged.append(Missing(f"{ACCESSES}, beside the run folder", "it cannot be opened"))
            return ()

    def attempts(self) -> Iterator[AttemptFiles]:
        """The attempts of each trial, in order."""
        named = ((path, re.fullmatch(r"(.+)-(\d+)", path.name)) for path in self.folder.glob("attempts/*"))
        numbered = [(match[1], int(match[2]), path) for path, match in named if match and path.is_dir()]
        for trial, _, path in sorted(numbered):
            outcome = self.record(Outcome, path / "outcome.json")
            events = tuple(filter(None, map(event_of, self.lines(path / "metrics.jsonl"))))
            journal = tuple(map(JournalEntry.model_validate, self.lines(path / "journal.jsonl")))
            yield AttemptFiles(path.name, trial, outcome, events, _first_step(path / "request.json"), journal)


def _first_step(path: Path) -> int | None:
    """The steps that are in the checkpoint from which a request goes on; None: it cannot be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["checkpoint"]
        return 0 if found is None else int(found.rpartition("-")[2])
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return None


def _may_be_a_plan(path: Path) -> bool:
    """Whether a file of the folder `plan` is a trial's plan, or too damaged to tell; others lie there as well."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return True
    return isinstance(found, dict) and {"trial", "settings"} <= found.keys()


def _from_recipe(text: str | None, key: str) -> Any:
    """A top-level value of the recipe, for the title when no plan was written; None where it cannot be read."""
    import yaml

    try:
        found = yaml.safe_load(text or "")
    except yaml.YAMLError:
        return None
    value = found.get(key) if isinstance(found, dict) else None
    return value.get("name") if isinstance(value, dict) else value
