"""Whole runs, seed by seed, until the eval rows say that the answer is clear."""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fulltune.compare import design, parallel, rate_search, timing
from fulltune.compare.context import FOLDER, OPEN, Line
from fulltune.compare.rates import scale_of
from fulltune.compare.sequential import WAITING_SHARE, look
from fulltune.compare.trials import clear, final, is_done, keep_best_model, result_of
from fulltune.compare.verdict import ArmItems
from fulltune.errors import Diverged
from fulltune.evaluate import outputs
from fulltune.inference.store import clusters_of
from fulltune.recipe.methods import RIVALS
from fulltune.records.comparison import Expectation, Search, Trial, TrialResult
from fulltune.records.differences import Look
from fulltune.stats import row_scores
from fulltune.tasks import Target

Results = dict[str, list[TrialResult]]


@dataclass(frozen=True)
class Ran:
    """What whole runs gave."""

    results: Results
    looks: list[Look]
    time_was_up: bool
    """It ended because of the budget: more time would add something."""


def run_seeds(
    line: Line, searches: dict[str, Search], expectation: Expectation, together: parallel.Together = parallel.alone
) -> Ran:
    """Whole runs, seed by seed, until the eval rows say that the answer is clear, or the time is up.

    `searches` changes where whole runs showed that another rate is better; an arm for which there is no time leaves it.
    `together` settles trials at a time.
    """
    results: Results = {arm: [] for arm in searches}
    looks: list[Look] = []
    most = most_seeds(expectation)
    all_at_once = not line.recipe.compare.sequential
    asked = dict.fromkeys(searches, most if all_at_once else 1)
    while asked:
        if not _train(line, searches, results, asked, expectation, together):
            line.say("the budget is used up: the verdict is made from what there is")
            return Ran(results, looks, True)
        if all_at_once:
            break
        asked = {arm: count for arm, count in _next(line, results, expectation, looks).items() if arm in results}
        if not asked and looks[-1].num_seeds > 1:
            asked = _before_full(line, searches, results, looks)
    return Ran(results, looks, False)


def most_seeds(expectation: Expectation) -> int:
    """Of each arm; the budget's are a forecast, and where time is left more are run."""
    return expectation.recipe_seeds or expectation.num_seeds


def _train(
    line: Line,
    searches: dict[str, Search],
    results: Results,
    asked: Mapping[str, int],
    expectation: Expectation,
    together: parallel.Together,
) -> bool:
    """Whole runs until each arm has the seeds asked for; False when the time is up first."""

    def next_of(arm: str) -> Trial:
        return design.final_trial(arm, searches[arm].chosen, line.recipe.train.seed + len(results[arm]))

    def keep() -> float:
        """Seconds of what matters more than another rate: the seeds that were planned."""
        return timing.to_come(line, _counts(results), expectation.num_seeds)

    while arms := _fewest(results, asked):
        if not results[arms[0]] and (late := _no_time(line, results, next_of)):
            line.say(f"{late}: there is no time for it")
            del results[late], searches[late]
            continue
        if len(results[arms[0]]) == 1:  # they go on: now their rates matter
            checks = [one for arm in arms if (one := _next_check(line, searches[arm], results[arm][0]))]
            if timing.has_time(line, checks, keep()):
                together(checks)
            for arm in arms:
                _check(line, searches, results[arm], keep())
        trials = [next_of(arm) for arm in arms]
        begins = bool(results[arms[0]]) and not is_done(line, trials[0])
        if begins and not timing.has_time(line, trials):
            return False
        together(trials)
        arm, trial = arms[0], trials[0]
        found = results[arm]
        line.say(f"{arm}: seed {len(found) + 1} of at most {most_seeds(expectation)}")
        try:
            found.append(final(line, trial) if found else _first(line, searches, trial))
        except Diverged as stop:
            # A rate at which one seed diverges is too high for the method: all its seeds get a lower one.
            spent = _seconds([*found, result_of(line, trial)])
            _take_lower(line, searches, trial, stop, spent)
            found.clear()
            continue
        keep_best_model(line, found)
        if most_seeds(expectation) == 1:
            _check(line, searches, found, keep())
    return True


def _counts(results: Results) -> dict[str, int]:
    return {arm: len(found) for arm, found in results.items()}


