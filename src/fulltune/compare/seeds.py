from __future__ import annotations

import shutil
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from fulltune.compare import budget, rates
from fulltune.compare.context import EVAL_OUTPUTS, Context
from fulltune.compare.sequential import SAMPLES, WAITING_SHARE, plan_next_seeds
from fulltune.compare.trials import delete_trial_files, is_done, keep_best_model, run_trial
from fulltune.compare.verdict import MethodOutputs, Terms
from fulltune.errors import Diverged
from fulltune.evaluate.scoring import load_outputs
from fulltune.inference.store import CLUSTERS
from fulltune.recipe.methods import RIVALS, Method, MethodKind
from fulltune.records.comparison import Expectation, Look, Search, Trial, TrialResult
from fulltune.stats.bootstrap import resample_trials
from fulltune.text import counted

Results = dict[str, list[TrialResult]]


MOST_WHOLE_RUNS = 4
MOST_WHOLE_RUNS_ALONE = 3
"""Maximum number of whole runs at different rates, in a comparison and in a rate search."""


def search_all_rates(context: Context, expectation: Expectation) -> dict[str, Search]:
    """Return each method's rate search. Without time, full and its first rival take defaults; others are dropped."""
    planned = [one for one in context.trained_methods if one.label in expectation.methods]
    pair = [one.label for one in planned if one is context.full or context.recipe.compared_kind(one) in RIVALS][:2]
    keep = budget.forecast_remaining_seconds(
        context, dict.fromkeys((one.label for one in planned), 0), min(budget.LEAST_SEEDS, expectation.num_seeds)
    )
    searches: dict[str, Search] = {}
    for method in planned:
        rate_search = search_rate(context, method, expectation.search_share, keep)
        if rate_search.tried or not rate_search.time_was_up or method.label in pair:
            searches[method.label] = rate_search
        else:
            context.say(f"{method.label}: not trained, because there is not enough time")
    return searches


def search_rate(context: Context, method: Method, search_share: float, reserved_seconds: float = 0.0) -> Search:
    """Load a method's finished search, or run and save one, leaving `reserved_seconds` for whole runs."""
    path = context.search_path(method.label)
    if path.exists() and not (result := Search.load(path)).time_was_up:
        return result
    result = _run_short_trials(context, method, search_share, reserved_seconds)
    result.save(path)
    return result


def _run_short_trials(context: Context, method: Method, search_share: float, reserved_seconds: float) -> Search:
    """Try the grid's rates in short trials, then rates beyond its edge while the edge is best; return the search."""
    label, grid, seed = method.label, budget.method_rates(context, method), context.recipe.train.seed
    if len(grid) == 1:
        return Search(method=label, chosen=grid[0], reason="the only rate in the recipe, so no search was needed")
    usual = budget.default_rate(context, method)
    share = rates.share_of_steps(search_share, context.method_setup(label).plan.total_steps)
    tried: dict[float, float] = {}
    next_rates = list(grid)
    while next_rates:
        trials = [rates.short_trial(label, rate, share, seed) for rate in next_rates]
        if not search_share or not budget.has_time(context, trials, reserved_seconds):
            context.say(f"{label}: not enough time to try the rate {' or '.join(f'{rate:g}' for rate in next_rates)}")
            break
        for trial in trials:
            context.say(f"{label}: trying the rate {trial.learning_rate:g} for {share:.1%} of the steps")
            tried[trial.learning_rate] = run_trial(context, trial).metric
        extends = method.learning_rates is None and len(tried) < len(grid) + rates.MOST_EXTENSIONS
        further = rates.next_rate_beyond_grid(tried, context.metric_scale) if extends else None
        next_rates = [] if further is None else [further]
    if not tried:
        return Search(
            method=label,
            chosen=usual,
            reason="the default rate, because there was no time for a search",
            time_was_up=True,
        )
    result = rates.search_from_short_trials(label, tried, share, context.metric_scale, usual)
    return result.model_copy(update={"time_was_up": bool(next_rates)})


