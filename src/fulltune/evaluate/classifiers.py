from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from fulltune.evaluate.scoring import WORST, Scored, Scoring
from fulltune.inference.store import CLUSTERS
from fulltune.records.scores import Confusion, Threshold
from fulltune.stats.bootstrap import bounds_of, resample_metrics
from fulltune.stats.calibration import calibrate
from fulltune.tasks import Predictions, classes, multiple_choice


def baseline_scorers(scoring: Scoring) -> dict[str, Callable[[], Scored]]:
    """Map names of score files to functions that score the majority class and, in multiple choice, the longest
    choice."""
    scorers: dict[str, Callable[[], Scored]] = {"baseline-majority": partial(score_majority_class, scoring)}
    if scoring.target.num_choices:
        scorers["baseline-longest"] = partial(_score_longest_choice, scoring)
    return scorers


def score_model(scoring: Scoring, model: PreTrainedModel, processor: Any) -> Scored:
    """Score a model on test rows, with a temperature and, if wanted, a threshold fitted on eval rows."""
    test_rows = scoring.predict_split(model, processor)
    calibration = threshold = None
    if scoring.target.form.is_calibrated:
        eval_rows = scoring.predict_split(model, processor, "eval")
        calibration = calibrate(eval_rows["logits"], eval_rows["labels"], test_rows["logits"], test_rows["labels"])
        if scoring.recipe.evaluate.threshold is not None:
            threshold = _fit_threshold(scoring, eval_rows, test_rows, calibration.temperature)
            decision = (calibration.temperature, threshold.value.value)
            scoring = replace(scoring, target=replace(scoring.target, decision=decision))
    decided = classes.decide(test_rows, scoring.target)
    predicted = decided["predicted"]
    texts = [scoring.task.display_text(row, scoring.target) for row in scoring.texts]
    return scoring.make_scores(
        scoring.plan.trial,
        "trained",
        len(predicted),
        metrics=scoring.estimate_metrics(decided) | scoring.estimate_user_metrics(predicted, test_rows["labels"]),
        calibration=calibration,
        threshold=threshold,
        confusion=_confusions(scoring, test_rows["labels"], predicted),
        worst=tuple(classes.worst_rows(test_rows, texts, scoring.target, WORST)),
    )


def _fit_threshold(scoring: Scoring, eval_rows: Predictions, test_rows: Predictions, temperature: float) -> Threshold:
    """Fit the threshold with the highest F1 on the eval rows, with its bootstrap interval."""
    target, confidence = scoring.target, scoring.recipe.evaluate.confidence
    expected = eval_rows["labels"] == target.positive
    chances = classes.class_probabilities(eval_rows["logits"], temperature)[:, target.positive]
    fitted = resample_metrics(
        {"expected": expected, "chances": chances},
        lambda rows: {"": classes.best_threshold(**rows)},
        samples=scoring.recipe.evaluate.bootstrap_samples,
        clusters=np.load(scoring.data / "eval" / CLUSTERS),
    )
    decided = classes.decide(test_rows, target)
    return Threshold(
        label=target.labels[target.positive],
        value=fitted[""].estimate(confidence),
        positives=int(expected.sum()),
        f1_without=scoring.estimate_metrics(decided)["f1"].estimate(confidence, bounds_of("f1")),
    )


def _score_labels(scoring: Scoring, name: str, decided: Predictions) -> Scored:
    """Score a baseline's predicted labels of the test rows."""
    true, predicted = np.array(scoring.rows("test")["labels"]), decided["predicted"]
    metrics = scoring.estimate_metrics({**decided, "labels": true}) | scoring.estimate_user_metrics(predicted, true)
    return scoring.make_scores(
        name, "baseline", len(true), metrics=metrics, confusion=_confusions(scoring, true, predicted)
    )


def score_majority_class(scoring: Scoring) -> Scored:
    """Score a baseline that always predicts the most frequent train class, or the mean of numbers."""
    from sklearn.dummy import DummyClassifier, DummyRegressor

    form, train, test = scoring.target.form, scoring.rows("train"), scoring.rows("test")
    dummy = DummyRegressor() if form.is_number else DummyClassifier(strategy="most_frequent")
    dummy.fit(np.zeros((len(train), 1)), np.array(train["labels"]))
    return _score_labels(scoring, form.majority, {"predicted": dummy.predict(np.zeros((len(test), 1)))})


def _score_longest_choice(scoring: Scoring) -> Scored:
    texts = [multiple_choice.choice_texts(row, scoring.target) for row in scoring.texts]
    longest = np.array([np.argmax([*map(len, row)]) for row in texts])
    return _score_labels(scoring, "longest choice", {"predicted": longest})


def score_frozen_classifier(scoring: Scoring, name: str, predicted: Sequence[tuple[int, np.ndarray]]) -> Scored:
    """Score a classifier fitted on embeddings. `predicted` has each row's index and outputs: [1, classes] or [choices,
    1]."""
    outputs = [values for _, values in sorted(predicted, key=lambda row: row[0])]
    if scoring.target.num_choices:
        return _score_labels(scoring, name, {"predicted": np.array([values[:, 0].argmax() for values in outputs])})
    return _score_labels(scoring, name, classes.decide({"logits": np.concatenate(outputs)}, scoring.target))


def _confusions(scoring: Scoring, true: np.ndarray, predicted: np.ndarray) -> Confusion | None:
    """Count the rows by true and predicted label; return None unless each row has one label."""
    if not scoring.target.form.one_label:
        return None
    from sklearn.metrics import confusion_matrix

    labels = scoring.target.labels
    counts = confusion_matrix(true, predicted, labels=range(len(labels)))
    return Confusion(labels=labels, counts=tuple(map(tuple, counts.tolist())))
