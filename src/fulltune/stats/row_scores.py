"""A metric as sums over rows: what a bootstrap can resample by the thousand without computing it anew each time.

Nearly every metric of the tasks is a function of sums over rows (right ones, losses, entities). A `Measure` says which
numbers a row contributes and how their sums become the metric, with the same value as the task's `metrics`. Rank
correlations and BLEU are no such functions; for them there is only `whole`, the task's `metrics` itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from fulltune.errors import SetupError
from fulltune.recipe.tasks import FACTS, TaskName, greater_is_better
from fulltune.tasks import Predictions, Target, question_answering, task_named
from fulltune.tasks.classes import NUMBER_METRICS, predict_labels

Count = Callable[[Predictions], np.ndarray]
"""From what `reduce` kept to what each row contributes: float64 [rows, k]."""
Value = Callable[[np.ndarray], np.ndarray]
"""From sums [..., k] to the metric [...]."""
_ROWS = ""
"""In place of an array's name: 1 for each row."""
_BOUNDS = {
    **dict.fromkeys(("loss", "perplexity", "rmse", "r2")),
    **dict.fromkeys(("mcc", "spearman", "kendall"), (-1.0, 1.0)),
    **dict.fromkeys(("chrf", "bleu"), (0.0, 100.0)),
}
"""Of metrics that may leave 0 to 1."""


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

    @property
    def bounds(self) -> tuple[float, float] | None:
        """Least and most; None: without a bound on one side."""
        return bounds_of(self.name)

    @property
    def span(self) -> float | None:
        """How much the metric can differ at most; None: without bound."""
        return None if self.bounds is None else self.bounds[1] - self.bounds[0]

    @property
    def sign(self) -> float:
        """Turns a difference so that positive is better."""
        return 1.0 if self.greater_is_better else -1.0


def bounds_of(metric: str) -> tuple[float, float] | None:
    """The least and the most that a metric can be; None: without a bound on one side."""
    return _BOUNDS.get(metric, (0.0, 1.0))


def measure_of(task_name: TaskName, target: Target, metric: str) -> Measure:
    """How a metric of a task is resampled.

    Raises:
        SetupError: When the task has no such metric.
    """
    facts = FACTS[task_name]
    if metric not in facts.metrics:
        raise SetupError(f"{task_name} has no metric '{metric}'; choose one of {', '.join(facts.metrics)}")
    counts, value = _sums(task_name, target, metric).get(metric, (None, None))
    return Measure(metric, greater_is_better(metric), _alone(task_name, target, metric), counts, value)


def _alone(task_name: TaskName, target: Target, metric: str) -> Callable[[Predictions], float]:
    """The metric by the task; of numbers without the others, since Kendall's takes long."""
    if target.problem_type == "regression" and metric in NUMBER_METRICS:
        return lambda kept: NUMBER_METRICS[metric](
            kept["labels"].astype(np.float64), predict_labels(kept["logits"], target).astype(np.float64)
        )
    return lambda kept: task_named(task_name).metrics(kept, target)[metric]


def _sums(task_name: TaskName, target: Target, metric: str) -> dict[str, tuple[Count, Value]]:
    """Of the task's metrics those that are functions of sums: what a row contributes, and what is made of the sums."""
    match task_name:
        case "text-classification" | "image-classification" | "multiple-choice":
            return _classes(target)
        case "token-classification":
            return {
                "f1": (_entities, _f1),
                "precision": (_entities, lambda sums: _share(sums[..., 0], sums[..., 1])),
                "recall": (_entities, lambda sums: _share(sums[..., 0], sums[..., 2])),
                "f1_macro": (lambda kept: _flat(np.asarray(kept["entities"], np.float64)), _f1_of_present),
                "accuracy": (_arrays("right", "words"), _ratio),
                "loss": (_arrays("nll", "seen"), _ratio),
            }
        case "question-answering":
            return {metric: (_mean_of(lambda kept: question_answering.row_scores(kept)[metric]), _ratio)}
        case "causal-lm" | "seq2seq":
            return {
                "loss": (_arrays("nll", "tokens"), _per_token),
                "perplexity": (_arrays("nll", "tokens"), lambda sums: np.exp(np.minimum(_per_token(sums), 700.0))),
                "token_accuracy": (_arrays("right", "tokens"), _per_token),
                **{name: (_arrays(name, _ROWS), _ratio) for name in ("exact_match", "rougeL", "chrf")},
            }


