from __future__ import annotations

import hashlib
import math
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any, Literal

import numpy as np
from scipy.stats import norm

from fulltune import evaluate, pipeline
from fulltune.audit.rows import LEAK, NEAR_LEAK
from fulltune.audit.stage import load_issues
from fulltune.data.patch import Decisions, load_patch, next_row_hash, save_patch
from fulltune.errors import RecipeError, SetupError
from fulltune.evaluate.scoring import compute_outputs, load_outputs, save_outputs
from fulltune.inference.store import CLUSTERS, read_original_rows, row_id
from fulltune.pipeline import Run, reader_of
from fulltune.plan.settings import with_settings
from fulltune.probe.linear import Items, NoProbe, error_rate, fit_at_strengths, select_classifier
from fulltune.recipe.fields import Recipe
from fulltune.recipe.functions import is_own
from fulltune.recipe.rules import of_answers
from fulltune.records.audit import HIGH_LOSS, PROOFS, TRAINED_PROOFS, Proof, Proofs, Remedy, RowDecision, RowIssue
from fulltune.records.data import DataSummary
from fulltune.records.events import Message, only_steps_and_warnings
from fulltune.stats.bootstrap import ResamplableMetric, find_metric, resample_trials
from fulltune.stats.intervals import EXTRA_DISAGREEMENTS, difference_of_methods, estimate_seed_spreads
from fulltune.system import run_folder
from fulltune.tasks import Predictions, Target
from fulltune.text import counted

TIMES, LEFT_OUT = 5, 0.2
LEAST_EVAL_ROWS = 50
_RESAMPLES = 1000
Action = Literal["drop", "replace"]
ALPHA = 0.05
"""Probability that at least one interval misses the true difference (Bonferroni)."""
FOLDER = "cleaning"
LEAST_SHARE, MOST_SHARE = 0.002, 0.5
"""Smallest and largest share of train rows that a step may change: below, nothing is measurable."""


_IDS, _CLUSTERS = "row_ids", "row_clusters"


@dataclass(frozen=True)
class CleaningStep:
    """A check's change to all train rows that it flagged: drop them, or apply the remedies."""

    check: str
    action: Action
    issues: tuple[RowIssue, ...]

    def __str__(self) -> str:
        done = "dropped" if self.action == "drop" else "changed as proposed"
        return f"{self.check}, {counted(len(self.issues), 'row')} {done}"

    @property
    def name(self) -> str:
        content = "".join(one.model_dump_json() for one in self.decisions)
        return f"{self.check.replace(' ', '-')}-{self.action}-{hashlib.sha256(content.encode()).hexdigest()[:8]}"

    @property
    def decisions(self) -> list[RowDecision]:
        return [one.decision(Remedy(action="drop") if self.action == "drop" else one.remedy) for one in self.issues]


def cleaning_steps(issues: Sequence[RowIssue]) -> list[CleaningStep]:
    """Return up to two steps per check (except leaks and high losses): drop flagged train rows, or apply remedies."""
    steps = []
    for check in dict.fromkeys(one.check for one in issues if one.check not in (LEAK, NEAR_LEAK, HIGH_LOSS)):
        # A row with several issues of a check, such as in both texts of a pair, counts with its first one.
        of_row = {one.key: one for one in reversed(issues) if one.check == check and one.split == "train"}
        train_issues = list(reversed(of_row.values()))
        changed = [one for one in train_issues if one.remedy.action == "replace"]
        both: tuple[tuple[Action, list[RowIssue]], ...] = (("drop", train_issues), ("replace", changed))
        steps += [CleaningStep(check, action, tuple(rows)) for action, rows in both if rows]
    return steps


def row_ids(folder: Path, decisions: Decisions | None = None) -> Iterator[str]:
    """Yield each row's id; equal rows get the same numbers as before `decisions` dropped some."""
    times = Counter[tuple[str, str]]()
    for row in read_original_rows(folder):
        yield next_row_hash(times, ("train", row_id(row)), decisions or {})


