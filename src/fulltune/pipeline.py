"""The straight line: data, plan, train, evaluate, report. Layer 3: the only place that knows all stages."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

from fulltune import data, evaluate, methods, plan, report
from fulltune.errors import DoesNotFitError, GuardStop, RecipeError, SetupError
from fulltune.footprint import records as footprint
from fulltune.models import load as model
from fulltune.models import packing, processors
from fulltune.recipe.fields import Recipe, with_attention
from fulltune.recipe.methods import Method
from fulltune.recipe.tasks import FACTS, TaskName
from fulltune.records.data import DataSummary
from fulltune.records.plan import MemoryNeed, Plan
from fulltune.records.scores import Scores
from fulltune.records.training import Outcome
from fulltune.stats.paired import paired
from fulltune.stats.row_scores import measure_of
from fulltune.system import hardware, run_folder
from fulltune.tasks import Target, Task, task_named
from fulltune.tasks.settings import check_settings_for
from fulltune.train.hooks import Hooks
from fulltune.train.loop.arguments import check_extra
from fulltune.train.parent.measure import measure as train_measure
from fulltune.train.parent.retry import train

FOOTPRINT, SHAPES = "footprint.json", "shapes.json"
"""In `plan`: the model's memory as traced for this machine's plan, and its sizes."""
Listener = Callable[[dict[str, Any]], None]
Until = Literal["data", "plan", "train", "evaluate", "report"]


@dataclass(frozen=True)
class Run:
    """A recipe in its folder."""

    recipe: Recipe
    folder: Path
    hooks: Hooks = field(default_factory=Hooks)
    listener: Listener = lambda event: None
    began: float | None = None
    """When the command or call that does the whole line began: seconds since 1970; None: single stages are called."""

    @property
    def task(self) -> Task:
        return task_named(self.recipe.task)

    def phase(self, name: str) -> None:
        self.listener({"kind": "phase", "name": name})


@dataclass(frozen=True, repr=False)
class Reached:
    """What the stages gave, as far as they were asked to go."""

    folder: Path
    summary: DataSummary
    plan: Plan | None = None
    outcome: Outcome | None = None
    scores: tuple[Scores, ...] = ()
    report: Path | None = None

    def __repr__(self) -> str:
        lines = [f"Reached: {self.folder}"]
        for entry in self.scores:
            if (found := entry.metrics.get(entry.main_metric)) is not None:
                lines.append(
                    f"  {entry.name}: {entry.main_metric} {found.value:.4g} [{found.low:.4g}, {found.high:.4g}]"
                )
        return "\n".join([*lines, *([f"  report: {self.report}"] if self.report else [])])


def run(job: Run, until: Until = "report", measure: bool = False) -> Reached:
    """Prepare, plan, train, evaluate and report.

    Each stage writes files into the run folder and is skipped when they are there, so that the same call continues an
    interrupted run.

    Args:
        job: The recipe, its run folder, the user's functions and who listens to progress.
        until: The last stage to do.
        measure: Try the plan's settings on this machine and take the fastest that fit.

    Returns:
        The records of all stages that were reached.

    Raises:
        FulltuneError: One of its kinds, each with its exit code.
    """
    if job.recipe.methods and until not in ("data", "plan"):
        raise RecipeError(
            "methods: names what to compare, and a run trains one method; use 'fulltune compare', or give one 'method' "
            "in place of 'methods'"
        )
    job = replace(job, began=job.began or time.time())
    with run_folder.writing(job.folder), run_folder.locked(job.folder):
        # The ways out of what does not fit are looked up in the folder.
        with run_folder.not_left_when_refused(job.folder, *((DoesNotFitError,) if until == "plan" else ())):
            summary = prepare(job, runs_here=until != "data")
            if until == "data":
                return Reached(job.folder, summary)
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
        trial = Plan.load(_plan_path(job))  # changed when memory ran out
        if until == "train":
            return Reached(job.folder, summary, trial, outcome)
        scores = (*score_baselines(job, trial, summary), score_trial(job, trial, summary, outcome))
        if until == "evaluate":
            return Reached(job.folder, summary, trial, outcome, scores)
        return Reached(job.folder, summary, trial, outcome, scores, write_report(job))


def finished(job: Run) -> Reached | None:
    """What a finished run left, from its files alone; None: something is left to do.

    Raises:
        SetupError: When the weights of its model are gone.
    """
    path, summary_path = _plan_path(job), job.folder / "data" / "summary.json"
    if not run_folder.is_complete(job.folder) or not path.exists() or not summary_path.exists():
        return None
    trial = Plan.load(path)
    lost = run_folder.lost_weights(job.folder / trial.model_folder)
    if lost is not None:
        raise SetupError(
            f"{lost}: is missing, though this run finished at {run_folder.finished_at(job.folder):%Y-%m-%d %H:%M}; put "
            "it back, or train it again as a new run: 'fulltune run RECIPE --fresh'"
        )
    files = sorted((job.folder / "scores").glob("*.json"), key=lambda file: file.stat().st_mtime)  # as they were made
    scores = tuple(sorted(map(Scores.load, files), key=lambda one: one.kind == "trained"))
    report_path = job.folder / run_folder.REPORT
    return Reached(job.folder, DataSummary.load(summary_path), trial, None, scores, report_path)


def _plan_path(job: Run) -> Path:
    return job.folder / "plan" / f"{job.recipe.method.arm}.json"


def prepare(job: Run, runs_here: bool = True) -> DataSummary:
    """The data stage: read, check, split and tokenise; what only the training needs may be missing elsewhere."""
    job.phase("reading the data")
    path = job.folder / "data" / data.SUMMARY
    before = path.stat().st_mtime_ns if path.exists() else None
    job.hooks.check(job.recipe)
    check_extra(job.recipe, runs_here=runs_here)
    evaluate.check_extras(job.recipe)
    source = model.locate(job.recipe.model)
    model.refuse_partial(job.recipe.model, source)
    config = model.load_config(job.recipe.model, source)
    check_model(job.recipe, config)
    methods.check(job.recipe, config)
    tokenizer = processors.load_processor(job.recipe.model, job.recipe.task, source, job.recipe.data.chat_template)
    reads_text = FACTS[job.recipe.task].reads == "text"
    vocabulary = getattr(config.get_text_config(), "vocab_size", None) if reads_text else None
    if vocabulary is not None and len(tokenizer) > vocabulary:
        raise SetupError(
            f"model: {job.recipe.model.name}: its tokenizer has {len(tokenizer)} tokens, but the model knows only "
            f"{vocabulary}; they do not belong together"
        )
    summary = data.prepare(
        job.recipe,
        job.folder / "data",
        job.task,
        tokenizer,
        data.Limits(
            model.position_limit(config) if reads_text else None,
            model.identity(config, job.recipe.model.attn_implementation),
            lambda: packing.obstacle(config, job.recipe.model.attn_implementation),
            methods.virtual_tokens(job.recipe),
        ),
        job.hooks.preprocess,
        planned_for=Plan.load(_plan_path(job)).data_fingerprint if _plan_path(job).exists() else None,
        cache_folder=job.folder.parent / ".fulltune-cache",
        listener=job.listener,
    )
    check_settings_for(job.recipe, summary)
    job.hooks.check_data(summary)
    job.listener({"kind": "data", "summary": summary, "is_known": before == path.stat().st_mtime_ns})
    return summary


def check_model(recipe: Recipe, config: Any) -> None:
    """Refuse a model that the task cannot use or that cannot be trained here."""
    problem = task_named(recipe.task).check_model(config)
    if problem is not None:
        raise SetupError(f"model: {recipe.model.name}: {problem}")
    experts = [getattr(config.get_text_config(), name, None) for name in ("num_local_experts", "num_experts")]
    if any(isinstance(count, int) and count > 1 for count in experts):
        # transformers 5.24 saves experts under other names than it trains them: a resumed run would lose them.
        raise SetupError(f"model: {recipe.model.name}: is a mixture of experts, which cannot be trained here yet")


def make_plan(job: Run, summary: DataSummary) -> Plan:
    """The plan stage: settle every number, with its reason."""
    job.phase("planning")
    machine = hardware.here()
    path = _plan_path(job)
    if path.exists():
        # A resumed run keeps its numbers, even when memory or cores are others now; the model need not be looked at.
        trial = Plan.load(path)
        if trial.device == "cuda" and not machine.gpus:
            raise SetupError(f"{job.folder}: was planned for a GPU, and there is none here; start a new run (--fresh)")
    else:
        source = model.locate(job.recipe.model)
        tokenizer = processors.load_processor(job.recipe.model, job.recipe.task, source)
        target = Target.of(summary)
        changes = job.task.config_changes(target, tokenizer)
        shapes = shapes_of(job.recipe, changes)
        traced = trace(job.recipe, target, summary.packed, shapes, machine, source, changes)
        traced.save(job.folder / "plan" / FOOTPRINT)
        shapes.save(job.folder / "plan" / SHAPES)
        fleet, own_loss = plan.here(machine, hardware.disk_free_bytes(job.folder)), job.hooks.compute_loss is not None
        trial = plan.fit(job.recipe, shapes, traced, summary, fleet, own_loss)
        started_seconds = None if job.began is None else time.time() - job.began
        trial = plan.with_time(trial, job.recipe, shapes, traced, summary, fleet, started_seconds)
        run_folder.environment(machine).save(job.folder / "environment.json")
        _save_plan(job, trial)
    job.listener({"kind": "plan", "plan": trial})
    return trial


@dataclass(frozen=True)
class Preparing:
    """What training does to a model before it starts; as a value, so that equal ones are traced once."""

    method: Method
    task: TaskName
    on_cpu: bool

    @classmethod
    def of(cls, recipe: Recipe, on_cpu: bool) -> Preparing:
        """Of a recipe's method, whatever its rate."""
        same = {"name": None, "learning_rate": None, "learning_rates": None}
        return cls(recipe.method.model_copy(update=same), recipe.task, on_cpu)

    def __call__(self, built: Any) -> None:
        from fulltune.models import dropout  # imports torch

        if self.method.kind != "full":
            methods.apply(built, self.method, self.task)
        if self.on_cpu:
            dropout.install(built)


