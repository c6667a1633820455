"""The test rows are opened, once: the verdict, and the record that the comparison's report is made from."""

from __future__ import annotations

import getpass
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime

import numpy as np

from fulltune import evaluate, report
from fulltune.compare import rate_search
from fulltune.compare.claims import claims
from fulltune.compare.context import BASE, OPEN, OPENINGS, RECORD, SEALED, Context, settings_of
from fulltune.compare.lint import design_of, lint
from fulltune.compare.seeds import SeedRuns, arm_items, most_seeds, waiting
from fulltune.compare.sequential import Left, left
from fulltune.compare.trials import best_seed, keep
from fulltune.compare.verdict import ArmItems, decide, of_learned
from fulltune.evaluate import outputs
from fulltune.evaluate.scoring import FEWEST_UNSEEN, note_access
from fulltune.files import append_line, lines_of
from fulltune.forgetting import drift
from fulltune.inference.store import clusters_of, in_train
from fulltune.recipe.tasks import FACTS, stands_in_train
from fulltune.records.comparison import ArmRow, Comparison, Held, Opening, Search, TrialResult
from fulltune.records.differences import ArmScore, Decision
from fulltune.records.run import COMPARISON
from fulltune.records.scores import Estimate, Scores
from fulltune.report.format import words
from fulltune.stats.bootstrap import draw, percentiles, resample
from fulltune.stats.calibration import calibrate
from fulltune.system import run_folder
from fulltune.text import format_metric

middle = statistics.median
"""Of what runs cost: the first one of a command finds files and libraries cold, and is no cost of the method."""
_SAMPLES = 2000
"""Resamples of generic texts."""


def judge(ran: SeedRuns) -> Comparison:
    """Open the test rows, once, and say what they say."""
    context = ran.context
    context.say("opening the test rows")
    alpha = left(ran.looks, context.alpha, time_was_up=ran.lacks_time)
    with context.clock.during("verdict"):
        openings = open_test_rows(context, [one.trial.name for runs in ran.results.values() for one in runs], alpha)
        baselines = untouched(context)
        compared = arm_items(context, ran.results, SEALED, waiting(ran.looks))
        if (context.folder / SEALED / f"{BASE}.npz").exists():
            kept = outputs.load(context.folder / SEALED / f"{BASE}.npz")
            compared.append(ArmItems(name=BASE, kind="base", trials=[kept], cost=0.0))
        held, scaled_away = held_runs(ran), dict[str, list[int]]()
        for one in held:
            if not one.preserved.is_feasible:
                scaled_away.setdefault(one.arm, []).append(one.seed)
        clusters = clusters_of(context.folder / "data" / "test")
        decision = of_learned(_decided(context, compared, clusters, alpha.now), scaled_away)
        leaks = without_leaks(context, compared, clusters, decision, scaled_away)
    found = comparison_of(ran, decision, held, baselines, openings)
    found = found.model_copy(update={"notes": (*found.notes, *leaks)})
    found.save(context.folder / RECORD)  # the test rows are opened: before anything else can go wrong
    value = next(row.metric.value for row in found.rows if row.kind == "full")
    note_access(context.folder, context.job.listener, trial=COMPARISON, outcome=None, metric=found.metric, value=value)
    write_model_cards(ran)
    return found


def _decided(context: Context, compared: Sequence[ArmItems], clusters: np.ndarray, alpha: float) -> Decision:
    return decide(
        compared,
        context.measure,
        margin=context.recipe.compare.margin,
        clusters=clusters,
        confidence=context.recipe.evaluate.confidence,
        alpha=alpha,
    )


def without_leaks(
    context: Context,
    compared: Sequence[ArmItems],
    clusters: np.ndarray,
    decision: Decision,
    scaled_away: Mapping[str, Sequence[int]],
) -> list[str]:
    """What the verdict would be without the test rows that stand in train; empty: none stands there."""
    seen = in_train(context.folder / "data" / "test")
    if not seen.any():
        return []
    stands = stands_in_train(context.summary.columns, context.recipe.data.near_duplicates < 1)
    said = f"{words.without_rows(int(seen.sum()), stands)}: "
    if len(np.unique(clusters[~seen])) < FEWEST_UNSEEN:
        return [f"{said}nothing is known, hardly any are left"]
    unseen = [
        replace(arm, trials=[{name: values[~seen] for name, values in kept.items()} for kept in arm.trials])
        for arm in compared
    ]
    found = of_learned(_decided(context, unseen, clusters[~seen], decision.alpha), scaled_away)
    metric = context.measure.name
    scores = ", ".join(f"{one.arm} {format_metric(metric, one.mean)}" for one in found.scores)
    same = found.verdict == decision.verdict
    return [f"{said}{scores}, and {'still' if same else f'not {decision.verdict} but'} {found.verdict}"]


