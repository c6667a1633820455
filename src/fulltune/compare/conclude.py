from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime

import numpy as np

from fulltune import evaluate, report
from fulltune.compare.context import BASE, EVAL_OUTPUTS, GENERIC, RECORD, TEST_LOG, TEST_OUTPUTS, Context, settings_of
from fulltune.compare.lint import lint_comparison, rows_in_train
from fulltune.compare.seeds import SeedRuns, load_method_outputs
from fulltune.compare.sequential import alpha_left
from fulltune.compare.trials import best_seed, save_outputs_by_split
from fulltune.compare.verdict import MethodOutputs, Terms, decide_verdict
from fulltune.evaluate.scoring import MIN_UNSEEN, compute_outputs, load_outputs, log_test_access
from fulltune.files import append_line, read_json_lines
from fulltune.forgetting.generic_text import drift_per_text
from fulltune.inference.store import CLUSTERS, IN_TRAIN
from fulltune.recipe.tasks import ALSO_OCCURS, FACTS, leaked_content
from fulltune.records.comparison import Comparison, Decision, MethodRow, TestRowsUse, TrialResult
from fulltune.records.scores import Estimate, Scores
from fulltune.stats.bootstrap import SAMPLES, resample_metrics, resample_trials
from fulltune.stats.calibration import calibrate
from fulltune.system import run_folder
from fulltune.text import format_metric

_TEXT_SAMPLES = 2000
median = statistics.median
"""Averages costs, because a command's first run is slow: it reads files that are not yet cached."""


def judge_on_test_rows(seed_runs: SeedRuns) -> Comparison:
    """Reach the verdict on the test rows, save the finished comparison, and write the model cards."""
    context = seed_runs.context
    context.say("deciding the verdict on the test rows")
    alpha, later = alpha_left(seed_runs.looks, context.alpha, time_was_up=seed_runs.lacks_time)
    with context.log_duration("verdict"):
        opening = TestRowsUse(
            time=datetime.now().astimezone().isoformat(timespec="seconds"),
            trials=tuple(one.trial.name for runs in seed_runs.results.values() for one in runs),
            alpha=alpha,
            left=later,
        )
        append_line(context.folder / TEST_LOG, opening.model_dump(mode="json"))
        openings = tuple(TestRowsUse.model_validate(entry) for entry in read_json_lines(context.folder / TEST_LOG))
        baselines = score_baselines(context)
        compared = load_method_outputs(context, seed_runs.results, TEST_OUTPUTS, seed_runs.waiting)
        if (context.folder / TEST_OUTPUTS / f"{BASE}.npz").exists():
            base = load_outputs(context.folder / TEST_OUTPUTS / f"{BASE}.npz")
            compared.append(MethodOutputs(name=BASE, kind="base", trials=[base], cost=0.0))
        clusters = np.load(context.folder / "data" / "test" / CLUSTERS)
        decision = _verdict_on_rows(context, compared, clusters, alpha)
        leaks = note_verdict_without_leaks(context, compared, clusters, decision)
    log_test_access(context.folder, context.job.listener)
    comparison = build_comparison(seed_runs, decision, baselines, openings)
    comparison = comparison.model_copy(update={"notes": (*comparison.notes, *leaks)})
    comparison.save(context.folder / RECORD)  # saved first: the test rows are open, and what follows may fail
    write_model_cards(seed_runs)
    return comparison


def _verdict_on_rows(
    context: Context, compared: Sequence[MethodOutputs], clusters: np.ndarray, alpha: float
) -> Decision:
    """Reach a verdict from outputs on the same rows. Rows with equal numbers in `clusters` depend on each other."""
    recipe = context.recipe
    terms = Terms(context.resamplable_metric, recipe.compare.margin, recipe.evaluate.confidence, alpha)
    drawn = resample_trials(context.resamplable_metric, [method.trials for method in compared], clusters, SAMPLES)
    return decide_verdict(compared, drawn, terms)