def shapes_of(recipe: Recipe, changes: Mapping[str, Any], weights: bool = True) -> model.Shapes:
    """The model's sizes, with what the recipe's method adds to it and trains of it.

    Raises:
        RecipeError: When the method cannot work on this model.
    """
    apply = Preparing.of(recipe, on_cpu=False) if recipe.method.kind != "full" else None
    return model.shapes(recipe.model, FACTS[recipe.task].auto_class, changes, weights, apply)


def _save_plan(job: Run, trial: Plan) -> None:
    resolved = [setting.model_dump(mode="json") for setting in trial.settings]
    (job.folder / "resolved.json").write_text(json.dumps(resolved, indent=2) + "\n", encoding="utf-8")
    trial.save(job.folder / trial.file)  # last: with a plan the others are there as well


def measure_plan(job: Run, trial: Plan, summary: DataSummary) -> Plan:
    """Replace what was chosen by what is fastest here, measured; the rows of the table lie beside the plan."""
    if job.hooks.needs_this_process:
        raise SetupError("measure: compute_loss cannot be handed to the processes that measure")
    if any((job.folder / "attempts").glob("*")):
        raise SetupError(f"{job.folder}: has begun to train with these settings; measure in a new run (--fresh)")
    available = _rooms(job, summary)(trial).available_bytes
    need = _need(job, summary)
    trial, found = train_measure(job.recipe, trial, summary, job.folder, available, need, job.listener)
    trial = plan.on_disk(job.recipe, trial, summary, hardware.disk_free_bytes(job.folder))
    found.save(job.folder / "plan" / "measured.json")
    _save_plan(job, trial)
    job.listener({"kind": "plan", "plan": trial})
    return trial


