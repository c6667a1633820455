"""The line of a comparison: data once, a rate search for each arm, seeds until the answer is clear, one look at the
test rows, the verdict. Layer 3, like `pipeline`, whose stages it uses.

    data → rates (halving, on eval rows) → seeds (looks at eval rows) → test rows, once → verdict → proof card

Everything is kept in files as it comes, so that the same command goes on where it was stopped.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import math
import platform
import shutil
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fulltune import evaluate, footprint, hardware, methods, model, pipeline, plan, processors, report, run_folder
from fulltune.compare import design, items
from fulltune.compare.claims import claims
from fulltune.compare.lint import lint
from fulltune.compare.sequential import look
from fulltune.compare.verdict import ArmItems, decide
from fulltune.compare_records import ArmDesign, ComparisonDesign, Decision, Finding, Look
from fulltune.errors import GuardStop, RecipeError
from fulltune.evaluate import drift, outputs
from fulltune.generic_text import generic_texts
from fulltune.recipe import Recipe
from fulltune.records import DataSummary, Estimate, Outcome, Plan, Scores
from fulltune.store import clusters_of
from fulltune.tasks import Target, task_named
from fulltune.train import Hooks, train
from fulltune.trials import ArmRow, Comparison, Expectation, Opening, Search, Trial, TrialResult, Tried
from fulltune.units import parse_seconds

FOLDER = "compare"
SEALED, OPEN = "predictions/sealed", "predictions/eval"
OPENINGS = f"{FOLDER}/test-openings.jsonl"
CLOCK = f"{FOLDER}/clock.jsonl"
RECORD = f"{FOLDER}/comparison.json"
BASE = "base"
START_SECONDS = 10.0
"""Of a trial beside its steps: imports, checks, the dry run, scoring eval and test rows. Roughly."""


def recipe_for(recipe: Recipe) -> Recipe:
    """The recipe as a comparison uses it: with `full` among its arms, and near-duplicates on one side of the split.

    Raises:
        RecipeError: When there is nothing to compare.
    """
    arms = recipe.methods
    if not any(one.kind not in ("full", "base") for one in arms):
        raise RecipeError(
            "methods: names nothing to compare full fine-tuning with; add for example 'methods: [base, full, lora, "
            "adapter, prompt]'"
        )
    if sum(one.kind == "full" for one in arms) != 1:
        raise RecipeError("methods: a comparison has 'full' exactly once: it is what the others are compared with")
    if "near_duplicates" in recipe.data.model_fields_set or recipe.task == "image-classification":
        return recipe
    block = recipe.data.model_copy(update={"near_duplicates": recipe.compare.near_duplicates})
    return recipe.model_copy(update={"data": block})


@dataclass(frozen=True)
class Room:
    """What all trials of an arm share."""

    arm: Any
    shapes: model.Shapes
    traced: footprint.Footprint
    plan: Plan
    """Of a whole run at the arm's usual rate."""


