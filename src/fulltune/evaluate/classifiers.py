"""Score classifiers, regressors and models that choose among answers, and their baselines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import PreTrainedModel

from fulltune.evaluate.scoring import WORST, Scored, Scoring
from fulltune.records.scores import Confusion
from fulltune.stats.calibration import calibrate
from fulltune.tasks import classes, multiple_choice

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def baselines(scoring: Scoring) -> dict[str, Callable[[], Scored]]:
    """Return the baselines' scorers by file name: the majority class and, for multiple choice, the longest choice."""
    scorers: dict[str, Callable[[], Scored]] = {"baseline-majority": partial(majority, scoring)}
    if scoring.target.num_choices:
        scorers["baseline-longest"] = partial(_score_longest_choice, scoring)
    return scorers


def trained(scoring: Scoring, model: PreTrainedModel, processor: Any) -> Scored:
    """Score the trained model, with a temperature fitted on the eval rows."""
    test_rows = scoring.run(model, processor)
    metrics = scoring.estimates(test_rows)
    predicted = classes.predict_labels(test_rows["logits"], scoring.target)
    calibration = None
    if scoring.target.form.is_calibrated:
        eval_rows = scoring.run(model, processor, "eval")
        calibration = calibrate(eval_rows["logits"], eval_rows["labels"], test_rows["logits"], test_rows["labels"])
    texts = [scoring.task.display_text(row, scoring.target) for row in scoring.texts]
    return scoring.scores(
        scoring.plan.trial,
        "trained",
        len(predicted),
        metrics=metrics | scoring.user_estimates(predicted, test_rows["labels"]),
        calibration=calibration,
        confusion=_confusion(scoring, test_rows["labels"], predicted),
        worst=tuple(classes.worst(test_rows, texts, scoring.target, WORST)),
    )


def _score_labels(scoring: Scoring, name: str, predicted: np.ndarray) -> Scored:
    true = np.array(scoring.rows("test")["labels"])
    metrics = scoring.estimates(
        {"true": true, "predicted": predicted},
        metrics=lambda rows: classes.label_metrics(rows["true"], rows["predicted"], scoring.target),
    )
    return scoring.scores(name, "baseline", len(true), metrics=metrics, confusion=_confusion(scoring, true, predicted))


def majority(scoring: Scoring) -> Scored:
    """Score the baseline that always predicts the most frequent class of train, or the mean of numbers."""
    from sklearn.dummy import DummyClassifier, DummyRegressor

    form, train, test = scoring.target.form, scoring.rows("train"), scoring.rows("test")
    dummy = DummyRegressor() if form.is_number else DummyClassifier(strategy="most_frequent")
    dummy.fit(np.zeros((len(train), 1)), np.array(train["labels"]))
    return _score_labels(scoring, form.majority, dummy.predict(np.zeros((len(test), 1))))


def _score_longest_choice(scoring: Scoring) -> Scored:
    """Score the choice with the most characters, because right answers are often written with more care."""
    texts = [multiple_choice.choice_texts(row, scoring.target) for row in scoring.texts]
    return _score_labels(scoring, "longest choice", np.array([int(np.argmax([*map(len, row)])) for row in texts]))


def frozen(scoring: Scoring, name: str, predicted: Sequence[tuple[int, np.ndarray]]) -> Scored:
    """Score a classifier on embeddings, given each row's index and outputs [items, outputs]."""
    outputs = [values for _, values in sorted(predicted, key=lambda row: row[0])]
    if scoring.target.num_choices:
        return _score_labels(scoring, name, np.array([int(values[:, 0].argmax()) for values in outputs]))
    return _score_labels(scoring, name, classes.predict_labels(np.concatenate(outputs), scoring.target))


def _confusion(scoring: Scoring, true: np.ndarray, predicted: np.ndarray) -> Confusion | None:
    """Count the rows by true and predicted label, or return None unless each row has one label."""
    if not scoring.target.form.one_label:
        return None
    from sklearn.metrics import confusion_matrix

    labels = scoring.target.labels
    counts = confusion_matrix(true, predicted, labels=range(len(labels)))
    return Confusion(labels=labels, counts=tuple(map(tuple, counts.tolist())))
