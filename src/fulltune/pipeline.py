"""Run a recipe's stages: data, plan, train, evaluate, report. A stage is skipped if its files exist."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from fulltune import data, evaluate, methods, report
from fulltune.audit import stage
from fulltune.audit.pretrained import RowReader
from fulltune.data.prepare import prepare_sources
from fulltune.data.readers.read import LocatedRow
from fulltune.data.sources import SourceRows, locate_as_in_recipe, read_source_rows
from fulltune.errors import DataError, DoesNotFitError, GuardStop, RecipeError, SetupError
from fulltune.evaluate.scoring import Scoring, UserMetrics
from fulltune.forgetting.generic_text import check_texts
from fulltune.inference.own_metrics import own_metric_names, try_own_metrics
from fulltune.inference.store import IN_TRAIN, read_original_rows
from fulltune.models.base import Base, check_weights
from fulltune.models.shapes import check_model
from fulltune.plan import budget, changed, fit, gpus, resolve
from fulltune.plan.workload import Workload
from fulltune.recipe.fields import Recipe
from fulltune.recipe.tasks import leaked_content
from fulltune.records.audit import Audit
from fulltune.records.data import DataSummary
from fulltune.records.events import DataPrepared, Listener, Message, PhaseBegan, Planned
from fulltune.records.plan import MemoryNeed, Plan, Setting
from fulltune.records.run import PairsChoice
from fulltune.records.scores import Scores
from fulltune.records.training import Outcome
from fulltune.report.format.blocks import Element, Headline, Section
from fulltune.system import hardware, run_folder
from fulltune.system.hardware import Machine
from fulltune.system.run_folder import RunResult
from fulltune.tasks import PLACE, Target
from fulltune.tasks.labels import check_label_settings
from fulltune.text import counted, first_few
from fulltune.train.hooks import Hooks
from fulltune.train.loop.arguments import check_trainable
from fulltune.train.parent.machines import MachineGroup
from fulltune.train.parent.measure import choose_fastest_plan as fastest_here
from fulltune.train.parent.retry import PlannedTrial, train_in_attempts
from fulltune.train.parent.spawn import Starter, start_in_new_process

if TYPE_CHECKING:
    from fulltune.footprint.trace import PlannedModel

Until = Literal["data", "plan", "train", "evaluate", "report"]


@dataclass(frozen=True)
class Run:
    """A recipe with its run folder, user functions and progress listener."""

    recipe: Recipe
    folder: Path
    hooks: Hooks = field(default_factory=Hooks)
    listener: Listener = lambda event: None
    began: float | None = None
    """Start of the whole command in seconds since 1970, or None for single stages."""

    group: MachineGroup | None = None
    """All machines of a multi-machine run, on the first machine; otherwise None."""

    def __post_init__(self) -> None:
        """Read pairs as an earlier command on this folder chose."""
        if (choice := self.pairs_choice) is not None:
            object.__setattr__(self, "recipe", self.recipe.read(choice.pairs))

    @property
    def pairs_choice(self) -> PairsChoice | None:
        return run_folder.load_pairs_choice(self.recipe, self.folder)

    def with_choices(self, trial: Plan) -> Plan:
        """Add what was chosen before the plan to its settings."""
        if (choice := self.pairs_choice) is None:
            return trial
        pairs = Setting(name="model.pairs", value=choice.pairs, reason=choice.reason, is_automatic=True)
        settings = (pairs, *(setting for setting in trial.settings if setting.name != pairs.name))
        return trial.model_copy(update={"settings": settings})

    @property
    def plan_path(self) -> Path:
        return self.folder / "plan" / f"{self.recipe.method.label}.json"

    @cached_property
    def base(self) -> Base:
        return Base.from_block(self.recipe.model, self.recipe.task, self.recipe.data.chat_template)

    def planned_model(self, summary: DataSummary) -> PlannedModel:
        """Return the model without weights that is traced to plan its memory."""
        from fulltune.footprint.trace import PlannedModel  # imports torch

        return PlannedModel(self.recipe, self.base, summary)

    def memory_need(self, summary: DataSummary) -> Callable[[Plan], MemoryNeed]:
        """Return a function that computes a changed plan's memory. Its first call traces the model."""
        model = cache(lambda: self.planned_model(summary))
        return lambda after: changed.memory_need_of_plan(after, self.recipe, model())

    @property
    def machine(self) -> Machine:
        """The machine whose resources a plan assumes: the weakest if there are several."""
        return hardware.measure_machine() if self.group is None else self.group.weakest

    def phase(self, name: str) -> None:
        self.listener(PhaseBegan(name=name))

    @property
    def start(self) -> Starter:
        return start_in_new_process if self.group is None else self.group.start


