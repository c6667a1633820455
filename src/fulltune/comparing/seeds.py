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
from fulltune.errors import GuardStop
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
    all_at_once = not line.recipe.compare.sequential
    asked = dict.fromkeys(searches, expectation.num_seeds if all_at_once else 1)
    while asked:
        for number in range(max(asked.values())):
            for arm in [arm for arm in asked if len(results[arm]) == number < asked[arm]]:
                if _time_is_up(line, arm, results):
                    line.say("the budget is used up: the verdict is made from what there is")
                    return results, looks
                trial = design.final_trial(
                    arm, searches[arm].chosen, line.recipe.train.seed + number, expectation.length_share
                )
                line.say(f"{arm}: seed {number + 1} of at most {expectation.num_seeds}")
                results[arm].append(_first(line, searches, trial) if number == 0 else final(line, trial))
                keep_best_model(line, results[arm])
        if all_at_once:
            break
        seen = _look(line, results, expectation)
        looks.append(seen)
        seen.save(line.folder / FOLDER / "looks" / f"{len(looks)}.json")
        count = seen.num_seeds
        line.say(f"after {count} seed{'s' if count > 1 else ''}: {seen.reason}")
        asked = {step.arm: step.seeds for step in seen.arms if step.decision == "more"}
    return results, looks


def _first(line: Line, searches: dict[str, Search], trial: Trial) -> TrialResult:
    """The first whole run of an arm, at a rate that holds for a whole run."""
    rows, is_share = line.summary.splits["eval"].rows, line.measure.span == 1.0
    greater, arm = line.measure.greater_is_better, trial.arm
    while True:
        try:
            result = final(line, trial)
        except GuardStop as stop:
            lower = design.next_lower(searches[arm])
            if lower is None:
                raise
            line.say(f"{trial.name}: {stop.problems[0]}")
            reason = f"{trial.learning_rate:g} was best in the search, but a whole run with it was stopped by a guard"
        else:
            lower = design.slower(searches[arm], result.metric, greater, rows, is_share)
            if lower is None:
                return result
            reason = f"{trial.learning_rate:g} was best in the search, but a whole run ended below its short trial"
        line.say(f"{arm}: {reason}; taking {lower:g}")
        for folder in ("models", "checkpoints"):
            shutil.rmtree(line.folder / folder / trial.name, ignore_errors=True)
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
    """Ask the eval rows whether the answer is clear."""
    return look(
        arm_items(line, results, OPEN, list(results)),
        line.measure,
        margin=line.recipe.compare.margin,
        max_seeds=expectation.num_seeds,
        alpha=1 - line.recipe.evaluate.confidence,
        clusters=clusters_of(line.folder / "data" / "eval"),
        test_rows=line.summary.splits["test"].rows,
    )
