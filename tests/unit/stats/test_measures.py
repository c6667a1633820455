"""A metric made of sums over rows has the value that the task's own function gives, also on resampled rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fulltune.errors import SetupError
from fulltune.recipe.tasks import FACTS, OF_ANSWERS, TaskName
from fulltune.stats.bootstrap import find_metric
from fulltune.tasks import Target, task_named, token_classification
from fulltune.tasks.padding import object_array

ROWS = 200
Kept = dict[str, np.ndarray]


def single_label(chance: np.random.Generator) -> Kept:
    labels = chance.integers(0, 5, ROWS)
    logits = chance.normal(size=(ROWS, 6)).astype(np.float32) + 2 * np.eye(6, dtype=np.float32)[labels]
    return {"logits": logits, "labels": labels, "loss": chance.random(ROWS, np.float32)}


def multi_label(chance: np.random.Generator) -> Kept:
    labels = (chance.random((ROWS, 4)) < (0.5, 0.2, 0.1, 0.0)).astype(np.float32)
    logits = chance.normal(size=(ROWS, 4)).astype(np.float32) + 2 * labels - 1
    return {"logits": logits, "labels": labels, "loss": chance.random(ROWS, np.float32)}


def numbers(chance: np.random.Generator) -> Kept:
    labels = chance.normal(1000, 1, ROWS).astype(np.float32)
    logits = (labels + chance.normal(0, 0.5, ROWS))[:, None].astype(np.float32)
    return {"logits": logits, "labels": labels, "loss": chance.random(ROWS, np.float32)}


NAMES = ("O", "B-LOC", "I-LOC", "B-PER", "I-PER")


def entities(chance: np.random.Generator) -> Kept:
    true = object_array([chance.integers(0, 5, size) for size in chance.integers(1, 9, ROWS)])
    predicted = object_array(
        [np.where(chance.random(len(row)) < 0.7, row, chance.integers(0, 5, len(row))) for row in true]
    )
    seen = np.array([len(row) for row in true])
    counted = token_classification.count_spans(true, predicted, Target("tags", {}, NAMES))
    return {**counted, "nll": chance.random(ROWS) * seen, "seen": seen}


def windows(chance: np.random.Generator) -> Kept:
    first, true_first = chance.integers(1, 6, (2, ROWS))
    none = chance.random(ROWS) < 0.2
    return {
        "first": first,
        "last": first + chance.integers(0, 3, ROWS),
        "chance": chance.random(ROWS),
        "nowhere": chance.random(ROWS),
        "true_first": np.where(none, 0, true_first),
        "true_last": np.where(none, 0, true_first + chance.integers(0, 3, ROWS)),
        "loss": chance.random(ROWS),
    }


def questions(chance: np.random.Generator) -> Kept:
    return {"f1": chance.random(ROWS), "exact_match": chance.integers(0, 2, ROWS), "loss": chance.random(ROWS)}


def queries(chance: np.random.Generator) -> Kept:
    metrics = task_named("embedding").FACTS.metrics
    return {name: chance.random(ROWS) for name in metrics} | {"counted": chance.integers(0, 2, ROWS).astype(float)}


def candidates(chance: np.random.Generator) -> Kept:
    return {"logits": chance.integers(0, 9, (ROWS, 16)).astype(np.float32), "loss": chance.random(ROWS)}


def labelled_candidates(chance: np.random.Generator) -> Kept:
    """Metrics of queries, as only whole queries can be scored."""
    labels = np.stack([chance.integers(0, 40, ROWS), chance.integers(0, 3, ROWS)], axis=1)
    rows = {"logits": chance.random((ROWS, 1)), "labels": labels, "loss": chance.random(ROWS)}
    return dict(task_named("reranking").row_scores(rows, Target("relevance", {}, num_choices=3)))


def tokens(chance: np.random.Generator) -> Kept:
    count = chance.integers(0, 30, ROWS).astype(float)
    return {"nll": chance.random(ROWS) * 3 * count, "tokens": count, "right": np.floor(chance.random(ROWS) * count)}


def generated(chance: np.random.Generator) -> Kept:
    lengths = chance.integers(1, 30, ROWS)
    totals = np.maximum(lengths[:, None] - np.arange(4), 0)
    counts = np.column_stack([chance.integers(0, totals + 1), totals, lengths, chance.integers(1, 30, ROWS)])
    return {name: chance.random(ROWS) for name in OF_ANSWERS if name != "bleu"} | {"bleu_counts": counts}


ONE_LABEL = "accuracy f1_macro mcc balanced_accuracy loss f1 precision recall roc_auc average_precision"
ONE_CLASS = Target("single_label", {}, tuple("abcdef"), positive_label="b")
CASES: list[tuple[TaskName, Target, Any, str]] = [
    ("text-classification", ONE_CLASS, single_label, ONE_LABEL),
    ("text-classification", replace(ONE_CLASS, decision=(2.0, 0.1)), single_label, "accuracy mcc f1 precision recall"),
    ("image-classification", ONE_CLASS, single_label, ONE_LABEL),
    ("text-classification", Target("multi_label", {}, tuple("abcd")), multi_label, "accuracy f1_macro f1_micro loss"),
    ("text-classification", Target("regression", {}), numbers, "r2 rmse spearman kendall loss"),
    ("multiple-choice", Target("choice", {}, num_choices=6), single_label, "accuracy loss"),
    ("token-classification", Target("tags", {}, NAMES), entities, "f1 precision recall f1_macro accuracy loss"),
    ("question-answering", Target("span", {}), windows, "f1 exact_match loss"),
    ("question-answering", Target("span", {}), questions, "f1 exact_match loss"),
    ("embedding", Target("query_and_positive", {}), queries, "ndcg@10 mrr@10 recall@1 recall@10 loss"),
    ("reranking", Target("ranking", {}), candidates, "ndcg@10 mrr@10 recall@1 loss"),
    ("reranking", Target("relevance", {}), labelled_candidates, "ndcg@10 mrr@10 recall@1 loss"),
    ("causal-lm", Target("text", {}), tokens, "loss perplexity token_accuracy"),
    ("causal-lm", Target("chat", {}), generated, " ".join(OF_ANSWERS)),
    ("seq2seq", Target("source_target", {}), tokens, "loss perplexity token_accuracy"),
    ("seq2seq", Target("source_target", {}), generated, " ".join(OF_ANSWERS)),
]
CASES += [("text-pairs", *rest) for task, *rest in CASES if task == "text-classification"]
EACH = [(task, target, make, metric) for task, target, make, metrics in CASES for metric in metrics.split()]
ANEW = {"spearman", "kendall", "roc_auc", "average_precision"}


def test_every_metric_of_every_task_is_compared() -> None:
    for name, facts in FACTS.items():
        assert set(facts.metrics) == {metric for task, _, _, metric in EACH if task == name}


@pytest.mark.parametrize(
    ("task", "target", "make", "metric"),
    EACH,
    ids=[f"{task}-{make.__name__}-{metric}" for task, _, make, metric in EACH],
)
def test_measure_equals_the_tasks_own_metric(task: TaskName, target: Target, make: Any, metric: str) -> None:
    measure = find_metric(task, target, metric)
    assert (measure.row_terms is None) == (metric in ANEW)
    for seed in range(3):
        chance = np.random.default_rng(seed)
        outputs = make(chance)
        # Of few rows some classes are missing.
        drawn = chance.integers(0, ROWS, (40, 15, ROWS)[seed])
        resample = {name: array[drawn] for name, array in outputs.items()}
        expected = task_named(task).metrics(resample, target)[metric]
        assert measure.compute(resample) == expected
        if measure.row_terms is not None and measure.from_sums is not None:
            by_sums = measure.from_sums(measure.row_terms(outputs)[drawn].sum(axis=0)) if metric != "r2" else expected
            assert float(by_sums) == pytest.approx(expected, rel=1e-5, abs=1e-12)
            whole = measure.from_sums(measure.row_terms(outputs).sum(axis=0))
            assert float(whole) == pytest.approx(task_named(task).metrics(outputs, target)[metric], rel=1e-5, abs=1e-12)


def test_measure_r2_of_resample_far_from_zero_keeps_its_digits() -> None:
    target = Target("regression", {})
    measure, kept = find_metric("text-classification", target, "r2"), numbers(np.random.default_rng(0))
    drawn = np.random.default_rng(1).integers(0, ROWS, ROWS)
    assert measure.row_terms is not None
    assert measure.from_sums is not None
    expected = measure.compute({name: array[drawn].astype(np.float64) for name, array in kept.items()})
    assert float(measure.from_sums(measure.row_terms(kept)[drawn].sum(axis=0))) == pytest.approx(expected, rel=1e-6)


def test_measure_many_resamples_at_once_are_the_same() -> None:
    target = Target("single_label", {}, tuple("abcdef"))
    outputs = single_label(np.random.default_rng(0))
    for metric in ("accuracy", "f1_macro", "mcc", "balanced_accuracy"):
        measure = find_metric("text-classification", target, metric)
        assert measure.row_terms is not None
        assert measure.from_sums is not None
        counts = measure.row_terms(outputs)
        sums = np.stack([[counts[:50].sum(axis=0), counts[50:].sum(axis=0)]])
        assert measure.from_sums(sums).shape == (1, 2)
        assert measure.from_sums(sums)[0, 1] == pytest.approx(measure.compute({k: v[50:] for k, v in outputs.items()}))


@pytest.mark.parametrize(
    ("task", "metric", "bounds", "span"),
    [
        ("text-classification", "accuracy", (0.0, 1.0), 1.0),
        ("text-classification", "spearman", (-1.0, 1.0), 2.0),
        ("text-classification", "mcc", (-1.0, 1.0), 2.0),
        ("text-classification", "r2", None, None),
        ("causal-lm", "loss", None, None),
        ("seq2seq", "chrf", (0.0, 100.0), 100.0),
    ],
)
def test_measure_knows_between_what_its_values_lie(
    task: TaskName, metric: str, bounds: tuple[float, float] | None, span: float | None
) -> None:
    measure = find_metric(task, Target(columns={}, problem_type="regression"), metric)
    assert (measure.bounds, measure.span) == (bounds, span)


def test_measure_unknown_metric_names_those_there_are() -> None:
    with pytest.raises(SetupError, match="has no metric 'bleu'; choose one of accuracy, loss"):
        find_metric("multiple-choice", Target("choice", {}), "bleu")
