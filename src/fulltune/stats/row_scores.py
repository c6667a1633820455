"""A metric as sums over rows: what a bootstrap can resample by the thousand without computing it anew each time.

Nearly every metric of the tasks is a function of sums over rows (right ones, losses, entities). A `Measure` says which
numbers a row contributes and how their sums become the metric, with the same value as the task's `metrics`. Rank
correlations and BLEU are no such functions; for them there is only `whole`, the task's `metrics` itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fulltune.errors import SetupError
from fulltune.recipe.tasks import TaskName, greater_is_better
from fulltune.tasks import Predictions, Target, question_answering, task_named
from fulltune.tasks.classes import NUMBER_METRICS, predict_labels

Count = Callable[[Predictions], np.ndarray]
"""From what `reduce` kept to what each row contributes: float64 [rows, k]."""
Value = Callable[[np.ndarray], np.ndarray]
"""From sums [..., k] to the metric [...]."""
_MEANS = ("exact_match", "rougeL", "chrf")
_BOUNDS = {
    **dict.fromkeys(("loss", "perplexity", "rmse", "r2")),
    **dict.fromkeys(("mcc", "spearman", "kendall"), (-1.0, 1.0)),
    **dict.fromkeys(("chrf", "bleu"), (0.0, 100.0)),
}
"""Of metrics that may leave 0 to 1; None: without a bound on one side."""


@dataclass(frozen=True)
class Measure:
    """A metric, ready to be resampled."""

    name: str
    greater_is_better: bool
    whole: Callable[[Predictions], float]
    """The metric by the task itself."""
    counts: Count | None
    """None: the metric is no function of sums, and has to be computed anew for each resample."""
    value: Value | None
    bounds: tuple[float, float] | None
    """Least and most; None: without."""

    @property
    def span(self) -> float | None:
        """How much the metric can differ at most; None: without bound."""
        return None if self.bounds is None else self.bounds[1] - self.bounds[0]

    @property
    def sign(self) -> float:
        """Turns a difference so that positive is better."""
        return 1.0 if self.greater_is_better else -1.0


def measure_of(task_name: TaskName, target: Target, metric: str) -> Measure:
    """How a metric of a task is resampled.

    Raises:
        SetupError: When the task has no such metric.
    """
    task = task_named(task_name)
    if metric not in task.FACTS.metrics:
        raise SetupError(f"{task_name} has no metric '{metric}'; choose one of {', '.join(task.FACTS.metrics)}")
    sums = _sums(task_name, target, metric)
    return Measure(
        name=metric,
        greater_is_better=greater_is_better(metric),
        whole=_alone(task_name, target, metric),
        counts=sums[0] if sums else None,
        value=sums[1] if sums else None,
        bounds=_BOUNDS.get(metric, (0.0, 1.0)),
    )


def _alone(task_name: TaskName, target: Target, metric: str) -> Callable[[Predictions], float]:
    """The metric by the task; of numbers without the others, since Kendall's takes long."""
    if target.problem_type == "regression" and metric in NUMBER_METRICS:
        return lambda kept: NUMBER_METRICS[metric](
            kept["labels"].astype(np.float64), predict_labels(kept["logits"], target).astype(np.float64)
        )
    return lambda kept: task_named(task_name).metrics(kept, target)[metric]


def _sums(task_name: TaskName, target: Target, metric: str) -> tuple[Count, Value] | None:
    match task_name:
        case "text-classification" | "image-classification":
            return _classes(target, metric)
        case "multiple-choice":
            return _choices(metric)
        case "token-classification":
            return _entities(metric)
        case "question-answering":
            return _spans(metric)
        case "causal-lm" | "seq2seq":
            return _tokens(metric)


def right_rows(task_name: TaskName, target: Target, kept: Predictions) -> np.ndarray | None:
    """Whether each row is wholly right: bool [rows]; None where rows of the task are not simply right or wrong."""
    match task_name:
        case "text-classification" | "image-classification" if target.problem_type != "regression":
            return _right_classes(target, kept)
        case "multiple-choice":
            return np.asarray(kept["logits"].argmax(axis=-1) == kept["labels"])
        case "token-classification":
            right, found, expected = np.moveaxis(kept["entities"].sum(axis=1), -1, 0)
            return np.asarray((right == found) & (right == expected))
        case "question-answering":
            return question_answering.row_scores(kept)["exact_match"] == 1
        case _:
            return kept["exact_match"] == 1 if "exact_match" in kept else None


def _right_classes(target: Target, kept: Predictions) -> np.ndarray:
    same = predict_labels(kept["logits"], target) == kept["labels"]
    return np.asarray(same.all(axis=-1) if same.ndim > 1 else same)


# ---- ratios ----------------------------------------------------------------------------------------------------


def _columns(*columns: np.ndarray) -> np.ndarray:
    return np.stack([np.asarray(column, np.float64) for column in columns], axis=-1)


def _ratio(sums: np.ndarray) -> np.ndarray:
    """First sum by the second; nothing of nothing is 0."""
    return _share(sums[..., 0], sums[..., 1])


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.zeros(np.broadcast(part, whole).shape), where=whole != 0)


def _f1(sums: np.ndarray) -> np.ndarray:
    """Of right, found and expected ones."""
    return _share(2 * sums[..., 0], sums[..., 1] + sums[..., 2])


def _mean(name: str) -> tuple[Count, Value]:
    return lambda kept: _columns(kept[name], np.ones(len(kept[name]))), _ratio