Choose = Callable[[Run, DataSummary], Run]
"""Chooses how the texts of pairs are read; returns the run, whose rows are prepared again if its recipe changes."""


def run(job: Run, until: Until = "report", measure: bool = False, choose: Choose | None = None) -> RunResult:
    """Run the stages up to `until`, resuming an interrupted run, and return their records. With `measure`, settings are
    timed before training, and the fastest are used."""
    if until not in ("data", "plan") and job.recipe.methods:
        raise RecipeError(
            "methods: a run trains one method; use 'fulltune compare', or give one 'method' instead of 'methods'"
        )
    if until not in ("data", "plan") and job.recipe.is_cross_validated:
        raise RecipeError(
            "data.folds: each fold needs a run of its own; use 'fulltune run', or set data.fold=1 for a single fold"
        )
    job = job if job.began else replace(job, began=time.time())
    with run_folder.explain_os_errors(job.folder), run_folder.lock_folder(job.folder):
        with run_folder.remove_new_run_on_error(job.folder):
            if job.group is not None:
                job.group.wait_before_first_attempt(job.phase)
        # A plan that does not fit stays in the folder, from which its alternatives are shown.
        with run_folder.remove_new_run_on_error(job.folder, *((DoesNotFitError,) if until == "plan" else ())):
            job, summary = prepare_as_chosen(job, choose, runs_here=until != "data")
            if until == "data":
                return RunResult(job.folder, summary)
            delete_outdated_plan(job.folder, job.plan_path)
            trial = make_plan(job, summary)
        if measure:
            trial = measure_plan(job, trial, summary)
        if until == "plan":
            return RunResult(job.folder, summary, trial)
        try:
            outcome = train_trial(job, trial, summary)
        except (GuardStop, DoesNotFitError) as stop:
            # The report shows the curves so far, and why there are no scores.
            raise type(stop)([*stop.problems, f"report: {write_report(job)}"]) from None
        trial = Plan.load(job.plan_path)  # changed if memory ran out
        if until == "train":
            return RunResult(job.folder, summary, trial, outcome)
        scores = (*score_baselines(job, trial, summary), score_trial(job, trial, summary, outcome))
        if until == "evaluate":
            return RunResult(job.folder, summary, trial, outcome, scores)
        return RunResult(job.folder, summary, trial, outcome, scores, write_report(job))


def prepare_as_chosen(job: Run, choose: Choose | None, runs_here: bool = True) -> tuple[Run, DataSummary]:
    """Run the data stage, for pairs of texts again if they turn out to be read in another way."""
    summary = prepare(job, runs_here)
    chosen = job if choose is None else choose(job, summary)
    return chosen, summary if chosen.recipe == job.recipe else prepare(chosen, runs_here)


