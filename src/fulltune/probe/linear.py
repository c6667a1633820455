"""Linear classifiers on features, by scikit-learn: fitted at several strengths, judged on rows they did not see."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, TypeVar

import numpy as np
from scipy.special import softmax

from fulltune.recipe.tasks import ProblemType
from fulltune.records.probe import MOST_SOLVER_BYTES, solver_bytes

Key = TypeVar("Key", bound=Hashable)
Name = TypeVar("Name", bound=Hashable)
FOLDS = 5
STRENGTHS = (1.0, 4.0, 16.0, 64.0, 256.0)
"""scikit-learn's C times the number of features, which have the spread 1; `RIDGE` over it is a ridge regression's alpha
for each item."""
MIDDLE, RIDGE = 16.0, 4.0
LEAST_SPREAD = 0.1
"""Of a feature, over the size of most features: what varies less is magnified as if it varied so much."""
MOST_COMPARED = 4_000
"""Items on which features are compared with others; the classifier on the best of them is fitted on all."""
MOST_STEPS, TOLERANCE = 300, 3e-4
"""The solver's. A third of this tolerance took twice as long and found nothing better on held-out rows; three times as
much gave a rival with 5 % more errors (2026-11-26)."""
_MANY_MULTIPLICATIONS = 10**9
"""Of a product of all features with all weights: one thread takes about a second for five."""
_LEAST_CHANCE = 1e-4
"""Below it a held-out class that a part of the rows does not have would decide alone."""


class NoProbe(Exception):
    """Why no probe can be fitted: the head then starts at random, and says so."""


@dataclass(frozen=True)
class Linear:
    """weight[outputs, hidden] and bias[outputs] for features as they come."""

    weight: np.ndarray
    bias: np.ndarray

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """outputs[items, outputs] of features[items, hidden]."""
        return features @ self.weight.T + self.bias


@dataclass(frozen=True)
class Items:
    """What a classifier is fitted on, or judged by."""

    kind: ProblemType
    features: np.ndarray
    labels: np.ndarray
    rows: np.ndarray
    """The row of each item: choices and tokens of a row exclude each other."""
    num_outputs: int
    class_weights: Sequence[float] | None = None

    def part(self, chosen: np.ndarray) -> Items:
        """Some of the items, bool [items]."""
        return replace(self, features=self.features[chosen], labels=self.labels[chosen], rows=self.rows[chosen])

    def sampled(self, most: int) -> Items:
        """At most so many items, those of some rows drawn at random; itself where these are all."""
        if len(self.rows) <= most:
            return self
        rows = np.unique(self.rows)
        count = max(1, len(rows) * most // len(self.rows))
        return self.part(np.isin(self.rows, np.random.default_rng(0).choice(rows, count, replace=False)))


def fits(items: Items, has_bias: bool = True, strengths: Sequence[float] = STRENGTHS) -> Iterator[tuple[float, Linear]]:
    """Each strength with its classifier, the most regularised first: each fit goes on from the one before.

    Raises:
        NoProbe: When nothing can be fitted.
    """
    count, width = items.features.shape
    if solver_bytes(items.kind, count, items.num_outputs, width) > MOST_SOLVER_BYTES:
        raise NoProbe(f"{items.num_outputs:,} classes of {width:,} features are too many to fit")
    shift, scale = standard(items.features, has_bias and items.kind not in ("choice", "span"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the solver stopped early: held-out rows judge what it found
        features = ((items.features - shift) * scale).astype(np.float32)
        for strength, found in _fitted(items, features, has_bias, strengths):
            weight = found.weight * scale
            yield strength, Linear(weight.astype(np.float32), (found.bias - weight @ shift).astype(np.float32))


def standard(features: np.ndarray, centred: bool) -> tuple[np.ndarray, np.ndarray]:
    """What is taken off each feature if `centred`, and what it is then multiplied by, so that its spread is 1, or less
    where it hardly varies: a classifier that magnifies such features is thrown off by the first steps of training."""
    centre = features.mean(axis=0, dtype=np.float64) if centred else np.zeros(features.shape[1])
    variance = ((features - centre) ** 2).mean(axis=0)
    size = np.median((features.astype(np.float64) ** 2).mean(axis=0))  # not the mean: few may be far larger
    return centre, 1.0 / np.sqrt(np.maximum(variance, max(LEAST_SPREAD**2 * size, 1e-30)))


def _fitted(
    items: Items, features: np.ndarray, has_bias: bool, strengths: Sequence[float]
) -> Iterator[tuple[float, Linear]]:
    match items.kind:
        case "regression":
            yield from _ridge(features, items.labels, has_bias, strengths)
        case "multi_label":
            yield from _each_label(items, features, has_bias, strengths)
        case "choice" | "span":
            yield from _within_rows(items, features, strengths)
        case _:
            yield from _logistic(features, items.labels, items.num_outputs, strengths, items.class_weights, has_bias)


def _logistic(
    features: np.ndarray,
    labels: np.ndarray,
    num_outputs: int,
    strengths: Sequence[float],
    class_weights: Sequence[float] | None = None,
    has_bias: bool = False,
) -> Iterator[tuple[float, Linear]]:
    from sklearn.linear_model import LogisticRegression

    present = np.unique(labels)
    if len(present) < 2:
        raise NoProbe("all train rows have the same class")
    weights = None if class_weights is None else {int(one): class_weights[one] for one in present}
    if weights is not None and not any(weights.values()):
        raise NoProbe("all train rows have a class that train.class_weights leaves out")
    model = LogisticRegression(
        max_iter=MOST_STEPS, tol=TOLERANCE, warm_start=True, fit_intercept=has_bias, class_weight=weights
    )
    for strength in strengths:
        model.C = strength / features.shape[1]
        with _threads(features.size * num_outputs):
            model.fit(features, labels)
        weight, bias = model.coef_, np.broadcast_to(model.intercept_, len(model.coef_))
        if len(present) == 2:  # one row, for the second class against the first
            weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
        whole = np.zeros((num_outputs, features.shape[1])), np.full(num_outputs, bias.min() - 1 if has_bias else 0.0)
        whole[0][present], whole[1][present] = weight, bias
        yield strength, Linear(*whole)


def _threads(multiplications: int) -> contextlib.AbstractContextManager[Any]:
    """One thread for small products: two that wait for each other at each of a thousand took 2.4 times as long, and 30
    times where something else ran on one of two cores."""
    if multiplications > _MANY_MULTIPLICATIONS:
        return contextlib.nullcontext()
    found: contextlib.AbstractContextManager[Any] = _thread_pools().limit(limits=1)
    return found


@cache
def _thread_pools() -> Any:
    """Of the libraries that are loaded by now; to find them takes longer than a small fit."""
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()


def _each_label(
    items: Items, features: np.ndarray, has_bias: bool, strengths: Sequence[float]
) -> Iterator[tuple[float, Linear]]:
    """A classifier for each label; one that all rows have, or none, gets a constant."""
    labels = items.labels.astype(np.int64)
    varied = [label for label in range(items.num_outputs) if len(np.unique(labels[:, label])) > 1]
    if not varied:
        raise NoProbe("each label is the same in all train rows")
    all_weights = items.class_weights or [1.0] * items.num_outputs
    paths = [
        _logistic(features, labels[:, label], 2, strengths, (1.0, all_weights[label]), has_bias) for label in varied
    ]
    for several in zip(*paths, strict=True):
        weight = np.zeros((items.num_outputs, features.shape[1]))
        bias = np.where(labels[0], 2.0, -2.0) * has_bias
        for label, (_, found) in zip(varied, several, strict=True):
            weight[label], bias[label] = 2 * found.weight[1], 2 * found.bias[1]
        yield several[0][0], Linear(weight, bias)


def _ridge(
    features: np.ndarray, numbers: np.ndarray, has_bias: bool, strengths: Sequence[float]
) -> Iterator[tuple[float, Linear]]:
    from sklearn.linear_model import Ridge

    middle = numbers.mean(dtype=np.float64) if has_bias else 0.0  # scikit-learn takes numbers to the features' type
    for strength in strengths:
        model = Ridge(alpha=len(features) * RIDGE / strength, fit_intercept=has_bias)
        model.fit(features, numbers - middle)
        yield strength, Linear(model.coef_[None], np.broadcast_to(model.intercept_ + middle, 1))


def _within_rows(items: Items, features: np.ndarray, strengths: Sequence[float]) -> Iterator[tuple[float, Linear]]:
    """The right item of each row against each other one: a logistic regression on their differences, without a bias,
    which all items of a row would share."""
    outputs = [_differences(features, right, items.rows) for right in items.labels.reshape(len(features), -1).T]
    paths = []
    for differences in outputs:
        if not len(differences):
            raise NoProbe("no train row has a right and a wrong choice")
        signs = np.where(np.arange(len(differences)) % 2, 1, -1)
        paths.append(list(_logistic(differences * signs[:, None], (signs > 0).astype(np.int64), 2, strengths)))
    for several in zip(*paths, strict=True):
        weight = np.concatenate([2 * found.weight[1:] for _, found in several])
        yield several[0][0], Linear(weight, np.zeros(len(weight)))


def _differences(features: np.ndarray, right: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Features of a row's right item less those of each wrong one: [wrong items, hidden]."""
    of_row = dict(zip(rows[right == 1].tolist(), np.flatnonzero(right == 1).tolist(), strict=True))
    wrong = np.array([i for i in np.flatnonzero(right == 0) if int(rows[i]) in of_row], np.int64)
    return features[[of_row[int(rows[i])] for i in wrong]] - features[wrong]


