"""The line of a run: data, plan, train, evaluate, report. A stage writes files, and is skipped when they are there."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fulltune import data, evaluate, methods, plan, report
from fulltune.audit import stage
from fulltune.audit.untouched import Reader
from fulltune.errors import DoesNotFitError, GuardStop, RecipeError, SetupError
from fulltune.evaluate.scoring import Scoring, UserMetrics
from fulltune.forgetting.generic_text import check_texts
from fulltune.models.base import Base, check_weights
from fulltune.models.shapes import check_model
from fulltune.recipe.fields import Recipe
from fulltune.records.audit import Audit
from fulltune.records.data import DataSummary
from fulltune.records.events import DataPrepared, Listener, PhaseBegan, Planned
from fulltune.records.plan import MemoryNeed, Plan
from fulltune.records.scores import Scores
from fulltune.records.training import Outcome
from fulltune.system import hardware, run_folder
from fulltune.system.hardware import Machine
from fulltune.system.run_folder import Reached
from fulltune.tasks.labels import check_settings_for
from fulltune.train.hooks import Hooks
from fulltune.train.loop.arguments import check_extra
from fulltune.train.parent.machines import MachineGroup
from fulltune.train.parent.measure import measure as fastest_here
from fulltune.train.parent.retry import PlannedTrial, train
from fulltune.train.parent.spawn import Starter, in_new_process

if TYPE_CHECKING:
    from fulltune.footprint.trace import PlannedModel

Until = Literal["data", "plan", "train", "evaluate", "report"]
"""The last stage to do."""


@dataclass(frozen=True)
class Run:
    """A recipe in its folder, with the user's own functions and who listens to progress."""

    recipe: Recipe
    folder: Path
    hooks: Hooks = field(default_factory=Hooks)
    listener: Listener = lambda event: None
    began: float | None = None
    """When the command or call that does the whole line began: seconds since 1970; None: single stages are called."""

    group: MachineGroup | None = None
    """As the first of several machines: all of them; None: there is only one."""

    @property
    def plan_path(self) -> Path:
        """Where the plan of the recipe's method lies."""
        return self.folder / "plan" / f"{self.recipe.method.label}.json"

    @cached_property
    def base(self) -> Base:
        """The pretrained model: found, its config and its processor read, once for all stages."""
        return Base.of(self.recipe.model, self.recipe.task, self.recipe.data.chat_template)

    def model(self, summary: DataSummary) -> PlannedModel:
        """The model as it is trained on these rows."""
        from fulltune.footprint.trace import PlannedModel  # imports torch

        return PlannedModel(self.recipe, self.base, summary)

    def need(self, summary: DataSummary) -> Callable[[Plan], MemoryNeed]:
        """The memory of a plan that is changed after it was made; the model is looked at when that is asked."""
        model = cache(lambda: self.model(summary))
        return lambda changed: plan.need_of(changed, self.recipe, model())

    @property
    def machine(self) -> Machine:
        """What training can count on: this machine, or the least of several."""
        return hardware.here() if self.group is None else self.group.weakest

    def phase(self, name: str) -> None:
        """Tell the listener what begins."""
        self.listener(PhaseBegan(name=name))

    @property
    def start(self) -> Starter:
        """How training processes are started."""
        return in_new_process if self.group is None else self.group.start


