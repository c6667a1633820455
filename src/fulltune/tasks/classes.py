from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from fulltune.records.data import DataSummary
from fulltune.records.scores import Answer
from fulltune.tasks import (
    PLAIN_LOSS,
    FromSums,
    LossSettings,
    Predictions,
    Row,
    RowAnswer,
    RowExamples,
    RowFeatures,
    RowTerms,
    Target,
    Tensor,
    Tokenizer,
)

RowScores = Callable[[Predictions, Target], Predictions]
Sums = Mapping[str, tuple[RowTerms, FromSums]]
ROWS = ""
"""Name that `stack_arrays` replaces with a column of ones."""

# ---- terms of a row ------------------------------------------------------------------------------------------


def numbers(*values: np.ndarray) -> np.ndarray:
    return np.stack([np.asarray(array, np.float64) for array in values], axis=-1)


def stack_arrays(*names: str) -> RowTerms:
    """Return a function that stacks the named arrays of predictions as columns of row terms [rows, names]."""
    return lambda predictions: numbers(
        *(predictions[name] if name else np.ones(len(predictions[names[0]])) for name in names)
    )


def terms_of_mean(score: Callable[[Predictions], np.ndarray]) -> RowTerms:
    """Return a function that computes row terms [rows, 2]: the score and 1. The mean score is the ratio of their
    sums."""
    return lambda predictions: numbers(values := score(predictions), np.ones(len(values)))


def flat(matches: np.ndarray) -> np.ndarray:
    return matches.reshape(len(matches), -1)


def over_all(sums: Sums, predictions: Predictions) -> dict[str, float]:
    return {name: float(value(count(predictions).sum(axis=0))) for name, (count, value) in sums.items()}


def sums_by_row(row_scores: RowScores, names: Sequence[str], target: Target, metric: str) -> Sums:
    def terms(name: str, predictions: Predictions) -> np.ndarray:
        rows = row_scores(predictions, target)
        weights = rows.get(f"{name} counted", rows["counted"])
        return numbers(rows[name] * weights, weights)

    return {name: (partial(terms, name), ratio) for name in names}


def metrics_by_row(row_scores: RowScores, names: Sequence[str], rows: Predictions, target: Target) -> dict[str, float]:
    rows = row_scores(rows, target)
    return over_all(sums_by_row(row_scores, [name for name in names if name in rows], target, ""), rows)


# ---- metrics from sums -----------------------------------------------------------------------------------------


def ratio(sums: np.ndarray) -> np.ndarray:
    return share(sums[..., 0], sums[..., 1])


def share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.zeros(np.broadcast(part, whole).shape), where=whole != 0)


def f1(sums: np.ndarray) -> np.ndarray:
    """Compute F1 from counts of true positives, predictions and targets, [..., 3]."""
    return share(2 * sums[..., 0], sums[..., 1] + sums[..., 2])


def split_into_threes(sums: np.ndarray) -> np.ndarray:
    return sums.reshape(*sums.shape[:-1], -1, 3)


def macro_f1(sums: np.ndarray) -> np.ndarray:
    return np.asarray(f1(split_into_threes(sums)).mean(axis=-1))


def macro_f1_of_present_classes(sums: np.ndarray) -> np.ndarray:
    """Average F1 over the classes that occur in predictions or targets, as in scikit-learn. `sums` are as in `mcc`."""
    parts = split_into_threes(sums)
    present = (parts[..., 1] + parts[..., 2] > 0).sum(axis=-1)
    return share(f1(parts).sum(axis=-1), present)


def mcc(sums: np.ndarray) -> np.ndarray:
    """Compute Matthews' correlation from each class's true positives, predictions and targets, summed over rows: [...,
    3 * classes]."""
    parts = split_into_threes(sums)
    right, predicted, expected = parts[..., 0].sum(axis=-1), parts[..., 1], parts[..., 2]
    rows = predicted.sum(axis=-1)
    scale = (rows**2 - (predicted**2).sum(axis=-1)) * (rows**2 - (expected**2).sum(axis=-1))
    return share(right * rows - (predicted * expected).sum(axis=-1), np.sqrt(scale))


