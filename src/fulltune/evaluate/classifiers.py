"""Models that give each row a label, several labels or a number; baselines that need no training."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from fulltune.calibration import calibrate
from fulltune.evaluate.bench import WORST, Bench
from fulltune.inference import embeddings
from fulltune.records import Confusion, Scores
from fulltune.tasks import text_classification


def baselines(bench: Bench) -> dict[str, Callable[[], Scores]]:
    """File name to what makes it: the majority class, and the simplest classifier on frozen embeddings."""
    return {"baseline-majority": lambda: _majority(bench), "baseline-frozen": lambda: _frozen(bench)}


def trained(bench: Bench, model: Any, tokenizer: Any) -> Scores:
    """The trained model; the temperature of its probabilities is fitted on the eval rows."""
    run = partial(bench.run, model, tokenizer.pad_token_id)
    kept = run(bench.rows("test"))
    metrics = bench.estimates(kept, lambda rows: bench.task.metrics(rows, bench.target))
    predicted = text_classification.predict_labels(kept["logits"], bench.target)
    calibration = None
    if bench.target.problem_type == "single_label":
        chosen = run(bench.rows("eval"))
        calibration = calibrate(chosen["logits"], chosen["labels"], kept["logits"], kept["labels"])
    texts = [str(row[bench.target.columns["text"]]) for row in bench.texts]
    return bench.scores(
        bench.plan.trial,
        "trained",
        len(predicted),
        metrics=metrics | bench.user_estimates(predicted, kept["labels"]),
        calibration=calibration,
        confusion=_confusion(bench, kept["labels"], predicted),
        worst=tuple(bench.task.worst(kept, texts, bench.target, WORST)),
    )


def _labels(rows: Any) -> np.ndarray:
    return np.array(rows["labels"])


def _label_scores(bench: Bench, name: str, predicted: np.ndarray) -> Scores:
    """Scores of a baseline that gives labels without probabilities."""
    true = _labels(bench.rows("test"))
    kept = {"true": true, "predicted": predicted}
    metrics = bench.estimates(
        kept, lambda rows: text_classification.label_metrics(rows["true"], rows["predicted"], bench.target)
    )
    return bench.scores(name, "baseline", len(true), metrics=metrics, confusion=_confusion(bench, true, predicted))


def _majority(bench: Bench) -> Scores:
    """The most frequent class of train (each label's majority; the mean) for every row."""
    from sklearn.dummy import DummyClassifier, DummyRegressor

    train, test = bench.rows("train"), bench.rows("test")
    regression = bench.target.problem_type == "regression"
    dummy = DummyRegressor() if regression else DummyClassifier(strategy="most_frequent")
    dummy.fit(np.zeros((len(train), 1)), _labels(train))
    name = {"regression": "mean of train", "multi_label": "majority of each label"}
    return _label_scores(
        bench, name.get(bench.target.problem_type, "majority class"), dummy.predict(np.zeros((len(test), 1)))
    )


def _frozen(bench: Bench) -> Scores:
    """The pretrained model left as it is: mean-pooled embeddings and the simplest classifier on them."""
    from sklearn.linear_model import LogisticRegression, RidgeCV
    from sklearn.multiclass import OneVsRestClassifier
    from sklearn.neighbors import NearestCentroid

    train, test = bench.rows("train"), bench.rows("test")
    model, tokenizer = bench.load_pretrained()
    embed = partial(
        embeddings,
        model,
        task=bench.task,
        pad_token_id=tokenizer.pad_token_id,
        batch_size=bench.plan.eval_batch_size,
        precision=bench.plan.precision,
    )
    match bench.target.problem_type:
        case "regression":
            name, head = "ridge regression (frozen embeddings)", RidgeCV(alphas=np.logspace(-3, 3, 7))
        case "multi_label":
            name, head = (
                "logistic regression (frozen embeddings)",
                OneVsRestClassifier(LogisticRegression(max_iter=1000)),
            )
        case _:
            name, head = "nearest centroid (frozen embeddings)", NearestCentroid()
    head.fit(embed(train), _labels(train))
    return _label_scores(bench, name, np.asarray(head.predict(embed(test))))


def _confusion(bench: Bench, true: np.ndarray, predicted: np.ndarray) -> Confusion | None:
    if bench.target.problem_type != "single_label":
        return None
    from sklearn.metrics import confusion_matrix

    counts = confusion_matrix(true, predicted, labels=range(len(bench.target.labels)))
    return Confusion(labels=bench.target.labels, counts=tuple(tuple(int(n) for n in row) for row in counts))
