"""What a comparison costs, and the search for each arm's learning rate on the eval rows."""

from __future__ import annotations

from typing import Any

from fulltune.compare import design, rate_search
from fulltune.comparing.line import FOLDER, START_SECONDS, Line
from fulltune.comparing.trials import tried
from fulltune.trials import Expectation, Search, Trial, Tried
from fulltune.units import is_share


def expect(line: Line) -> Expectation:
    """The design and what it costs; settled once, so that going on later changes nothing."""
    path = line.folder / FOLDER / "expectation.json"
    if path.exists():
        found = Expectation.load(path)
        if found.budget_seconds != line.budget_seconds:
            made_for = "no budget" if found.budget_seconds is None else f"a budget of {found.budget_seconds:g} s"
            line.say(f"it goes on with the design that was made for {made_for}; --fresh begins anew")
    else:
        block = line.recipe.compare
        costs = {one.arm: design.Cost(_run_seconds(line, one.arm), len(_grid(line, one))) for one in line.trained_arms}
        seeds = design.num_seeds(block.seeds, line.summary.splits["train"].rows)
        rows = line.summary.splits["test"].rows
        margin = block.margin if is_share(line.measure.name) else None
        steps = line.room(line.full.arm).plan.total_steps
        share, least = (rate_search.share_of_steps(one, steps) for one in (block.search_share, 0.0))
        found = design.expected(
            costs, seeds, share, START_SECONDS, rows, margin, line.budget_seconds, block.sequential, least
        )
        found.save(path)
    event = {"kind": "expectation", "expectation": found, "metric": line.measure.name}
    line.job.listener(event | {"margin": line.recipe.compare.margin})
    return found


def _run_seconds(line: Line, arm: str) -> float:
    time_need = line.room(arm).plan.time
    return time_need.total_seconds if time_need else 0.0


def _grid(line: Line, method: Any) -> tuple[float, ...]:
    usual = line.room(method.arm).plan.learning_rate
    return rate_search.grid(usual, method.learning_rates, method.learning_rate)


def grid_trials(line: Line, method: Any, expectation: Expectation) -> list[Trial]:
    """The short trials that a search begins with; none where there is one rate."""
    rates = _grid(line, method)
    total_steps = line.room(method.arm).plan.total_steps
    wanted = rate_search.share_of_steps(expectation.search_share * expectation.length_share, total_steps)
    share = min(wanted, expectation.length_share)
    seed = line.recipe.train.seed
    return [rate_search.search_trial(method.arm, rate, share, seed) for rate in rates] if len(rates) > 1 else []


def search(line: Line, method: Any, expectation: Expectation) -> Search:
    """Find an arm's learning rate on the eval rows."""
    path = line.folder / FOLDER / "searches" / f"{method.arm}.json"
    if path.exists():
        return Search.load(path)
    trials = grid_trials(line, method, expectation)
    if not trials:
        found = rate_search.without_search(method.arm, *_grid(line, method))
        found.save(path)
        return found
    may_extend = method.learning_rates is None
    found_at: dict[float, Tried] = {}

    def run_one(trial: Trial) -> None:
        rate = trial.learning_rate
        line.say(f"{method.arm}: trying the rate {rate:g} for {trial.share:.1%} of the steps")
        found_at[rate] = Tried(learning_rate=rate, share=trial.share, metric=tried(line, trial))

    for trial in trials:
        run_one(trial)
    scale = scale_of(line)
    for _ in range(rate_search.MOST_EXTENSIONS):
        metrics = {rate: one.metric for rate, one in found_at.items()}
        further = rate_search.beyond(metrics, scale, may_extend)
        if further is None:
            break
        run_one(rate_search.search_trial(method.arm, further, trials[0].share, line.recipe.train.seed))
    found = rate_search.finished(method.arm, list(found_at.values()), scale, may_extend)
    found.save(path)
    return found


def scale_of(line: Line) -> rate_search.Scale:
    """How the eval rows measure a trial."""
    measure = line.measure
    return rate_search.Scale(measure.greater_is_better, line.summary.splits["eval"].rows, is_share(measure.name))
