"""Metrics as sums over rows, for all tasks; and rows with one label, several, a number or a right choice: their loss,
metrics and answers."""

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
from fulltune.tasks import Count, Encoded, Predictions, Row, Target, Tensor, Value

ROWS = ""
"""In place of an array's name: 1 for each row."""

# ---- what a row contributes ------------------------------------------------------------------------------------


def numbers(*values: np.ndarray) -> np.ndarray:
    """The numbers of each row, side by side."""
    return np.stack([np.asarray(one, np.float64) for one in values], axis=-1)


def arrays(*names: str) -> Count:
    """What `reduce` kept under these names."""
    return lambda kept: numbers(*(kept[name] if name else np.ones(len(kept[names[0]])) for name in names))


def mean_of(score: Callable[[Predictions], np.ndarray]) -> Count:
    """A number of each row, and 1."""

    def count(kept: Predictions) -> np.ndarray:
        values = score(kept)
        return numbers(values, np.ones(len(values)))

    return count


def flat(matches: np.ndarray) -> np.ndarray:
    return matches.reshape(len(matches), -1)


def over_all(sums: Mapping[str, tuple[Count, Value]], kept: Predictions) -> dict[str, float]:
    """The metrics of all rows together."""
    return {name: float(value(count(kept).sum(axis=0))) for name, (count, value) in sums.items()}


# ---- what is made of the sums ----------------------------------------------------------------------------------


def ratio(sums: np.ndarray) -> np.ndarray:
    """First sum by the second; nothing of nothing is 0."""
    return share(sums[..., 0], sums[..., 1])


def share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.zeros(np.broadcast(part, whole).shape), where=whole != 0)


def f1(sums: np.ndarray) -> np.ndarray:
    """Of right, found and expected ones."""
    return share(2 * sums[..., 0], sums[..., 1] + sums[..., 2])


def by_three(sums: np.ndarray) -> np.ndarray:
    return sums.reshape(*sums.shape[:-1], -1, 3)


def f1_of_all(sums: np.ndarray) -> np.ndarray:
    return np.asarray(f1(by_three(sums)).mean(axis=-1))


def f1_of_present(sums: np.ndarray) -> np.ndarray:
    """Mean over the classes that were found or expected, as scikit-learn takes it."""
    parts = by_three(sums)
    present = (parts[..., 1] + parts[..., 2] > 0).sum(axis=-1)
    return share(f1(parts).sum(axis=-1), present)


def mcc(sums: np.ndarray) -> np.ndarray:
    """Matthews' coefficient of several classes from their counts alone."""
    parts = by_three(sums)
    right, found, expected = parts[..., 0].sum(axis=-1), parts[..., 1], parts[..., 2]
    rows = found.sum(axis=-1)
    scale = (rows**2 - (found**2).sum(axis=-1)) * (rows**2 - (expected**2).sum(axis=-1))
    return share(right * rows - (found * expected).sum(axis=-1), np.sqrt(scale))


def r2(sums: np.ndarray) -> np.ndarray:
    errors, rows, values, squares = np.moveaxis(sums, -1, 0)
    return np.asarray(1 - share(errors, squares - values**2 / rows))


# ---- rows with classes, numbers or choices ---------------------------------------------------------------------


def config_changes(target: Target, processor: Any) -> dict[str, Any]:
    """Head size and label names as a model's config has them, and, for decoders that label texts, the padding token
    that finds the last real one; nothing where the head has one size only."""
    form, labels = target.form, target.labels or ("value",)
    if not (target.labels or form.is_number):
        return {}
    found: dict[str, Any] = {
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {name: position for position, name in enumerate(labels)},
    }
    if not form.tags_words:
        kind = "multi_label_classification" if form.several_labels else "single_label_classification"
        found["problem_type"] = "regression" if form.is_number else kind
        found |= {"pad_token_id": processor.pad_token_id} if hasattr(processor, "get_vocab") else {}
    return found


def label_words(value: Any, target: Target) -> str:
    """A label value in words."""
    if target.form.is_number:
        return f"{float(value):g}"
    if not target.form.several_labels:
        return target.labels[int(value)] if target.labels else f"({int(value)})"
    chosen = [name for name, present in zip(target.labels, value, strict=True) if present >= 0.5]
    return ", ".join(chosen) or "(none)"


def loss(
    logits: Tensor,
    labels: Tensor,
    target: Target,
    smoothing: float = 0.0,
    class_weights: Sequence[float] | None = None,
) -> Tensor:
    """`row_losses`, summed: a scalar."""
    return row_losses(logits, labels, target, smoothing, class_weights).sum()


