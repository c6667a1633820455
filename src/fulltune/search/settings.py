"""The search among the settings that the recipe lists: all combinations where few, else drawn by Optuna (TPE)."""

from __future__ import annotations

import importlib.util
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fulltune import pipeline
from fulltune.compare.design import FORECAST_AGAIN, round_up
from fulltune.compare.rate_search import Scale
from fulltune.compare.trial_folder import Clock, changed, trial_of
from fulltune.errors import DoesNotFitError, GuardStop, RecipeError, SetupError
from fulltune.pipeline import Run
from fulltune.recipe.several_runs import combinations, num_combinations, why_impossible, with_settings
from fulltune.records.comparison import Searched, TriedSettings
from fulltune.records.data import DataSummary
from fulltune.records.events import Said
from fulltune.records.plan import Plan
from fulltune.records.scores import Estimate
from fulltune.search import FOLDER
from fulltune.stats.bootstrap import Resampled
from fulltune.stats.intervals import paired
from fulltune.stats.row_scores import measure_of
from fulltune.tasks import Target
from fulltune.text import counted, format_metric, format_seconds, is_share, listed, parse_seconds, typed_seconds

USUAL = "usual"
"""The folder of the run with the recipe's own settings."""
_DRAWS = 10
"""So many times as many draws as runs: some come twice, and some are impossible."""
Tell = Callable[[float], None]


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
        return "-".join(str(values.index(settings[key]) + 1) for key, values in block.items()) if settings else USUAL

    def record(self, name: str) -> Path:
        return self.folder / "trials" / f"{name}.json"

    def run(self, settings: dict[str, Any]) -> TriedSettings:
        """Train with these settings; done before, it is known. That it diverged or does not fit is a result, too."""
        name = self.name(settings)
        if (path := self.record(name)).exists():
            return TriedSettings.load(path)
        clock, metric, problem = Clock(path.with_suffix(".jsonl")), None, ""
        try:
            # What the best settings bought is asked of the usual run's weights, which do not stay on the disk.
            with clock.during(name):
                reached = pipeline.run(self._job(name, settings), "train" if settings else "evaluate")
            assert reached.outcome is not None, "asked for"
            metric = reached.outcome.best_metric
            problem = "" if metric is not None else "its eval rows were never scored"
        except (GuardStop, DoesNotFitError) as stop:
            problem = "; ".join(stop.problems)
        value, seconds = math.nan if metric is None else metric, round(clock.spent_seconds, 1)
        found = TriedSettings(name=name, settings=settings, metric=value, seconds=seconds, problem=problem)
        found.save(path)
        return found

    def _job(self, name: str, settings: dict[str, Any]) -> Run:
        # Going on at half the rate, it would not tell whether these settings are any good.
        only: dict[str, dict[str, Any]] = {"evaluate": {"baselines": False}, "train": {"max_rollbacks": 0}}
        recipe = changed(with_settings(self.job.recipe, settings), only)
        return trial_of(self.job, recipe, self.folder / name, self.job.folder / "data")

    def score(self, one: TriedSettings) -> None:
        """The test rows of a run whose weights are there."""
        pipeline.run(self._job(one.name, one.settings), "evaluate")

    def plan(self, name: str) -> Plan:
        return Plan.load(self.folder / name / "plan" / f"{self.job.recipe.method.arm}.json")


def search(job: Run, summary: DataSummary, planned: Plan) -> Searched:
    """Find the best settings in whole runs; the recipe's own are kept unless clearly beaten on eval rows."""
    block, trials = job.recipe.search, _Trials(job, summary)

    def say(text: str) -> None:
        job.listener(Said(text=text))

    budget = None if block.budget is None else parse_seconds(block.budget)
    possible = num_combinations(block.settings)
    most, draws = min(block.trials, possible), possible > block.trials
    _check_first(draws, budget, planned, trials)
    run_seconds = planned.time.whole_seconds if planned.time else 0.0
    left = 1 + most - len(list(trials.record(USUAL).parent.glob("*.json")))
    say(
        f"search: {counted(1 + most, 'whole run')}, with the recipe's own settings and {most} of "
        f"{counted(possible, 'combination')} of {listed(list(block.settings))}; {left} to do, about "
        f"{format_seconds(round(left * run_seconds))}"
        + (f" (budget: {typed_seconds(budget)})" if budget is not None else "")
    )

    def run(number: int, settings: dict[str, Any]) -> TriedSettings:
        what = (
            listed([f"{key.split('.')[-1]} {value}" for key, value in settings.items()]) or "the recipe's own settings"
        )
        say(f"run {number} of {1 + most}: {what}")
        one = trials.run(settings)
        say(f"  {one.problem or f'{planned.metric} {format_metric(planned.metric, one.metric)} on the eval rows'}")
        return one

    scale = Scale(planned.greater_is_better, summary.splits["eval"].rows, is_share(planned.metric))
    found, time_was_up = [run(1, {})], False
    for settings, tell in _drawn(job, scale) if draws else ((one, None) for one in combinations(block.settings)):
        known = next((one for one in found if _is_the_same(job, one.settings, settings)), None)
        if known is None:
            longest, spent = max(one.seconds for one in found), sum(one.seconds for one in found)
            begins = not trials.record(trials.name(settings)).exists()
            if time_was_up := begins and budget is not None and spent + longest > budget:
                say("the budget is used up: the best of the runs so far is taken")
                break
            found.append(known := run(1 + len(found), settings))
            kept = choice(found, scale)
            for one in found:
                for part in ("models", "checkpoints") if one.name != kept.name else ():
                    shutil.rmtree(trials.folder / one.name / part, ignore_errors=True)
        if tell is not None:
            tell(scale.oriented(known.metric))
        if len(found) > most:
            break
    return _searched(trials, found, planned, scale).model_copy(
        update={"budget_seconds": budget, "time_was_up": time_was_up}
    )


