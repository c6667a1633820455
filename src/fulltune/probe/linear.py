from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, TypeVar, cast

import numpy as np
from scipy.special import softmax

from fulltune.recipe.tasks import ProblemType
from fulltune.records.probe import MOST_SOLVER_BYTES, solver_bytes

Key = TypeVar("Key", bound=Hashable)
SpaceName = TypeVar("SpaceName", bound=Hashable)
Result = TypeVar("Result", bound=tuple[Any, ...])
FOLDS = 5
STRENGTHS = (1.0, 4.0, 16.0, 64.0, 256.0)
"""Regularisation strengths: scikit-learn's C times the number of features."""
FEWER_ROWS = (1 / 16, 1 / 4)
"""Further strengths for pairs, whose cosine alone may be the best that few rows can give."""
MIDDLE, RIDGE = 16.0, 4.0
COSINE_SCALE = 30.0
"""Factor of a pair's cosine, which is hardly regularised then. With 30 instead of 1, 180 rows of pairs ranked by a
number gave a spearman of 0.74 instead of 0.70, as the untouched cosine did (2026-11-30)."""
LEAST_SPREAD = 0.1
MOST_COMPARED = 4_000
MOST_STEPS, TOLERANCE = 300, 3e-4
"""Limits of the solver. Three times the tolerance gave 5 % more errors (2026-11-26)."""
_MANY_MULTIPLICATIONS = 10**9
"""Number of multiplications above which several threads are faster (about 0.2 s in one thread)."""
_LEAST_CHANCE = 1e-4
"""Lower limit of a probability, so that one unseen class does not dominate the loss."""


class NoProbe(Exception):
    """Raised if no probe can be fitted. The head then starts with random weights."""


@dataclass(frozen=True)
class LinearClassifier:
    """A linear function with `weight` [outputs, hidden] and `bias` [outputs]."""

    weight: np.ndarray
    bias: np.ndarray

    def __call__(self, features: np.ndarray) -> np.ndarray:
        return features @ self.weight.T + self.bias