def prepare(job: Run, runs_here: bool = True) -> DataSummary:
    """Run the data stage, and return the prepared rows' summary. If `runs_here` is False, packages needed only for
    training may be missing."""
    job.phase("reading the data")
    path = job.folder / "data" / data.SUMMARY
    before = path.stat().st_mtime_ns if path.exists() else None
    preprocess = job.hooks.with_named(job.recipe).preprocess
    job.hooks.check_recipe(job.recipe)
    try:
        base = job.base
        if runs_here:
            check_weights(base)
    except SetupError as error:
        raise SetupError([*error.problems, *data.file_problems(job.recipe, preprocess)]) from None
    check_recipe(job.recipe, base, runs_here)
    check_texts(job.recipe.preserve)
    stage = data.Stage(
        job.recipe,
        job.folder / "data",
        base.processor,
        data.Limits.of(base, job.recipe),
        preprocess,
        planned_fingerprint=Plan.load(job.plan_path).data_fingerprint if job.plan_path.exists() else None,
        cache_folder=job.folder.parent / ".fulltune-cache",
        listener=job.listener,
    )
    summary = data.prepare(stage)
    check_label_settings(job.recipe, summary)
    job.hooks.check_data(summary, own_metric_names(job.recipe))
    try_own_metrics(job.recipe, Target.of(summary), job.folder / "data")
    job.listener(DataPrepared(summary=summary, is_reused=before == path.stat().st_mtime_ns))
    return summary


def check_recipe(recipe: Recipe, base: Base, runs_here: bool) -> None:
    """Before rows are read, raise an error for settings that the libraries (if `runs_here`), the model or the method do
    not support."""
    check_trainable(recipe, check_packages=runs_here)
    check_model(recipe, base)
    methods.check_methods(recipe, base)


def audit_rows(job: Run, summary: DataSummary, reads_rows: bool = True) -> Audit:
    """Audit the rows and return the issues. If `reads_rows`, the pretrained model looks for label errors and
    outliers."""
    if reads_rows and stage.checks_that_need_model(summary):
        check_weights(job.base)
    job.phase("auditing the rows")
    return stage.audit_rows(reader_of(job, summary), reads_rows)


def add_highest_losses(job: Run, summary: DataSummary) -> Audit:
    """Add the rows with the trained model's highest losses to the audit, and return the audit."""
    trial = run_folder.load_trained_plan(job.recipe, job.folder, hardware.measure_machine())
    if summary.packed:
        raise SetupError(
            "--losses: packed texts share rows, so no text has its own loss; train with data.packing=false"
        )
    job.phase("reading train and eval rows with the trained model")
    losses = evaluate.train_and_eval_losses(_scoring(job, trial, summary))
    return stage.write_losses(job.recipe, job.folder / "data", summary, losses)


def reader_of(job: Run, summary: DataSummary) -> RowReader:
    return RowReader(job.recipe, job.base, summary, job.folder / "data", job.listener)


def delete_outdated_plan(run_folder_path: Path, plan_path: Path) -> None:
    """Delete an unused plan not made by `--measure` if its speeds were measured over a day ago or on a busy machine."""
    if not plan_path.exists() or any(
        (run_folder_path / name).exists() for name in ("attempts", "search", "plan/measured.json")
    ):
        return
    if Plan.load(plan_path).busy or time.time() - plan_path.stat().st_mtime > 24 * 3600:
        plan_path.unlink()