@dataclass
class Line:
    """A comparison on its way."""

    job: pipeline.Run
    summary: DataSummary
    command: str
    budget_seconds: float | None = None
    _rooms: dict[str, Room] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return self.job.folder

    @property
    def recipe(self) -> Recipe:
        return self.job.recipe

    @cached_property
    def machine(self) -> hardware.Machine:
        return hardware.here()

    @cached_property
    def texts(self) -> tuple[list[str], str]:
        return generic_texts(self.recipe.compare.generic_text)

    @cached_property
    def most_tokens(self) -> int:
        """Of a generic text, for all arms alike."""
        limit = self.room(self.full.arm).shapes.position_limit or drift.MOST_TOKENS
        return min(drift.MOST_TOKENS, limit - methods.virtual_tokens(self.recipe))

    @cached_property
    def measure(self) -> items.Measure:
        return items.measure_of(self.recipe.task, Target.of(self.summary), self.room(self.full.arm).plan.metric)

    @property
    def full(self) -> Any:
        return next(one for one in self.recipe.methods if one.kind == "full")

    @property
    def trained_arms(self) -> list[Any]:
        """Full first: the others are compared with it."""
        return [self.full, *(one for one in self.recipe.methods if one.kind not in ("full", "base"))]

    @property
    def spent_seconds(self) -> float:
        return sum(entry["seconds"] for entry in _lines(self.folder / CLOCK))

    @property
    def seconds_left(self) -> float:
        return math.inf if self.budget_seconds is None else self.budget_seconds - self.spent_seconds

    def say(self, text: str) -> None:
        self.job.listener({"kind": "comparison", "text": text})

    @contextlib.contextmanager
    def clocked(self, what: str) -> Iterator[None]:
        """Write down how long something took, over all commands that worked on this comparison."""
        began = time.monotonic()
        try:
            yield
        finally:
            _append(self.folder / CLOCK, {"what": what, "seconds": round(time.monotonic() - began, 3)})

    def room(self, arm: str) -> Room:
        """Sizes, memory and plan of an arm; traced once."""
        if arm not in self._rooms:
            method = next(one for one in self.recipe.methods if one.arm == arm)
            recipe = self.recipe.model_copy(update={"method": method, "methods": ()})
            source = model.locate(recipe.model)
            tokenizer = processors.load_processor(recipe.model, recipe.task, source)
            target = Target.of(self.summary)
            changes = task_named(recipe.task).config_changes(target, tokenizer)
            shapes = pipeline.shapes_of(recipe, changes)
            traced = pipeline.trace(recipe, target, self.summary.packed, shapes, self.machine, source, changes)
            found = Room(method, shapes, traced, self._fit(recipe, shapes, traced))
            self._rooms[arm] = found
        return self._rooms[arm]

    def _fit(self, recipe: Recipe, shapes: model.Shapes, traced: footprint.Footprint) -> Plan:
        free = hardware.disk_free_bytes(self.folder)
        made = plan.fit(recipe, shapes, traced, self.summary, self.machine, free)
        return plan.with_time(made, recipe, shapes, traced, self.summary, self.machine)

    def trial_recipe(self, trial: Trial) -> Recipe:
        """One run of one arm: the recipe with its rate, its seed and, in a search, fewer steps."""
        room = self.room(trial.arm)
        method = room.arm.model_copy(update={"learning_rate": trial.learning_rate, "learning_rates": None})
        changes: dict[str, Any] = {"seed": trial.seed}
        steps = max(2, round(trial.share * room.plan.total_steps))
        if trial.share < 1:
            changes |= {"max_steps": steps, "num_train_epochs": None}
            if self.recipe.train.warmup_steps is not None:
                ratio = self.recipe.train.warmup_steps / max(1, room.plan.total_steps)
                changes |= {"warmup_steps": None, "warmup_ratio": ratio}
        if trial.searches:
            changes |= {"early_stopping_patience": None, "eval_strategy": "steps", "eval_steps": steps}
            changes["save_steps"] = None
        block = self.recipe.train.model_copy(update=changes)
        return self.recipe.model_copy(update={"method": method, "methods": (), "train": block})

    def trial_plan(self, trial: Trial, recipe: Recipe) -> Plan:
        room = self.room(trial.arm)
        made = self._fit(recipe, room.shapes, room.traced)
        return made.model_copy(update={"trial": trial.name, "model_name": trial.name})


def lint_recipe(recipe: Recipe) -> tuple[Finding, ...]:
    """What would make the comparison that a recipe asks for unfair; nothing is trained, no rows are read."""
    block, source = recipe.model, model.locate(recipe.model, weights=False)
    shapes = model.shapes(block, task_named(recipe.task).AUTO_CLASS, {}, weights=False)
    planned = recipe.compare.seeds or LEAST_USUAL_SEEDS
    arms = []
    for method in recipe.methods:
        if method.kind == "base":
            continue
        usual, _ = plan.learning_rate_of(method, shapes.num_parameters, shapes.is_decoder)
        rates = design.grid(usual, method.learning_rates, method.learning_rate)
        arms.append(
            ArmDesign(
                name=method.arm,
                kind=method.kind,
                settings=_settings(method),
                rates_searched=rates if len(rates) > 1 else (),
                learning_rate=rates[0] if len(rates) == 1 else None,
                seeds=tuple(range(recipe.train.seed, recipe.train.seed + planned)),
                weights_dtype=recipe.model.weights_dtype,
                bf16_rounding=recipe.train.bf16_rounding,
            )
        )
    return lint(ComparisonDesign(arms=tuple(arms), weights_source="gguf" if source.gguf_file else "plain"))


