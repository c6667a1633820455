"""Whether cleaning helps: classifiers or whole runs with and without each cleaning step, on the same eval rows.

The runs leave their patch and what they gave for each eval row, so that further seeds or steps take only what is not
there; the test rows are never looked at.
"""

from __future__ import annotations

import hashlib
import math
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from pathlib import Path
from typing import Any, Literal

import numpy as np
from scipy.stats import norm

from fulltune import evaluate, pipeline
from fulltune.audit.rows import LEAK, NEAR_LEAK
from fulltune.audit.stage import load_issues
from fulltune.data.patch import Decisions, load_patch, numbered, save_patch
from fulltune.errors import RecipeError, SetupError
from fulltune.evaluate.scoring import load_outputs, outputs, save_outputs
from fulltune.inference.store import CLUSTERS, row_id, texts
from fulltune.pipeline import Run, reader_of
from fulltune.plan.settings import with_settings
from fulltune.probe.linear import Items, NoProbe, error_rate, fits, select_classifier
from fulltune.recipe.fields import Recipe
from fulltune.records.audit import HIGH_LOSS, PROOFS, TRAINED_PROOFS, Proof, Proofs, Remedy, RowDecision, RowIssue
from fulltune.records.data import DataSummary
from fulltune.records.events import Message, without_tables
from fulltune.stats.bootstrap import Measure, draw, measure_of
from fulltune.stats.intervals import SURPRISES, difference, seed_spreads
from fulltune.system import run_folder
from fulltune.tasks import Predictions, Target
from fulltune.text import counted

TIMES, LEFT_OUT = 5, 0.2
"""How often so large a part of the train rows is left out."""
LEAST_EVAL_ROWS = 50
_RESAMPLES = 1000
Action = Literal["drop", "replace"]
ALPHA = 0.05
"""Intervals of all steps together are wrong in so many cases (Bonferroni)."""
FOLDER = "cleaning"
LEAST_SHARE, MOST_SHARE = 0.002, 0.5
"""Of the train rows: fewer change nothing that a few trainings could show, without more it is other data."""


_IDS, _CLUSTERS = "row_ids", "row_clusters"
"""Beside what a run gave for its eval rows: the `row_id` of each, numbered where rows are equal, and its cluster."""


@dataclass(frozen=True)
class CleaningStep:
    """One thing that could be done with all train rows that a check found."""

    check: str
    action: Action
    issues: tuple[RowIssue, ...]

    def __str__(self) -> str:
        done = "left out" if self.action == "drop" else "changed as proposed"
        return f"{self.check}, {counted(len(self.issues), 'row')} {done}"

    @property
    def name(self) -> str:
        """As a file's name, another one for other decisions."""
        told = "".join(one.model_dump_json() for one in self.decisions)
        return f"{self.check.replace(' ', '-')}-{self.action}-{hashlib.sha256(told.encode()).hexdigest()[:8]}"

    @property
    def decisions(self) -> list[RowDecision]:
        """As lines of a patch file."""
        return [one.decided(Remedy(action="drop") if self.action == "drop" else one.remedy) for one in self.issues]


def cleaning_steps(issues: Sequence[RowIssue]) -> list[CleaningStep]:
    """Each check's train rows dropped, and where something is proposed, replaced by it; leaks and high losses aside."""
    steps = []
    for check in dict.fromkeys(one.check for one in issues if one.check not in (LEAK, NEAR_LEAK, HIGH_LOSS)):
        # Of a row with several faults of a kind, such as in both texts of a pair, the first is taken.
        of_row = {one.key: one for one in reversed(issues) if one.check == check and one.split == "train"}
        them = list(reversed(of_row.values()))
        changed = [one for one in them if one.remedy.action == "replace"]
        both: tuple[tuple[Action, list[RowIssue]], ...] = (("drop", them), ("replace", changed))
        steps += [CleaningStep(check, action, tuple(rows)) for action, rows in both if rows]
    return steps


def ids(folder: Path, decided: Decisions | None = None) -> Iterator[str]:
    """Yield the identity of each row of a split, numbered among equal rows as issues are: rows of train's file that
    `decided` drops are counted."""
    times = Counter[str]()
    of_train = [line for (source, _), line in (decided or {}).items() if source == "train"]
    dropped = {line.row for line in of_train if line.remedy.action == "drop"}
    for row in texts(folder):
        name = row_id(row)
        times[name] += 1
        while numbered(name, times[name]) in dropped:
            times[name] += 1
        yield numbered(name, times[name])


# ---- by whole runs -------------------------------------------------------------------------------------------------


