"""The search among settings that the recipe lists: whole runs, each in a run folder of its own.

Where the values make few combinations each is tried, else Optuna draws them (TPE, Bergstra et al. 2011).

The recipe's own settings get a run, too, and are kept unless others are ahead by more than a standard error on the
eval rows. Of the runs so far only the best one's weights stay on the disk.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from fulltune import pipeline
from fulltune.compare import rate_search
from fulltune.errors import Diverged, RecipeError, SetupError
from fulltune.recipe.rules import with_settings
from fulltune.records.data import DataSummary
from fulltune.records.events import DataPrepared, Event, Listener, Said
from fulltune.records.plan import Plan, Setting
from fulltune.records.scores import Estimate
from fulltune.records.search import Searched, TriedSettings
from fulltune.run_context import Run
from fulltune.search.folder import FOLDER, adopt, make
from fulltune.stats.bootstrap import Resampled
from fulltune.stats.intervals import paired
from fulltune.stats.row_scores import measure_of
from fulltune.tasks import Target
from fulltune.text import counted, format_metric, format_seconds, is_share, listed, parse_seconds, typed_seconds

USUAL = "usual"
"""The folder of the run with the recipe's own settings."""
_DRAWS = 10
"""So many times as many draws at most: some are drawn twice."""


@dataclass(frozen=True)
class _Trials:
    """Runs with other settings, of one search."""

    job: Run
    summary: DataSummary

    @property
    def folder(self) -> Path:
        return self.job.folder / FOLDER

    def name(self, settings: Mapping[str, Any]) -> str:
        """Of a combination: the places of its values in their lists."""
        block = self.job.recipe.search.settings
        return "-".join(str(values.index(settings[key]) + 1) for key, values in block.items())

    def record(self, name: str) -> Path:
        return self.folder / "trials" / f"{name}.json"

    def job_of(self, name: str, settings: dict[str, Any]) -> Run:
        recipe = with_settings(self.job.recipe, settings)
        recipe = recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"baselines": False})})
        folder = self.folder / name
        make(folder, recipe, self.job.folder / "data")
        return replace(self.job, recipe=recipe, folder=folder, listener=_quiet(self.job.listener), began=None)

    def run(self, name: str, settings: dict[str, Any]) -> TriedSettings:
        """Train with these settings and score the test rows, which nothing here reads; done before, it is known."""
        if (path := self.record(name)).exists():
            return TriedSettings.load(path)
        began = time.monotonic()
        try:
            reached = pipeline.run(self.job_of(name, settings), "evaluate")
            assert reached.outcome is not None, "asked for"
            metric = reached.outcome.best_metric
        except Diverged:
            metric = None
        found = TriedSettings(
            name=name,
            settings=settings,
            metric=math.nan if metric is None else metric,
            seconds=round(time.monotonic() - began, 1),
        )
        found.save(path)
        return found

    def plan(self, name: str) -> Plan:
        return Plan.load(self.folder / name / "plan" / f"{self.job.recipe.method.arm}.json")

    def drop_weights(self, name: str) -> None:
        for part in ("models", "checkpoints"):
            shutil.rmtree(self.folder / name / part, ignore_errors=True)