# ---- by whole runs -------------------------------------------------------------------------------------------------


def prove_by_training(job: Run, summary: DataSummary, seeds: int, checks: Sequence[str]) -> None:
    """Train with and without each cleaning step of `checks` (all if empty), and write the comparisons on eval rows."""
    of_data, folder, number = job.folder / "data", job.folder / FOLDER, 0
    possible = cleaning_steps(load_issues(of_data))
    steps = _steps_to_train(possible, summary, checks)
    job.phase("training with and without each cleaning step")
    folder.mkdir(exist_ok=True)
    before = load_patch(Path(job.recipe.data.patch)) if job.recipe.data.patch else {}
    outputs, patches = list[list[Predictions]](), list[str]()
    for step in (None, *steps):
        # With other rows, such as after a patch, all runs are trained again.
        stem = folder / f"{step.name if step else 'as-they-are'}-{summary.fingerprint[:8]}"
        changes: dict[str, Any] = {}
        if step is not None:
            changes["data.patch"] = f"{stem}.patch.jsonl"
            save_patch(Path(f"{stem}.patch.jsonl"), (before | {one.key: one for one in step.decisions}).values())
            patches.append(f"{FOLDER}/{stem.name}.patch.jsonl")
        outputs.append([])
        for seed in range(seeds):
            number += 1
            which = f"training {number} of {(1 + len(steps)) * seeds}"
            job.listener(Message(text=f"{which}: {step or 'unchanged rows'}, seed {seed}"))
            recipe = with_settings(job.recipe, {**changes, "train.seed": job.recipe.train.seed + seed})
            outputs[-1].append(_eval_outputs_of_run(replace(job, recipe=recipe, folder=folder / f"{stem.name}-{seed}")))
    shutil.rmtree(folder / ".fulltune-cache", ignore_errors=True)
    metric = job.recipe.evaluate.metric or summary.form.metrics[0]
    measure = find_metric(job.recipe.task, Target.of(summary), metric)
    proofs, rows = _compare_runs(measure, steps, patches, outputs)
    Proofs(
        fingerprint=summary.fingerprint,
        eval_rows=rows,
        repetitions=seeds,
        proofs=tuple(proofs),
        metric=metric,
        greater_is_better=measure.greater_is_better,
        source="trainings",
        untried=() if checks else tuple(str(one) for one in possible if one not in steps),
    ).save(of_data / TRAINED_PROOFS)


def check_proofs_possible(recipe: Recipe, summary: DataSummary, by_classifiers: bool, by_trainings: bool) -> None:
    """Raise `RecipeError` if proving by classifiers or by trainings is impossible with this recipe or its rows."""
    if by_classifiers and not summary.form.one_label:
        raise RecipeError(
            "--prove: needs rows with one label each; compare other rows by whole trainings: --trainings 3"
        )
    if by_trainings and (recipe.is_searched or recipe.methods):
        several = "search" if recipe.is_searched else "methods"
        raise RecipeError(f"--trainings: needs a recipe with one method and fixed settings; remove {several}")
    if by_trainings and (is_own(recipe.evaluate.metric) or of_answers(recipe)):
        raise RecipeError("--trainings: own metrics and those of answers cannot be compared yet; choose another metric")
    if by_trainings and summary.packed and not recipe.data.eval:
        raise RecipeError(
            "--trainings: packed texts share rows, so dropping a text would change the eval texts; give the eval texts "
            "in a separate file (data.eval)"
        )
    if (by_classifiers or by_trainings) and (count := summary.splits["eval"].rows) < LEAST_EVAL_ROWS:
        raise RecipeError(
            f"{'--prove' if by_classifiers else '--trainings'}: {count} eval rows are too few, expected at least "
            f"{LEAST_EVAL_ROWS}; give more, in a file (data.eval) or as a larger share of the train rows "
            "(data.eval_fraction)"
        )