# ---- what a row contributes ------------------------------------------------------------------------------------


def _columns(*columns: np.ndarray) -> np.ndarray:
    return np.stack([np.asarray(column, np.float64) for column in columns], axis=-1)


def _arrays(*names: str) -> Count:
    """What `reduce` kept under these names."""
    return lambda kept: _columns(*(kept[name] if name else np.ones(len(kept[names[0]])) for name in names))


def _mean_of(score: Callable[[Predictions], np.ndarray]) -> Count:
    """A number of each row, and 1."""

    def count(kept: Predictions) -> np.ndarray:
        values = score(kept)
        return _columns(values, np.ones(len(values)))

    return count


def _entities(kept: Predictions) -> np.ndarray:
    """Right, found and expected entities of all types: [rows, 3]."""
    return np.asarray(kept["entities"].sum(axis=1), np.float64)


def _right_classes(kept: Predictions, target: Target) -> np.ndarray:
    same = predict_labels(kept["logits"], target) == kept["labels"]
    return np.asarray(same.all(axis=-1) if same.ndim > 1 else same)


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


def _squares(kept: Predictions) -> np.ndarray:
    """Of numbers: squared errors, 1, targets and their squares: [rows, 4]."""
    true, predicted = (np.asarray(values, np.float64) for values in (kept["labels"], kept["logits"][:, 0]))
    # The mean of all rows is taken off first: a sum of squares far from 0 would lose its digits.
    centred = true - true.mean()
    return _columns((true - predicted) ** 2, np.ones(len(true)), centred, centred**2)


def _classes(target: Target) -> dict[str, tuple[Count, Value]]:
    """Of rows with a class, several, or a number."""
    loss: dict[str, tuple[Count, Value]] = {"loss": (_arrays("loss", _ROWS), _ratio)}
    if target.problem_type == "regression":
        return loss | {"r2": (_squares, _r2), "rmse": (_squares, lambda sums: np.sqrt(_ratio(sums)))}
    right, several = partial(_right_classes, target=target), target.problem_type == "multi_label"
    found = loss | {
        "accuracy": (_mean_of(right), _ratio),
        "f1_macro": (lambda kept: _flat(_matches(kept, target)), _f1_of_all if several else _f1_of_present),
    }
    if several:
        return found | {"f1_micro": (lambda kept: _matches(kept, target).sum(axis=1), _f1)}
    return found | {"mcc": (lambda kept: _flat(_matches(kept, target)), _mcc)}


# ---- what is made of the sums ----------------------------------------------------------------------------------


def _ratio(sums: np.ndarray) -> np.ndarray:
    """First sum by the second; nothing of nothing is 0."""
    return _share(sums[..., 0], sums[..., 1])


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.zeros(np.broadcast(part, whole).shape), where=whole != 0)


def _per_token(sums: np.ndarray) -> np.ndarray:
    return sums[..., 0] / np.maximum(sums[..., 1], 1.0)


def _f1(sums: np.ndarray) -> np.ndarray:
    """Of right, found and expected ones."""
    return _share(2 * sums[..., 0], sums[..., 1] + sums[..., 2])


def _by_three(sums: np.ndarray) -> np.ndarray:
    return sums.reshape(*sums.shape[:-1], -1, 3)


def _f1_of_all(sums: np.ndarray) -> np.ndarray:
    return np.asarray(_f1(_by_three(sums)).mean(axis=-1))


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


def _r2(sums: np.ndarray) -> np.ndarray:
    errors, rows, values, squares = np.moveaxis(sums, -1, 0)
    return np.asarray(1 - _share(errors, squares - values**2 / rows))