def run(job: Run, until: Until = "report", measure: bool = False) -> Reached:
    """Prepare, plan, train, evaluate and report; the same call continues an interrupted run."""
    if until not in ("data", "plan") and job.recipe.methods:
        raise RecipeError(
            "methods: names what to compare, and a run trains one method; use 'fulltune compare', or give one "
            "'method' in place of 'methods'"
        )
    job = job if job.began else replace(job, began=time.time())
    with run_folder.writing(job.folder), run_folder.locked(job.folder):
        with run_folder.not_left_when_refused(job.folder):
            if job.group is not None:
                job.group.begin(job.phase)
        # The ways out of what does not fit are looked up in the folder.
        with run_folder.not_left_when_refused(job.folder, *((DoesNotFitError,) if until == "plan" else ())):
            summary = prepare(job, runs_here=until != "data")
            if until == "data":
                return Reached(job.folder, summary)
            forget_old_speeds(job.folder, job.plan_path)
            trial = make_plan(job, summary)
        if measure:
            trial = measure_plan(job, trial, summary)
        if until == "plan":
            return Reached(job.folder, summary, trial)
        try:
            outcome = train_trial(job, trial, summary)
        except (GuardStop, DoesNotFitError) as stop:
            # The report says what was seen until then, and why there are no scores.
            raise type(stop)([*stop.problems, f"report: {write_report(job)}"]) from None
        trial = Plan.load(job.plan_path)  # changed when memory ran out
        if until == "train":
            return Reached(job.folder, summary, trial, outcome)
        scores = (*score_baselines(job, trial, summary), score_trial(job, trial, summary, outcome))
        if until == "evaluate":
            return Reached(job.folder, summary, trial, outcome, scores)
        return Reached(job.folder, summary, trial, outcome, scores, write_report(job))


def prepare(job: Run, runs_here: bool = True) -> DataSummary:
    """The data stage: read, check, split and tokenise; what only the training needs, also the model's weights, may be
    missing elsewhere."""
    job.phase("reading the data")
    path = job.folder / "data" / data.SUMMARY
    before = path.stat().st_mtime_ns if path.exists() else None
    job.hooks.check(job.recipe)
    try:
        base = job.base
        if runs_here:
            check_weights(base)
    except SetupError as error:
        raise SetupError([*error.problems, *data.wrong_files(job.recipe, job.hooks.preprocess)]) from None
    check_recipe(job.recipe, base, runs_here)
    check_texts(job.recipe.preserve)
    stage = data.Stage(
        job.recipe,
        job.folder / "data",
        base.processor,
        data.Limits.of(base, job.recipe),
        job.hooks.preprocess,
        planned_for=Plan.load(job.plan_path).data_fingerprint if job.plan_path.exists() else None,
        cache_folder=job.folder.parent / ".fulltune-cache",
        listener=job.listener,
    )
    summary = data.prepare(stage)
    check_settings_for(job.recipe, summary)
    job.hooks.check_data(summary)
    job.listener(DataPrepared(summary=summary, is_reused=before == path.stat().st_mtime_ns))
    return summary


def check_recipe(recipe: Recipe, base: Base, runs_here: bool) -> None:
    """Refuse what the libraries, the model or the method forbid, before any row is read."""
    check_extra(recipe, runs_here=runs_here)
    check_model(recipe, base)
    methods.check(recipe, base.config)


def audit_rows(job: Run, summary: DataSummary, reads_rows: bool = True) -> Audit:
    """What is wrong with single rows; with `reads_rows` the untouched model also judges labels and finds outliers."""
    if reads_rows and stage.by_model(summary):
        check_weights(job.base)
    job.phase("auditing the rows")
    return stage.audit(reader_of(job, summary), reads_rows)


def list_losses(job: Run, summary: DataSummary) -> Audit:
    """The loss of each train and eval row by the run's trained model; the highest ones are added to what was found."""
    trial = run_folder.trained_plan(job.recipe, job.folder, hardware.here())
    if summary.packed:
        raise SetupError(
            "--losses: texts share rows here, so that none has a loss of its own; train with data.packing=false"
        )
    job.phase("reading train and eval rows with the trained model")
    found = evaluate.losses(_scoring(job, trial, summary))
    return stage.list_losses(job.recipe, job.folder / "data", summary, found)


def reader_of(job: Run, summary: DataSummary) -> Reader:
    """What reads the run's rows with the untouched model."""
    return Reader(job.recipe, job.base, summary, job.folder / "data", job.listener)


def forget_old_speeds(folder: Path, path: Path) -> None:
    """Remove a plan that nothing has begun with and whose speeds are those of a busy machine, or of another day: it is
    made again. What `--measure` chose stays."""
    if not path.exists() or any((folder / name).exists() for name in ("attempts", "search", "plan/measured.json")):
        return
    if Plan.load(path).busy or time.time() - path.stat().st_mtime > 24 * 3600:
        path.unlink()