def centroids(items: Items) -> Linear:
    """The class whose mean is nearest, as a linear classifier: the squared distance without what all classes share."""
    weight = np.zeros((items.num_outputs, items.features.shape[1]), np.float32)
    bias = np.full(items.num_outputs, -1e30, np.float32)
    for one in np.unique(items.labels):
        weight[one] = items.features[items.labels == one].mean(axis=0)
        bias[one] = -(weight[one] ** 2).sum() / 2
    return Linear(weight, bias)


Candidates = Callable[[Items], Iterable[tuple[Key, Linear]]]
Measure = Callable[[Items, Linear], float]


def best(
    items: Items, held_out: Items | None, candidates: Candidates[Key], measure: Measure, tolerance: float = 0.0
) -> tuple[float, Key, Linear]:
    """Measure, key and classifier of the candidate that is best on rows it did not see, fitted on all of `items`.

    Args:
        items: Of the train rows.
        held_out: Of other rows; None: parts of the train rows are held out in turn.
        candidates: Fits them, each with a key that tells it from the others.
        measure: The less the better.
        tolerance: The first one is taken whose measure is above the least by no more than this share.

    Raises:
        NoProbe: When nothing can be fitted.
    """
    if held_out is not None:
        found = [(measure(held_out, one), key, one) for key, one in candidates(items)]
        return _first(found, tolerance)
    _, row = np.unique(items.rows, return_inverse=True)
    if row.max() == 0:
        raise NoProbe("there is one train row")
    fold = np.random.default_rng(0).permutation(row.max() + 1)[row] % FOLDS
    sums: dict[Key, float] = {}
    measured = 0
    for number in range(min(FOLDS, row.max() + 1)):
        left_out = items.part(fold == number)
        with contextlib.suppress(NoProbe):  # what is left may have one class alone; nothing was given then
            for key, one in candidates(items.part(fold != number)):
                sums[key] = sums.get(key, 0.0) + measure(left_out, one) * len(left_out.rows)
            measured += len(left_out.rows)
    if not measured:  # nothing tells them apart: the first is the most regularised
        key, one = next(iter(candidates(items)))
        return measure(items, one), key, one
    least, chosen = _first([(total, key) for key, total in sums.items()], tolerance)
    return least / measured, chosen, next(one for key, one in candidates(items) if key == chosen)


