"""What a comparison costs, and the search for each arm's learning rate on the eval rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fulltune.compare import design, rate_search, timing
from fulltune.compare.context import FOLDER, Line
from fulltune.compare.trials import tried
from fulltune.inference.store import texts
from fulltune.records.comparison import Expectation, Search, Trial, TrialResult, Tried
from fulltune.records.events import Designed
from fulltune.tasks import PLACE
from fulltune.text import is_share

EXPECTATION = f"{FOLDER}/expectation.json"


def expect(line: Line) -> Expectation:
    """The design and what it costs; settled once for a budget, so that going on later changes nothing."""
    path = line.folder / EXPECTATION
    found = Expectation.load(path) if path.exists() else None
    if found is None or found.budget_seconds != line.budget_seconds or found.length_share < 1:
        found = _settled(line)
        found.save(path)
    line.job.listener(Designed(expectation=found, metric=line.measure.name, margin=line.recipe.compare.margin))
    return found


def _settled(line: Line) -> Expectation:
    """The design for this budget, less what is there."""
    block = line.recipe.compare
    steps = line.room(line.full.arm).plan.total_steps
    share, least = (rate_search.share_of_steps(one, steps) for one in (block.search_share, 0.0))
    prepared, ended = line.time_passed()
    if line.budget_seconds is not None:
        _measure(line, least)
    costs = timing.costs_of(line)
    found = design.expected(
        costs,
        design.num_seeds(block.seeds, line.summary.splits["train"].rows),
        share,
        timing.fixed_of(line),
        line.summary.splits["test"].rows,
        block.margin if is_share(line.measure.name) else None,
        line.budget_seconds,
        sequential=block.sequential,
        least_search_share=least,
        alpha=line.alpha,
        spent_seconds=line.spent_seconds + prepared,
        done=_done(line, costs),
    )
    line.write_time("preparation", prepared, ended)  # not of a command whose budget was refused
    return found


def _measure(line: Line, share: float) -> None:
    """Before a budget is planned for: a short trial of full, where there is none, because arithmetic alone errs too
    much; most often the search begins with the same one."""
    if any((line.folder / FOLDER / "trials").glob("*.json")):
        return
    trial = rate_search.search_trial(line.full.arm, timing.usual(line, line.full), share, line.recipe.train.seed)
    line.say(f"measuring how fast it is here, before the budget is planned: {trial.share:.0%} of a run of {trial.arm}")
    tried(line, trial)


def _done(line: Line, costs: Mapping[str, design.Cost]) -> design.Done:
    """What an earlier command left."""
    kept = [TrialResult.load(path).trial for path in (line.folder / FOLDER / "trials").glob("*.json")]
    searches = {arm: Search.load(path) for arm in costs if (path := _path(line, arm)).exists()}
    return design.Done(
        runs={arm: _usable(found, kept) for arm, found in searches.items()},
        searched=[arm for arm, found in searches.items() if not found.time_was_up],
    )


def _usable(search: Search, kept: Sequence[Trial]) -> int:
    """Whole runs of an arm that are not made again: at the rate that its search chose, and at those checked beside it.

    An earlier search may have chosen another one.
    """
    runs = [one for one in kept if one.arm == search.arm and not one.searches]
    beside = (one for one in runs if one == design.final_trial(one.arm, one.learning_rate, one.seed, check=True))
    rates = {search.chosen, *(one.learning_rate for one in beside)}
    return sum(one.learning_rate in rates for one in runs)


def _path(line: Line, arm: str) -> Any:
    return line.folder / FOLDER / "searches" / f"{arm}.json"


def grid_trials(line: Line, method: Any, expectation: Expectation) -> list[Trial]:
    """The short trials that a search begins with; none where there is one rate, or no time for a search."""
    rates = timing.grid(line, method)
    total_steps = line.room(method.arm).plan.total_steps
    if len(rates) < 2 or not expectation.search_share:
        return []
    share = rate_search.share_of_steps(expectation.search_share, total_steps)
    return [rate_search.search_trial(method.arm, rate, share, line.recipe.train.seed) for rate in rates]


def search(line: Line, method: Any, expectation: Expectation, keep: float = 0.0) -> Search | None:
    """Find an arm's learning rate on the eval rows.

    Args:
        line: The comparison.
        method: Whose rate.
        expectation: How long short trials are.
        keep: Seconds that seeds need, which matter more than a search.

    Returns:
        None where there is no time for the search.
    """
    path = _path(line, method.arm)
    if path.exists() and not (found := Search.load(path)).time_was_up:
        return found
    trials = grid_trials(line, method, expectation)
    rates = timing.grid(line, method)
    if len(rates) == 1:
        found = rate_search.without_search(method.arm, *rates)
        found.save(path)
        return found
    if not trials or not timing.has_time(line, trials, keep):
        return None
    may_extend = method.learning_rates is None
    found_at: dict[float, Tried] = {}

    def run_one(trial: Trial) -> None:
        rate = trial.learning_rate
        line.say(f"{method.arm}: trying the rate {rate:g} for {trial.share:.1%} of the steps")
        found_at[rate] = Tried(learning_rate=rate, share=trial.share, metric=tried(line, trial))

    for trial in trials:
        run_one(trial)
    scale, time_was_up = scale_of(line), False
    for _ in range(rate_search.MOST_EXTENSIONS):
        metrics = {rate: one.metric for rate, one in found_at.items()}
        further = rate_search.beyond(metrics, scale, may_extend)
        if further is None:
            break
        trial = rate_search.search_trial(method.arm, further, trials[0].share, line.recipe.train.seed)
        time_was_up = not timing.has_time(line, [trial], keep)
        if time_was_up:
            line.say(f"{method.arm}: no time to try {further:g} as well")
            break
        run_one(trial)
    found = rate_search.finished(method.arm, list(found_at.values()), scale, may_extend, timing.usual(line, method))
    found = found.model_copy(update={"time_was_up": time_was_up})
    found.save(path)
    return found


def usual(line: Line, method: Any) -> Search:
    """The usual rate, where there is no time to search."""
    found = rate_search.without_time(method.arm, timing.usual(line, method), method.learning_rates is None)
    found.save(_path(line, method.arm))
    return found


def scale_of(line: Line) -> rate_search.Scale:
    """How the eval rows measure a trial."""
    measure = line.measure
    return rate_search.Scale(measure.greater_is_better, _num_measured(line), is_share(measure.name))


def _num_measured(line: Line) -> int:
    """Eval rows; of windows of long passages the questions, each of which is right or wrong as one."""
    if line.summary.problem_type != "span":
        return line.summary.splits["eval"].rows
    return len({row[PLACE] for row in texts(line.folder / "data" / "eval")})