def _steps_to_train(steps: Sequence[CleaningStep], summary: DataSummary, checks: Sequence[str]) -> list[CleaningStep]:
    """Return the steps of `checks`, or else all that change enough rows. Raise `RecipeError` if none is left."""
    steps = [step for step in steps if _leaves_enough(step, summary)]
    if checks:
        available = {step.check for step in steps}
        if unknown := [check for check in checks if check not in available]:
            others = (
                f"expected one of {', '.join(sorted(available))}" if available else "no other check has rows to clean"
            )
            raise RecipeError(f"--check: '{unknown[0]}' has no train rows to clean, or too many; {others}")
        return [step for step in steps if step.check in checks]
    least = LEAST_SHARE * summary.splits["train"].rows
    if not (worth := [step for step in steps if len(step.issues) >= least]):
        raise RecipeError(
            f"--trainings: no check flagged at least {LEAST_SHARE:.1%} of the train rows, and a few trainings "
            "cannot show the effect of fewer; name a check with --check to try anyway"
        )
    return worth


def _leaves_enough(step: CleaningStep, summary: DataSummary) -> bool:
    """Return whether a step keeps at least half of the train rows, and rows of every label."""
    if step.action == "replace":
        return True
    labels, counts = Counter(one.label for one in step.issues), summary.splits["train"].label_counts
    has_all = all(counts.get(label or "", math.inf) > count for label, count in labels.items())
    return has_all and len(step.issues) <= MOST_SHARE * summary.splits["train"].rows


def _eval_outputs_of_run(job: Run) -> Predictions:
    """Return the outputs of a run's model on the eval rows; train first unless they are saved."""
    run, saved = job.folder, Path(f"{job.folder}.npz")
    if not saved.exists():
        run_folder.find_or_make_folder(job.recipe, "", run.name, run, fresh=False)
        reached = pipeline.run(replace(job, listener=only_steps_and_warnings(job.listener), began=None), "train")
        assert reached.plan is not None, "asked for"
        assert reached.outcome is not None, "asked for"
        assert reached.outcome.model_folder is not None, "a run that ended well has a model"
        scoring = evaluate.make_scoring(job.recipe, reached.plan, reached.summary, run, job.base)
        predictions = compute_outputs(scoring, run / reached.outcome.model_folder, (), 1, ("eval",))[0]["eval"]
        rows = run / "data" / "eval"
        save_outputs(saved, {**predictions, _IDS: np.array(list(row_ids(rows))), _CLUSTERS: np.load(rows / CLUSTERS)})
    shutil.rmtree(run, ignore_errors=True)
    return load_outputs(saved)


def _select_by_id(saved: Predictions, ids: np.ndarray) -> Predictions:
    """Return the saved outputs of the rows with these ids, in this order."""
    order = np.argsort(saved[_IDS])
    places = order[np.searchsorted(saved[_IDS][order], ids)]
    return {name: array[places] for name, array in saved.items()}


def _compare_runs(
    metric: ResamplableMetric,
    steps: Sequence[CleaningStep],
    patches: Sequence[str],
    eval_outputs: Sequence[Sequence[Predictions]],
) -> tuple[list[Proof], int]:
    """Compare runs with and without each cleaning step; return the comparisons and the number of eval rows common to
    all runs. `eval_outputs[run][seed]` begins with the run without cleaning."""
    common = reduce(np.intersect1d, [one[_IDS] for trials in eval_outputs for one in trials])
    if len(common) < 2:
        raise RecipeError("--trainings: the runs have no eval rows in common; give the eval rows in a file (data.eval)")
    same = [[_select_by_id(one, common) for one in trials] for trials in eval_outputs]
    drawn = resample_trials(metric, same, same[0][0][_CLUSTERS])
    spreads = estimate_seed_spreads(drawn, [False] * len(eval_outputs))
    proofs = []
    for number, (step, patch) in enumerate(zip(steps, patches, strict=True), start=1):
        gap = difference_of_methods(drawn, number, 0, spreads, 1.0, metric.span)
        low, high = gap.interval(ALPHA / len(steps))
        proofs.append(
            Proof(
                check=step.check,
                action=step.action,
                rows=len(step.issues),
                before=float(drawn.point[0].mean()),
                difference=gap.estimate,
                low=low,
                high=high,
                patch=patch,
            )
        )
    return proofs, len(common)


