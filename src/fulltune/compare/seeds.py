"""Whole runs, seed by seed, until the eval rows say that the answer is clear."""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from fulltune.compare import design, rate_search, timing
from fulltune.compare.context import FOLDER, OPEN, Context
from fulltune.compare.rates import scale_of
from fulltune.compare.sequential import WAITING_SHARE, look
from fulltune.compare.trials import clear, is_done, keep_best_model, run_trial
from fulltune.compare.verdict import ArmItems
from fulltune.errors import Diverged
from fulltune.evaluate import outputs
from fulltune.inference.store import clusters_of
from fulltune.recipe.methods import RIVALS, ArmKind
from fulltune.records.comparison import Expectation, Search, Trial, TrialResult
from fulltune.records.differences import Look
from fulltune.text import counted

Results = dict[str, list[TrialResult]]
"""The whole runs of each arm, seed by seed."""


def most_seeds(expectation: Expectation) -> int:
    """Of each arm; the budget's are a forecast, and where time is left more are run."""
    return expectation.recipe_seeds or expectation.num_seeds


@dataclass
class SeedRuns:
    """Whole runs of a comparison's arms; `searches` follows the rates, and loses an arm for which there is no time."""

    context: Context
    searches: dict[str, Search]
    expectation: Expectation
    results: Results = field(default_factory=dict)
    looks: list[Look] = field(default_factory=list)
    time_was_up: bool = False
    """It ended because of the budget."""

    @property
    def left_out(self) -> tuple[str, ...]:
        """Methods that were not trained."""
        return tuple(one.arm for one in self.context.trained_arms if one.arm not in self.results)

    @property
    def lacks_time(self) -> bool:
        """More time would add seeds, methods or searches of rates."""
        return self.time_was_up or bool(self.left_out) or any(one.time_was_up for one in self.searches.values())

    def run(self) -> SeedRuns:
        """Run seeds until the eval rows say that the answer is clear, or the time is up."""
        self.results = {arm: [] for arm in self.searches}
        at_once = not self.context.recipe.compare.sequential
        asked = dict.fromkeys(self.searches, most_seeds(self.expectation) if at_once else 1)
        while asked:
            if not self._train(asked):
                self.context.say("the budget is used up: the verdict is made from what there is")
                self.time_was_up = True
                break
            if at_once:
                break
            asked = {arm: count for arm, count in self._look().items() if arm in self.results}
            if not asked and self.looks[-1].num_seeds > 1:
                asked = self._before_full()
        return self

    def best_rate(self, arm: str) -> TrialResult:
        """One seed of one arm, at the best rate that whole runs show; its model is kept as `models/<arm>`."""
        self.results[arm] = []
        while (result := self.first(self._next_trial(arm))).problems:
            self._after_divergence(result)
        self.results[arm].append(result)
        self.check_rate(arm)
        return self.results[arm][0]

    def _train(self, asked: Mapping[str, int]) -> bool:
        """Whole runs until each arm has the seeds asked for; False when the time is up first."""
        while lacking := {arm: len(found) for arm, found in self.results.items() if len(found) < asked.get(arm, 0)}:
            arms = [arm for arm, count in lacking.items() if count == min(lacking.values())]
            arm = arms[0]
            found, most = self.results[arm], most_seeds(self.expectation)
            if not found and (late := self._no_time()):
                self.context.say(f"{late}: there is no time for it")
                del self.results[late], self.searches[late]
                continue
            if len(found) == 1:  # they go on: now their rates matter
                for each in arms:
                    self.check_rate(each, self._keep())
            trials = [self._next_trial(each) for each in arms]
            begins = bool(found) and not is_done(self.context, trials[0])
            if begins and not timing.has_time(self.context, trials):
                return False
            self.context.say(f"{arm}: seed {len(found) + 1} of at most {most}")
            result = run_trial(self.context, trials[0]) if found else self.first(trials[0])
            if result.problems:
                # A rate at which one seed diverges is too high for the method: all its seeds get a lower one.
                self._after_divergence(result)
                continue
            found.append(result)
            keep_best_model(self.context, found)
            if most == 1:
                self.check_rate(arm, self._keep())
        return True

    def _next_trial(self, arm: str) -> Trial:
        seed = self.context.recipe.train.seed + len(self.results[arm])
        return design.final_trial(arm, self.searches[arm].chosen, seed)

    def _keep(self, seeds: int | None = None) -> float:
        """Seconds of what matters more than other rates or methods: so many seeds, else those that were planned."""
        counts = {arm: len(found) for arm, found in self.results.items()}
        return timing.to_come(self.context, counts, seeds or self.expectation.num_seeds)

    def _no_time(self) -> str | None:
        """A method without a run for which there is no time beside two seeds of full and of the first rival."""
        context = self.context
        pair = (context.full.arm, next(arm for arm in self.results if self._kind(arm) in RIVALS))
        keep = self._keep(min(design.LEAST_SEEDS, context.recipe.compare.seeds or design.LEAST_SEEDS))
        others = (arm for arm, found in self.results.items() if not found and arm not in pair)
        return next((arm for arm in others if not timing.has_time(context, [self._next_trial(arm)], keep)), None)

    def _look(self) -> dict[str, int]:
        """Look at the eval rows: how many seeds which methods are to have before the next look; none: it is enough."""
        seen = self.ask_eval_rows(again=self._again(self.looks))
        self.looks.append(seen)
        seen.save(self.context.folder / FOLDER / "looks" / f"{len(self.looks)}.json")
        self.context.say(f"after {counted(seen.num_seeds, 'seed')}: {seen.reason}")
        return {step.arm: step.seeds for step in seen.arms if step.decision == "more"}

    def ask_eval_rows(self, *, again: bool) -> Look:
        """Whether the answer is clear; `again`: with so many seeds of full it was asked before."""
        context = self.context
        full = self.results[context.full.arm]
        behind = [arm for arm, found in self.results.items() if len(found) < len(full)]
        return look(
            arm_items(context, self.results, OPEN, behind),
            context.measure,
            margin=context.recipe.compare.margin,
            max_seeds=most_seeds(self.expectation),
            again=again,
            alpha=context.alpha,
            clusters=clusters_of(context.folder / "data" / "eval"),
            test_rows=context.summary.splits["test"].rows,
        )

    def _again(self, looks: Sequence[Look]) -> bool:
        return bool(looks) and looks[-1].num_seeds == len(self.results[self.context.full.arm])

    def _before_full(self) -> dict[str, int]:
        """Before full is said to win: choose all rivals' rates as full's was, and name one that is now to catch up."""
        context, scale = self.context, scale_of(self.context)
        kinds = ("full", *RIVALS)
        decisive = {arm: found for arm, found in self.results.items() if self._kind(arm) in kinds}
        full = decisive[context.full.arm]
        means = {
            arm: statistics.mean(scale.oriented(one.metric) for one in found)
            for arm, found in decisive.items()
            if len(found) == len(full)
        }
        mine, leader = means.pop(context.full.arm), max(means.values())
        if mine - leader < context.recipe.compare.margin:
            return {}
        changed = [arm for arm, found in decisive.items() if len(found) == 1 and self.check_rate(arm)]
        better = [arm for arm in changed if scale.oriented(self.results[arm][0].metric) > leader]
        return {} if self._again(self.looks[:-1]) else dict.fromkeys(better, len(full))

    def first(self, trial: Trial) -> TrialResult:
        """The first whole run of an arm, at a rate that holds for a whole run; or one that diverged."""
        while True:
            result, search = run_trial(self.context, trial), self.searches[trial.arm]
            lower = None
            if not result.problems and not self.context.is_held(trial.arm):
                lower = rate_search.slower(search, result.metric, scale_of(self.context))
            if lower is None:
                return result
            reason = f"a whole run with {search.chosen:g} ended below its short trial"
            self._replace(trial, lower, reason, [result])
            trial = trial.model_copy(update={"learning_rate": lower})

    def _after_divergence(self, result: TrialResult) -> None:
        """Choose a lower rate for all seeds of an arm after one diverged; Diverged where nothing lower is left."""
        context, trial, search = self.context, result.trial, self.searches[result.trial.arm]
        lower = rate_search.after_divergence(search)
        if lower is None:
            raise Diverged(result.problems)
        reason = f"{search.chosen:g} diverged in a whole run (seed {trial.seed})"
        self._replace(trial, lower, reason, [*self.results[trial.arm], result])
        # The lower rate may have had its run, but its model was deleted when a higher one was better.
        shutil.rmtree(context.folder / "models" / trial.arm, ignore_errors=True)
        again = design.final_trial(trial.arm, lower, context.recipe.train.seed)
        context.result_path(again.name).unlink(missing_ok=True)
        self.results[trial.arm].clear()

    def _replace(self, trial: Trial, lower: float, reason: str, dropped: Sequence[TrialResult]) -> None:
        self.context.say(f"{trial.arm}: {reason}; taking {lower:g}")
        clear(self.context, trial)
        search = rate_search.replaced(self.searches[trial.arm], lower, reason, _seconds(dropped))
        self.searches[trial.arm] = search
        search.save(self.context.search_path(trial.arm))

    def check_rate(self, arm: str, keep: float = 0.0) -> bool:
        """Take the best of whole runs at other rates for an arm, leaving `keep` seconds; whether it is another rate."""
        context, search, first = self.context, self.searches[arm], self.results[arm][0]
        runs = {search.chosen: first}
        while (check := self._next_check(arm, *runs.values())) is not None:
            rate = check.learning_rate
            if not timing.has_time(context, [check], keep):
                context.say(f"{arm}: no time to try {rate:g} in a whole run as well")
                break
            context.say(f"{arm}: a whole run with {rate:g} as well, because short trials do not show the better rate")
            runs[rate] = run_trial(context, check)
        if len(runs) > 1:
            metrics = {rate: one.metric for rate, one in runs.items()}
            may_extend, share = self._may_extend(arm), first.trial.share
            found = rate_search.after_whole(search, metrics, scale_of(context), may_extend, share)
            self.results[arm][0] = runs.pop(found.chosen)
            self.searches[arm] = rate_search.with_dropped(found, _seconds(list(runs.values())))
            for dropped in runs.values():
                shutil.rmtree(context.folder / "models" / dropped.trial.name, ignore_errors=True)
            context.say(f"{arm}: taking {found.chosen:g}")
        keep_best_model(context, self.results[arm])
        return self.results[arm][0] is not first

    def _next_check(self, arm: str, *runs: TrialResult) -> Trial | None:
        """The whole run at another rate that comes after these; None: no more, or the short trials were whole runs."""
        search, trial = self.searches[arm], runs[0].trial
        if any(one.share >= trial.share for one in search.tried):
            return None
        rates = (search.chosen, *(one.trial.learning_rate for one in runs[1:]))
        whole = dict(zip(rates, map(self.context.trained_metric, runs), strict=True))
        rate = rate_search.next_whole(
            search,
            whole,
            scale_of(self.context),
            self._may_extend(arm),
            self.context.most_whole_runs,
        )
        return None if rate is None else design.final_trial(arm, rate, trial.seed, check=True)

    def _kind(self, arm: str) -> ArmKind:
        return self.context.recipe.compared_kind(self.context.setup(arm).arm)

    def _may_extend(self, arm: str) -> bool:
        """The recipe names no rates to search among."""
        return self.context.setup(arm).arm.learning_rates is None


def _seconds(found: Sequence[TrialResult]) -> list[float]:
    return [one.train_seconds for one in found]


def waiting(looks: Sequence[Look]) -> set[str]:
    """Methods that have fewer seeds because the verdict did not hinge on them."""
    return {step.arm for step in looks[-1].arms if step.seeds < looks[-1].num_seeds} if looks else set()


def arm_items(context: Context, results: Results, place: str, waited: Collection[str]) -> list[ArmItems]:
    """What the trials of all arms gave for the rows of a split; those that waited are tested at a part of alpha."""
    folder, setups = context.folder / place, {arm: context.setup(arm) for arm in results}
    return [
        ArmItems(
            name=arm,
            kind=context.recipe.compared_kind(setups[arm].arm),
            trials=[outputs.load(folder / f"{one.trial.name}.npz") for one in trials],
            cost=float(setups[arm].plan.num_trainable_parameters),
            alpha_share=WAITING_SHARE if arm in waited else 1.0,
        )
        for arm, trials in results.items()
    ]
