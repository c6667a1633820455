"""Models that give each row a label, several labels, a number or one of its choices; baselines without training."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from fulltune.evaluate.scoring import WORST, Bench, Scored
from fulltune.inference.run import Share, embeddings
from fulltune.models.processors import opened
from fulltune.records.plan import MOST_EMBEDDED
from fulltune.records.scores import Confusion
from fulltune.stats.calibration import calibrate
from fulltune.tasks import Predictions, image_classification, multiple_choice, text_classification


def baselines(bench: Bench) -> dict[str, Callable[[], Scored]]:
    """File name to what makes it: the majority class, and the simplest classifier on frozen embeddings.

    Choices have no classes: what costs nothing there is the usual position of the right one, and the longest choice.
    """
    if bench.target.problem_type == "choice":
        return {"baseline-majority": lambda: _majority(bench), "baseline-longest": lambda: _longest(bench)}
    return {"baseline-majority": lambda: _majority(bench), "baseline-frozen": lambda: _frozen(bench)}


def trained(bench: Bench, model: Any, tokenizer: Any) -> Scored:
    """The trained model; the temperature of its probabilities is fitted on the eval rows."""

    def run(split: str) -> Predictions:
        return bench.run(model, tokenizer.pad_token_id, opened(bench.rows(split), tokenizer), split)

    kept = run("test")
    metrics = bench.estimates(kept, lambda rows: bench.task.metrics(rows, bench.target))
    predicted = text_classification.predict_labels(kept["logits"], bench.target)
    calibration = None
    if bench.target.problem_type in ("single_label", "choice"):
        chosen = run("eval")
        calibration = calibrate(chosen["logits"], chosen["labels"], kept["logits"], kept["labels"])
    texts = [_shown(bench, row) for row in bench.texts]
    return bench.scores(
        bench.plan.trial,
        "trained",
        len(predicted),
        metrics=metrics | bench.user_estimates(predicted, kept["labels"]),
        calibration=calibration,
        confusion=_confusion(bench, kept["labels"], predicted),
        worst=tuple(bench.task.worst(kept, texts, bench.target, WORST)),
    )


def _shown(bench: Bench, row: dict[str, Any]) -> str:
    """A test row as one reads it in a list of mistakes."""
    if bench.target.problem_type == "choice":
        return multiple_choice.as_shown(row, bench.target)
    if "image" in bench.target.columns:
        return image_classification.short_name(row, bench.target)
    return " / ".join(
        str(row[bench.target.columns[role]]) for role in ("text", "text_pair") if role in bench.target.columns
    )


def _labels(rows: Any) -> np.ndarray:
    return np.array(rows["labels"])


def _label_scores(bench: Bench, name: str, predicted: np.ndarray) -> Scored:
    """Scores of a baseline that gives labels without probabilities."""
    true = _labels(bench.rows("test"))
    kept = {"true": true, "predicted": predicted}
    of_labels = (
        multiple_choice.label_metrics
        if bench.target.problem_type == "choice"
        else partial(text_classification.label_metrics, target=bench.target)
    )
    metrics = bench.estimates(kept, lambda rows: of_labels(rows["true"], rows["predicted"]))
    return bench.scores(name, "baseline", len(true), metrics=metrics, confusion=_confusion(bench, true, predicted))


def _majority(bench: Bench) -> Scored:
    """The most frequent class of train (each label's majority; the mean; the position) for every row."""
    from sklearn.dummy import DummyClassifier, DummyRegressor

    train, test = bench.rows("train"), bench.rows("test")
    regression = bench.target.problem_type == "regression"
    dummy = DummyRegressor() if regression else DummyClassifier(strategy="most_frequent")
    dummy.fit(np.zeros((len(train), 1)), _labels(train))
    name = {"regression": "mean of train", "multi_label": "majority of each label", "choice": "most frequent position"}
    return _label_scores(
        bench, name.get(bench.target.problem_type, "majority class"), dummy.predict(np.zeros((len(test), 1)))
    )


def _longest(bench: Bench) -> Scored:
    """The choice with the most characters: people who write a right answer are often more careful with it."""
    texts = [multiple_choice.choice_texts(row, bench.target) for row in bench.texts]
    return _label_scores(bench, "longest choice", np.array([int(np.argmax([*map(len, row)])) for row in texts]))


def _frozen(bench: Bench) -> Scored:
    """The pretrained model left as it is: mean-pooled embeddings and the simplest classifier on them."""
    from sklearn.linear_model import LogisticRegression, RidgeCV
    from sklearn.multiclass import OneVsRestClassifier
    from sklearn.neighbors import NearestCentroid

    model, tokenizer = bench.load_pretrained()
    train, test = (opened(bench.rows(split), tokenizer) for split in ("train", "test"))

    def embed(rows: Any, split: str) -> np.ndarray:
        call = partial(embeddings, model, rows, bench.task, tokenizer.pad_token_id, precision=bench.plan.precision)
        watch = bench.watch(f"embedding {split} rows")
        return bench.in_batches(lambda batch_size: call(batch_size=batch_size, watch=watch))

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
    labels = _labels(train)
    if len(train) > MOST_EMBEDDED:
        chosen = np.random.default_rng(0).choice(len(train), MOST_EMBEDDED, replace=False)
        train, labels = Share(train, chosen.tolist()), labels[chosen]
        name = name.replace("embeddings)", f"embeddings of {MOST_EMBEDDED:,} train rows)")
    head.fit(embed(train, "train"), labels)
    return _label_scores(bench, name, np.asarray(head.predict(embed(test, "test"))))


def _confusion(bench: Bench, true: np.ndarray, predicted: np.ndarray) -> Confusion | None:
    if bench.target.problem_type != "single_label":
        return None
    from sklearn.metrics import confusion_matrix

    counts = confusion_matrix(true, predicted, labels=range(len(bench.target.labels)))
    return Confusion(labels=bench.target.labels, counts=tuple(tuple(int(n) for n in row) for row in counts))