# ---- by linear classifiers on the pretrained model -----------------------------------------------------------------


Change = tuple[CleaningStep, np.ndarray, np.ndarray]
"""A cleaning step, a mask of the rows that it keeps, and their new labels."""


def prove_by_classifiers(job: Run, summary: DataSummary) -> None:
    """Fit classifiers with and without each cleaning step, and write the comparisons on eval rows."""
    job.phase("fitting classifiers with and without each cleaning step")
    reader, folder = reader_of(job, summary), job.folder / "data"
    try:
        train, positions = reader.items("train")
        held_out, _ = reader.items("eval")
        _, strength, _ = select_classifier(train, held_out, fit_at_strengths, error_rate)
        decided = load_patch(Path(job.recipe.data.patch)) if job.recipe.data.patch else None
        names = list(row_ids(folder / "train", decided))
        place = {names[position]: at for at, position in enumerate(positions)}
        changes, left_out = list[Change](), list[str]()
        for step in cleaning_steps(load_issues(folder)):
            # Classifiers can drop or relabel rows, but have no features of changed texts.
            stays, labels = np.ones(len(train.labels), bool), train.labels.copy()
            for issue in (issue for issue in step.issues if issue.row in place):
                if step.action == "drop":
                    stays[place[issue.row]] = False
                elif issue.remedy.column == summary.columns.get("label"):
                    labels[place[issue.row]] = summary.labels.index(issue.remedy.value)
            changes.append((step, stays, labels))
        proofs = list(_fit_and_compare(train, held_out, changes, strength, left_out))
    except NoProbe as error:
        raise SetupError(f"--prove: nothing can be compared: {error}") from None
    Proofs(
        fingerprint=summary.fingerprint,
        eval_rows=len(held_out.labels),
        repetitions=TIMES,
        proofs=tuple(proofs),
        untried=tuple(left_out),
    ).save(folder / PROOFS)


def _fit_and_compare(
    train: Items, held_out: Items, changes: Sequence[Change], regularization: float, untried: list[str]
) -> Iterator[Proof]:
    """Yield comparisons, with intervals, of classifiers with and without each step; failed ones go to `untried`."""

    def fitted(rows: Items) -> np.ndarray:
        """Fit a classifier to `rows`; return 1 for each held-out row that it predicts correctly, else 0."""
        [(_, classifier)] = fit_at_strengths(rows, strengths=(regularization,))
        return (classifier(held_out.features).argmax(axis=1) == held_out.labels).astype(np.float64)

    drawn = np.random.default_rng(0)
    parts = [drawn.random(len(train.labels)) >= LEFT_OUT for _ in range(TIMES)]
    before = np.mean([fitted(train.select(part)) for part in parts], axis=0)
    samples = drawn.integers(0, len(before), (_RESAMPLES, len(before)))
    tails = ALPHA / max(1, len(changes)) / 2
    for step, stays, labels in changes:
        if stays.all() and (labels == train.labels).all():
            continue
        items = replace(train, labels=labels)
        try:
            after = np.mean([fitted(items.select(part & stays)) for part in parts], axis=0)
        except NoProbe:  # hardly anything is left, or a single class
            untried.append(str(step))
            continue
        moved = after - before
        low, high = np.quantile(moved[samples].mean(axis=1), [tails, 1 - tails])
        # Even if no row differs here, rows elsewhere might.
        unseen = float(norm.isf(tails)) * math.sqrt(EXTRA_DISAGREEMENTS) / len(before)
        yield Proof(
            check=step.check,
            action=step.action,
            rows=int((~stays).sum() if step.action == "drop" else (labels != train.labels).sum()),
            before=float(before.mean()),
            difference=float(moved.mean()),
            low=float(moved.mean() - math.hypot(moved.mean() - low, unseen)),
            high=float(moved.mean() + math.hypot(high - moved.mean(), unseen)),
        )
