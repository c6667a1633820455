"""Metrics from counts have scikit-learn's values, also where classes are missing or all rows are of one."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
from scipy import stats
from scipy.special import softmax
from sklearn import metrics as reference

from fulltune.tasks import Target
from fulltune.tasks.classes import best_threshold, label_metrics, predict_labels, ranking_metrics


def target(problem_type: Any) -> Target:
    return Target(problem_type, {})


@pytest.mark.parametrize("classes", range(1, 7))
def test_classes_have_the_values_of_scikit_learn(classes: int) -> None:
    draw = np.random.default_rng(classes)
    for rows in (1, 2, 5, 30, 200):
        true = draw.integers(0, classes, rows)
        predicted = np.where(draw.random(rows) < 0.5, true, draw.integers(0, classes, rows))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = {
                "accuracy": reference.accuracy_score(true, predicted),
                "f1_macro": reference.f1_score(true, predicted, average="macro", zero_division=0),
                "mcc": reference.matthews_corrcoef(true, predicted),
                "balanced_accuracy": reference.balanced_accuracy_score(true, predicted),
            }
        assert label_metrics(true, predicted, target("single_label")) == pytest.approx(expected)


@pytest.mark.parametrize("digits", [1, 9])
def test_one_class_against_the_rest_has_the_values_of_scikit_learn(digits: int) -> None:
    """Also where scores are equal, and with a threshold."""
    draw = np.random.default_rng(digits)
    for rows, classes in ((6, 2), (40, 3), (200, 5)):
        true = np.append(draw.integers(0, classes, rows - 2), [0, 1])
        logits = np.round(draw.normal(size=(rows, classes)) + np.eye(classes)[true], digits)
        chances = softmax(logits, axis=1)[:, 1]
        for decision in (None, (1.0, 0.3)):
            one = Target("single_label", {}, tuple("abcde"[:classes]), positive_label="b", decision=decision)
            predicted = predict_labels(logits, one)
            assert (predicted == 1).tolist() == (logits.argmax(1) == 1 if decision is None else chances >= 0.3).tolist()
            own, guessed = true == 1, predicted == 1
            expected = {
                "f1": reference.f1_score(own, guessed, zero_division=0),
                "precision": reference.precision_score(own, guessed, zero_division=0),
                "recall": reference.recall_score(own, guessed),
                "roc_auc": reference.roc_auc_score(own, chances),
                "average_precision": reference.average_precision_score(own, chances),
            }
            found = label_metrics(true, predicted, one, chances)
            assert {name: found[name] for name in expected} == pytest.approx(expected)
            majority = label_metrics(true, np.zeros(rows, int), one)
            assert (majority["roc_auc"], majority["average_precision"]) == pytest.approx((0.5, own.mean()))
    assert all(math.isnan(ranking_metrics(np.zeros(3, bool), np.arange(3))[name]) for name in list(expected)[3:])


def test_threshold_is_the_one_with_the_highest_f1() -> None:
    draw = np.random.default_rng(0)
    for rows in (5, 30, 200):
        scores, expected = np.round(draw.random(rows), 2), np.append(True, draw.random(rows - 1) < 0.1)
        best = max(reference.f1_score(expected, scores >= value) for value in scores.tolist())
        assert reference.f1_score(expected, scores >= best_threshold(expected, scores)) == pytest.approx(best)
    separated = np.array([0.99, 0.98, 0.96, 0.02, 0.01])
    assert best_threshold(separated > 0.5, separated) == pytest.approx(0.49), "halfway between the classes"


@pytest.mark.parametrize("labels", range(2, 6))
def test_several_labels_have_the_values_of_scikit_learn(labels: int) -> None:
    draw = np.random.default_rng(labels)
    for rows in (1, 2, 5, 30):
        true = draw.integers(0, 2, (rows, labels))
        predicted = np.where(draw.random((rows, labels)) < 0.6, true, draw.integers(0, 2, (rows, labels)))
        expected = {
            "accuracy": reference.accuracy_score(true, predicted),
            "f1_micro": reference.f1_score(true, predicted, average="micro", zero_division=0),
            "f1_macro": reference.f1_score(true, predicted, average="macro", zero_division=0),
        }
        assert label_metrics(true, predicted, target("multi_label")) == pytest.approx(expected)


@pytest.mark.parametrize("rows", [2, 3, 10, 100])
def test_numbers_have_the_values_of_scikit_learn_and_scipy(rows: int) -> None:
    draw = np.random.default_rng(rows)
    true, noise = draw.normal(size=rows).astype(np.float32), draw.normal(size=rows).astype(np.float32)
    for predicted in (true, true + noise, noise):
        expected = {
            "r2": reference.r2_score(true, predicted),
            "spearman": stats.spearmanr(true, predicted).statistic,
            "kendall": stats.kendalltau(true, predicted).statistic,
            "rmse": reference.root_mean_squared_error(true, predicted),
        }
        assert label_metrics(true, predicted, target("regression")) == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("lost", [np.nan, np.inf, -np.inf])
def test_numbers_are_nan_if_a_prediction_is_not_finite(lost: float) -> None:
    found = label_metrics(np.arange(4.0), np.array([0.0, 1.0, lost, 3.0]), target("regression"))
    assert list(found) == ["r2", "spearman", "kendall", "rmse"]
    assert np.isnan(list(found.values())).all()


def test_numbers_without_spread_explain_nothing() -> None:
    same, other = np.ones(4), np.arange(4.0)
    assert label_metrics(same, same, target("regression"))["r2"] == 1
    assert label_metrics(same, other, target("regression"))["r2"] == 0
    assert label_metrics(other, same, target("regression"))["spearman"] == 0