@dataclass
class SeedRuns:
    """Trains a comparison's methods seed by seed until the answer is clear."""

    context: Context
    searches: dict[str, Search]
    expectation: Expectation
    results: Results = field(default_factory=dict)
    looks: list[Look] = field(default_factory=list)
    time_was_up: bool = False

    @property
    def dropped_methods(self) -> tuple[str, ...]:
        return tuple(one.label for one in self.context.trained_methods if one.label not in self.results)

    @property
    def waiting(self) -> tuple[str, ...]:
        return self.looks[-1].waiting if self.looks else ()

    @property
    def lacks_time(self) -> bool:
        return self.time_was_up or bool(self.dropped_methods) or any(one.time_was_up for one in self.searches.values())

    def train_until_clear(self) -> SeedRuns:
        """Train one seed after another until the eval rows give a clear answer or time is up, and return self."""
        self.results = {method: [] for method in self.searches}
        at_once = not self.context.recipe.compare.sequential
        wanted = dict.fromkeys(self.searches, self.expectation.most_seeds if at_once else 1)
        while wanted:
            if not self._train_seeds(wanted):
                self.context.say("the budget is used up, so the verdict is based on the finished runs")
                self.time_was_up = True
                break
            if at_once:
                break
            wanted = self._decide_next_seeds()
            if not wanted and self.looks[-1].num_seeds > 1:
                wanted = self._recheck_rivals()
        return self

    def train_best_rate(self, method: str) -> TrialResult:
        """Train one seed at the best rate, save its model as `models/<method>`, and return its result."""
        self.results[method] = []
        while (result := run_trial(self.context, self._next_trial(method))).problems:
            self._lower_rate(result)
        self.results[method].append(result)
        self.try_other_rates(method)
        return self.results[method][0]

    def _train_seeds(self, wanted: Mapping[str, int]) -> bool:
        """Train until each method has the number of seeds in `wanted`. Return False if time runs out first."""
        while lacking := {name: len(runs) for name, runs in self.results.items() if len(runs) < wanted.get(name, 0)}:
            methods = [name for name, count in lacking.items() if count == min(lacking.values())]
            method = methods[0]
            runs, most = self.results[method], self.expectation.most_seeds
            if not runs and (late := self._first_unaffordable_method()):
                self.context.say(f"{late}: not trained, because there is not enough time")
                del self.results[late], self.searches[late]
                continue
            if len(runs) == 1:  # a second seed follows, so now the rate matters
                for each in methods:
                    self.try_other_rates(each, self._reserved_seconds())
            trials = [self._next_trial(each) for each in methods]
            begins = bool(runs) and not is_done(self.context, trials[0])
            if begins and not budget.has_time(self.context, trials):
                return False
            self.context.say(f"{method}: seed {len(runs) + 1} of at most {most}")
            result = run_trial(self.context, trials[0])
            if result.problems:
                # A rate at which one seed diverges is too high for the method: all its seeds get a lower one.
                self._lower_rate(result)
                continue
            runs.append(result)
            keep_best_model(self.context, runs)
            if most == 1:
                self.try_other_rates(method, self._reserved_seconds())
        return True

    def _next_trial(self, method: str) -> Trial:
        seed = self.context.recipe.train.seed + len(self.results[method])
        return rates.whole_run_trial(method, self.searches[method].chosen, seed)

    def _reserved_seconds(self, seeds: int | None = None) -> float:
        counts = {method: len(runs) for method, runs in self.results.items()}
        return budget.forecast_remaining_seconds(self.context, counts, seeds or self.expectation.num_seeds)

    def _first_unaffordable_method(self) -> str | None:
        """Return the first method without time left besides two seeds of full and its first rival, or None."""
        context = self.context
        pair = (context.full.label, next(method for method in self.results if self._kind(method) in RIVALS))
        keep = self._reserved_seconds(min(budget.LEAST_SEEDS, context.recipe.compare.seeds or budget.LEAST_SEEDS))
        others = (method for method, runs in self.results.items() if not runs and method not in pair)
        return next(
            (method for method in others if not budget.has_time(context, [self._next_trial(method)], keep)), None
        )

    def _decide_next_seeds(self) -> dict[str, int]:
        """Judge the runs so far on eval rows. Return the number of seeds that each method needs (empty to stop)."""
        context, again = self.context, self._is_second_look(self.looks)
        full = self.results[context.full.label]
        behind = [method for method, runs in self.results.items() if len(runs) < len(full)]
        compared = load_method_outputs(context, self.results, EVAL_OUTPUTS, behind)
        clusters = np.load(context.folder / "data" / "eval" / CLUSTERS)
        drawn = resample_trials(context.resamplable_metric, [one.trials for one in compared], clusters, SAMPLES)
        terms = Terms(context.resamplable_metric, context.recipe.compare.margin, alpha=context.alpha)
        test_rows = context.summary.splits["test"].rows
        result = plan_next_seeds(compared, drawn, terms, self.expectation.most_seeds, test_rows, again=again)
        self.looks.append(result)
        context.say(f"after {counted(result.num_seeds, 'seed')}: {result.reason}")
        return result.wanted_seeds

    def _is_second_look(self, looks: Sequence[Look]) -> bool:
        return bool(looks) and looks[-1].num_seeds == len(self.results[self.context.full.label])

    def _recheck_rivals(self) -> dict[str, int]:
        """Try other rates for rivals before full wins; return the number of seeds for those that must catch up."""
        context, scale = self.context, self.context.metric_scale
        kinds = ("full", *RIVALS)
        decisive = {method: runs for method, runs in self.results.items() if self._kind(method) in kinds}
        full = decisive[context.full.label]
        means = {
            method: statistics.mean(scale.oriented(run.metric) for run in runs)
            for method, runs in decisive.items()
            if len(runs) == len(full)
        }
        mine, leader = means.pop(context.full.label), max(means.values())
        if mine - leader < context.recipe.compare.margin:
            return {}
        changed = [method for method, runs in decisive.items() if len(runs) == 1 and self.try_other_rates(method)]
        better = [method for method in changed if scale.oriented(self.results[method][0].metric) > leader]
        return {} if self._is_second_look(self.looks[:-1]) else dict.fromkeys(better, len(full))

    def _lower_rate(self, result: TrialResult) -> None:
        """Restart a method at a lower rate after a trial diverged. Raise `Diverged` if no rate is left."""
        context, trial, search = self.context, result.trial, self.searches[result.trial.method]
        lower = rates.lower_rate_after_divergence(search)
        if lower is None:
            raise Diverged(result.problems)
        reason = f"{search.chosen:g} diverged in a whole run (seed {trial.seed})"
        context.say(f"{trial.method}: {reason}; using {lower:g} instead")
        delete_trial_files(context, trial)
        # The lower rate may have had its run, but its model was deleted when a higher one was better.
        shutil.rmtree(context.folder / "models" / trial.method, ignore_errors=True)
        again = rates.whole_run_trial(trial.method, lower, context.recipe.train.seed)
        context.result_path(again.name).unlink(missing_ok=True)
        self.searches[trial.method] = rates.with_lower_rate(search, lower, reason)
        self.searches[trial.method].save(context.search_path(trial.method))
        self.results[trial.method].clear()

    def try_other_rates(self, method: str, reserved_seconds: float = 0.0) -> bool:
        """Try other rates in whole runs, leaving `reserved_seconds`. Return True if the rate changed."""
        context, search, first = self.context, self.searches[method], self.results[method][0]
        may_extend = context.method_setup(method).method.learning_rates is None
        most = MOST_WHOLE_RUNS if context.recipe.methods else MOST_WHOLE_RUNS_ALONE
        runs = {search.chosen: first}
        while search.share < first.trial.share:  # otherwise the short trials were whole runs
            whole = {rate: one.metric for rate, one in runs.items()}
            rate = rates.next_rate_for_whole_run(search, whole, context.metric_scale, may_extend, most)
            if rate is None:
                break
            check = rates.whole_run_trial(method, rate, first.trial.seed, is_rate_test=True)
            if not budget.has_time(context, [check], reserved_seconds):
                context.say(f"{method}: not enough time to try {rate:g} in a whole run")
                break
            context.say(
                f"{method}: trying {rate:g} in a whole run, because short trials cannot show which rate is better"
            )
            runs[rate] = run_trial(context, check)
        if len(runs) > 1:
            metrics = {rate: one.metric for rate, one in runs.items()}
            improved = rates.search_after_whole_runs(search, metrics, context.metric_scale)
            self.results[method][0] = runs.pop(improved.chosen)
            self.searches[method] = improved
            for dropped in runs.values():
                shutil.rmtree(context.folder / "models" / dropped.trial.name, ignore_errors=True)
            context.say(f"{method}: using {improved.chosen:g}")
        keep_best_model(context, self.results[method])
        return self.results[method][0] is not first

    def _kind(self, method: str) -> MethodKind:
        return self.context.recipe.compared_kind(self.context.method_setup(method).method)


def load_method_outputs(
    context: Context, results: Results, subfolder: str, methods_behind: Collection[str]
) -> list[MethodOutputs]:
    """Load the methods' outputs from a subfolder. `methods_behind` may spend only `WAITING_SHARE` of alpha."""
    folder, setups = context.folder / subfolder, {method: context.method_setup(method) for method in results}
    return [
        MethodOutputs(
            name=method,
            kind=context.recipe.compared_kind(setups[method].method),
            trials=[load_outputs(folder / f"{one.trial.name}.npz") for one in trials],
            cost=float(setups[method].plan.num_trainable_parameters),
            alpha_share=WAITING_SHARE if method in methods_behind else 1.0,
        )
        for method, trials in results.items()
    ]