def row_losses(
    logits: Tensor,
    labels: Tensor,
    target: Target,
    smoothing: float = 0.0,
    class_weights: Sequence[float] | None = None,
) -> Tensor:
    """Cross entropy, binary cross entropy averaged over labels, or squared error: [batch].

    The error of a number is in units of the train rows' standard deviation, where that is known, whatever the logits'
    own units are: 1 is what the mean of the train rows gets. `logits[batch, classes]`, of a number `logits[batch, 1]`;
    `labels[batch]` are classes or numbers, of several labels 0 or 1, `labels[batch, classes]`.
    """
    import torch.nn.functional as F

    logits = logits.float()
    weights = None if class_weights is None else logits.new_tensor(list(class_weights))
    if target.form.is_number:
        shift, factor = target.logit_scale
        expected = ((labels.double() - shift) / factor).float()  # in the logits' units: near 1e8 fp32 has no ones
        unit = target.scale[1] if target.scale else 1.0
        return ((logits.squeeze(-1) - expected) * (factor / unit)).square()
    if target.form.several_labels:
        soft = labels * (1 - smoothing) + smoothing / 2
        return F.binary_cross_entropy_with_logits(logits, soft, pos_weight=weights, reduction="none").mean(dim=-1)
    return F.cross_entropy(logits, labels, weight=weights, label_smoothing=smoothing, reduction="none")


def count_items(labels: Tensor) -> int:
    """Rows of `labels[batch, ...]`."""
    return labels.shape[0]


def reduce(logits: Tensor, labels: Tensor, target: Target) -> dict[str, Tensor]:
    """Keep `logits[batch, classes]` as float32, of numbers in the user's units, `labels` and the plain `loss[batch]`:
    small whatever the length."""
    kept = logits.float()
    if target.form.is_number:
        shift, factor = target.logit_scale
        kept = (factor * logits.double() + shift).float()
    return {"logits": kept, "labels": labels, "loss": row_losses(logits, labels, target)}


def metrics(kept: Predictions, target: Target) -> dict[str, float]:
    """`label_metrics` of the predicted labels, and the loss."""
    values = label_metrics(kept["labels"], predict_labels(kept["logits"], target), target)
    return values | ({"loss": float(np.mean(kept["loss"]))} if "loss" in kept else {})


def label_metrics(true: np.ndarray, predicted: np.ndarray, target: Target) -> dict[str, float]:
    """The metrics that need only labels, class ids [rows], a 0/1 matrix [rows, labels] or numbers [rows]: with
    scikit-learn's values, from counts at a hundredth of its time, as a bootstrap computes them a thousand times."""
    form = target.form
    if form.is_number:
        both = true.astype(np.float64), predicted.astype(np.float64)
        return {name: metric(*both) for name, metric in NUMBER_METRICS.items()}
    if form.several_labels:
        counts = numbers((true * predicted).sum(axis=0), predicted.sum(axis=0), true.sum(axis=0))
        return {
            "f1_micro": float(f1(counts.sum(axis=0))),
            "f1_macro": float(f1_of_all(counts.ravel())),
            "accuracy": float((true == predicted).all(axis=1).mean()),
        }
    if not form.one_label:
        return {"accuracy": float(np.mean(true == predicted))}
    classes = int(max(true.max(), predicted.max())) + 1
    counts = numbers(*(np.bincount(ids, minlength=classes) for ids in (true[true == predicted], predicted, true)))
    return {
        "accuracy": float(counts[:, 0].sum() / len(true)),
        "f1_macro": float(f1_of_present(counts.ravel())),
        "mcc": float(mcc(counts.ravel())),
    }


def _r2(true: np.ndarray, predicted: np.ndarray) -> float:
    """As scikit-learn has it: where all targets are equal, 1 for the right answer and 0 for any other."""
    if len(true) < 2:
        return math.nan
    error, spread = ((true - predicted) ** 2).sum(), ((true - true.mean()) ** 2).sum()
    return float(1 - error / spread) if spread > 0 else float(error == 0)


def _correlation(name: str, true: np.ndarray, predicted: np.ndarray) -> float:
    """A rank correlation of scipy's; of a constant prediction 0."""
    from scipy import stats

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a constant prediction
        found = float(getattr(stats, name)(true, predicted).statistic)
    return found if math.isfinite(found) else 0.0


NUMBER_METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "r2": _r2,
    "spearman": partial(_correlation, "spearmanr"),
    "kendall": partial(_correlation, "kendalltau"),
    "rmse": lambda true, predicted: math.sqrt(((true - predicted) ** 2).mean()),
}
"""Of targets and predictions, float64 [rows]. A constant prediction has no rank correlation: it counts as 0."""


def predict_labels(logits: np.ndarray, target: Target) -> np.ndarray:
    """Class ids [rows], a 0/1 matrix [rows, labels], or numbers [rows], from `logits[rows, classes]`."""
    if target.form.is_number:
        return logits[:, 0]
    return (logits > 0).astype(np.int64) if target.form.several_labels else logits.argmax(axis=-1)


def worst(kept: Predictions, texts: Sequence[str], target: Target, count: int) -> Iterable[Answer]:
    """The wrong rows (regression: all rows) with the highest loss."""
    predicted, true = predict_labels(kept["logits"], target), kept["labels"]
    differs: Any = np.ones(len(true), bool) if target.form.is_number else np.asarray(predicted != true)
    wrong = differs.any(axis=-1) if differs.ndim > 1 else differs
    order = [position for position in np.argsort(-kept["loss"], kind="stable") if wrong[position]]
    for position in order[:count]:
        yield Answer(
            text=texts[position],
            expected=label_words(true[position], target),
            predicted=label_words(predicted[position], target),
            loss=float(kept["loss"][position]),
        )