def balanced_accuracy(sums: np.ndarray) -> np.ndarray:
    """Average the recall of the classes that occur in targets, as in scikit-learn. `sums` are as in `mcc`."""
    parts = split_into_threes(sums)
    return share(share(parts[..., 0], parts[..., 2]).sum(axis=-1), (parts[..., 2] > 0).sum(axis=-1))


OF_ALL = {"f1_macro": macro_f1_of_present_classes, "mcc": mcc, "balanced_accuracy": balanced_accuracy}
OF_ONE: dict[str, FromSums] = {
    "f1": f1,
    "precision": lambda sums: share(sums[..., 0], sums[..., 1]),
    "recall": lambda sums: share(sums[..., 0], sums[..., 2]),
}
"""Metrics of one class from its sums: true positives, predictions and targets [..., 3]."""


def best_threshold(expected: np.ndarray, chances: np.ndarray) -> float:
    """Return the probability from which on rows must be positive for the highest F1: halfway between two rows', and the
    nearest to 0.5 of those that are as good. `expected` is bool [rows]."""
    ends, hits, ranked = _count_by_rank(expected, chances)
    halfway, scores = (ranked + np.append(ranked[1:], 0.0)) / 2, hits / (ends + hits[-1])
    best = halfway[scores == scores.max()]
    return float(best[np.argmin(np.abs(best - 0.5))])


def ranking_metrics(expected: np.ndarray, scores: np.ndarray) -> dict[str, float]:
    """Compute scikit-learn's ROC AUC and average precision, but faster, or NaN without both classes."""
    ends, hits, _ = _count_by_rank(expected, scores)
    positives, negatives = hits[-1], ends[-1] - hits[-1]
    if not positives or not negatives:
        return dict.fromkeys(("roc_auc", "average_precision"), math.nan)
    new = np.diff(hits, prepend=0)
    return {
        "roc_auc": float(np.diff(ends - hits, prepend=0) @ (hits - new / 2) / (positives * negatives)),
        "average_precision": float(new @ (hits / ends) / positives),
    }


