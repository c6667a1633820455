"""Run a recipe with `data.folds`: data → a run for each fold, in subfolders → all rows' answers → pooled scores."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby

import numpy as np

from fulltune import evaluate, pipeline, report
from fulltune.errors import SetupError
from fulltune.evaluate.scoring import Scoring, compute_outputs
from fulltune.files import write_text
from fulltune.inference.store import CLUSTERS
from fulltune.methods.folder import read_notes
from fulltune.pipeline import Choose, Run, Until
from fulltune.plan.settings import with_settings
from fulltune.records.data import SOURCES
from fulltune.records.events import Listener, Message, only_steps_and_warnings
from fulltune.records.scores import Scores
from fulltune.report.format.words import format_estimate, metric_name
from fulltune.stats.bootstrap import resample_metrics
from fulltune.system import run_folder
from fulltune.system.memory import release_unused
from fulltune.system.run_folder import FOLDS, RunResult
from fulltune.tasks import PLACE, Example, Predictions

ANSWERS = "out_of_fold.jsonl"


def run_folds(job: Run, until: Until, measure: bool, choose: Choose | None = None) -> RunResult:
    """Run or resume all folds, and score all rows' answers together. The stages `data` and `plan` are fold 1's; each
    fold chooses by its own rows how pairs are read."""
    count, pooled = job.recipe.data.folds or 0, job.folder / FOLDS
    if measure:
        raise SetupError("data.folds: 'plan --measure' measures a single run; set data.fold=1 as well")
    stage, chooses = ("data", None) if until == "report" else (until, choose)
    reached = pipeline.run(job, stage, choose=chooses)
    if until != "report":
        job.listener(Message(text=f"this is fold 1 of {count}; 'fulltune run' trains a model for each fold"))
        return reached
    with run_folder.explain_os_errors(job.folder), run_folder.lock_folder(job.folder):
        jobs = [_open_fold(job, number) for number in range(1, count + 1)]
        for fold in jobs:  # rows are refused before any fold is trained
            pipeline.run(fold, "data")
        folds = [
            _run_fold(fold, f"fold {number} of {count}", job.listener, choose) for number, fold in enumerate(jobs, 1)
        ]
        if not pooled.exists():
            _score_together(job, [*map(replace, jobs)], folds).save(pooled)  # read as each fold chose
        scores = (*(fold.scores[-1] for fold in folds), Scores.load(pooled))
        return RunResult(job.folder, reached.summary, scores=scores, report=report.write_run_report(job.folder))


def _open_fold(job: Run, number: int) -> Run:
    """Find or make a fold's own run folder."""
    recipe, folder = with_settings(job.recipe, {"data.fold": number}), job.folder / "folds" / str(number)
    text = (job.folder / "recipe.yaml").read_text(encoding="utf-8") + f"\n# --set data.fold={number}\n"
    run_folder.find_or_make_folder(recipe, text, "", folder, False, job.hooks.digest())
    if (sources := job.folder / SOURCES).exists():  # all folds are of one revision
        shutil.copy2(sources, folder)
    listener = job.listener if number == 1 else only_steps_and_warnings(job.listener)
    return replace(job, recipe=recipe, folder=folder, listener=listener, began=None)


def _run_fold(job: Run, name: str, listener: Listener, choose: Choose | None) -> RunResult:
    """Run or resume a fold, or load its results."""
    if (reached := run_folder.load_finished_run(job.recipe, job.folder)) is None:
        listener(Message(text=name, level="progress"))
        release_unused()  # by the model that scored the last fold
        reached = pipeline.run(job, choose=choose)
    trained, metric = reached.scores[-1], reached.scores[-1].main_metric
    if metric in trained.metrics:
        name += f": {metric_name(metric)} {format_estimate(metric, trained.metrics[metric])}"
    listener(Message(text=name, level="progress"))
    return reached


def _score_together(job: Run, jobs: Sequence[Run], folds: Sequence[RunResult]) -> Scores:
    """Write all rows' answers, each by the model that did not train on the row, and return their scores."""
    lines, outputs, clusters = list[str](), list[Predictions](), list[np.ndarray]()
    job.phase("answering each fold's test rows")
    for number, (fold, reached) in enumerate(zip(jobs, folds, strict=True), start=1):
        assert reached.plan is not None
        model_folder = reached.folder / reached.plan.model_folder
        scoring = evaluate.make_scoring(fold.recipe, reached.plan, reached.summary, reached.folder, fold.base)
        predictions = compute_outputs(scoring, model_folder, (), 0, ("test",))[0]["test"]
        answers = _answers(scoring, predictions, read_notes(model_folder).get("temperature", 1.0))
        lines += [json.dumps({"fold": number, **answer}, ensure_ascii=False) + "\n" for answer in answers]
        outputs.append({name: array for name, array in predictions.items() if array.dtype != object})
        clusters.append(np.load(scoring.data / "test" / CLUSTERS) + (number << 32))  # no cluster is in two folds
    write_text(job.folder / ANSWERS, "".join(lines), private=True)
    metrics = resample_metrics(
        {name: np.concatenate([arrays[name] for arrays in outputs]) for name in outputs[0]},
        lambda rows: scoring.task.metrics(rows, scoring.target),
        samples=job.recipe.evaluate.bootstrap_samples,
        clusters=np.concatenate(clusters),
    )
    return scoring.make_scores("out of fold", "trained", len(lines), metrics)[0]


def _answers(scoring: Scoring, outputs: Predictions, temperature: float) -> Iterator[dict[str, object]]:
    """Yield each test row's place, expected answer, and answer as in `fulltune predict`, or loss of a generated one."""
    texts, task, target, features = scoring.texts, scoring.task, scoring.target, scoring.rows("test")
    rows = [list(numbers) for _, numbers in groupby(range(len(texts)), lambda number: texts[number][PLACE])]
    if task.FACTS.writes:
        sums = [[float(outputs[name][numbers].sum()) for name in ("nll", "tokens")] for numbers in rows]
        answers = [{"loss": nll / max(1, tokens), "tokens": int(tokens)} for nll, tokens in sums]
    else:
        examples = [[Example(features[number], 0) for number in numbers] for numbers in rows]
        asked = [task.with_placeholder_answer(texts[numbers[0]], target) for numbers in rows]
        answers = task.answers(outputs, asked, examples, target, temperature)
    roles = ("label", "tags", "answers", "completion", "target")
    column = next((target.columns[role] for role in roles if role in target.columns), "")
    for row, answer in zip((texts[numbers[0]] for numbers in rows), answers, strict=True):
        yield {"place": row[PLACE], "expected": row.get(column), **answer}