LEAST_USUAL_SEEDS = 3


def _settings(method: Any) -> dict[str, Any]:
    """A method's own settings."""
    found: dict[str, Any] = method.model_dump(mode="json", exclude={"kind", "name", "learning_rate", "learning_rates"})
    return found


@dataclass(frozen=True)
class Compared:
    """What a comparison gave."""

    comparison: Comparison
    folder: Path
    cards: tuple[Path, ...]


def run(job: pipeline.Run, command: str, budget: str | None = None) -> Compared:
    """Compare the recipe's methods, or go on with it.

    Args:
        job: The recipe, as `recipe_for` gives it, in its run folder.
        command: What was typed, for the record.
        budget: Most time to take, such as `30m`; None: the recipe's, else without limit.

    Raises:
        FulltuneError: One of its kinds; the same command goes on.
    """
    with run_folder.writing(job.folder), run_folder.locked(job.folder):
        summary = pipeline.prepare(job)
        text = budget or job.recipe.compare.budget
        line = Line(job, summary, command, parse_seconds(text) if text else None)
        expectation = _expect(line)
        searches = {one.arm: _search(line, one, expectation) for one in line.trained_arms}
        results, looks = _run_seeds(line, searches, expectation)
        comparison = _judge(line, expectation, searches, results, looks)
        return Compared(comparison, job.folder, report.write_proof(job.folder))


# ---- before it starts ------------------------------------------------------------------------------------------


def _expect(line: Line) -> Expectation:
    """The design and what it costs; settled once, so that going on later changes nothing."""
    path = line.folder / FOLDER / "expectation.json"
    if path.exists():
        found = Expectation.load(path)
    else:
        block = line.recipe.compare
        costs = {one.arm: design.Cost(_run_seconds(line, one.arm), len(_grid(line, one))) for one in line.trained_arms}
        seeds, _ = design.num_seeds(block.seeds, line.summary.splits["train"].rows)
        rows = line.summary.splits["test"].rows
        is_share = line.measure.span == 1.0
        found = design.expected(costs, seeds, block.search_share, START_SECONDS, rows, is_share, line.budget_seconds)
        found.save(path)
    margin = line.recipe.compare.margin
    line.job.listener({"kind": "expectation", "expectation": found, "metric": line.measure.name, "margin": margin})
    return found


def _run_seconds(line: Line, arm: str) -> float:
    time_need = line.room(arm).plan.time
    return time_need.total_seconds if time_need else 0.0


def _grid(line: Line, method: Any) -> tuple[float, ...]:
    usual = line.room(method.arm).plan.learning_rate
    return design.grid(usual, method.learning_rates, method.learning_rate)


# ---- rates -----------------------------------------------------------------------------------------------------


def _search(line: Line, method: Any, expectation: Expectation) -> Search:
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
    shares = (design.first_share(expectation.search_share), expectation.search_share)
    tried: list[Tried] = []

    def run_one(rate: float, share: float, rung: int) -> float:
        share_here = share * expectation.length_share
        seed = line.recipe.train.seed
        trial = design.search_trial(method.arm, rate, share_here, seed)
        line.say(f"{method.arm}: trying the rate {rate:g} for {share_here:.1%} of the steps")
        metric = _tried(line, trial)
        tried.append(Tried(learning_rate=rate, share=share_here, metric=metric))
        return metric

    first = {rate: run_one(rate, shares[0], 1) for rate in rates}
    extensions = 0
    while (further := design.beyond(first, greater, extensions, may_extend)) is not None and further not in first:
        first[further] = run_one(further, shares[0], 1)
        extensions += 1
    for rate in design.survivors(first, greater):
        run_one(rate, shares[1], 2)
    found = design.finished(method.arm, tried, greater, may_extend)
    found.save(path)
    return found


