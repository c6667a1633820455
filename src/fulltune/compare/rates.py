"""The search for each arm's learning rate on the eval rows."""

from __future__ import annotations

from typing import Any

from fulltune.compare import design, rate_search, timing
from fulltune.compare.context import Context
from fulltune.compare.trials import run_trial
from fulltune.forgetting.budget import MOST_ROWS
from fulltune.inference.store import texts
from fulltune.recipe.methods import RIVALS
from fulltune.records.comparison import Expectation, Search, Trial, Tried
from fulltune.tasks import PLACE
from fulltune.text import is_share


def search_all(context: Context, expectation: Expectation) -> dict[str, Search]:
    """The rate of each arm that is trained; without time to search, full and the first rival take the usual one."""
    methods = [one for one in context.trained_arms if one.arm in expectation.arms]
    pair = [one.arm for one in methods if one is context.full or context.recipe.compared_kind(one) in RIVALS][:2]
    seeds = min(design.LEAST_SEEDS, expectation.num_seeds)
    keep = timing.to_come(context, dict.fromkeys((one.arm for one in methods), 0), seeds)
    searches: dict[str, Search] = {}
    for method in methods:
        found = search(context, method, expectation, keep)
        if found is None and method.arm not in pair:
            context.say(f"{method.arm}: there is no time for it")
            continue
        if found is None:
            context.say(f"{method.arm}: no time to search its rate; taking the usual one")
            rate = timing.usual(context, method)
            found = rate_search.without_time(method.arm, rate, method.learning_rates is None)
            found.save(context.search_path(method.arm))
        searches[method.arm] = found
    return searches


def grid_trials(context: Context, method: Any, expectation: Expectation) -> list[Trial]:
    """The short trials that a search begins with; none where there is one rate, or no time for a search."""
    rates = timing.grid(context, method)
    total_steps = context.setup(method.arm).plan.total_steps
    if len(rates) < 2 or not expectation.search_share:
        return []
    share = rate_search.share_of_steps(expectation.search_share, total_steps)
    return [rate_search.search_trial(method.arm, rate, share, context.recipe.train.seed) for rate in rates]


def search(context: Context, method: Any, expectation: Expectation, keep: float = 0.0) -> Search | None:
    """Find an arm's rate on eval rows; None without time for it beside the `keep` seconds that seeds need."""
    path, seed = context.search_path(method.arm), context.recipe.train.seed
    if path.exists() and not (known := Search.load(path)).time_was_up:
        return known
    rates = timing.grid(context, method)
    if len(rates) == 1:
        found = rate_search.without_search(method.arm, *rates)
        found.save(path)
        return found
    trials = grid_trials(context, method, expectation)
    if not trials or not timing.has_time(context, trials, keep):
        return None
    may_extend, scale, time_was_up = method.learning_rates is None, scale_of(context), False
    tried: dict[float, Tried] = {}
    while True:
        for trial in trials:
            rate = trial.learning_rate
            context.say(f"{method.arm}: trying the rate {rate:g} for {trial.share:.1%} of the steps")
            tried[rate] = Tried(learning_rate=rate, share=trial.share, metric=run_trial(context, trial).metric)
        metrics = {rate: one.metric for rate, one in tried.items()}
        further = rate_search.beyond(metrics, scale, may_extend)
        if further is None and context.finds_ceiling:
            further = rate_search.above(metrics, scale, may_extend)
        if further is None or len(tried) >= len(rates) + rate_search.MOST_EXTENSIONS:
            break
        trials = [rate_search.search_trial(method.arm, further, trials[0].share, seed)]
        time_was_up = not timing.has_time(context, trials, keep)
        if time_was_up:
            context.say(f"{method.arm}: no time to try {further:g} as well")
            break
    found = rate_search.finished(method.arm, list(tried.values()), scale, may_extend, timing.usual(context, method))
    found = found.model_copy(update={"time_was_up": time_was_up})
    found.save(path)
    return found


def scale_of(context: Context) -> rate_search.Scale:
    """How the eval rows measure a trial; of windows of long passages each question counts, right or wrong as one."""
    measure, num_rows = context.measure, context.summary.splits["eval"].rows
    if context.summary.form.has_windows:
        num_rows = len({row[PLACE] for row in texts(context.folder / "data" / "eval")})
    if context.recipe.preserve.budget is not None:
        num_rows = min(num_rows, MOST_ROWS)  # that whole runs are measured on
    return rate_search.Scale(measure.greater_is_better, num_rows, is_share(measure.name))