def _count_by_rank(expected: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each distinct score, highest first, count the rows with at least this score, and the positive ones."""
    order = np.argsort(-scores.astype(np.float64))
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(order) - 1)
    return ends + 1.0, np.cumsum(expected[order])[ends], scores[order][ends]


def r2(sums: np.ndarray) -> np.ndarray:
    errors, rows, values, squares = np.moveaxis(sums, -1, 0)
    return np.asarray(1 - share(errors, squares - values**2 / rows))


# ---- rows with classes, numbers or choices ---------------------------------------------------------------------


def config_changes(target: Target, processor: Tokenizer) -> dict[str, Any]:
    """Return values to set on the model's config: labels, problem type, and the padding token that decoders need."""
    form, labels = target.form, target.labels or ("value",)
    if not (target.labels or form.is_number):
        return {}
    changes: dict[str, Any] = {
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {name: position for position, name in enumerate(labels)},
    }
    if not form.tags_words:
        kind = "multi_label_classification" if form.several_labels else "single_label_classification"
        changes["problem_type"] = "regression" if form.is_number else kind
        changes |= {"pad_token_id": processor.pad_token_id} if hasattr(processor, "get_vocab") else {}
    return changes


def label_as_text(value: Any, target: Target) -> str:
    """Return a row's label, labels or number as text."""
    if target.form.is_number:
        return f"{float(value):g}"
    if not target.form.several_labels:
        return target.labels[int(value)] if target.labels else f"({int(value)})"
    return ", ".join(name for name, present in zip(target.labels, value, strict=True) if present >= 0.5) or "(none)"


def loss(logits: Tensor, labels: Tensor, target: Target, settings: LossSettings = PLAIN_LOSS) -> Tensor:
    """Return the sum of `row_losses`."""
    return row_losses(logits, labels, target, settings).sum()


def row_losses(logits: Tensor, labels: Tensor, target: Target, settings: LossSettings = PLAIN_LOSS) -> Tensor:
    """Compute each row's loss [batch]: cross entropy, binary cross entropy averaged over labels, or squared error
    (relative to the train rows' variance, if known).

    `logits` are [batch, classes], or [batch, 1] for numbers; `labels` are class ids or numbers [batch], or 0/1 [batch,
    classes].
    """
    import torch.nn.functional as F

    logits = logits.float()
    weights = None if settings.class_weights is None else logits.new_tensor(list(settings.class_weights))
    if target.form.is_number:
        shift, factor = target.logit_scale
        expected = ((labels.double() - shift) / factor).float()  # in logit units: in fp32, 1e8 and 1e8 + 1 are equal
        unit = target.scale[1] if target.scale else 1.0
        return ((logits.squeeze(-1) - expected) * (factor / unit)).square()
    if target.form.ranks_rows:  # a grade is a share of the highest one in train
        labels = (labels[:, 1:] / (target.num_choices - 1)).clamp(max=1)
    if target.form.several_labels or target.form.ranks_rows:
        soft = labels * (1 - settings.smoothing) + settings.smoothing / 2
        return F.binary_cross_entropy_with_logits(logits, soft, pos_weight=weights, reduction="none").mean(dim=-1)
    return F.cross_entropy(logits, labels, weight=weights, label_smoothing=settings.smoothing, reduction="none")


def count_items(labels: Tensor) -> int:
    return labels.shape[0]


def reduce_logits(logits: Tensor, labels: Tensor, target: Target) -> dict[str, Tensor]:
    """Return float32 `logits[batch, classes]` (regression: numbers in the data's units), `labels` and unsmoothed
    `loss[batch]`."""
    outputs = logits.float()
    if target.form.is_number:
        shift, factor = target.logit_scale
        outputs = (factor * logits.double() + shift).float()
    return {"logits": outputs, "labels": labels, "loss": row_losses(logits, labels, target)}


def metrics(predictions: Predictions, target: Target) -> dict[str, float]:
    rows = decide(predictions, target)
    values = label_metrics(rows["labels"], rows["predicted"], target, rows.get("score"))
    return values | ({"loss": float(np.mean(predictions["loss"]))} if "loss" in predictions else {})


def decide(predictions: Predictions, target: Target) -> Predictions:
    """Replace `logits` by `predicted` labels and the `score` of `positive_label`, which are faster to resample."""
    if "predicted" in predictions:
        return predictions
    logits, others = predictions["logits"], {name: rows for name, rows in predictions.items() if name != "logits"}
    score = {} if target.positive_label is None else {"score": class_probabilities(logits, 1.0)[:, target.positive]}
    return {**others, "predicted": predict_labels(logits, target), **score}


def label_metrics(
    true: np.ndarray, predicted: np.ndarray, target: Target, scores: np.ndarray | None = None
) -> dict[str, float]:
    """Compute scikit-learn's metrics by name, but faster. Labels are class ids [rows], 0/1 [rows, labels] or numbers
    [rows]. Without `scores` [rows], rows are ranked by `predicted`."""
    form = target.form
    if form.is_number:
        return _number_metrics(true.astype(np.float64), predicted.astype(np.float64))
    if form.several_labels:
        counts = numbers((true * predicted).sum(axis=0), predicted.sum(axis=0), true.sum(axis=0))
        return {
            "f1_micro": float(f1(counts.sum(axis=0))),
            "f1_macro": float(macro_f1(counts.ravel())),
            "accuracy": float((true == predicted).all(axis=1).mean()),
        }
    if not form.one_label:
        return {"accuracy": float(np.mean(true == predicted))}
    classes = max(len(target.labels), int(max(true.max(), predicted.max())) + 1)
    counts = numbers(*(np.bincount(ids, minlength=classes) for ids in (true[true == predicted], predicted, true)))
    values = {name: float(value(counts.ravel())) for name, value in OF_ALL.items()}
    values["accuracy"] = float(counts[:, 0].sum() / len(true))
    if target.positive_label is None:
        return values
    place = target.positive
    values |= {name: float(value(counts[place])) for name, value in OF_ONE.items()}
    return values | ranking_metrics(true == place, predicted == place if scores is None else scores)


def _number_metrics(true: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """Compute scikit-learn's and scipy's metrics: NaN if a prediction is not finite, 0 without a rank correlation."""
    from scipy import stats
    from sklearn.metrics import r2_score

    if not np.isfinite(predicted).all():
        return dict.fromkeys(("r2", "spearman", "kendall", "rmse"), math.nan)
    with warnings.catch_warnings(action="ignore"):  # about a constant prediction or a single row
        r2 = float(r2_score(true, predicted))
        spearman, kendall = (float(rank(true, predicted).statistic) for rank in (stats.spearmanr, stats.kendalltau))
    ranks = {"spearman": spearman, "kendall": kendall}
    rmse = math.sqrt(((true - predicted) ** 2).mean())
    return {"r2": r2, **{name: value if math.isfinite(value) else 0.0 for name, value in ranks.items()}, "rmse": rmse}


def predict_labels(logits: np.ndarray, target: Target) -> np.ndarray:
    """Turn `logits[rows, classes]` into class ids [rows], a 0/1 matrix [rows, labels] or numbers [rows]."""
    if target.decision is not None:
        temperature, threshold = target.decision
        is_positive = class_probabilities(logits, temperature)[:, target.positive] >= threshold
        logits = np.where(is_positive[:, None] == (np.arange(logits.shape[1]) == target.positive), logits, -np.inf)
    if target.form.is_number:
        return logits[:, 0]
    return (logits > 0).astype(np.int64) if target.form.several_labels else logits.argmax(axis=-1)


def worst_rows(predictions: Predictions, texts: Sequence[str], target: Target, count: int) -> Iterable[Answer]:
    """Yield the `count` wrongly predicted rows with the highest loss. In regression, all rows count as wrong."""
    predicted, true = predict_labels(predictions["logits"], target), predictions["labels"]
    wrong = np.ones(len(true), bool) if target.form.is_number else ~_is_right(predictions, target)
    order = [position for position in np.argsort(-predictions["loss"], kind="stable") if wrong[position]]
    for position in order[:count]:
        yield Answer(
            text=texts[position],
            expected=label_as_text(true[position], target),
            predicted=label_as_text(predicted[position], target),
            loss=float(predictions["loss"][position]),
        )


def answers(
    predictions: Predictions, rows: Sequence[Row], examples: RowExamples, target: Target, temperature: float
) -> list[RowAnswer]:
    """Return each row's answer: its label or labels with probabilities, or a number."""
    if target.form.is_number:
        return [{"value": value} for value in predictions["logits"][:, 0].tolist()]
    labels = target.labels
    if target.form.several_labels:
        from scipy.special import expit

        return [
            {
                "labels": [name for name, chance in zip(labels, chances, strict=True) if chance > 0.5],
                "probabilities": dict(zip(labels, chances, strict=True)),
            }
            for chances in expit(predictions["logits"].astype(np.float64)).tolist()
        ]
    return [
        {"label": labels[best], "probability": chances[best], "probabilities": dict(zip(labels, chances, strict=True))}
        for best, chances in classes_with_chances(predictions["logits"], target, temperature)
    ]


def classes_with_chances(logits: np.ndarray, target: Target, temperature: float) -> Iterable[tuple[int, list[float]]]:
    """Yield each row's predicted class id and all classes' probabilities. `temperature` divides the logits."""
    chances = class_probabilities(logits, temperature)
    return zip(predict_labels(logits, target).tolist(), chances.tolist(), strict=True)


def class_probabilities(logits: np.ndarray, temperature: float) -> np.ndarray:
    """Return the calibrated probabilities, float64 [rows, classes]."""
    from scipy.special import softmax

    return np.asarray(softmax(logits.astype(np.float64) / temperature, axis=-1))


def with_placeholder_label(row: Row, target: Target) -> Row:
    """Return a copy of the row with a placeholder label, which checks and tokenisation require."""
    placeholder: object = 0.0 if target.form.is_number else [] if target.form.several_labels else target.labels[0]
    return {**row, target.columns["label"]: placeholder}


# ---- metrics as sums over rows ---------------------------------------------------------------------------------


def _is_right(predictions: Predictions, target: Target) -> np.ndarray:
    same = predict_labels(predictions["logits"], target) == predictions["labels"]
    return np.asarray(same.all(axis=-1) if same.ndim > 1 else same)


def _matches(predictions: Predictions, target: Target) -> np.ndarray:
    """For each row and class, return 0 or 1 for true positive, predicted and expected: [rows, classes, 3]."""
    predicted, true = predict_labels(predictions["logits"], target), predictions["labels"]
    if target.form.several_labels:
        guessed, expected = predicted > 0, true > 0
    else:
        classes = np.arange(predictions["logits"].shape[1])
        guessed, expected = predicted[:, None] == classes, true[:, None] == classes
    return numbers(guessed & expected, guessed, expected)


def _regression_terms(predictions: Predictions) -> np.ndarray:
    """Return each row's squared error, 1, centred target and squared centred target: [rows, 4]."""
    true, predicted = (
        np.asarray(values, np.float64) for values in (predictions["labels"], predictions["logits"][:, 0])
    )
    # Without centring, a sum of squares far from 0 would lose its digits.
    centred = true - true.mean()
    return numbers((true - predicted) ** 2, np.ones(len(true)), centred, centred**2)


def metrics_from_sums(target: Target, metric: str) -> dict[str, tuple[RowTerms, FromSums]]:
    """Map each metric (ignoring `metric`) to two functions: one computes its row terms, the other its value from their
    sums."""
    loss: dict[str, tuple[RowTerms, FromSums]] = {"loss": (stack_arrays("loss", ROWS), ratio)}
    if target.form.is_number:
        return loss | {"r2": (_regression_terms, r2), "rmse": (_regression_terms, lambda sums: np.sqrt(ratio(sums)))}
    right, matches = (partial(terms, target=target) for terms in (_is_right, _matches))
    metrics = loss | {"accuracy": (terms_of_mean(right), ratio)}
    if target.form.several_labels:
        micro = {"f1_micro": (lambda predictions: matches(predictions).sum(axis=1), f1)}
        return metrics | micro | {"f1_macro": (lambda predictions: flat(matches(predictions)), macro_f1)}
    metrics |= {name: (lambda predictions: flat(matches(predictions)), value) for name, value in OF_ALL.items()}
    of_one = OF_ONE.items() if target.positive_label is not None else ()
    return metrics | {name: (lambda rows: matches(rows)[:, target.positive], value) for name, value in of_one}


# ---- guessing --------------------------------------------------------------------------------------------------


def chance_loss(summary: DataSummary, class_weights: Sequence[float] | None) -> float:
    """Return the loss of always predicting the mean number, or equal probabilities for all classes."""
    if summary.form.is_number:
        return 1.0
    if summary.num_choices:
        return math.log(summary.num_choices)
    guess, train = math.log(2 if summary.form.several_labels else max(2, len(summary.labels))), summary.splits["train"]
    if class_weights is None:
        return guess
    counts = [train.label_counts.get(label, 0) for label in summary.labels]
    if summary.form.one_label:
        return guess * sum(map(math.prod, zip(class_weights, counts, strict=True))) / sum(counts)
    shares = [count / train.rows for count in counts]
    return guess * statistics.fmean(
        1 + (weight - 1) * share for weight, share in zip(class_weights, shares, strict=True)
    )


def full_row(target: Target, length: int) -> RowFeatures:
    several = np.ones(len(target.labels), np.float32) if target.form.several_labels else 0
    return {"input_ids": np.ones(length, np.int64), "labels": 1.0 if target.form.is_number else several}