def _tried(line: Line, trial: Trial) -> float:
    """The eval metric of a short trial; NaN when it came to nothing. Its model is not kept."""
    path = line.folder / FOLDER / "trials" / f"{trial.name}.json"
    if path.exists():
        return TrialResult.load(path).metric
    try:
        _, outcome, result = _trained(line, trial)
    except GuardStop as stop:
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


# ---- one trial -------------------------------------------------------------------------------------------------


def _trained(line: Line, trial: Trial) -> tuple[Plan, Outcome, TrialResult]:
    """Train one trial through the train stage, under its guards."""
    recipe = line.trial_recipe(trial)
    made = line.trial_plan(trial, recipe)
    made.save(line.folder / made.file)
    with line.clocked(trial.name):
        outcome = train(recipe, made, line.folder, Hooks(), _without_tables(line.job.listener))
    made = Plan.load(line.folder / made.file)  # changed when memory ran out
    model_folder = line.folder / str(outcome.model_folder)
    room = line.room(trial.arm)
    tokens = _tokens_seen(line, trial, outcome)
    return (
        made,
        outcome,
        TrialResult(
            trial=trial,
            metric=math.nan if outcome.best_metric is None else outcome.best_metric,
            steps=outcome.steps,
            best_step=outcome.best_step or outcome.steps,
            train_seconds=outcome.train_seconds,
            tokens_per_second=outcome.tokens_per_second,
            peak_memory_bytes=outcome.peak_memory_bytes,
            memory_growth_bytes=outcome.memory_growth_bytes,
            num_parameters=made.num_parameters,
            num_trainable=made.num_trainable_parameters,
            tokens=tokens,
            train_flops=room.traced.train_flops_per_token * tokens,
            saved_bytes=_weights_bytes(model_folder),
            device=made.device,
            precision=made.precision,
            weights_dtype=made.weights_dtype,
            bf16_rounding=made.bf16_rounding,
        ),
    )


def _tokens_seen(line: Line, trial: Trial, outcome: Outcome) -> int:
    """Of all steps, padding left out: each step takes a global batch of rows of the mean length."""
    split = line.summary.splits["train"]
    batch = line.room(trial.arm).plan.global_batch_size
    return round(outcome.steps * min(batch, split.rows) * split.tokens / max(1, split.rows))


def _weights_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _without_tables(listener: pipeline.Listener) -> pipeline.Listener:
    """Of a trial only what moves: the tables of all trials would hide the comparison."""
    shown = ("train", "warning", "resume", "attempt")
    return lambda event: listener(event) if event.get("kind") in shown else None


def _final(line: Line, trial: Trial) -> TrialResult:
    """A whole run of an arm; what it gives for eval and test rows is kept, the test rows' part sealed."""
    path = line.folder / FOLDER / "trials" / f"{trial.name}.json"
    if not path.exists():
        made, outcome, result = _trained(line, trial)
        with line.clocked(f"{trial.name}: rows"):
            bench = evaluate.bench_of(line.trial_recipe(trial), made, line.summary, line.folder)
            found = outputs.outputs(bench, line.folder / str(outcome.model_folder), line.texts[0], line.most_tokens)
            _keep(line, trial.name, found)
        result = result.model_copy(update={"seconds_per_row": found.seconds_per_row})
        result.save(path)
    return TrialResult.load(path)


def _keep(line: Line, name: str, found: outputs.Outputs) -> None:
    for split, place in (("eval", OPEN), ("test", SEALED)):
        if split in found.kept:
            outputs.save(line.folder / place / f"{name}.npz", found.kept[split])
    if found.generic is not None:
        outputs.save(line.folder / "predictions" / "generic" / f"{name}.npz", {"generic": found.generic})


def _keep_best_model(line: Line, results: Sequence[TrialResult]) -> None:
    """Of an arm's seeds the model with the best eval metric becomes `models/<arm>`; the others are deleted."""
    greater = line.measure.greater_is_better
    best = max(results, key=lambda one: (one.metric if greater else -one.metric, -one.trial.seed))
    models, arm = line.folder / "models", best.trial.arm
    mine = models / best.trial.name
    if mine.exists():
        shutil.rmtree(models / arm, ignore_errors=True)
        mine.rename(models / arm)
    for one in results:
        shutil.rmtree(models / one.trial.name, ignore_errors=True)