def make_plan(job: Run, summary: DataSummary) -> Plan:
    """The plan stage: settle every number, with its reason; a resumed run keeps them, but for where things lie."""
    job.phase("planning")
    machine = job.machine
    before = run_folder.plan_to_continue(job.plan_path, machine) if job.plan_path.exists() else None
    if before is not None and plan.is_placed_as(before, job.recipe):
        trial = before
    else:
        recipe = job.recipe if before is None else plan.as_begun(job.recipe, before)
        model = job.model(summary)
        footprint = model.footprint(recipe, *plan.device_and_precision(recipe, machine))
        model.save(footprint, job.folder)
        free, machines = hardware.disk_free_bytes(job.folder), job.recipe.train.num_machines
        fleet, own_loss = plan.here(machine, free, machines, str(job.folder)), job.hooks.compute_loss is not None
        started_seconds = None if job.began is None else time.time() - job.began
        workload = plan.Workload(recipe, model.shapes, lambda weights_dtype: footprint, summary)
        trial = plan.fit(workload, fleet, own_loss, started_seconds)
        if before is not None:
            trial = plan.placed_anew(before, trial)
        run_folder.environment(machine).save(job.folder / run_folder.ENVIRONMENT)
        run_folder.save_plan(job.folder, job.recipe, trial)
    job.listener(Planned(plan=trial))
    return trial


def measure_plan(job: Run, trial: Plan, summary: DataSummary) -> Plan:
    """Replace what was chosen by what is fastest here, measured; the rows of the table lie beside the plan."""
    if job.recipe.train.num_machines > 1:
        raise RecipeError("--measure: tries settings on one machine; set train.num_machines=1, and fewer processes")
    available, _ = plan.available(job.recipe, hardware.here(), trial.device)
    trial = fastest_here(_planned(job, trial, summary), summary, available)
    trial = plan.on_disk(job.recipe, trial, hardware.disk_free_bytes(job.folder), str(job.folder))
    run_folder.save_plan(job.folder, job.recipe, trial)
    job.listener(Planned(plan=trial))
    return trial


def train_trial(job: Run, trial: Plan, summary: DataSummary) -> Outcome:
    """The train stage: attempts under guard, until one succeeds or nothing is left to try."""
    if job.recipe.is_searched:
        raise RecipeError(
            "method.learning_rate: search takes several runs, and this is one; call fulltune.run, or name the rate"
        )
    return train(_planned(job, trial, summary), job.start)


def _planned(job: Run, trial: Plan, summary: DataSummary) -> PlannedTrial:
    return PlannedTrial(job.recipe, trial, job.folder, job.hooks, job.listener, job.need(summary))


def score_baselines(job: Run, trial: Plan, summary: DataSummary) -> list[Scores]:
    """What costs no training, on the same test rows: what the training has to beat."""
    if not job.recipe.evaluate.baselines:
        return []
    job.phase("scoring the baselines")
    return evaluate.baselines(_scoring(job, trial, summary))


def score_trial(job: Run, trial: Plan, summary: DataSummary, outcome: Outcome) -> Scores:
    """The trained model on the test rows."""
    job.phase("scoring the trained model")
    return evaluate.score(_scoring(job, trial, summary, job.hooks.metrics), outcome)


def _scoring(job: Run, trial: Plan, summary: DataSummary, metrics: UserMetrics | None = None) -> Scoring:
    found = evaluate.scoring_of(job.recipe, trial, summary, job.folder, job.base)
    return replace(found, user_metrics=metrics, listener=job.listener)


def write_report(job: Run) -> Path:
    """The report stage: from files alone."""
    job.phase("writing the report")
    if job.began is not None:
        run_folder.note_command(job.folder, job.began)
    path = report.write(job.folder)
    if (model_folder := job.folder / "models" / job.recipe.method.label).exists():
        report.write_model_card(job.folder, model_folder)
    return path