def _no_time(line: Line, results: Results, next_of: Callable[[str], Trial]) -> str | None:
    """A method that has no run yet and for which there is no time beside two seeds of full and of one rival.

    Full and the first rival of the recipe always get a run: without them there is nothing to compare.
    """
    pair = (line.full.arm, next(arm for arm in results if line.room(arm).arm.kind in RIVALS))
    seeds = min(design.LEAST_SEEDS, line.recipe.compare.seeds or design.LEAST_SEEDS)
    keep = timing.to_come(line, _counts(results), seeds)
    others = (arm for arm, found in results.items() if not found and arm not in pair)
    return next((arm for arm in others if not timing.has_time(line, [next_of(arm)], keep)), None)


def _seconds(found: Sequence[TrialResult]) -> list[float]:
    return [one.train_seconds for one in found]


def _next(line: Line, results: Results, expectation: Expectation, looks: list[Look]) -> dict[str, int]:
    """Look at the eval rows: how many seeds which methods are to have before the next look; none when it is enough."""
    seen = _look(line, results, expectation, again=_again(looks, results[line.full.arm]))
    looks.append(seen)
    seen.save(line.folder / FOLDER / "looks" / f"{len(looks)}.json")
    count = seen.num_seeds
    line.say(f"after {count} seed{'s' if count > 1 else ''}: {seen.reason}")
    return {step.arm: step.seeds for step in seen.arms if step.decision == "more"}


def _again(looks: Sequence[Look], full: Sequence[TrialResult]) -> bool:
    """With so many seeds of full it was looked before."""
    return bool(looks) and looks[-1].num_seeds == len(full)


def _before_full(line: Line, searches: dict[str, Search], results: Results, looks: Sequence[Look]) -> dict[str, int]:
    """FULL says that full beats all: before it may come to that, the rates of all are chosen as full's was.

    Methods that waited get whole runs at other rates; one that is better by that than the leader is to catch up.
    """
    scale, full = scale_of(line), results[line.full.arm]
    decisive = {arm: found for arm, found in results.items() if line.room(arm).arm.kind in ("full", *RIVALS)}
    means = {
        arm: statistics.mean(scale.oriented(one.metric) for one in found)
        for arm, found in decisive.items()
        if len(found) == len(full)
    }
    mine, leader = means.pop(line.full.arm), max(means.values())
    if mine - leader < line.recipe.compare.margin:
        return {}
    changed = [arm for arm, found in decisive.items() if len(found) == 1 and _check(line, searches, found, 0.0)]
    better = [arm for arm in changed if scale.oriented(results[arm][0].metric) > leader]
    return {} if _again(looks[:-1], full) else dict.fromkeys(better, len(full))


def _fewest(results: Results, asked: Mapping[str, int]) -> list[str]:
    """The arms whose turn it is: of those that lack seeds the ones with the fewest."""
    lacking = {arm: len(found) for arm, found in results.items() if len(found) < asked.get(arm, 0)}
    return [arm for arm, count in lacking.items() if count == min(lacking.values())]


def _take_lower(line: Line, searches: dict[str, Search], trial: Trial, stop: Diverged, spent: Sequence[float]) -> None:
    """Choose a lower rate after a run diverged.

    Raises:
        Diverged: Nothing lower is left to try, or the rate was given.
    """
    search = searches[trial.arm]
    lower = rate_search.after_divergence(search)
    if lower is None:
        raise stop
    line.say(f"{trial.name}: {stop.problems[0]}")
    reason = f"{search.chosen:g} diverged in a whole run (seed {trial.seed})"
    _replace(line, searches, trial, lower, reason, spent)
    # The lower rate may have had its run, but its model was deleted when a higher one was better.
    shutil.rmtree(line.folder / "models" / trial.arm, ignore_errors=True)
    first = design.final_trial(trial.arm, lower, line.recipe.train.seed)
    (line.folder / FOLDER / "trials" / f"{first.name}.json").unlink(missing_ok=True)


def _replace(
    line: Line, searches: dict[str, Search], trial: Trial, lower: float, reason: str, spent: Sequence[float]
) -> None:
    line.say(f"{trial.arm}: {reason}; taking {lower:g}")
    clear(line, trial)
    searches[trial.arm] = rate_search.replaced(searches[trial.arm], lower, reason, spent)
    searches[trial.arm].save(line.folder / FOLDER / "searches" / f"{trial.arm}.json")


def _first(line: Line, searches: dict[str, Search], trial: Trial) -> TrialResult:
    """The first whole run of an arm, at a rate that holds for a whole run.

    Raises:
        Diverged: It did; the caller takes a lower rate.
    """
    while True:
        result = final(line, trial)
        search = searches[trial.arm]
        lower = rate_search.slower(search, result.metric, scale_of(line))
        if lower is None:
            return result
        reason = f"a whole run with {search.chosen:g} ended below its short trial"
        _replace(line, searches, trial, lower, reason, _seconds([result]))
        trial = trial.model_copy(update={"learning_rate": lower})