def prove_by_training(job: Run, summary: DataSummary, seeds: int, checks: Sequence[str]) -> None:
    """Train with and without each step (those of `checks`, or all), compare on eval rows, write the proofs."""
    of_data, folder, number = job.folder / "data", job.folder / FOLDER, 0
    possible = cleaning_steps(load_issues(of_data))
    steps = _worth_a_training(possible, summary, checks)
    job.phase("training with and without each cleaning step")
    folder.mkdir(exist_ok=True)
    before = load_patch(Path(job.recipe.data.patch)) if job.recipe.data.patch else {}
    outputs, patches = list[list[Predictions]](), list[str]()
    for step in (None, *steps):
        # With other rows, such as after a patch, all is trained anew.
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
            job.listener(Message(text=f"{which}: {step or 'rows as they are'}, seed {seed}"))
            recipe = with_settings(job.recipe, {**changes, "train.seed": job.recipe.train.seed + seed})
            outputs[-1].append(_rows_of_run(replace(job, recipe=recipe, folder=folder / f"{stem.name}-{seed}")))
    shutil.rmtree(folder / ".fulltune-cache", ignore_errors=True)
    metric = job.recipe.evaluate.metric or summary.form.metrics[0]
    measure = measure_of(job.recipe.task, Target.of(summary), metric)
    proofs, rows = _compared(measure, steps, patches, outputs)
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


def refuse_proofs(recipe: Recipe, summary: DataSummary, by_classifiers: bool, by_trainings: bool) -> None:
    """Raises a `RecipeError` for proofs that these rows cannot give, or runs of this recipe."""
    if by_classifiers and not summary.form.one_label:
        raise RecipeError(
            "--prove: these rows have no single label each, and only by such can cleaning be compared in seconds; "
            "compare it by trainings instead: --trainings 3"
        )
    if by_trainings and (recipe.is_searched or recipe.methods):
        several = "search" if recipe.is_searched else "methods"
        raise RecipeError(f"--trainings: compares runs of one method and its settings; give a recipe without {several}")
    if by_trainings and summary.packed and not recipe.data.eval:
        raise RecipeError(
            "--trainings: these texts share rows, so that those held out differ as soon as a text is left out; give "
            "eval texts in a file of their own (data.eval)"
        )
    if (by_classifiers or by_trainings) and (count := summary.splits["eval"].rows) < LEAST_EVAL_ROWS:
        raise RecipeError(
            f"{'--prove' if by_classifiers else '--trainings'}: {count} eval rows tell nothing, expected "
            f"{LEAST_EVAL_ROWS} at least; give more, in a file (data.eval) or as a larger part of the train rows "
            "(data.eval_fraction)"
        )


def _worth_a_training(steps: Sequence[CleaningStep], summary: DataSummary, checks: Sequence[str]) -> list[CleaningStep]:
    """The steps of some checks, or of all those with rows enough; raises a `RecipeError` when there is none."""
    steps = [step for step in steps if _leaves_enough(step, summary)]
    if checks:
        known = {step.check for step in steps}
        if unknown := [check for check in checks if check not in known]:
            raise RecipeError(
                f"--check: '{unknown[0]}' found no train rows that cleaning could change, or too many; expected one of "
                f"{', '.join(sorted(known)) or 'none: nothing was found'}"
            )
        return [step for step in steps if step.check in checks]
    least = LEAST_SHARE * summary.splits["train"].rows
    if not (worth := [step for step in steps if len(step.issues) >= least]):
        raise RecipeError(
            f"--trainings: no check found {LEAST_SHARE:.1%} of the train rows, and fewer change nothing that a few "
            "trainings could show; name one to try it all the same (--check)"
        )
    return worth


def _leaves_enough(step: CleaningStep, summary: DataSummary) -> bool:
    """At least half of the train rows stay, and some of each label: else other rows would be compared, and classes."""
    if step.action == "replace":
        return True
    labels, counts = Counter(one.label for one in step.issues), summary.splits["train"].label_counts
    has_all = all(counts.get(label or "", math.inf) > count for label, count in labels.items())
    return has_all and len(step.issues) <= MOST_SHARE * summary.splits["train"].rows


def _rows_of_run(job: Run) -> Predictions:
    """What a whole run in its folder gives for its eval rows; only that is kept of it."""
    run, kept = job.folder, Path(f"{job.folder}.npz")
    if not kept.exists():
        run_folder.find_or_make(job.recipe, "", run.name, run, fresh=False)
        reached = pipeline.run(replace(job, listener=without_tables(job.listener), began=None), "train")
        assert reached.plan is not None, "asked for"
        assert reached.outcome is not None, "asked for"
        assert reached.outcome.model_folder is not None, "a run that ended well has a model"
        scoring = evaluate.scoring_of(job.recipe, reached.plan, reached.summary, run, job.base)
        found = outputs(scoring, run / reached.outcome.model_folder, (), 1, ("eval",))[0]["eval"]
        rows = run / "data" / "eval"
        save_outputs(kept, {**found, _IDS: np.array(list(ids(rows))), _CLUSTERS: np.load(rows / CLUSTERS)})
    shutil.rmtree(run, ignore_errors=True)
    return load_outputs(kept)


def _chosen(kept: Predictions, names: np.ndarray) -> Predictions:
    """Of some of these rows, in the order of their ids."""
    order = np.argsort(kept[_IDS])
    chosen = order[np.searchsorted(kept[_IDS][order], names)]
    return {name: array[chosen] for name, array in kept.items()}