def _rooms(job: Run, summary: DataSummary) -> Callable[[Plan], plan.Room]:
    """The plan stage's arithmetic for a plan with another precision or attention, traced when it is asked for."""
    machine, source, target = hardware.here(), model.locate(job.recipe.model), Target.of(summary)
    tokenizer = processors.load_processor(job.recipe.model, job.recipe.task, source)
    changes = job.task.config_changes(target, tokenizer)
    shapes = shapes_of(job.recipe, changes)

    @cache
    def room(precision: str, attention: str | None) -> plan.Room:
        block = job.recipe.train.model_copy(update={"precision": precision})
        same = with_attention(job.recipe.model_copy(update={"train": block}), attention)
        traced = trace(same, target, summary.packed, shapes, machine, source, changes)
        return plan.room(same, shapes, traced, machine, plan.device_and_precision(same, machine)[0])

    return lambda changed: room(changed.precision, changed.attn_implementation)


def _need(job: Run, summary: DataSummary) -> Callable[[Plan], MemoryNeed | None]:
    """The memory of a plan that is changed later; nothing is read before it is asked."""
    rooms = cache(lambda: _rooms(job, summary))
    return lambda changed: rooms()(changed).need(plan.levers_of(job.recipe, changed, summary))


def trace(
    recipe: Recipe,
    target: Target,
    packed: bool,
    shapes: model.Shapes,
    machine: hardware.Machine,
    source: model.Source,
    changes: Mapping[str, Any],
    weights_dtype: str | None = None,
) -> footprint.Footprint:
    """The model's memory and work as functions of the micro batch, without its weights.

    Args:
        recipe: Says how the model is trained.
        target: What the task learns.
        packed: Several texts share a row.
        shapes: The model's sizes.
        machine: Where it is trained.
        source: Where the model's files are.
        changes: Of the model's config, by the task.
        weights_dtype: Another type of the weights than the recipe's.
    """
    device, precision = plan.device_and_precision(recipe, machine)
    pixels, assumed = None, ""
    if FACTS[recipe.task].reads == "image":
        pixels, assumed = processors.image_shape(recipe.model, source)
    found = footprint.trace(
        model.configured(recipe.model, source, changes),
        task_named(recipe.task),
        target,
        weights_dtype=weights_dtype or recipe.model.weights_dtype,
        precisions=(precision,),
        # Both, whatever the recipe says: the other one can be a way out.
        checkpointing=(False, True) if shapes.can_recompute else (False,),
        attn_implementation=recipe.model.attn_implementation,
        packed=packed,
        num_parameters=shapes.num_held or shapes.num_parameters,
        all_trained=shapes.num_trained is None,
        prepare=Preparing.of(recipe, on_cpu=device == "cpu"),
        pixels=pixels,
    )
    return found.model_copy(update={"assumed": assumed}) if assumed else found


