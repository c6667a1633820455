"""Metrics from counts have scikit-learn's values, also where classes are missing or all rows are of one."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as reference

from fulltune.tasks import Target
from fulltune.tasks.classes import label_metrics


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
            }
        assert label_metrics(true, predicted, target("single_label")) == pytest.approx(expected)


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


def test_numbers_without_spread_explain_nothing() -> None:
    same, other = np.ones(4), np.arange(4.0)
    assert label_metrics(same, same, target("regression"))["r2"] == 1
    assert label_metrics(same, other, target("regression"))["r2"] == 0
    assert label_metrics(other, same, target("regression"))["spearman"] == 0
