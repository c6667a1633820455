from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np

from fulltune import files, probe
from fulltune.errors import SetupError
from fulltune.evaluate.scoring import Scored, Scoring, log_test_access
from fulltune.footprint.records import SHAPES
from fulltune.methods.folder import NOTES, read_notes
from fulltune.models.base import Base, with_decoded_images
from fulltune.models.shapes import Shapes
from fulltune.probe.features import FeatureExtractor, pair_separators
from fulltune.recipe.fields import Recipe
from fulltune.recipe.tasks import FACTS, TaskName
from fulltune.records.data import DataSummary, SplitName
from fulltune.records.plan import Plan
from fulltune.records.probe import FrozenBaseline, Probe
from fulltune.records.scores import Estimate, Scores, Threshold
from fulltune.records.training import Outcome
from fulltune.stats.bootstrap import Resampled, find_metric
from fulltune.stats.calibration import fit_temperature
from fulltune.stats.intervals import paired_difference
from fulltune.system.memory import explain_out_of_memory
from fulltune.tasks import Predictions, Target, task_named
from fulltune.tasks.classes import label_as_text, predict_labels
from fulltune.tasks.labels import class_weights

BEFORE_TRAINING = "before-training"
LINEAR_PROBE = "linear probe of the pretrained model"
SPLITS: tuple[SplitName, ...] = ("train", "eval")
_REMEDY = "even the smallest batch failed; free memory and run the same command again. The trained model is saved"
SplitLosses = tuple[np.ndarray, Sequence[str | None]]
"""Each example's summed loss and number of items as float64 [examples, 2], and its predicted label as text or None."""


def make_scoring(recipe: Recipe, plan: Plan, summary: DataSummary, folder: Path, base: Base) -> Scoring:
    """Build the object that loads a run's test rows and scores models on them."""
    weights, target = class_weights(recipe, summary), replace(Target.of(summary), loss_rows=plan.global_batch_size)
    return Scoring(recipe, plan, task_named(recipe.task), target, folder / "data", base, class_weights=weights)


def score_baselines(scoring: Scoring) -> list[Scores]:
    """Return the scores of all baselines, such as the majority class or the pretrained model. Saved scores are
    reused."""
    scorer, folder = _scorer_of(scoring.recipe.task), scoring.data.parent

    def score_pretrained() -> Scored:
        scores, main = scorer.score_model(scoring, *scoring.load_model_and_processor(None))
        return scores.model_copy(update={"name": "before training", "kind": "untouched"}), main

    scorers = {} if scoring.task.FACTS.head_is_new else {BEFORE_TRAINING: score_pretrained}
    scorers |= scorer.baseline_scorers(scoring)
    if scoring.task.FACTS.head_is_new:
        with explain_out_of_memory("the linear probe of the pretrained model", _REMEDY):
            scorers |= _probe_baselines(scoring, scorer)
    shapes = folder / "plan" / SHAPES
    # A checkpoint that already has a head for the task is also scored untrained. A comparison does so as `base`.
    if not scoring.recipe.methods and shapes.exists() and Shapes.load(shapes).head_is_kept:
        scorers.setdefault(BEFORE_TRAINING, score_pretrained)
    return [_load_or_score(folder / "scores" / f"{name}.json", score) for name, score in scorers.items()]


def _probe_baselines(scoring: Scoring, scorer: ModuleType) -> dict[str, Callable[[], Scored]]:
    """Map names of score files to functions that score the pretrained model with the linear probe as head, and a
    classifier on its embeddings."""
    if scoring.plan.head_init is None and scoring.target.form.has_windows:
        return {}
    fitted = load_or_fit_probe(scoring)
    scorers: dict[str, Callable[[], Scored]] = {}
    if (baseline := fitted.baseline) is not None:
        scorers["baseline-frozen"] = lambda: _score_frozen_classifier(scoring, scorer, fitted, baseline)
    if fitted.head is not None:
        scorers["baseline-probe"] = lambda: _score_probe_head(scoring, scorer)
    return scorers


def load_or_fit_probe(scoring: Scoring) -> Probe:
    """Load the probe from the run folder, where it is if training needed it, or fit it."""
    rows, eval_rows = (with_decoded_images(scoring.rows(split), scoring.base.processor) for split in ("train", "eval"))
    with_head = scoring.plan.head_init is not None
    return probe.load_or_fit_probe(scoring.data.parent, lambda: _feature_extractor(scoring), rows, eval_rows, with_head)


def _feature_extractor(scoring: Scoring) -> FeatureExtractor:
    """Load the pretrained model as a feature extractor. A missing head gets random weights from a fixed seed."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(probe.SEED)  # weights that the head lacks are drawn at random
        model, processor = scoring.load_model_and_processor(None)
    return FeatureExtractor(
        model,
        scoring.recipe.task,
        scoring.target,
        processor.pad_token_id,
        scoring.plan.eval_batch_size,
        scoring.plan.precision,
        scoring.class_weights,
        pair_separators(processor, scoring.target),
        scoring.watch("reading rows with the pretrained model"),
    )


def _score_frozen_classifier(scoring: Scoring, scorer: ModuleType, fitted: Probe, baseline: FrozenBaseline) -> Scored:
    """Score a fitted classifier on the pretrained model's embeddings of test rows."""
    extractor, folder = _feature_extractor(scoring), scoring.data.parent
    if fitted.head is not None:
        probe.initialise_head_from_probe(extractor.model, folder)  # the head's other layers may affect the embeddings
    rows = with_decoded_images(scoring.rows("test"), scoring.base.processor)
    rows_note = f" of {fitted.train_rows:,} train rows" if fitted.train_rows < fitted.available_rows else ""
    pair_note = ", each text encoded separately" if baseline.pooling == "pair" else ""
    name = f"{baseline.kind} (frozen embeddings{rows_note}{pair_note})"
    outputs = probe.predict_baseline(extractor, rows, baseline, probe.load_baseline_classifier(folder))
    return scorer.score_frozen_classifier(scoring, name, outputs)