def search(job: Run, summary: DataSummary, planned: Plan) -> Searched:
    """Find the best settings, and put the run with them into the run folder.

    Args:
        job: The recipe in its run folder.
        summary: Of its prepared rows.
        planned: The plan with the recipe's own settings.

    Raises:
        SetupError: When Optuna is missing.
        RecipeError: When the budget is too short for two runs.
        FulltuneError: Of a run; that it diverged is a result.
    """
    block, trials = job.recipe.search, _Trials(job, summary)
    budget = None if block.budget is None else parse_seconds(block.budget)
    combinations = math.prod(len(values) for values in block.settings.values())
    most = min(block.trials, combinations)
    run_seconds = planned.time.whole_seconds if planned.time else 0.0
    _refuse_short(budget, run_seconds)
    job.listener(
        Said(
            text=f"search among {counted(combinations, 'combination')} of {listed(list(block.settings))}: the recipe's "
            f"own settings and {counted(most, 'run')}, about {format_seconds(round((1 + most) * run_seconds))}"
            + (f" (budget: {typed_seconds(budget)})" if budget is not None else "")
        )
    )
    scale = rate_search.Scale(planned.greater_is_better, summary.splits["eval"].rows, is_share(planned.metric))
    found, time_was_up = [trials.run(USUAL, {})], False
    draws = combinations_of(block.settings) if combinations <= most else _drawn(job, trials.folder, found, scale)
    for settings in draws:
        name = trials.name(settings)
        if name in {one.name for one in found}:
            continue
        longest = max(one.seconds for one in found)
        if budget is not None and not trials.record(name).exists():
            time_was_up = sum(one.seconds for one in found) + longest > budget
        if time_was_up:
            job.listener(Said(text="the budget is used up: the best of the runs so far is taken"))
            break
        found.append(one := trials.run(name, settings))
        said = listed([f"{key.split('.')[-1]} {value}" for key, value in settings.items()])
        job.listener(Said(text=f"{said}: {planned.metric} {format_metric(planned.metric, one.metric)}"))
        best = choice(found, scale)
        for loser in found:
            if loser.name != best.name:
                trials.drop_weights(loser.name)
        if len(found) > most:
            break
    best = choice(found, scale)
    if math.isnan(best.metric):
        raise Diverged("search: the training diverged with all settings that were tried; lower the learning rate")
    reason = (
        "searched: the best of" if best.settings else "kept by the search: none of the others was clearly better in"
    )
    chosen = tuple(
        Setting(name=name, value=value, reason=f"{reason} {counted(len(found), 'whole run')}", chosen=True)
        for name, value in best.settings.items()
    )
    made = trials.plan(best.name)
    result = Searched(
        trial=made.trial,
        settings=best.settings,
        metric_name=planned.metric,
        greater_is_better=planned.greater_is_better,
        eval_rows=scale.eval_rows,
        candidates=tuple(sorted(found, key=lambda one: scale.oriented(one.metric), reverse=True)),
        num_combinations=combinations,
        bought=_bought(trials, best),
        confidence=job.recipe.evaluate.confidence,
        seconds=round(sum(one.seconds for one in found), 1),
        run_seconds=best.seconds,
        budget_seconds=budget,
        time_was_up=time_was_up,
    )
    adopt(trials.folder / best.name, made, job.folder, planned.method, chosen)
    for one in found:
        trials.drop_weights(one.name)
    return result


def choice(found: list[TriedSettings], scale: rate_search.Scale) -> TriedSettings:
    """The best run, where it is ahead of the first one, with the usual settings, by more than a standard error."""
    usual, *_ = found
    best = max(found, key=lambda one: scale.oriented(one.metric))
    ahead = scale.oriented(best.metric) - scale.oriented(usual.metric)
    return best if ahead > scale.tolerance(best.metric) else usual


def _refuse_short(budget: float | None, run_seconds: float) -> None:
    if budget is not None and budget < 2 * run_seconds:
        buys = counted(int(budget / run_seconds), "run")
        enough = typed_seconds(rate_up(2.3 * run_seconds))
        raise RecipeError(
            f"search.budget: is too short for a search: it buys {buys} of about {format_seconds(round(run_seconds))}, "
            f"and two are the least; give --budget {enough} or more, or leave out the search"
        )


def rate_up(seconds: float) -> float:
    return float(10 * math.ceil(seconds / 10))


def _bought(trials: _Trials, best: TriedSettings) -> Estimate | None:
    """The best run's metric on the test rows less that of the usual settings; None: they are the same."""
    if best.name == USUAL:
        return None
    files = [trials.folder / name / "scores" / f"{trials.plan(name).trial}.npz" for name in (best.name, USUAL)]
    if not all(file.exists() for file in files):  # the usual settings diverged
        return None
    recipe, metric = trials.job.recipe, trials.plan(best.name).metric
    span = measure_of(recipe.task, Target.of(trials.summary), metric).span
    mine, other = map(Resampled.load, files)
    return paired(mine, other, span, recipe.evaluate.confidence)


def _quiet(listener: Listener) -> Listener:
    """Of a trial what moves: the tables of all trials would hide the search."""

    def listen(event: Event) -> None:
        if not isinstance(event, DataPrepared):
            listener(event)

    return listen


def combinations_of(values: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    """Each combination of the values, in their order."""
    for chosen in product(*values.values()):
        yield dict(zip(values, chosen, strict=True))


def _drawn(job: Run, folder: Path, found: list[TriedSettings], scale: rate_search.Scale) -> Iterator[dict[str, Any]]:
    """Combinations that Optuna draws, each when the one before is in `found`.

    Raises:
        SetupError: When Optuna is missing.
    """
    try:
        import optuna
    except ImportError:
        raise SetupError(
            "search: makes more combinations than search.trials, so that Optuna draws some, and it is missing; install "
            "it with pip install 'fulltune[search]', or raise search.trials"
        ) from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    values, block = job.recipe.search.settings, job.recipe.search
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=job.recipe.train.seed), direction="maximize")
    for _ in range(_DRAWS * block.trials):
        trial = study.ask()
        places = {name: trial.suggest_categorical(name, range(len(listed_))) for name, listed_ in values.items()}
        settings = {name: values[name][place] for name, place in places.items()}
        yield settings
        metric = next(one.metric for one in found if one.settings == settings)
        told = scale.oriented(metric)
        study.tell(
            trial,
            told if math.isfinite(told) else None,
            state=None if math.isfinite(told) else optuna.trial.TrialState.FAIL,
        )