def _searched(trials: _Trials, found: Sequence[TriedSettings], planned: Plan, scale: Scale) -> Searched:
    """The record of these runs, the first with the recipe's own settings; GuardStop when every run failed."""
    block = trials.job.recipe.search
    best = choice(found, scale)
    if math.isnan(best.metric):
        raise GuardStop([f"search: {one.name}: {one.problem}" for one in found])
    if best.name != USUAL:
        trials.score(best)
    others = counted(len(found) - 1, "other")
    reason = (
        f"the best of {counted(len(found), 'whole run')}" if best.settings else f"none of {others} was clearly better"
    )
    values = {one.name: one.value for one in planned.settings}
    return Searched(
        trial=trials.plan(best.name).trial,
        place=f"{FOLDER}/{best.name}",
        settings=best.settings,
        own={name: values.get(name) for name in block.settings},
        reason=f"searched: {reason}",
        metric_name=planned.metric,
        greater_is_better=planned.greater_is_better,
        eval_rows=scale.eval_rows,
        tried=tuple(sorted(found, key=lambda one: scale.oriented(one.metric), reverse=True)),
        num_combinations=num_combinations(block.settings),
        bought=_bought(trials, best),
        confidence=trials.job.recipe.evaluate.confidence,
        seconds=round(sum(one.seconds for one in found), 1),
        run_seconds=best.seconds,
    )


def in_words(job: Run, planned: Plan) -> str:
    """What it consists of, and about how long it takes."""
    block = job.recipe.search
    runs = 1 + min(block.trials, num_combinations(block.settings))
    said = counted(runs, "whole run")
    if planned.time is None:
        return said
    # Other settings than the number of epochs hardly change the time.
    epochs = block.settings.get("train.num_train_epochs", (planned.num_train_epochs,))
    longer = sum(float(one) for one in epochs) / len(epochs) / planned.num_train_epochs
    seconds = (1 + (runs - 1) * longer) * planned.time.whole_seconds
    return f"{said}, about {format_seconds(round(seconds))}"


def choice(found: Sequence[TriedSettings], scale: Scale) -> TriedSettings:
    """The best run, where it is ahead of the first one, with the usual settings, by more than a standard error."""
    usual, *_ = found
    best = max(found, key=lambda one: scale.oriented(one.metric))
    ahead = scale.oriented(best.metric) - scale.oriented(usual.metric)
    return best if ahead > scale.tolerance(best.metric) else usual


def _check_first(draws: bool, budget: float | None, planned: Plan, trials: _Trials) -> None:
    """Refuse, before anything is trained, what could not be searched."""
    if draws and importlib.util.find_spec("optuna") is None:
        raise SetupError(
            "search: makes more combinations than search.trials, so that Optuna draws some, and it is missing; install "
            "it with pip install 'fulltune[search]', or raise search.trials"
        )
    run_seconds = planned.time.whole_seconds if planned.time else 0.0
    if budget is None or trials.record(USUAL).exists() or budget >= 2 * run_seconds:
        return
    enough = typed_seconds(round_up(2 * FORECAST_AGAIN * run_seconds))
    raise RecipeError(
        f"search.budget: is too short for a search: it buys {counted(int(budget / run_seconds), 'run')} of about "
        f"{format_seconds(round(run_seconds))}, and two are the least; give --budget {enough} or more, or leave out "
        "the search"
    )


def _is_the_same(job: Run, one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two combinations make the same run, such as the recipe's own settings written out."""
    first, second = (with_settings(job.recipe, settings).fingerprint() for settings in (one, other))
    return first == second


def _bought(trials: _Trials, best: TriedSettings) -> Estimate | None:
    """The best run's metric on the test rows less that of the usual settings; None: they are the same."""
    if best.name == USUAL:
        return None
    files = [trials.folder / name / "scores" / f"{trials.plan(name).trial}.npz" for name in (best.name, USUAL)]
    if not all(file.exists() for file in files):  # the usual settings failed
        return None
    recipe, metric = trials.job.recipe, trials.plan(best.name).metric
    span = measure_of(recipe.task, Target.of(trials.summary), metric).span
    mine, other = map(Resampled.load, files)
    return paired(mine, other, span, recipe.evaluate.confidence)


def _drawn(job: Run, scale: Scale) -> Iterator[tuple[dict[str, Any], Tell | None]]:
    """Possible combinations that Optuna draws, each to be told how it went before the next is asked for."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    values, block = job.recipe.search.settings, job.recipe.search
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=job.recipe.train.seed), direction="maximize")
    for _ in range(_DRAWS * block.trials):
        trial = study.ask()
        places = {name: trial.suggest_categorical(name, range(len(given))) for name, given in values.items()}
        settings = {name: values[name][place] for name, place in places.items()}
        if why_impossible(job.recipe, settings):
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
            continue

        def tell(value: float, trial: Any = trial) -> None:
            failed = optuna.trial.TrialState.FAIL
            study.tell(trial, value) if math.isfinite(value) else study.tell(trial, state=failed)

        yield settings, tell