def _score_probe_head(scoring: Scoring, scorer: ModuleType) -> Scored:
    model, processor = scoring.load_model_and_processor(None)
    probe.initialise_head_from_probe(model, scoring.data.parent)
    scores, main = scorer.score_model(scoring, model, processor)
    changes = {"name": LINEAR_PROBE, "kind": "baseline", "calibration": None, "worst": ()}
    return scores.model_copy(update=changes), main


def score_trained_model(scoring: Scoring, outcome: Outcome) -> Scores:
    """Return the trained model's scores on the test rows, with differences from the baselines. Also log the access, and
    save a classifier's temperature and threshold."""
    plan, folder = scoring.plan, scoring.data.parent
    if outcome.model_folder is None:
        raise SetupError(f"{folder}: attempt {outcome.attempt} saved no model to evaluate")
    model_folder = folder / outcome.model_folder
    if scoring.user_metrics is not None:  # existing scores may lack these metrics
        (folder / "scores" / f"{plan.trial}.json").unlink(missing_ok=True)
    scores = score_finished_model(scoring, model_folder, lambda: log_test_access(folder, scoring.listener, outcome))
    if scores.calibration is not None:
        _save_temperature(model_folder, scores.calibration.temperature, scores.threshold)
    return scores


def score_finished_model(scoring: Scoring, model_folder: Path, log: Callable[[], None] = lambda: None) -> Scores:
    """Return a finished model's scores on the test rows, with differences from the baselines. `log` is called unless
    they were saved before."""
    plan, folder = scoring.plan, scoring.data.parent
    scoring = replace(scoring, slice_by=scoring.recipe.evaluate.slice_by)

    def score_and_log() -> Scored:
        scores = _scorer_of(scoring.recipe.task).score_model(scoring, *scoring.load_model_and_processor(model_folder))
        log()
        return scores

    scores = _load_or_score(folder / "scores" / f"{plan.trial}.json", score_and_log)
    span = find_metric(scoring.recipe.task, scoring.target, plan.metric, plan.greater_is_better).span
    return save_differences(folder, scores, partial(paired_difference, span=span, confidence=scores.confidence))


def train_and_eval_losses(scoring: Scoring) -> dict[SplitName, SplitLosses]:
    """Compute the trained model's losses and predicted labels on train and eval rows, by split. Test rows are excluded,
    because their losses would bias later choices."""
    measure = find_metric(scoring.recipe.task, scoring.target, "loss")
    assert measure.row_terms is not None, "a loss is a mean"
    by_split: dict[SplitName, SplitLosses] = {}
    with explain_out_of_memory("reading rows with the trained model", _REMEDY):
        model, processor = scoring.load_model_and_processor(scoring.data.parent / scoring.plan.model_folder)
        for split in SPLITS:
            predictions = scoring.predict_split(model, processor, split)
            counts = measure.row_terms(predictions)
            labels: list[str | None] = [None] * len(counts)
            if "logits" in predictions:
                predicted = predict_labels(predictions["logits"], scoring.target)
                labels = [label_as_text(label, scoring.target) for label in predicted]
            by_split[split] = counts, labels
    return by_split


def save_differences(
    folder: Path, scores: Scores, difference: Callable[[Resampled, Resampled], Estimate | None]
) -> Scores:
    """Apply `difference` to the resamples of the trained model and of each scored baseline. Add the results to
    `scores`, save and return them."""
    differences = {}
    path = folder / "scores" / f"{scores.name}.json"
    for other_path in sorted(path.parent.glob("*.json")):
        other, beside = Scores.load(other_path), [place.with_suffix(".npz") for place in (path, other_path)]
        if other.kind == "trained" or not all(place.exists() for place in beside):
            continue
        if (ahead := difference(*map(Resampled.load, beside))) is not None:
            differences[other.name] = ahead
    if differences != scores.differences:
        scores = scores.model_copy(update={"differences": differences})
        scores.save(path)
    return scores


def fit_and_save_temperature(scoring: Scoring, model_folder: Path, eval_rows: Predictions) -> None:
    """Fit a classifier's temperature on eval rows, and save it in the model's folder (1 if fitting is impossible)."""
    if scoring.target.form.is_calibrated:
        _save_temperature(model_folder, fit_temperature(eval_rows["logits"], eval_rows["labels"]) or 1.0)


def _save_temperature(model_folder: Path, temperature: float, fitted: Threshold | None = None) -> None:
    notes = {**read_notes(model_folder), "temperature": temperature}
    if fitted is not None:
        interval = fitted.value.model_dump(include={"value", "low", "high"})
        notes["threshold"] = {"label": fitted.label, **interval, "positives": fitted.positives}
    files.write_json(model_folder / NOTES, notes)


def _scorer_of(task: TaskName) -> ModuleType:
    return import_module(f"fulltune.evaluate.{FACTS[task].scored_by}")


def _load_or_score(path: Path, score: Callable[[], Scored]) -> Scores:
    """Load the scores at `path`; if the file is missing, call `score`, and save the scores and resamples."""
    if path.exists():
        return Scores.load(path)
    started = time.monotonic()
    with explain_out_of_memory(f"scoring {path.stem}", _REMEDY):
        scores, main = score()
    path.with_suffix(".npz").unlink(missing_ok=True)
    if main is not None:
        main.save(path.with_suffix(".npz"))
    scores = scores.model_copy(update={"seconds": round(time.monotonic() - started, 3)})
    scores.save(path)
    return scores
