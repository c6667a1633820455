"""What a comparison costs, and the search for each arm's learning rate on the eval rows."""

from __future__ import annotations

import math
import shutil
from typing import Any

from fulltune.compare import design
from fulltune.comparing.line import FOLDER, START_SECONDS, Line
from fulltune.comparing.trials import trained
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
        share = design.share_of_steps(block.search_share, line.room(line.full.arm).plan.total_steps)
        found = design.expected(costs, seeds, share, START_SECONDS, rows, margin, line.budget_seconds, block.sequential)
        found.save(path)
    event = {"kind": "expectation", "expectation": found, "metric": line.measure.name}
    line.job.listener(event | {"margin": line.recipe.compare.margin})
    return found


def _run_seconds(line: Line, arm: str) -> float:
    time_need = line.room(arm).plan.time
    return time_need.total_seconds if time_need else 0.0


def _grid(line: Line, method: Any) -> tuple[float, ...]:
    usual = line.room(method.arm).plan.learning_rate
    return design.grid(usual, method.learning_rates, method.learning_rate)


def search(line: Line, method: Any, expectation: Expectation) -> Search:
    """Find an arm's learning rate on the eval rows."""
    path = line.folder / FOLDER / "searches" / f"{method.arm}.json"
    if path.exists():
        return Search.load(path)
    rates = _grid(line, method)
    if len(rates) == 1:
        found = design.without_search(method.arm, rates[0])
        found.save(path)
        return found
    greater = line.measure.greater_is_better
    may_extend = method.learning_rates is None
    total_steps = line.room(method.arm).plan.total_steps
    wanted = design.share_of_steps(expectation.search_share * expectation.length_share, total_steps)
    share = min(wanted, expectation.length_share)
    tried: dict[float, Tried] = {}

    def run_one(rate: float) -> None:
        trial = design.search_trial(method.arm, rate, share, line.recipe.train.seed)
        line.say(f"{method.arm}: trying the rate {rate:g} for {share:.1%} of the steps")
        tried[rate] = Tried(learning_rate=rate, share=share, metric=_tried(line, trial))

    for rate in rates:
        run_one(rate)
    rows, is_share = line.summary.splits["eval"].rows, line.measure.span == 1.0
    for _ in range(design.MOST_EXTENSIONS):
        metrics = {rate: one.metric for rate, one in tried.items()}
        further = design.beyond(metrics, greater, may_extend, rows, is_share)
        if further is None or further in tried:
            break
        run_one(further)
    found = design.finished(method.arm, list(tried.values()), greater, may_extend, rows, is_share)
    found.save(path)
    return found


def _tried(line: Line, trial: Trial) -> float:
    """The eval metric of a short trial; NaN when it came to nothing. Its model is not kept."""
    path = line.folder / FOLDER / "trials" / f"{trial.name}.json"
    if path.exists():
        return TrialResult.load(path).metric
    try:
        _, outcome, result = trained(line, trial)
    except Diverged as stop:
        line.say(f"{trial.name}: {stop.problems[0]}")
        result = _failed(line, trial)
    else:
        shutil.rmtree(line.folder / str(outcome.model_folder), ignore_errors=True)
    result.save(path)
    return result.metric


def _failed(line: Line, trial: Trial) -> TrialResult:
    made = line.room(trial.arm).plan
    return TrialResult(
        trial=trial,
        metric=math.nan,
        steps=0,
        best_step=0,
        train_seconds=0.0,
        tokens_per_second=0.0,
        peak_memory_bytes=0,
        memory_growth_bytes=0,
        num_parameters=made.num_parameters,
        num_trainable=made.num_trainable_parameters,
        tokens=0,
        train_flops=0.0,
        saved_bytes=0,
        device=made.device,
        precision=made.precision,
        weights_dtype=made.weights_dtype,
    )