def note_verdict_without_leaks(
    context: Context, compared: Sequence[MethodOutputs], clusters: np.ndarray, decision: Decision
) -> list[str]:
    """Repeat the verdict without test rows that occur in train; return a list with a note, if there are such rows."""
    leaked = np.load(context.folder / "data" / "test" / IN_TRAIN)
    if not leaked.any():
        return []
    content = leaked_content(context.summary.columns, context.recipe.data.near_duplicates < 1)
    rows = f"{leaked.sum():,} test rows" if leaked.sum() > 1 else "test row"
    prefix = f"without the {rows} whose {content}: "
    if len(np.unique(clusters[~leaked])) < MIN_UNSEEN:
        return [f"{prefix}too few rows remain for a verdict"]
    rows_of = context.scoring.by_row
    unseen = [
        replace(method, trials=[{name: one[~leaked] for name, one in rows_of(run).items()} for run in method.trials])
        for method in compared
    ]
    clean = _verdict_on_rows(context, unseen, clusters[~leaked], decision.alpha)
    scores = ", ".join(f"{method} {format_metric(clean.metric, one.value)}" for method, one in clean.scores.items())
    same = clean.verdict == decision.verdict
    verdict = f"still {clean.verdict}" if same else f"{clean.verdict} instead of {decision.verdict}"
    return [f"{prefix}{scores}; the verdict is {verdict}"]


def score_baselines(context: Context) -> tuple[Scores, ...]:
    """Score the baselines, starting with the pretrained model or the most frequent answer."""
    folder, writes = context.folder, FACTS[context.recipe.task].writes
    of_rows, of_texts = folder / TEST_OUTPUTS / f"{BASE}.npz", folder / GENERIC / f"{BASE}.npz"
    if not (of_rows if writes else of_texts).exists():
        splits = ("eval", "test") if writes else ()
        predictions, _ = compute_outputs(context.scoring, None, context.texts[0], context.most_tokens, splits)
        save_outputs_by_split(context, BASE, predictions)
    return tuple(evaluate.score_baselines(context.scoring))


def build_comparison(
    seed_runs: SeedRuns, decision: Decision, baselines: tuple[Scores, ...], openings: tuple[TestRowsUse, ...]
) -> Comparison:
    """Build the comparison's record with its fairness findings. `openings` logs each use of the test rows."""
    context, summary = seed_runs.context, seed_runs.context.summary
    rows = method_rows(seed_runs, decision, baselines)
    environment = run_folder.describe_environment(context.machine, context.recipe)
    dropped = [f"rows dropped: {count:,}, {reason}" for reason, count in summary.dropped.items()]
    linted = rows_in_train(summary)
    in_two_splits = [note for note in summary.notes if ALSO_OCCURS in note and note != linted]
    comparison = Comparison(
        name=context.folder.name,
        model=context.recipe.model.name,
        task=context.recipe.task,
        train_rows=summary.splits["train"].rows,
        mixed_rows=summary.rows_per_epoch - summary.splits["train"].rows,
        eval_rows=summary.splits["eval"].rows,
        test_rows=summary.splits["test"].rows,
        decision=decision,
        rows=rows,
        baselines=baselines,
        expectation=seed_runs.expectation,
        looks=tuple(seed_runs.looks),
        findings=(),
        openings=openings,
        drift_unit="nats per token" if summary.form.reads_any_text else "1 - cosine",
        generic_text=context.texts[1],
        seconds=round(context.seconds_spent, 1),
        cores=context.machine.num_cores,
        time_was_up=seed_runs.lacks_time,
        device=context.method_setup(context.full.label).plan.device,
        data_fingerprint=summary.fingerprint,
        command=context.command,
        versions={"fulltune": environment.fulltune, "python": environment.python, **environment.packages},
        notes=(*dropped, *in_two_splits),
    )
    return comparison.model_copy(update={"findings": lint_comparison(seed_runs, comparison)})