def make_plan(job: Run, summary: DataSummary) -> Plan:
    """Run the plan stage, which chooses every setting and records the reason. A resumed run can change only its
    placement."""
    from fulltune.stream.files import read_headers  # imports torch
    from fulltune.stream.trial import measure_disk

    job.phase("planning")
    machine = job.machine
    before = run_folder.load_plan_to_continue(job.plan_path, machine) if job.plan_path.exists() else None
    if before is not None:
        before = changed.plan_to_continue(before, job.recipe, any(job.folder.glob("checkpoints/*/checkpoint-*")))
    if before is not None and (functions := run_folder.changed_functions(job.folder)):
        job.listener(Message(text=f"{functions}: the file has changed since this run was planned", level="warning"))
    if before is not None and changed.has_same_placement(before, job.recipe):
        trial = before
    else:
        recipe = job.recipe if before is None else changed.recipe_for_resuming(job.recipe, before)
        model = job.planned_model(summary)
        footprint = model.footprint(recipe, *resolve.device_and_precision(recipe, machine))
        model.save(footprint, job.folder)
        free, machines = hardware.disk_free_bytes(job.folder), job.recipe.train.num_machines
        free += before.disk.checkpoint_bytes if before and before.stream else 0  # of the state that is there
        fleet = gpus.local_hardware(machine, free, machines, str(job.folder))
        own_loss = job.hooks.compute_loss is not None
        started_seconds = None if job.began is None else time.time() - job.began
        workload = Workload(recipe, model.shapes, lambda weights_dtype: footprint, summary)
        trial = fit.make_plan(workload, fleet, own_loss, started_seconds)
        if (stream := trial.stream) is not None:  # the first plan says where, the second one how long the disk takes
            if job.base.path is not None and not recipe.model.random_weights:
                read_headers(job.base)
            where, needed = trial.state_folder(job.folder), 0 if before else stream.state_bytes + stream.gradient_bytes
            there = {"state_disk_bytes": hardware.disk_free_bytes(where), "disk_speed": measure_disk(where, needed)}
            fleet = fleet.model_copy(update=there)
            trial = fit.make_plan(workload, fleet, own_loss, started_seconds)
        trial = job.with_choices(trial)
        if before is not None:
            trial = changed.with_new_placement(before, trial)
        run_folder.describe_environment(machine, job.recipe).save(job.folder / run_folder.ENVIRONMENT)
        run_folder.save_plan(job.folder, job.recipe, trial)
    job.listener(Planned(plan=trial))
    return trial


def measure_plan(job: Run, trial: Plan, summary: DataSummary) -> Plan:
    """Replace the plan's settings with the fastest ones measured on this machine; save and return the plan."""
    if job.recipe.train.num_machines > 1:
        raise RecipeError("--measure: needs a single machine; set train.num_machines=1 and fewer processes")
    available, _ = budget.usable_memory(job.recipe, hardware.measure_machine(), trial.device)
    trial = fastest_here(_trial_to_train(job, trial, summary), summary, available)
    trial = changed.with_disk_need(job.recipe, trial, hardware.disk_free_bytes(job.folder), str(job.folder))
    run_folder.save_plan(job.folder, job.recipe, trial)
    job.listener(Planned(plan=trial))
    return trial


def train_trial(job: Run, trial: Plan, summary: DataSummary) -> Outcome:
    """Run the train stage with new attempts until one succeeds or nothing is left to try; return the outcome."""
    if job.recipe.is_searched:
        raise RecipeError("method.learning_rate: the search needs several runs; call fulltune.run, or set a rate")
    return train_in_attempts(_trial_to_train(job, trial, summary), job.start)


def _trial_to_train(job: Run, trial: Plan, summary: DataSummary) -> PlannedTrial:
    return PlannedTrial(job.recipe, trial, job.folder, job.hooks, job.listener, job.memory_need(summary))


def score_baselines(job: Run, trial: Plan, summary: DataSummary) -> list[Scores]:
    """Score the baselines on the test rows; return an empty list if the recipe turns them off."""
    if not job.recipe.evaluate.baselines:
        return []
    job.phase("scoring the baselines")
    return evaluate.score_baselines(_scoring(job, trial, summary))


def score_trial(job: Run, trial: Plan, summary: DataSummary, outcome: Outcome) -> Scores:
    job.phase("scoring the trained model")
    return evaluate.score_trained_model(_scoring(job, trial, summary, job.hooks.metrics), outcome)


def _scoring(job: Run, trial: Plan, summary: DataSummary, metrics: UserMetrics | None = None) -> Scoring:
    scoring = evaluate.make_scoring(job.recipe, trial, summary, job.folder, job.base)
    return replace(scoring, user_metrics=metrics, listener=job.listener)


