"""Whole runs, seed by seed, until the eval rows say that the answer is clear."""

from __future__ import annotations

import shutil
from collections.abc import Sequence

import numpy as np

from fulltune.compare import design, items
from fulltune.compare.sequential import look
from fulltune.compare.verdict import ArmItems
from fulltune.compare_records import Look
from fulltune.comparing.line import FOLDER, OPEN, Line
from fulltune.comparing.trials import final, keep_best_model
from fulltune.evaluate import outputs
from fulltune.store import clusters_of
from fulltune.tasks import Target
from fulltune.trials import Expectation, Search, Trial, TrialResult

Results = dict[str, list[TrialResult]]


def run_seeds(line: Line, searches: dict[str, Search], expectation: Expectation) -> tuple[Results, list[Look]]:
    """Whole runs, seed by seed, until the eval rows say that the answer is clear, or the time is up.

    `searches` changes where a whole run showed that the rate found is too high.
    """
    results: Results = {arm: [] for arm in searches}
    looks: list[Look] = []
    active = list(searches)
    for number in range(expectation.num_seeds):
        seed = line.recipe.train.seed + number
        for arm in list(active):
            trial = design.final_trial(arm, searches[arm].chosen, seed, expectation.length_share)
            if _time_is_up(line, arm, results):
                line.say("the budget is used up: the verdict is made from what there is")
                return results, looks
            line.say(f"{arm}: seed {number + 1} of at most {expectation.num_seeds}")
            results[arm].append(_first(line, searches, trial) if number == 0 else final(line, trial))
            keep_best_model(line, results[arm])
        seen = _look(line, results, expectation)
        looks.append(seen)
        seen.save(line.folder / FOLDER / "looks" / f"{number + 1}.json")
        line.say(f"after {number + 1} seed{'s' if number else ''}: {seen.reason}")
        for step in seen.arms:
            if step.decision == "drop":
                line.say(f"{step.arm}: no further seeds: {step.reason}")
        active = [arm for arm in active if seen.step(arm).decision == "more"]
        if seen.enough:
            break
    return results, looks


def _first(line: Line, searches: dict[str, Search], trial: Trial) -> TrialResult:
    """The first whole run of an arm, at a rate that holds for a whole run."""
    rows, is_share = line.summary.splits["eval"].rows, line.measure.span == 1.0
    greater, arm = line.measure.greater_is_better, trial.arm
    while True:
        result = final(line, trial)
        lower = design.slower(searches[arm], result.metric, greater, rows, is_share)
        if lower is None:
            return result
        reason = f"{trial.learning_rate:g} was best in the search, but a whole run with it ended below its short trial"
        line.say(f"{arm}: {reason}; taking {lower:g}")
        shutil.rmtree(line.folder / "models" / trial.name, ignore_errors=True)
        searches[arm] = searches[arm].model_copy(update={"chosen": lower, "reason": reason})
        searches[arm].save(line.folder / FOLDER / "searches" / f"{arm}.json")
        trial = trial.model_copy(update={"learning_rate": lower})


def _time_is_up(line: Line, arm: str, results: Results) -> bool:
    """Whether the next run would go beyond the budget; each arm gets one run all the same."""
    if not results[arm]:
        return False
    spent = [one.train_seconds for one in results[arm]]
    path = line.folder / FOLDER / "trials" / f"{arm}-seed{results[arm][-1].trial.seed + 1}.json"
    return not path.exists() and line.seconds_left < sum(spent) / len(spent)


def arm_items(line: Line, results: Results, place: str, arms: Sequence[str]) -> list[ArmItems]:
    """What the trials of these arms gave for the rows of a split."""
    found = []
    target = Target.of(line.summary)
    for arm in arms:
        kept = [outputs.load(line.folder / place / f"{one.trial.name}.npz") for one in results[arm]]
        rights = [items.right_rows(line.recipe.task, target, one) for one in kept]
        known = [one for one in rights if one is not None]
        method = line.room(arm).arm
        found.append(
            ArmItems(
                name=arm,
                kind=method.kind,
                trials=kept,
                cost=float(line.room(arm).plan.num_trainable_parameters),
                right=np.stack(known) if len(known) == len(kept) else None,
            )
        )
    return found


def _look(line: Line, results: Results, expectation: Expectation) -> Look:
    """Ask the eval rows whether the answer is clear; methods given up before count among those that are compared."""
    return look(
        arm_items(line, results, OPEN, list(results)),
        line.measure,
        margin=line.recipe.compare.margin,
        max_seeds=expectation.num_seeds,
        alpha=1 - line.recipe.evaluate.confidence,
        clusters=clusters_of(line.folder / "data" / "eval"),
        test_rows=line.summary.splits["test"].rows,
    )
