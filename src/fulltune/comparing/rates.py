"""What a comparison costs, and the search for each arm's learning rate on the eval rows."""

from __future__ import annotations

import shutil
import time
from typing import Any

from fulltune.compare import design, rate_search
from fulltune.comparing.line import FOLDER, START_SECONDS, Line
from fulltune.comparing.trials import failed, trained
from fulltune.errors import Diverged
from fulltune.trials import Expectation, Search, Trial, TrialResult, Tried


def expect(line: Line) -> Expectation:
    """The design and what it costs; settled once, so that going on later changes nothing."""
    path = line.folder / FOLDER / "expectation.json"
    if path.exists():
        found = Expectation.load(path)
    else:
        block = line.recipe.compare
        costs = {one.arm: design.Cost(_run_seconds(line, one.arm), len(_grid(line, one))) for one in line.trained_arms}
        seeds, _ = design.num_seeds(block.seeds, line.summary.splits["train"].rows)
        rows = line.summary.splits["test"].rows
        margin = block.margin if line.measure.span == 1.0 else None
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


def search(line: Line, method: Any, expectation: Expectation) -> Search:
    """Find an arm's learning rate on the eval rows."""
    path = line.folder / FOLDER / "searches" / f"{method.arm}.json"
    if path.exists():
        return Search.load(path)
    rates = _grid(line, method)
    if len(rates) == 1:
        found = rate_search.without_search(method.arm, rates[0])
        found.save(path)
        return found
    may_extend = method.learning_rates is None
    total_steps = line.room(method.arm).plan.total_steps
    wanted = rate_search.share_of_steps(expectation.search_share * expectation.length_share, total_steps)
    share = min(wanted, expectation.length_share)
    tried: dict[float, Tried] = {}

    def run_one(rate: float) -> None:
        trial = rate_search.search_trial(method.arm, rate, share, line.recipe.train.seed)
        line.say(f"{method.arm}: trying the rate {rate:g} for {share:.1%} of the steps")
        tried[rate] = Tried(learning_rate=rate, share=share, metric=_tried(line, trial))

    for rate in rates:
        run_one(rate)
    scale = scale_of(line)
    for _ in range(rate_search.MOST_EXTENSIONS):
        metrics = {rate: one.metric for rate, one in tried.items()}
        further = rate_search.beyond(metrics, scale, may_extend)
        if further is None:
            break
        run_one(further)
    found = rate_search.finished(method.arm, list(tried.values()), scale, may_extend)
    found.save(path)
    return found


def scale_of(line: Line) -> rate_search.Scale:
    """How the eval rows measure a trial."""
    measure = line.measure
    return rate_search.Scale(measure.greater_is_better, line.summary.splits["eval"].rows, measure.span == 1.0)


def _tried(line: Line, trial: Trial) -> float:
    """The eval metric of a short trial; NaN when it came to nothing. Its model is not kept."""
    path = line.folder / FOLDER / "trials" / f"{trial.name}.json"
    if path.exists():
        return TrialResult.load(path).metric
    began = time.monotonic()
    try:
        _, outcome, result = trained(line, trial)
    except Diverged as stop:
        line.say(f"{trial.name}: {stop.problems[0]}")
        return failed(line, trial, time.monotonic() - began).metric
    shutil.rmtree(line.folder / str(outcome.model_folder), ignore_errors=True)
    result.save(path)
    return result.metric