def _compared(
    measure: Measure, steps: Sequence[CleaningStep], patches: Sequence[str], outputs: Sequence[Sequence[Predictions]]
) -> tuple[list[Proof], int]:
    """Each step against the first one, on the rows that all have; and how many these are."""
    common = reduce(np.intersect1d, [one[_IDS] for trials in outputs for one in trials])
    if len(common) < 2:
        raise RecipeError("--trainings: the runs have no eval rows in common; give these in a file (data.eval)")
    same = [[_chosen(one, common) for one in trials] for trials in outputs]
    drawn = draw(measure, same, same[0][0][_CLUSTERS])
    spreads = seed_spreads(drawn, [False] * len(outputs))
    proofs = []
    for number, (step, patch) in enumerate(zip(steps, patches, strict=True), start=1):
        found = difference(drawn, number, 0, spreads, 1.0, measure.span)
        low, high = found.interval(ALPHA / len(steps))
        proofs.append(
            Proof(
                check=step.check,
                action=step.action,
                rows=len(step.issues),
                before=float(drawn.point[0].mean()),
                difference=found.estimate,
                low=low,
                high=high,
                patch=patch,
            )
        )
    return proofs, len(common)


# ---- by linear classifiers on the untouched model ------------------------------------------------------------------


Change = tuple[CleaningStep, np.ndarray, np.ndarray]
"""With each train row whether it is kept, bool [rows], and the label that it has then."""


def prove_by_classifiers(job: Run, summary: DataSummary) -> None:
    """Fit with and without each cleaning step, compare on the unchanged eval rows, and write `proofs.json`."""
    job.phase("fitting classifiers with and without each cleaning step")
    reader, folder = reader_of(job, summary), job.folder / "data"
    try:
        train, positions = reader.items("train")
        held_out, _ = reader.items("eval")
        _, strength, _ = select_classifier(train, held_out, fits, error_rate)
        decided = load_patch(Path(job.recipe.data.patch)) if job.recipe.data.patch else None
        names = list(ids(folder / "train", decided))
        place = {names[position]: at for at, position in enumerate(positions)}
        changes, left_out = list[Change](), list[str]()
        for step in cleaning_steps(load_issues(folder)):
            # Classifiers have rows and labels, but not other texts.
            kept, labels = np.ones(len(train.labels), bool), train.labels.copy()
            for one in (one for one in step.issues if one.row in place):
                if step.action == "drop":
                    kept[place[one.row]] = False
                elif one.remedy.column == summary.columns.get("label"):
                    labels[place[one.row]] = summary.labels.index(one.remedy.value)
            changes.append((step, kept, labels))
        proofs = list(_fitted(train, held_out, changes, strength, left_out))
    except NoProbe as error:
        raise SetupError(f"--prove: nothing can be compared: {error}") from None
    Proofs(
        fingerprint=summary.fingerprint,
        eval_rows=len(held_out.labels),
        repetitions=TIMES,
        proofs=tuple(proofs),
        untried=tuple(left_out),
    ).save(folder / PROOFS)


def _fitted(
    train: Items,
    held_out: Items,
    changes: Sequence[Change],
    strength: float,
    left_out: list[str],
) -> Iterator[Proof]:
    """Each step's proof; one that leaves nothing to fit is put among what is left out."""
    fitted = partial(_right, held_out=held_out, strength=strength)
    drawn = np.random.default_rng(0)
    parts = [drawn.random(len(train.labels)) >= LEFT_OUT for _ in range(TIMES)]
    before = np.mean([fitted(train.select(part)) for part in parts], axis=0)
    samples = drawn.integers(0, len(before), (_RESAMPLES, len(before)))
    tails = ALPHA / max(1, len(changes)) / 2
    for step, kept, labels in changes:
        if kept.all() and (labels == train.labels).all():
            continue
        items = replace(train, labels=labels)
        try:
            after = np.mean([fitted(items.select(part & kept)) for part in parts], axis=0)
        except NoProbe:  # hardly anything is left, or a single class
            left_out.append(str(step))
            continue
        moved = after - before
        low, high = np.quantile(moved[samples].mean(axis=1), [tails, 1 - tails])
        # No row that differs among these does not prove that none would among others.
        unseen = float(norm.isf(tails)) * math.sqrt(SURPRISES) / len(before)
        yield Proof(
            check=step.check,
            action=step.action,
            rows=int((~kept).sum() if step.action == "drop" else (labels != train.labels).sum()),
            before=float(before.mean()),
            difference=float(moved.mean()),
            low=float(moved.mean() - math.hypot(moved.mean() - low, unseen)),
            high=float(moved.mean() + math.hypot(high - moved.mean(), unseen)),
        )


def _right(items: Items, held_out: Items, strength: float) -> np.ndarray:
    """Whether each eval row is answered right: float64 [rows]."""
    [(_, found)] = fits(items, strengths=(strength,))
    return (found(held_out.features).argmax(axis=1) == held_out.labels).astype(np.float64)