def _first(found: Sequence[Any], tolerance: float) -> Any:
    """The first of several, each with its measure in front, that is as good as the best but for the tolerance."""
    most = min(one[0] for one in found) * (1 + tolerance)
    return next(one for one in found if one[0] <= most)


def best_space(
    spaces: Mapping[Name, tuple[Items, Items | None]],
    candidates: Callable[..., Any],
    measure: Measure,
    tolerance: float = 0.0,
) -> tuple[Name, float, Any, Linear]:
    """The name of the features that are best at a middle strength, by some of the items, and what `best` finds on
    them."""
    middle = partial(candidates, strengths=(MIDDLE,))
    name = next(iter(spaces))
    if len(spaces) > 1:
        name = min(spaces, key=lambda one: _compared(*spaces[one], middle, measure))
    return name, *best(*spaces[name], candidates, measure, tolerance)


def _compared(items: Items, held_out: Items | None, candidates: Candidates[Any], measure: Measure) -> float:
    """How good features are, by some of the items; by all where some say nothing, for example without a rare class."""
    with contextlib.suppress(NoProbe):
        return best(items.sampled(MOST_COMPARED), held_out, candidates, measure)[0]
    return best(items, held_out, candidates, measure)[0]


def loss(items: Items, found: Linear) -> float:
    """Mean cross entropy in nats, by the weights of the classes; of numbers the mean squared error over their
    variance."""
    weights = None if items.class_weights is None else np.asarray(items.class_weights)
    outputs = found(items.features).astype(np.float64)
    match items.kind:
        case "regression":
            return float(((outputs[:, 0] - items.labels) ** 2).mean() / max(items.labels.var(), 1e-30))
        case "multi_label":
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


def wrong(items: Items, found: Linear) -> float:
    """Share of items (of choices: of rows) whose best output is not the right one; where items have no class, the
    loss."""
    if items.kind in ("regression", "multi_label"):
        return loss(items, found)
    outputs = found(items.features)
    if items.kind == "choice":
        order = np.lexsort((outputs[:, 0], items.rows))
        last = np.append(items.rows[order][1:] != items.rows[order][:-1], True)
        return float((items.labels[order][last] != 1).mean())
    return float((outputs.argmax(axis=1) != items.labels).mean())


def _row_losses(outputs: np.ndarray, right: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Cross entropy of each right item among those of its row."""
    _, row = np.unique(rows, return_inverse=True)
    highest = np.full(row.max() + 1, -np.inf)
    np.maximum.at(highest, row, outputs)
    sums = np.bincount(row, np.exp(outputs - highest[row]))
    losses: np.ndarray = (highest + np.log(sums))[row[right]] - outputs[right]
    return losses
