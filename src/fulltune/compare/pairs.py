"""Choose whether a run reads the two texts of a row together or apart, by a linear probe of both ways and, with enough
rows, by two short trainings. Test rows are not used."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from dataclasses import replace

from fulltune import evaluate, pipeline
from fulltune.compare.context import Context
from fulltune.compare.trials import run_trial
from fulltune.data.prepare import link_cached_rows
from fulltune.models.shapes import why_unfit_for_task
from fulltune.pipeline import Run
from fulltune.plan.settings import with_settings
from fulltune.recipe.model import PairsReading
from fulltune.recipe.tasks import FACTS, TEXT_PAIRS
from fulltune.records.comparison import Trial
from fulltune.records.data import SOURCES, DataSummary
from fulltune.records.events import Message, only_steps_and_warnings
from fulltune.records.run import PairsChoice
from fulltune.system import run_folder
from fulltune.system.memory import release_unused

FOLDER = "pairs"
LEAST_TRAIN, LEAST_EVAL = 1_000, 100
"""Minimum numbers of rows for short trainings; with fewer, the probe decides."""
SHARE = 1 / 3
_WAYS: tuple[PairsReading, ...] = ("joint", "apart")  # the first if both are equal


def choose_pairs(job: Run, summary: DataSummary) -> Run:
    """Choose how pairs are read, unless the recipe or an earlier command did or the rows are no pairs; record the
    choice, and return the run that reads them so."""
    if not _is_open(job, summary):
        return job
    folder = job.folder / FOLDER
    if why := _why_joint(job):
        choice = PairsChoice(pairs="joint", reason=why)
    else:
        job.phase("choosing how pairs are read")
        contexts = {way: _context(job, way) for way in _WAYS}
        choice = _compare(contexts)
        if choice.pairs == "apart":
            shutil.rmtree(job.folder / "plan", ignore_errors=True)  # of rows that are read together
            link_cached_rows(folder / "apart" / "data", job.folder / "data")
    choice.save(job.folder / run_folder.PAIRS)
    shutil.rmtree(folder, ignore_errors=True)
    job.listener(Message(text=f"pairs: read {choice.pairs}: {choice.reason}"))
    return replace(job)


def announce_choice(job: Run, summary: DataSummary) -> Run:
    """Say that a plan of pairs precedes the choice."""
    if _is_open(job, summary):
        message = "this plan reads pairs jointly; 'fulltune run' first chooses between joint and apart (model.pairs)"
        job.listener(Message(text=message))
    return job


def _is_open(job: Run, summary: DataSummary) -> bool:
    return job.recipe.model.pairs == "auto" and "text_pair" in summary.columns and job.pairs_choice is None


def _why_joint(job: Run) -> str | None:
    """Return the reason why both ways cannot be tried, or None."""
    recipe = job.recipe
    if why := why_unfit_for_task(job.base.config, FACTS[TEXT_PAIRS]):
        return why
    if recipe.train.placement == "stream" or recipe.model.random_weights:
        return "a linear probe of both ways needs pretrained weights that are all in memory"
    if job.group is not None or job.hooks.compute_loss is not None:
        return "both ways are tried only on one machine, without a loss from Python"
    return None


def _context(job: Run, way: PairsReading) -> Context:
    """Prepare the rows as they are read in one of the ways, in a folder of its own."""
    folder = job.folder / FOLDER / way
    recipe = with_settings(job.recipe.read(way), {"model.pairs": way})
    run_folder.find_or_make_folder(recipe, "", way, folder, fresh=False)
    if (sources := job.folder / SOURCES).exists():  # the same revision
        shutil.copy2(sources, folder)
    if way == "joint" and not (folder / "data").exists():
        link_cached_rows(job.folder / "data", folder / "data")
    inner = replace(job, recipe=recipe, folder=folder, listener=only_steps_and_warnings(job.listener))
    return Context(inner, pipeline.prepare(inner), "")


def _compare(contexts: Mapping[PairsReading, Context]) -> PairsChoice:
    """Choose by the checkpoint's head, else by short trainings, else by the probe."""
    setups = {way: context.method_setup(context.full.label) for way, context in contexts.items()}
    for way, setup in setups.items():
        if setup.shapes.head_is_kept:
            return PairsChoice(pairs=way, reason="the checkpoint has a head for these labels that reads pairs so")
    probes = {way: evaluate.load_or_fit_probe(context.scoring).head for way, context in contexts.items()}
    losses = {way: math.inf if start is None else start.loss for way, start in probes.items()}
    release_unused()  # by the models that the probes read
    best = min(_WAYS, key=losses.__getitem__)
    splits = contexts[best].summary.splits
    if splits["train"].rows < LEAST_TRAIN or splits["eval"].rows < LEAST_EVAL:
        why = f"a linear probe of the pretrained model has a held-out loss of {_both(losses)}"
        return PairsChoice(pairs=best, reason=f"{why}; more rows would be tried in training", losses=losses)
    plan, metrics = setups[best].plan, dict[PairsReading, float]()
    for way, context in contexts.items():
        rate, seed = setups[way].plan.learning_rate, setups[way].plan.seed
        trial = Trial(name=way, method=context.full.label, learning_rate=rate, seed=seed, share=SHARE, searches=True)
        metrics[way] = run_trial(context, trial).metric
    worst, sign = -math.inf, 1 if plan.greater_is_better else -1
    ranked = {way: sign * value if math.isfinite(value) else worst for way, value in metrics.items()}
    best = max(_WAYS, key=lambda way: (ranked[way], -losses[way]))
    why = f"{plan.metric} on the eval rows after a third of the steps is {_both(metrics)}"
    return PairsChoice(pairs=best, reason=why, losses=losses, metrics=metrics)


def _both(values: Mapping[PairsReading, float]) -> str:
    return f"{values['apart']:.3g} if they are read apart, {values['joint']:.3g} if jointly"