def _check(line: Line, searches: dict[str, Search], results: list[TrialResult], keep: float) -> bool:
    """Put the best of whole runs at other rates in the place of an arm's first one; whether it was another one."""
    before = results[0]
    results[0] = _checked(line, searches, before, keep)
    keep_best_model(line, results)
    return results[0] is not before


def _checked(line: Line, searches: dict[str, Search], result: TrialResult, keep: float) -> TrialResult:
    """The same, or a whole run at another rate where that is better, and there is time beside what is to be kept.

    `searches` changes in memory only: when the comparison goes on later, the same is found again from all of them.
    """
    arm, trial, search = result.trial.arm, result.trial, searches[result.trial.arm]
    runs = {search.chosen: result}
    while (check := _next_check(line, search, *runs.values())) is not None:
        rate = check.learning_rate
        if not timing.has_time(line, [check], keep):
            line.say(f"{arm}: no time to try {rate:g} in a whole run as well")
            break
        line.say(f"{arm}: a whole run with {rate:g} as well, because short trials alone do not tell the better rate")
        runs[rate] = _or_failed(line, check)
    if len(runs) == 1:
        return result
    found = rate_search.after_whole(search, _metrics(runs), scale_of(line), _may_extend(line, arm), trial.share)
    taken = runs.pop(found.chosen)
    searches[arm] = rate_search.with_dropped(found, _seconds(list(runs.values())))
    for left in runs.values():
        shutil.rmtree(line.folder / "models" / left.trial.name, ignore_errors=True)
    line.say(f"{arm}: taking {found.chosen:g}")
    return taken


def _next_check(line: Line, search: Search, *runs: TrialResult) -> Trial | None:
    """The whole run at another rate that comes after these; None: no more, or the short trials were whole runs."""
    trial = runs[0].trial
    if any(one.share >= trial.share for one in search.tried):
        return None
    whole = {search.chosen: runs[0].metric} | {one.trial.learning_rate: one.metric for one in runs[1:]}
    rate = rate_search.next_whole(search, whole, scale_of(line), _may_extend(line, search.arm))
    return None if rate is None else design.final_trial(search.arm, rate, trial.seed, check=True)


def _may_extend(line: Line, arm: str) -> bool:
    """The recipe names no rates to search among."""
    return line.room(arm).arm.learning_rates is None


def _metrics(runs: Mapping[float, TrialResult]) -> dict[float, float]:
    return {rate: one.metric for rate, one in runs.items()}


def _or_failed(line: Line, trial: Trial) -> TrialResult:
    """A whole run, or the result of one that diverged, which is kept as well."""
    try:
        return final(line, trial)
    except Diverged as stop:
        line.say(f"{trial.name}: {stop.problems[0]}")
        return result_of(line, trial)


def waiting(looks: Sequence[Look]) -> set[str]:
    """Methods that have fewer seeds because the verdict did not hinge on them."""
    return {step.arm for step in looks[-1].arms if step.seeds < looks[-1].num_seeds} if looks else set()


def arm_items(line: Line, results: Results, place: str, waited: Collection[str]) -> list[ArmItems]:
    """What the trials of all arms gave for the rows of a split; those that waited are tested at a part of alpha."""
    found = []
    target = Target.of(line.summary)
    for arm in results:
        kept = [outputs.load(line.folder / place / f"{one.trial.name}.npz") for one in results[arm]]
        rights = [row_scores.right_rows(line.recipe.task, target, one) for one in kept]
        known = [one for one in rights if one is not None]
        method = line.room(arm).arm
        found.append(
            ArmItems(
                name=arm,
                kind=method.kind,
                trials=kept,
                cost=float(line.room(arm).plan.num_trainable_parameters),
                right=np.stack(known) if len(known) == len(kept) else None,
                alpha_share=WAITING_SHARE if arm in waited else 1.0,
            )
        )
    return found


def _look(line: Line, results: Results, expectation: Expectation, *, again: bool) -> Look:
    """Ask the eval rows whether the answer is clear."""
    behind = [arm for arm, found in results.items() if len(found) < len(results[line.full.arm])]
    return look(
        arm_items(line, results, OPEN, behind),
        line.measure,
        margin=line.recipe.compare.margin,
        max_seeds=most_seeds(expectation),
        again=again,
        alpha=line.alpha,
        clusters=clusters_of(line.folder / "data" / "eval"),
        test_rows=line.summary.splits["test"].rows,
    )