def open_test_rows(context: Context, trials: Sequence[str], alpha: Left) -> tuple[Opening, ...]:
    """Note who looks at the sealed rows; the noted openings, this one included."""
    opening = Opening(
        time=datetime.now().astimezone().isoformat(timespec="seconds"),
        by=f"{getpass.getuser()}@{platform.node()}",
        command=context.command,
        trials=tuple(trials),
        alpha=alpha.now,
        left=alpha.later,
    )
    append_line(context.folder / OPENINGS, opening.model_dump(mode="json"))
    return tuple(Opening.model_validate(entry) for entry in lines_of(context.folder / OPENINGS))


def untouched(context: Context) -> tuple[Scores, ...]:
    """What costs no training: the untouched language model or the most frequent answer first, then other baselines."""
    made, folder = context.setup(context.full.arm).plan, context.folder
    writes = FACTS[context.recipe.task].writes
    of_rows, of_texts = folder / SEALED / f"{BASE}.npz", folder / "predictions" / "generic" / f"{BASE}.npz"
    scoring = evaluate.scoring_of(context.recipe, made, context.summary, folder, context.job.base)
    if not (of_rows if writes else of_texts).exists():
        splits = ("eval", "test") if writes else ()
        keep(context, BASE, outputs.outputs(scoring, None, context.texts[0], context.most_tokens, splits))
    return tuple(evaluate.baselines(scoring))


def held_runs(ran: SeedRuns) -> tuple[Held, ...]:
    """The whole runs that a budget for forgetting held, seed by seed."""
    known = ((one.trial, ran.context.preserved(one.trial)) for runs in ran.results.values() for one in runs)
    return tuple(Held(arm=trial.arm, seed=trial.seed, preserved=found) for trial, found in known if found is not None)


def comparison_of(
    ran: SeedRuns,
    decision: Decision,
    held: tuple[Held, ...],
    baselines: tuple[Scores, ...],
    openings: tuple[Opening, ...],
) -> Comparison:
    """The record that the report is made from."""
    context, summary, expectation = ran.context, ran.context.summary, ran.expectation
    rows = rows_of(ran, decision, baselines)
    full = ran.results[context.full.arm]
    runs = [one for found in ran.results.values() for one in found]
    seeds = most_seeds(expectation)
    fixed = sum(seeds * middle(one.train_seconds for one in found) for found in ran.results.values())
    environment = run_folder.environment(context.machine)
    design = design_of(ran, openings, full_wins=decision.verdict == "FULL")
    return Comparison(
        name=context.folder.name,
        model=context.recipe.model.name,
        task=context.recipe.task,
        train_rows=summary.splits["train"].rows,
        mixed_rows=summary.rows_per_epoch - summary.splits["train"].rows,
        eval_rows=summary.splits["eval"].rows,
        test_rows=summary.splits["test"].rows,
        metric=context.measure.name,
        greater_is_better=context.measure.greater_is_better,
        decision=decision,
        rows=rows,
        baselines=baselines,
        searches=tuple(ran.searches.values()),
        expectation=expectation,
        looks=tuple(ran.looks),
        findings=lint(design),
        openings=openings,
        claims=claims(rows, decision, summary.splits["train"].rows, held, context.setup(context.full.arm).plan),
        drift_unit="nats per token" if summary.form.reads_any_text else "1 - cosine",
        drift_text=context.texts[1],
        held=held,
        num_trials=len(runs) + sum(len(one.tried) + one.other_runs for one in ran.searches.values()),
        seconds=round(context.clock.spent_seconds, 1),
        full_run_seconds=round(middle(one.train_seconds for one in full), 1),
        fixed_design_seconds=round(fixed + sum(row.search_seconds for row in rows), 1),
        cores=context.machine.num_cores,
        time_was_up=ran.lacks_time,
        left_out=ran.left_out,
        device=context.setup(context.full.arm).plan.device,
        started=context.clock.started,
        data_fingerprint=summary.fingerprint,
        command=context.command,
        versions={"fulltune": environment.fulltune, "python": environment.python, **environment.packages},
        notes=tuple(_notes(context, design.test_in_train)),
    )