def write_report(job: Run) -> Path:
    """Write the report and return its path."""
    job.phase("writing the report")
    if job.began is not None:
        run_folder.record_duration(job.folder, job.began)
    path = report.write_run_report(job.folder)
    if (model_folder := job.folder / "models" / job.recipe.method.label).exists():
        report.write_model_card(job.folder, model_folder)
    return path


# ---- rows that came after a run ------------------------------------------------------------------------------------


Later = tuple[tuple[Scores, ...], list[Headline | Section | Element], Path]
_AS_THEY_ARE = {"max_rows": None, "time": None, "folds": None, "fold": None, "patch": None, "contamination": None}


def score_later_rows(job: Run, model_folder: Path, file: Path, allowed: bool) -> Later:
    """Score the baselines and a finished model on a labelled file; return the scores, what is printed, and the folder.
    Raise `DataError` for rows of train unless they are `allowed`."""
    run, recipe = job.folder, job.recipe
    plans = [run / "plan" / f"{model_folder.name}.json", *sorted(run.glob(f"plan/{model_folder.name}-seed*.json"))]
    path = next(path for path in plans if path.exists())
    plan = run_folder.load_plan_to_continue(path, hardware.measure_machine())
    folder = run / "evaluations" / (file.stem + f"-{model_folder.name}" * bool(recipe.methods))
    with run_folder.explain_os_errors(run), run_folder.lock_folder(run):
        shutil.rmtree(folder, ignore_errors=True)
        summary = _prepare_rows(job, file, folder, allowed)
        for name in ("plan", "probe"):  # the baselines are those of the run
            if (run / name).exists():
                (folder / name).symlink_to((run / name).resolve())
        scoring = evaluate.make_scoring(recipe, plan, summary, folder, job.base)
        scoring = replace(scoring, listener=job.listener)
        job.phase("scoring the baselines and the trained model")
        baselines = evaluate.score_baselines(scoring) if recipe.evaluate.baselines else []
        scores = (*baselines, evaluate.score_finished_model(scoring, model_folder))
        return scores, report.write_later_rows_report(run, folder, summary, scores), folder


def _prepare_rows(job: Run, file: Path, folder: Path, allowed: bool) -> DataSummary:
    """Prepare the run's train and eval rows and, as test rows, those of the file."""
    job.phase(f"reading {file.name}")
    recipe = job.recipe.model_copy(update={"data": job.recipe.data.model_copy(update=_AS_THEY_ARE)})
    preprocess = job.hooks.with_named(recipe).preprocess
    sources = {name: _stored_rows(job.folder / "data" / name) for name in ("train", "eval")}
    sources["test"] = read_source_rows(recipe, locate_as_in_recipe(recipe, [str(file)], True), preprocess)
    stage = data.Stage(recipe, folder / "data", job.base.processor, data.Limits.of(job.base, recipe))
    summary = prepare_sources(stage, sources, None, DataSummary.of_run(job.folder).fingerprint)
    places = [row[PLACE] for row in read_original_rows(stage.folder / "test")]
    leaked = [*dict.fromkeys(np.array(places)[np.load(stage.folder / "test" / IN_TRAIN)].tolist())]
    if leaked and not allowed:
        content = leaked_content(summary.columns, recipe.data.near_duplicates < 1)
        raise DataError(
            f"{file}: {len(leaked):,} of {counted(len(set(places)), 'row')} are rows of train: their {content} "
            f"({first_few(leaked)}); remove them, or score them as well with --allow-training-rows"
        )
    return summary


def _stored_rows(folder: Path) -> SourceRows:
    """Return a split's rows as the run stored them. Of packed texts, only the first of each row is known."""

    def rows(problems: list[str] | None) -> Iterator[LocatedRow]:
        for _, same in groupby(read_original_rows(folder), key=id):  # windows of a row share a dictionary
            row = dict(next(same))
            place = row.pop(PLACE)
            if row:
                yield place, row

    return SourceRows(f"the run's {folder.name} rows", rows)