# ---- seeds -----------------------------------------------------------------------------------------------------

Results = dict[str, list[TrialResult]]


def _run_seeds(line: Line, searches: Mapping[str, Search], expectation: Expectation) -> tuple[Results, list[Look]]:
    """Whole runs, seed by seed, until the eval rows say that the answer is clear, or the time is up."""
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
            results[arm].append(_final(line, trial))
            _keep_best_model(line, results[arm])
        seen = _look(line, results, active, expectation)
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


def _time_is_up(line: Line, arm: str, results: Results) -> bool:
    """Whether the next run would go beyond the budget; each arm gets one run all the same."""
    if not results[arm]:
        return False
    spent = [one.train_seconds for one in results[arm]]
    path = line.folder / FOLDER / "trials" / f"{arm}-seed{results[arm][-1].trial.seed + 1}.json"
    return not path.exists() and line.seconds_left < sum(spent) / len(spent)


def _arm_items(line: Line, results: Results, place: str, arms: Sequence[str]) -> list[ArmItems]:
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


def _look(line: Line, results: Results, active: Sequence[str], expectation: Expectation) -> Look:
    """Ask the eval rows whether the answer is clear."""
    return look(
        _arm_items(line, results, OPEN, active),
        line.measure,
        margin=line.recipe.compare.margin,
        max_seeds=expectation.num_seeds,
        alpha=1 - line.recipe.evaluate.confidence,
        clusters=clusters_of(line.folder / "data" / "eval"),
        test_rows=line.summary.splits["test"].rows,
    )


# ---- the verdict -----------------------------------------------------------------------------------------------


def _judge(
    line: Line,
    expectation: Expectation,
    searches: Mapping[str, Search],
    results: Results,
    looks: Sequence[Look],
) -> Comparison:
    """Open the test rows, once, and say what they say."""
    path = line.folder / RECORD
    if path.exists():
        return Comparison.load(path)
    line.say("opening the test rows")
    arms = [arm for arm in results if results[arm]]
    with line.clocked("verdict"):
        base, baselines = _untouched(line)
        openings = _open_test_rows(line, [one.trial.name for arm in arms for one in results[arm]])
        compared = _arm_items(line, results, SEALED, arms)
        if (line.folder / SEALED / f"{BASE}.npz").exists():
            kept = outputs.load(line.folder / SEALED / f"{BASE}.npz")
            compared.append(ArmItems(name=BASE, kind="base", trials=[kept], cost=0.0))
        confidence = line.recipe.evaluate.confidence
        decision = decide(
            compared,
            line.measure,
            margin=line.recipe.compare.margin,
            clusters=clusters_of(line.folder / "data" / "test"),
            confidence=confidence,
            alpha=looks[-1].spent if looks else 1 - confidence,
        )
    found = _comparison(line, expectation, searches, results, looks, decision, base, baselines, openings)
    found.save(path)
    return found


def _untouched(line: Line) -> tuple[Scores | None, tuple[Scores, ...]]:
    """What costs no training: the arm `base` (the untouched language model, else the most frequent answer), and all
    baselines. A language model's rows are kept, so that it is compared like the others."""
    plan_of_full = line.room(line.full.arm).plan
    writes = line.recipe.task in ("causal-lm", "seq2seq")
    path = line.folder / SEALED / f"{BASE}.npz"
    generic_path = line.folder / "predictions" / "generic" / f"{BASE}.npz"
    if not (path.exists() if writes else generic_path.exists()):
        bench = evaluate.bench_of(line.recipe, plan_of_full, line.summary, line.folder)
        splits = ("eval", "test") if writes else ()
        _keep(line, BASE, outputs.outputs(bench, None, line.texts[0], line.most_tokens, splits))
    baselines = tuple(evaluate.baselines(line.recipe, plan_of_full, line.summary, line.folder))
    return (baselines[0] if baselines else None), baselines