def method_rows(seed_runs: SeedRuns, decision: Decision, baselines: Sequence[Scores]) -> tuple[MethodRow, ...]:
    """Return one table row per method, after a row for the pretrained model or first baseline."""
    context, scores, sign = seed_runs.context, decision.scores, seed_runs.context.resamplable_metric.sign
    num_parameters = context.method_setup(context.full.label).plan.num_parameters
    base = scores.get(BASE) or (baselines[0].metrics.get(context.resamplable_metric.name) if baselines else None)
    rows = []
    if base is not None and any(one.kind == "base" for one in context.recipe.methods):
        rows.append(MethodRow(method=BASE, kind="base", num_parameters=num_parameters, metric=base, gain_share=0.0))
    gain = 0.0 if base is None else scores[context.full.label].value - base.value
    for method, runs in seed_runs.results.items():
        score, search, setup = scores[method], seed_runs.searches[method], context.method_setup(method)
        share = None if base is None or sign * gain <= 0 else (score.value - base.value) / gain
        rows.append(
            MethodRow(
                method=method,
                kind=context.recipe.compared_kind(setup.method),
                settings=settings_of(setup.method),
                search=search,
                seeds=tuple(one.trial.seed for one in runs),
                waited=method in seed_runs.waiting,
                weights_dtype=setup.plan.weights_dtype,
                bf16_rounding=setup.plan.bf16_rounding,
                num_parameters=num_parameters,
                num_trainable=runs[0].num_trainable,
                metric=score,
                gain_share=share,
                train_tokens=runs[0].tokens,
                train_seconds=round(median(one.train_seconds for one in runs), 2),
                tokens_per_second=round(median(one.tokens_per_second for one in runs), 1),
                train_flops=median(one.train_flops for one in runs),
                peak_memory_bytes=max(one.peak_memory_bytes for one in runs),
                memory_growth_bytes=max(one.memory_growth_bytes for one in runs),
                saved_bytes=runs[0].saved_bytes,
                drift=_estimate_drift(context, runs),
                seconds_per_row=median(one.seconds_per_row or 0.0 for one in runs),
            )
        )
    return tuple(rows)


def _estimate_drift(context: Context, results: Sequence[TrialResult]) -> Estimate | None:
    """Estimate a method's mean drift, or return None if the pretrained model's outputs are missing."""
    folder = context.folder / GENERIC
    if not (folder / f"{BASE}.npz").exists():
        return None
    before, *after = (load_outputs(folder / f"{name}.npz") for name in (BASE, *(one.trial.name for one in results)))
    of_text = np.mean([drift_per_text(before["generic"], one["generic"]) for one in after], axis=0)
    drawn = resample_metrics(
        {"drift": of_text}, lambda texts: {"drift": float(texts["drift"].mean())}, samples=_TEXT_SAMPLES
    )
    return drawn["drift"].estimate(context.recipe.evaluate.confidence)


def write_model_cards(seed_runs: SeedRuns) -> None:
    """Write a model card beside each method's weights, with the saved model's test score."""
    context, scoring = seed_runs.context, seed_runs.context.scoring
    for method, runs in seed_runs.results.items():
        folder = context.folder / "models" / method
        if not folder.is_dir():
            context.say(f"{method}: no model card was written, because models/{method} no longer exists")
            continue
        name = best_seed(context, runs).trial.name
        eval_outputs, test = (
            load_outputs(context.folder / place / f"{name}.npz") for place in (EVAL_OUTPUTS, TEST_OUTPUTS)
        )
        metrics = scoring.estimate_metrics(test, metrics=context.resamplable_metric.compute_as_dict)
        calibration = None
        if context.summary.form.is_calibrated:
            calibration = calibrate(eval_outputs["logits"], eval_outputs["labels"], test["logits"], test["labels"])
        num_rows = metrics[context.resamplable_metric.name].num_rows
        scores, _ = scoring.make_scores(name, "trained", num_rows, metrics, calibration=calibration)
        report.write_model_card(context.folder, folder, scores)