@dataclass(frozen=True)
class Items:
    """Items with features, labels and row numbers, on which a classifier is fitted or evaluated."""

    kind: ProblemType
    features: np.ndarray
    labels: np.ndarray
    rows: np.ndarray
    """Index of each item's row. Only one of a row's choices or tokens is right."""
    num_outputs: int
    class_weights: Sequence[float] | None = None
    is_pair: bool = False
    """True if the last quarter of the features is the product of two vectors, whose sum is their cosine."""

    def select(self, mask: np.ndarray) -> Items:
        return replace(self, features=self.features[mask], labels=self.labels[mask], rows=self.rows[mask])

    def sample(self, max_items: int) -> Items:
        """Draw whole rows at random, with about `max_items` items in total."""
        if len(self.rows) <= max_items:
            return self
        rows = np.unique(self.rows)
        count = max(1, len(rows) * max_items // len(self.rows))
        return self.select(np.isin(self.rows, np.random.default_rng(0).choice(rows, count, replace=False)))


def fit_at_strengths(
    items: Items, has_bias: bool = True, strengths: Sequence[float] | None = None
) -> Iterator[tuple[float, LinearClassifier]]:
    """Yield (regularisation strength, fitted classifier) pairs. Raise `NoProbe` if none can be fitted. A pair's cosine
    is fitted as a feature of its own, and its weight is then added to those of the product."""
    count, width = items.features.shape
    if solver_bytes(items.kind, count, items.num_outputs, width) > MOST_SOLVER_BYTES:
        raise NoProbe(f"{items.num_outputs:,} classes with {width:,} features each are too many to fit")
    features, product = items.features, slice(width - width // 4, width)
    if items.is_pair:
        features = np.hstack([features, features[:, product].sum(axis=1, keepdims=True)])
    shift, scale = shift_and_scale(features, has_bias and items.kind not in ("choice", "span"))
    scale[width:] *= COSINE_SCALE
    strengths = strengths or ((*FEWER_ROWS, *STRENGTHS) if items.is_pair else STRENGTHS)
    with warnings.catch_warnings(action="ignore"):  # the solver may stop early, but held-out rows judge the result
        features = ((features - shift) * scale).astype(np.float32)
        for strength, classifier in _fit_by_form(items, features, has_bias, strengths):
            weight = classifier.weight * scale
            bias = classifier.bias - weight @ shift
            weight[:, product] += weight[:, width:].sum(axis=1, keepdims=True)
            yield strength, LinearClassifier(weight[:, :width].astype(np.float32), bias.astype(np.float32))


def shift_and_scale(features: np.ndarray, centred: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return each feature's shift (0 unless `centred`) and scale.

    Nearly constant features are not fully scaled up, because the first training steps would spoil a classifier that
    relies on them.
    """
    centre = features.mean(axis=0, dtype=np.float64) if centred else np.zeros(features.shape[1])
    variance = ((features - centre) ** 2).mean(axis=0)
    size = np.median((features.astype(np.float64) ** 2).mean(axis=0))  # the mean would follow a few large features
    return centre, 1.0 / np.sqrt(np.maximum(variance, max(LEAST_SPREAD**2 * size, 1e-30)))


def _fit_by_form(
    items: Items, features: np.ndarray, has_bias: bool, strengths: Sequence[float]
) -> Iterator[tuple[float, LinearClassifier]]:
    """Yield each regularisation strength with a classifier that suits the problem type."""
    match items.kind:
        case "regression":
            yield from _fit_ridge(features, items.labels, has_bias, strengths)
        case "multi_label" | "relevance":
            yield from _fit_each_label(items, features, has_bias, strengths)
        case "choice" | "span":
            yield from _fit_within_rows(items, features, strengths)
        case _:
            yield from _fit_logistic(
                features, items.labels, items.num_outputs, strengths, items.class_weights, has_bias
            )


def _fit_logistic(
    features: np.ndarray,
    labels: np.ndarray,
    num_outputs: int,
    strengths: Sequence[float],
    class_weights: Sequence[float] | None = None,
    has_bias: bool = False,
) -> Iterator[tuple[float, LinearClassifier]]:
    """Yield (strength, logistic regression) pairs. Classes that do not occur get zero weights."""
    from sklearn.linear_model import LogisticRegression

    present = np.unique(labels)
    if len(present) < 2:
        raise NoProbe("all train rows have the same class")
    weights = None if class_weights is None else {int(label): class_weights[label] for label in present}
    if weights is not None and not any(weights.values()):
        raise NoProbe("all train rows have a class whose weight in train.class_weights is 0")
    model = LogisticRegression(
        max_iter=MOST_STEPS, tol=TOLERANCE, warm_start=True, fit_intercept=has_bias, class_weight=weights
    )
    for strength in strengths:
        model.C = strength / features.shape[1]
        with _limit_threads(features.size * num_outputs):
            model.fit(features, labels)
        weight, bias = model.coef_, np.broadcast_to(model.intercept_, len(model.coef_))
        if len(present) == 2:  # `coef_` has one row: the second class against the first
            weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
        all_bias = np.full(num_outputs, bias.min() - 1 if has_bias else 0.0)
        classifier = LinearClassifier(np.zeros((num_outputs, features.shape[1])), all_bias)
        classifier.weight[present], classifier.bias[present] = weight, bias
        yield strength, classifier


def _limit_threads(multiplications: int) -> contextlib.AbstractContextManager[object]:
    """Limit small matrix products to one thread, because two threads took 2.4 to 30 times as long."""
    if multiplications > _MANY_MULTIPLICATIONS:
        return contextlib.nullcontext()
    return cast("contextlib.AbstractContextManager[object]", _thread_pools().limit(limits=1))


@cache
def _thread_pools() -> Any:
    """Return threadpoolctl's controller, cached because finding thread pools is slow."""
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()


def _fit_each_label(
    items: Items, features: np.ndarray, has_bias: bool, strengths: Sequence[float]
) -> Iterator[tuple[float, LinearClassifier]]:
    """Yield (strength, classifier), fitted label by label. Labels of all or no rows get a constant output."""
    labels = items.labels.astype(np.int64)
    varied = [label for label in range(items.num_outputs) if len(np.unique(labels[:, label])) > 1]
    if not varied:
        raise NoProbe("each label is the same in all train rows")
    all_weights = items.class_weights or [1.0] * items.num_outputs
    paths = [
        _fit_logistic(features, labels[:, label], 2, strengths, (1.0, all_weights[label]), has_bias) for label in varied
    ]
    for binaries in zip(*paths, strict=True):
        weight = np.zeros((items.num_outputs, features.shape[1]))
        bias = np.where(labels[0], 2.0, -2.0) * has_bias
        for label, (_, binary) in zip(varied, binaries, strict=True):
            weight[label], bias[label] = 2 * binary.weight[1], 2 * binary.bias[1]
        yield binaries[0][0], LinearClassifier(weight, bias)


def _fit_ridge(
    features: np.ndarray, numbers: np.ndarray, has_bias: bool, strengths: Sequence[float]
) -> Iterator[tuple[float, LinearClassifier]]:
    """Yield (strength, ridge regression) pairs."""
    from sklearn.linear_model import Ridge

    # In float64, as scikit-learn casts numbers to the features' type.
    middle = numbers.mean(dtype=np.float64) if has_bias else 0.0
    for strength in strengths:
        model = Ridge(alpha=len(features) * RIDGE / strength, fit_intercept=has_bias)
        model.fit(features, numbers - middle)
        yield strength, LinearClassifier(model.coef_[None], np.broadcast_to(model.intercept_ + middle, 1))


def _fit_within_rows(
    items: Items, features: np.ndarray, strengths: Sequence[float]
) -> Iterator[tuple[float, LinearClassifier]]:
    """Yield (strength, classifier) pairs. The classifiers have no bias and rank each row's right item first."""
    outputs = [_feature_differences(features, right, items.rows) for right in items.labels.reshape(len(features), -1).T]
    paths = []
    for differences in outputs:
        if not len(differences):
            raise NoProbe("no train row has both a right and a wrong choice")
        signs = np.where(np.arange(len(differences)) % 2, 1, -1)
        paths.append(list(_fit_logistic(differences * signs[:, None], (signs > 0).astype(np.int64), 2, strengths)))
    for binaries in zip(*paths, strict=True):
        weight = np.concatenate([2 * binary.weight[1:] for _, binary in binaries])
        yield binaries[0][0], LinearClassifier(weight, np.zeros(len(weight)))


def _feature_differences(features: np.ndarray, right: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return the features of each row's right item minus those of each wrong one."""
    of_row = dict(zip(rows[right == 1].tolist(), np.flatnonzero(right == 1).tolist(), strict=True))
    wrong = np.array([i for i in np.flatnonzero(right == 0) if int(rows[i]) in of_row], np.int64)
    return features[[of_row[int(rows[i])] for i in wrong]] - features[wrong]


Candidates = Callable[[Items], Iterable[tuple[Key, LinearClassifier]]]
Criterion = Callable[[Items, LinearClassifier], float]


def select_classifier(
    items: Items, held_out: Items | None, candidates: Candidates[Key], criterion: Criterion, tolerance: float = 0.0
) -> tuple[float, Key, LinearClassifier]:
    """Select the candidate with the lowest criterion on held-out rows, fitted on all items. Raise `NoProbe` if none can
    be fitted.

    `candidates` yields keys and fitted classifiers. Without `held_out`, cross-validation decides. An earlier candidate
    wins if its criterion exceeds the lowest by at most `tolerance` (relative). Returns criterion, key and classifier.
    """
    if held_out is not None:
        results = [(criterion(held_out, classifier), key, classifier) for key, classifier in candidates(items)]
        return _first_within_tolerance(results, tolerance)
    _, row = np.unique(items.rows, return_inverse=True)
    if row.max() == 0:
        raise NoProbe("there is only one train row")
    fold = np.random.default_rng(0).permutation(row.max() + 1)[row] % FOLDS
    sums: dict[Key, float] = {}
    measured = 0
    for number in range(min(FOLDS, row.max() + 1)):
        fold_items = items.select(fold == number)
        with contextlib.suppress(NoProbe):  # the other folds may have a single class
            for key, classifier in candidates(items.select(fold != number)):
                sums[key] = sums.get(key, 0.0) + criterion(fold_items, classifier) * len(fold_items.rows)
            measured += len(fold_items.rows)
    if not measured:  # nothing can be compared, so take the most regularised
        key, classifier = next(iter(candidates(items)))
        return criterion(items, classifier), key, classifier
    total, best = _first_within_tolerance([(total, key) for key, total in sums.items()], tolerance)
    return total / measured, best, next(classifier for key, classifier in candidates(items) if key == best)


def _first_within_tolerance(results: Sequence[Result], tolerance: float) -> Result:
    limit = min(result[0] for result in results) * (1 + tolerance)
    return next(result for result in results if result[0] <= limit)


def select_features(
    spaces: Mapping[SpaceName, tuple[Items, Items | None]],
    candidates: Callable[..., Any],
    criterion: Criterion,
    tolerance: float = 0.0,
) -> tuple[SpaceName, float, Any, LinearClassifier]:
    """Select the best features (a key of `spaces`) on a sample of items, then, as `select_classifier` does, the best
    classifier on all items.

    Returns:
        Name of the features, criterion, key and classifier.
    """
    middle = partial(candidates, strengths=(MIDDLE,))
    name = next(iter(spaces))
    if len(spaces) > 1:
        name = min(spaces, key=lambda name: _score_features(*spaces[name], middle, criterion))
    return name, *select_classifier(*spaces[name], candidates, criterion, tolerance)


def _score_features(items: Items, held_out: Items | None, candidates: Candidates[Any], criterion: Criterion) -> float:
    """Return the lowest criterion of classifiers fitted to a sample, or to all items if that lacks a class."""
    with contextlib.suppress(NoProbe):
        return select_classifier(items.sample(MOST_COMPARED), held_out, candidates, criterion)[0]
    return select_classifier(items, held_out, candidates, criterion)[0]


def mean_loss(items: Items, classifier: LinearClassifier) -> float:
    """Return the class-weighted mean cross entropy in nats, or for regression the unexplained variance's share."""
    weights = None if items.class_weights is None else np.asarray(items.class_weights)
    outputs = classifier(items.features).astype(np.float64)
    match items.kind:
        case "regression":
            return float(((outputs[:, 0] - items.labels) ** 2).mean() / max(items.labels.var(), 1e-30))
        case "multi_label" | "relevance":
            losses = np.logaddexp(0, np.where(items.labels > 0.5, -outputs, outputs))
            return float((losses if weights is None else losses * np.where(items.labels > 0.5, weights, 1.0)).mean())
        case "choice" | "span":
            right = items.labels.reshape(len(outputs), -1) == 1
            return float(
                np.mean([_row_losses(outputs[:, i], right[:, i], items.rows).mean() for i in range(outputs.shape[1])])
            )
    chances = softmax(outputs, axis=1)[np.arange(len(outputs)), items.labels]
    losses = -np.log(np.maximum(chances, _LEAST_CHANCE))
    return float(losses.mean() if weights is None else (losses * weights[items.labels]).mean())


def error_rate(items: Items, classifier: LinearClassifier) -> float:
    """Return the share of items (or rows with choices) predicted wrongly, or without classes the mean loss."""
    if items.kind in ("regression", "multi_label", "relevance"):
        return mean_loss(items, classifier)
    outputs = classifier(items.features)
    if items.kind == "choice":
        order = np.lexsort((outputs[:, 0], items.rows))
        last = np.append(items.rows[order][1:] != items.rows[order][:-1], True)
        return float((items.labels[order][last] != 1).mean())
    return float((outputs.argmax(axis=1) != items.labels).mean())


def _row_losses(outputs: np.ndarray, right: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return the cross entropy of choosing each right item among its row's items."""
    _, row = np.unique(rows, return_inverse=True)
    highest = np.full(row.max() + 1, -np.inf)
    np.maximum.at(highest, row, outputs)
    sums = np.bincount(row, np.exp(outputs - highest[row]))
    losses: np.ndarray = (highest + np.log(sums))[row[right]] - outputs[right]
    return losses