def answers(
    kept: Predictions, rows: Sequence[Row], encoded: Encoded, target: Target, temperature: float
) -> list[dict[str, Any]]:
    """`label`, `probability` and `probabilities` by label; or `labels` and `probabilities`; or `value`."""
    if target.form.is_number:
        return [{"value": value} for value in kept["logits"][:, 0].tolist()]
    labels = target.labels
    if target.form.several_labels:
        from scipy.special import expit

        return [
            {
                "labels": [name for name, chance in zip(labels, chances, strict=True) if chance > 0.5],
                "probabilities": dict(zip(labels, chances, strict=True)),
            }
            for chances in expit(kept["logits"].astype(np.float64)).tolist()
        ]
    return [
        {"label": labels[best], "probability": chances[best], "probabilities": dict(zip(labels, chances, strict=True))}
        for best, chances in calibrated(kept["logits"], temperature)
    ]


def calibrated(logits: np.ndarray, temperature: float) -> Iterable[tuple[int, list[float]]]:
    """For each row of `logits[rows, classes]` the most probable class, and the probabilities of all."""
    from scipy.special import softmax

    chances = softmax(logits.astype(np.float64) / temperature, axis=-1)
    return zip(logits.argmax(axis=-1).tolist(), chances.tolist(), strict=True)


def with_label(row: Mapping[str, Any], target: Target) -> dict[str, Any]:
    """A row whose label is not known, with some label: checks and tokenising ask for one, no answer depends on it."""
    some: Any = 0.0 if target.form.is_number else [] if target.form.several_labels else target.labels[0]
    return {**row, target.columns["label"]: some}


# ---- metrics as sums over rows ---------------------------------------------------------------------------------


def _right_classes(kept: Predictions, target: Target) -> np.ndarray:
    same = predict_labels(kept["logits"], target) == kept["labels"]
    return np.asarray(same.all(axis=-1) if same.ndim > 1 else same)


def _matches(kept: Predictions, target: Target) -> np.ndarray:
    """Right, found and expected of each class: 0 or 1, [rows, classes, 3]."""
    predicted, true = predict_labels(kept["logits"], target), kept["labels"]
    if target.form.several_labels:
        found, expected = predicted > 0, true > 0
    else:
        classes = np.arange(kept["logits"].shape[1])
        found, expected = predicted[:, None] == classes, true[:, None] == classes
    return numbers(found & expected, found, expected)


def _squares(kept: Predictions) -> np.ndarray:
    """Of numbers: squared errors, 1, targets and their squares: [rows, 4]."""
    true, predicted = (np.asarray(values, np.float64) for values in (kept["labels"], kept["logits"][:, 0]))
    # The mean of all rows is taken off first: a sum of squares far from 0 would lose its digits.
    centred = true - true.mean()
    return numbers((true - predicted) ** 2, np.ones(len(true)), centred, centred**2)


def sums(target: Target, metric: str) -> dict[str, tuple[Count, Value]]:
    """Of rows with a class, several, or a number."""
    loss: dict[str, tuple[Count, Value]] = {"loss": (arrays("loss", ROWS), ratio)}
    if target.form.is_number:
        return loss | {"r2": (_squares, r2), "rmse": (_squares, lambda sums: np.sqrt(ratio(sums)))}
    right, several = partial(_right_classes, target=target), target.form.several_labels
    found = loss | {
        "accuracy": (mean_of(right), ratio),
        "f1_macro": (lambda kept: flat(_matches(kept, target)), f1_of_all if several else f1_of_present),
    }
    if several:
        return found | {"f1_micro": (lambda kept: _matches(kept, target).sum(axis=1), f1)}
    return found | {"mcc": (lambda kept: flat(_matches(kept, target)), mcc)}


# ---- guessing --------------------------------------------------------------------------------------------------


def chance_loss(summary: DataSummary, weights: Sequence[float] | None) -> float:
    """The loss of logits that are all the same; of numbers that of the train rows' mean."""
    if summary.form.is_number:
        return 1.0
    if summary.num_choices:
        return math.log(summary.num_choices)
    guess, train = math.log(2 if summary.form.several_labels else max(2, len(summary.labels))), summary.splits["train"]
    if weights is None:
        return guess
    counts = [train.label_counts.get(label, 0) for label in summary.labels]
    if summary.form.one_label:
        return guess * sum(map(math.prod, zip(weights, counts, strict=True))) / sum(counts)
    shares = [count / train.rows for count in counts]
    return guess * statistics.fmean(1 + (weight - 1) * share for weight, share in zip(weights, shares, strict=True))


def full_row(target: Target, length: int) -> dict[str, Any]:
    """A row of so many tokens, of the first class, all labels, or the number 1."""
    several = np.ones(len(target.labels), np.float32) if target.form.several_labels else 0
    return {"input_ids": np.ones(length, np.int64), "labels": 1.0 if target.form.is_number else several}