def _mean_of(score: Callable[[Predictions], np.ndarray]) -> tuple[Count, Value]:
    def count(kept: Predictions) -> np.ndarray:
        values = score(kept)
        return _columns(values, np.ones(len(values)))

    return count, _ratio


# ---- classes and numbers ---------------------------------------------------------------------------------------


def _classes(target: Target, metric: str) -> tuple[Count, Value] | None:
    if metric == "loss":
        return _mean("loss")
    match target.problem_type, metric:
        case "regression", _:
            return _numbers(metric)
        case "multi_label", "f1_micro":
            return lambda kept: _matches(kept, target).sum(axis=1), _f1
        case "multi_label", "f1_macro":
            return lambda kept: _flat(_matches(kept, target)), lambda sums: _f1(_by_three(sums)).mean(axis=-1)
        case _, "f1_macro":
            return lambda kept: _flat(_matches(kept, target)), _f1_of_present
        case _, "mcc":
            return lambda kept: _flat(_matches(kept, target)), _mcc
        case _, "accuracy":
            return _mean_of(lambda kept: _right_classes(target, kept).astype(float))
    return None


def _matches(kept: Predictions, target: Target) -> np.ndarray:
    """Right, found and expected of each class: 0 or 1, [rows, classes, 3]."""
    predicted, true = predict_labels(kept["logits"], target), kept["labels"]
    if target.problem_type == "multi_label":
        found, expected = predicted > 0, true > 0
    else:
        classes = np.arange(kept["logits"].shape[1])
        found, expected = predicted[:, None] == classes, true[:, None] == classes
    return _columns(found & expected, found, expected)


def _flat(matches: np.ndarray) -> np.ndarray:
    return matches.reshape(len(matches), -1)


def _by_three(sums: np.ndarray) -> np.ndarray:
    return sums.reshape(*sums.shape[:-1], -1, 3)


def _f1_of_present(sums: np.ndarray) -> np.ndarray:
    """Mean over the classes that were found or expected, as scikit-learn takes it."""
    parts = _by_three(sums)
    present = (parts[..., 1] + parts[..., 2] > 0).sum(axis=-1)
    return _share(_f1(parts).sum(axis=-1), present)


def _mcc(sums: np.ndarray) -> np.ndarray:
    """Matthews' coefficient of several classes from their counts alone."""
    parts = _by_three(sums)
    right, found, expected = parts[..., 0].sum(axis=-1), parts[..., 1], parts[..., 2]
    rows = found.sum(axis=-1)
    scale = (rows**2 - (found**2).sum(axis=-1)) * (rows**2 - (expected**2).sum(axis=-1))
    return _share(right * rows - (found * expected).sum(axis=-1), np.sqrt(scale))


def _numbers(metric: str) -> tuple[Count, Value] | None:
    def count(kept: Predictions) -> np.ndarray:
        true, predicted = (np.asarray(values, np.float64) for values in (kept["labels"], kept["logits"][:, 0]))
        # The mean of all rows is taken off first: a sum of squares far from 0 would lose its digits.
        centred = true - true.mean()
        return _columns((true - predicted) ** 2, np.ones(len(true)), centred, centred**2)

    def r2(sums: np.ndarray) -> np.ndarray:
        errors, rows, values, squares = np.moveaxis(sums, -1, 0)
        return 1 - _share(errors, squares - values**2 / rows)

    match metric:
        case "r2":
            return count, r2
        case "rmse":
            return count, lambda sums: np.sqrt(_ratio(sums))
    return None


def _choices(metric: str) -> tuple[Count, Value] | None:
    if metric == "loss":
        return _mean("loss")
    return _mean_of(lambda kept: (kept["logits"].argmax(axis=-1) == kept["labels"]).astype(float))


# ---- words, spans, tokens --------------------------------------------------------------------------------------


def _entities(metric: str) -> tuple[Count, Value] | None:
    def over_types(kept: Predictions) -> np.ndarray:
        return np.asarray(kept["entities"].sum(axis=1), np.float64)

    match metric:
        case "f1":
            return over_types, _f1
        case "precision":
            return over_types, lambda sums: _share(sums[..., 0], sums[..., 1])
        case "recall":
            return over_types, lambda sums: _share(sums[..., 0], sums[..., 2])
        case "f1_macro":
            return lambda kept: _flat(np.asarray(kept["entities"], np.float64)), _f1_of_present
        case "accuracy":
            return lambda kept: _columns(kept["right"], kept["words"]), _ratio
        case "loss":
            return lambda kept: _columns(kept["nll"], kept["seen"]), _ratio
    return None


def _spans(metric: str) -> tuple[Count, Value] | None:
    return _mean_of(lambda kept: question_answering.row_scores(kept)[metric])


def _tokens(metric: str) -> tuple[Count, Value] | None:
    match metric:
        case "loss":
            return lambda kept: _columns(kept["nll"], kept["tokens"]), _per_token
        case "perplexity":
            return (
                lambda kept: _columns(kept["nll"], kept["tokens"]),
                lambda sums: np.exp(np.minimum(_per_token(sums), 700.0)),
            )
        case "token_accuracy":
            return lambda kept: _columns(kept["right"], kept["tokens"]), _per_token
        case _ if metric in _MEANS:
            return _mean(metric)
    return None


def _per_token(sums: np.ndarray) -> np.ndarray:
    return sums[..., 0] / np.maximum(sums[..., 1], 1.0)