def _open_test_rows(line: Line, trials: Sequence[str]) -> tuple[Opening, ...]:
    """Note who looks at the sealed rows; the noted openings, this one included."""
    opening = Opening(
        time=datetime.now().astimezone().isoformat(timespec="seconds"),
        by=f"{getpass.getuser()}@{platform.node()}",
        command=line.command,
        trials=tuple(trials),
    )
    _append(line.folder / OPENINGS, opening.model_dump(mode="json"))
    return tuple(Opening.model_validate(entry) for entry in _lines(line.folder / OPENINGS))


def _comparison(
    line: Line,
    expectation: Expectation,
    searches: Mapping[str, Search],
    results: Results,
    looks: Sequence[Look],
    decision: Decision,
    base: Scores | None,
    baselines: tuple[Scores, ...],
    openings: tuple[Opening, ...],
) -> Comparison:
    summary = line.summary
    rows = _rows(line, searches, results, looks, decision, base)
    finals = [one for arm in results for one in results[arm]]
    full = [one.train_seconds for one in results[line.full.arm]]
    environment = run_folder.environment(line.machine)
    made = line.room(line.full.arm).plan
    asked = _asked(line)
    fixed = sum(
        statistics.mean(one.train_seconds for one in results[arm]) * expectation.num_seeds
        for arm in results
        if results[arm]
    ) + sum(row.search_seconds for row in rows)
    return Comparison(
        name=line.folder.name,
        model=line.recipe.model.name,
        task=line.recipe.task,
        problem_type=summary.problem_type,
        train_rows=summary.splits["train"].rows,
        eval_rows=summary.splits["eval"].rows,
        test_rows=summary.splits["test"].rows,
        metric=line.measure.name,
        greater_is_better=line.measure.greater_is_better,
        decision=decision,
        rows=rows,
        baselines=baselines,
        searches=tuple(searches.values()),
        expectation=expectation,
        looks=tuple(looks),
        findings=lint(_design(line, searches, results, looks, openings)),
        openings=openings,
        claims=claims(rows, decision, summary.splits["train"].rows),
        drift_unit="nats per token" if summary.problem_type in drift.WRITERS else "1 - cosine",
        drift_text=line.texts[1],
        num_trials=len(finals) + sum(len(one.tried) for one in searches.values()),
        seconds=round(line.spent_seconds, 1),
        full_run_seconds=round(statistics.mean(full), 1),
        fixed_design_seconds=round(fixed, 1),
        cores=line.machine.num_cores,
        device=made.device,
        started=environment.started,
        data_fingerprint=summary.fingerprint,
        command=line.command,
        versions={"fulltune": environment.fulltune, "python": environment.python, **environment.packages},
        notes=tuple(asked),
    )


def _asked(line: Line) -> list[str]:
    """What the data stage found that a reader of the verdict should know."""
    return [note for note in line.summary.notes if "also stand in" in note or "repeat" in note]