def score_baselines(job: Run, trial: Plan, summary: DataSummary) -> list[Scores]:
    """What costs no training, on the same test rows: what the training has to beat."""
    if not job.recipe.evaluate.baselines:
        return []
    job.phase("scoring the baselines")
    path = job.folder / "plan" / SHAPES
    head_is_kept = path.exists() and model.Shapes.load(path).head_is_kept
    return evaluate.baselines(job.recipe, trial, summary, job.folder, head_is_kept, job.listener)


def train_trial(job: Run, trial: Plan, summary: DataSummary) -> Outcome:
    """The train stage."""
    return train(job.recipe, trial, job.folder, job.hooks, job.listener, _need(job, summary))


def score_trial(job: Run, trial: Plan, summary: DataSummary, outcome: Outcome) -> Scores:
    """The trained model on the test rows."""
    job.phase("scoring the trained model")
    scores = evaluate.score(job.recipe, trial, summary, outcome, job.folder, job.hooks.metrics, job.listener)
    span = measure_of(job.recipe.task, Target.of(summary), trial.metric).span
    return evaluate.with_differences(job.folder, scores, partial(paired, span=span, confidence=scores.confidence))


def write_report(job: Run) -> Path:
    """The report stage: from files alone."""
    job.phase("writing the report")
    if job.began is not None:
        run_folder.note_command(job.folder, job.began)
    path = report.write(job.folder)
    model_folder = job.folder / "models" / job.recipe.method.arm
    if model_folder.exists():
        report.write_model_card(job.folder, model_folder)
    return path