def rows_of(ran: SeedRuns, decision: Decision, baselines: Sequence[Scores]) -> tuple[ArmRow, ...]:
    """A row for each arm, the untouched model (or the first of the baselines) first."""
    context, scores, waited = ran.context, {one.arm: one for one in decision.scores}, waiting(ran.looks)
    num_parameters = context.setup(context.full.arm).plan.num_parameters
    base = _base(context, scores.get(BASE), baselines)
    rows = []
    if base is not None and any(one.kind == "base" for one in context.recipe.methods):
        rows.append(
            ArmRow(
                arm=BASE,
                kind="base",
                num_parameters=num_parameters,
                num_trainable=0,
                metric=base,
                values=(base.value,),
                gain_share=0.0,
            )
        )
    gain = 0.0 if base is None else scores[context.full.arm].mean - base.value
    for arm, found in ran.results.items():
        score, search, method = scores[arm], ran.searches[arm], context.setup(arm).arm
        share = None if base is None or context.measure.sign * gain <= 0 else (score.mean - base.value) / gain
        rows.append(
            ArmRow(
                arm=arm,
                kind=context.recipe.compared_kind(method),
                settings=settings_of(method),
                num_parameters=num_parameters,
                num_trainable=found[0].num_trainable,
                learning_rate=search.chosen,
                seeds=tuple(one.trial.seed for one in found),
                metric=Estimate(value=score.mean, low=score.low, high=score.high),
                values=score.values,
                gain_share=share,
                train_seconds=round(middle(one.train_seconds for one in found), 2),
                search_seconds=round(_search_seconds(context, search), 2),
                tokens_per_second=round(middle(one.tokens_per_second for one in found), 1),
                train_flops=middle(one.train_flops for one in found),
                peak_memory_bytes=max(one.peak_memory_bytes for one in found),
                memory_growth_bytes=max(one.memory_growth_bytes for one in found),
                saved_bytes=found[0].saved_bytes,
                drift=_drift(context, found),
                seconds_per_row=middle(one.seconds_per_row or 0.0 for one in found),
                waited=arm in waited,
            )
        )
    return tuple(rows)


def _base(context: Context, score: ArmScore | None, baselines: Sequence[Scores]) -> Estimate | None:
    """The metric without training."""
    if score is not None:
        return Estimate(value=score.mean, low=score.low, high=score.high)
    return baselines[0].metrics.get(context.measure.name) if baselines else None


def _search_seconds(context: Context, search: Search) -> float:
    spent = search.other_seconds
    for one in search.tried:
        trial = rate_search.search_trial(search.arm, one.learning_rate, one.share, context.recipe.train.seed)
        path = context.result_path(trial.name)
        spent += TrialResult.load(path).train_seconds if path.exists() else 0.0
    return spent


def _drift(context: Context, found: Sequence[TrialResult]) -> Estimate | None:
    """Mean drift on generic text, with a bootstrap interval over the texts."""
    folder = context.folder / "predictions" / "generic"
    if not (folder / f"{BASE}.npz").exists():
        return None
    before = outputs.load(folder / f"{BASE}.npz")["generic"]
    moved = [drift.drift(before, outputs.load(folder / f"{one.trial.name}.npz")["generic"]) for one in found]
    of_text = {"drift": np.mean(moved, axis=0)}
    mean = resample(of_text, lambda texts: {"drift": float(texts["drift"].mean())}, samples=_SAMPLES)["drift"]
    return mean.estimate(context.recipe.evaluate.confidence)


def _notes(context: Context, said: str) -> list[str]:
    """What the data stage found that a reader of the verdict should know, less what the lint has said."""
    dropped = [f"rows dropped: {count:,}, {reason}" for reason, count in context.summary.dropped.items()]
    found = [note for note in context.summary.notes if "also stand" in note or "repeat" in note]
    return dropped + [note for note in found if note != said]


def write_model_cards(ran: SeedRuns) -> None:
    """A README.md beside each method's weights, with the kept seed's score on the test rows."""
    context, measure, confidence = ran.context, ran.context.measure, ran.context.recipe.evaluate.confidence
    for arm, found in ran.results.items():
        folder = context.folder / "models" / arm
        if not folder.is_dir():
            context.say(f"{arm}: its model is no longer in models/{arm}, so it gets no model card")
            continue
        name = best_seed(context, found).trial.name
        chosen, test = (outputs.load(context.folder / place / f"{name}.npz") for place in (OPEN, SEALED))
        drawn = draw(measure, [[test]], clusters_of(context.folder / "data" / "test"))
        low, high = percentiles(drawn.draws[0][:, 0], confidence)
        calibration = None
        if context.summary.form.is_calibrated:
            calibration = calibrate(chosen["logits"], chosen["labels"], test["logits"], test["labels"])
        scores = Scores(
            name=name,
            kind="trained",
            rows=drawn.num_rows,
            metrics={measure.name: Estimate(value=float(drawn.point[0][0]), low=low, high=high)},
            main_metric=measure.name,
            greater_is_better=measure.greater_is_better,
            confidence=confidence,
            calibration=calibration,
        )
        report.write_model_card(context.folder, folder, scores)