def _rows(
    line: Line,
    searches: Mapping[str, Search],
    results: Results,
    looks: Sequence[Look],
    decision: Decision,
    base: Scores | None,
) -> tuple[ArmRow, ...]:
    scores = {one.arm: one for one in decision.scores}
    dropped = {step.arm: step.reason for seen in looks for step in seen.arms if step.decision == "drop"}
    base_value = _base_value(line, scores.get(BASE), base)
    full_value = scores[line.full.arm].mean
    made = line.room(line.full.arm).plan
    rows = []
    if any(one.kind == "base" for one in line.recipe.methods) and base_value is not None:
        of_base = scores.get(BASE)
        estimate = (
            Estimate(value=of_base.mean, low=of_base.low, high=of_base.high)
            if of_base
            else base.metrics[line.measure.name]  # type: ignore[union-attr]  # `base_value` came from it
        )
        rows.append(
            ArmRow(
                arm=BASE,
                kind="base",
                num_parameters=made.num_parameters,
                num_trainable=0,
                metric=estimate,
                values=(estimate.value,),
                gain_share=0.0,
            )
        )
    for arm, found in results.items():
        if not found:
            continue
        score, method = scores[arm], line.room(arm).arm
        gain = None
        if base_value is not None and full_value != base_value:
            gain = (score.mean - base_value) / (full_value - base_value)
        mean = statistics.mean
        rows.append(
            ArmRow(
                arm=arm,
                kind=method.kind,
                settings=_settings(method),
                num_parameters=made.num_parameters,
                num_trainable=found[0].num_trainable,
                learning_rate=searches[arm].chosen,
                seeds=tuple(one.trial.seed for one in found),
                metric=Estimate(value=score.mean, low=score.low, high=score.high),
                values=score.values,
                gain_share=gain,
                train_seconds=round(mean(one.train_seconds for one in found), 2),
                search_seconds=round(_search_seconds(line, searches[arm]), 2),
                tokens_per_second=round(mean(one.tokens_per_second for one in found), 1),
                train_flops=mean(one.train_flops for one in found),
                peak_memory_bytes=max(one.peak_memory_bytes for one in found),
                memory_growth_bytes=max(one.memory_growth_bytes for one in found),
                saved_bytes=found[0].saved_bytes,
                drift=_drift(line, found),
                seconds_per_row=mean(one.seconds_per_row or 0.0 for one in found),
                dropped=dropped.get(arm, ""),
            )
        )
    return tuple(rows)


def _base_value(line: Line, of_rows: Any, base: Scores | None) -> float | None:
    """The metric without training."""
    if of_rows is not None:
        return float(of_rows.mean)
    return base.metrics[line.measure.name].value if base and line.measure.name in base.metrics else None


def _search_seconds(line: Line, search: Search) -> float:
    spent = 0.0
    for one in search.tried:
        trial = design.search_trial(search.arm, one.learning_rate, one.share, line.recipe.train.seed)
        path = line.folder / FOLDER / "trials" / f"{trial.name}.json"
        spent += TrialResult.load(path).train_seconds if path.exists() else 0.0
    return spent


def _drift(line: Line, found: Sequence[TrialResult]) -> Estimate | None:
    """Mean drift on generic text, with a bootstrap interval over the texts."""
    folder = line.folder / "predictions" / "generic"
    if not (folder / f"{BASE}.npz").exists():
        return None
    before = outputs.load(folder / f"{BASE}.npz")["generic"]
    moved = [drift.drift(before, outputs.load(folder / f"{one.trial.name}.npz")["generic"]) for one in found]
    of_text = np.mean(moved, axis=0)
    drawn = np.random.default_rng(0).integers(0, len(of_text), (2000, len(of_text)))
    means = of_text[drawn].mean(axis=1)
    tail = (1 - line.recipe.evaluate.confidence) / 2
    low, high = np.quantile(means, (tail, 1 - tail))
    return Estimate(value=float(of_text.mean()), low=float(low), high=float(high))


def _design(
    line: Line, searches: Mapping[str, Search], results: Results, looks: Sequence[Look], openings: Sequence[Opening]
) -> ComparisonDesign:
    """What the lint looks at."""
    dropped = {step.arm for seen in looks for step in seen.arms if step.decision == "drop"}
    arms = []
    for arm, found in results.items():
        method, made = line.room(arm).arm, line.room(arm).plan
        arms.append(
            ArmDesign(
                name=arm,
                kind=method.kind,
                settings=_settings(method),
                rates_searched=tuple(sorted({one.learning_rate for one in searches[arm].tried})),
                learning_rate=searches[arm].chosen,
                seeds=tuple(one.trial.seed for one in found),
                weights_dtype=made.weights_dtype,
                bf16_rounding=made.bf16_rounding,
                train_tokens=found[0].tokens if found else None,
                dropped=arm in dropped,
            )
        )
    return ComparisonDesign(
        arms=tuple(arms),
        weights_source="gguf" if line.recipe.model.name.endswith(".gguf") else "plain",
        eval_is_test=False,  # the recipe refuses the same file, the split keeps them apart
        test_openings=len(openings),
        same_data_order=True,  # the sampler's order depends on seed and epoch alone
    )


# ---- files -----------------------------------------------------------------------------------------------------


def _append(path: Path, entry: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
