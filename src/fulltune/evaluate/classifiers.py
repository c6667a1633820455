"""Models that give each row a label, several labels, a number or one of its choices; baselines without training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from fulltune.evaluate.scoring import WORST, Scored, Scoring
from fulltune.records.scores import Confusion
from fulltune.stats.calibration import calibrate
from fulltune.tasks import classes, multiple_choice


def baselines(scoring: Scoring) -> dict[str, Callable[[], Scored]]:
    """File name to what makes it: the majority class; of choices the usual position of the right one, and the
    longest."""
    made: dict[str, Callable[[], Scored]] = {"baseline-majority": partial(majority, scoring)}
    if scoring.target.num_choices:
        made["baseline-longest"] = partial(_longest, scoring)
    return made


def trained(scoring: Scoring, model: Any, processor: Any) -> Scored:
    """The trained model; the temperature of its probabilities is fitted on the eval rows."""
    kept = scoring.run(model, processor)
    metrics = scoring.estimates(kept)
    predicted = classes.predict_labels(kept["logits"], scoring.target)
    calibration = None
    if scoring.target.form.is_calibrated:
        chosen = scoring.run(model, processor, "eval")
        calibration = calibrate(chosen["logits"], chosen["labels"], kept["logits"], kept["labels"])
    texts = [scoring.task.display_text(row, scoring.target) for row in scoring.texts]
    return scoring.scores(
        scoring.plan.trial,
        "trained",
        len(predicted),
        metrics=metrics | scoring.user_estimates(predicted, kept["labels"]),
        calibration=calibration,
        confusion=_confusion(scoring, kept["labels"], predicted),
        worst=tuple(classes.worst(kept, texts, scoring.target, WORST)),
    )


def _label_scores(scoring: Scoring, name: str, predicted: np.ndarray) -> Scored:
    """Scores of a baseline that gives labels without probabilities."""
    true = np.array(scoring.rows("test")["labels"])
    metrics = scoring.estimates(
        {"true": true, "predicted": predicted},
        metrics=lambda rows: classes.label_metrics(rows["true"], rows["predicted"], scoring.target),
    )
    return scoring.scores(name, "baseline", len(true), metrics=metrics, confusion=_confusion(scoring, true, predicted))


def majority(scoring: Scoring) -> Scored:
    """The most frequent class of train (each label's majority; the mean; the position) for every row."""
    from sklearn.dummy import DummyClassifier, DummyRegressor

    form, train, test = scoring.target.form, scoring.rows("train"), scoring.rows("test")
    dummy = DummyRegressor() if form.is_number else DummyClassifier(strategy="most_frequent")
    dummy.fit(np.zeros((len(train), 1)), np.array(train["labels"]))
    return _label_scores(scoring, form.majority, dummy.predict(np.zeros((len(test), 1))))


def _longest(scoring: Scoring) -> Scored:
    """The choice with the most characters: people who write a right answer are often more careful with it."""
    texts = [multiple_choice.choice_texts(row, scoring.target) for row in scoring.texts]
    return _label_scores(scoring, "longest choice", np.array([int(np.argmax([*map(len, row)])) for row in texts]))


def frozen(scoring: Scoring, name: str, predicted: Sequence[tuple[int, np.ndarray]]) -> Scored:
    """What a classifier on embeddings gives: for each row its number, and the outputs of its items [items, outputs]."""
    outputs = [values for _, values in sorted(predicted, key=lambda found: found[0])]
    if scoring.target.num_choices:
        return _label_scores(scoring, name, np.array([int(values[:, 0].argmax()) for values in outputs]))
    return _label_scores(scoring, name, classes.predict_labels(np.concatenate(outputs), scoring.target))


def _confusion(scoring: Scoring, true: np.ndarray, predicted: np.ndarray) -> Confusion | None:
    if not scoring.target.form.one_label:
        return None
    from sklearn.metrics import confusion_matrix

    labels = scoring.target.labels
    counts = confusion_matrix(true, predicted, labels=range(len(labels)))
    return Confusion(labels=labels, counts=tuple(map(tuple, counts.tolist())))
