"""Settings that the task does not read are refused, all at once; defaults that are written out are not."""

from __future__ import annotations

import re
from contextlib import nullcontext
from typing import Any

import pytest
from transformers import AutoConfig

from fulltune.errors import RecipeError
from fulltune.models.shapes import why_unfit_for_task
from fulltune.recipe.data import DataBlock
from fulltune.recipe.fields import Recipe
from fulltune.recipe.model import EvaluateBlock
from fulltune.recipe.rules import problems_of
from fulltune.recipe.tasks import FACTS, READ_BY
from fulltune.records.data import DataSummary, SplitSummary
from fulltune.tasks.labels import check_label_settings, class_weights


def recipe(task: str, train: dict[str, Any] | None = None, **data: Any) -> Recipe:
    values = {"model": "m", "task": task, "data": {"train": "t.csv", **data}, "train": train or {}}
    return Recipe.model_validate(values)


def test_settings_of_another_task_are_all_named() -> None:
    assert sorted(problems_of(recipe("text-classification", text="a", tokens="b", stride=0, source_prefix="s: "))) == [
        "data.source_prefix: has no effect for text-classification; remove it",
        "data.stride: has no effect for text-classification; remove it",
        "data.tokens: has no effect for text-classification; remove it",
    ]


@pytest.mark.parametrize(
    ("task", "data"),
    [
        ("text-classification", {"problem_type": "regression", "text_pair": "b", "label": "c"}),
        ("token-classification", {"problem_type": "auto", "stride": None, "undecodable_images": "error"}),
        ("question-answering", {"stride": 0, "context": "c", "answers": "a", "max_length": 64}),
        ("causal-lm", {"text_rows": "line", "chat_template": "t.jinja"}),
        ("seq2seq", {"source_prefix": "sum: ", "source": "a", "target": "b"}),
    ],
)
def test_settings_of_the_task_and_defaults_pass(task: str, data: dict[str, Any]) -> None:
    given = recipe(task, **data)
    assert problems_of(given) == []


def test_every_column_belongs_to_some_task() -> None:
    columns = {name for name, field in DataBlock.model_fields.items() if (field.description or "").startswith("Column")}
    of_any_task = {"columns", "group", "time"}
    assert columns - of_any_task <= set(READ_BY) <= set(DataBlock.model_fields)


def test_smoothing_of_a_number_is_refused_when_it_is_known() -> None:
    smooth = {"label_smoothing_factor": 0.1}
    known = recipe("text-classification", smooth, problem_type="regression")
    assert problems_of(known) == ["train.label_smoothing_factor: has no effect for regression; remove it"]
    unknown = recipe("text-classification", smooth)
    assert problems_of(unknown) == []
    check_label_settings(unknown, summary({}))
    with pytest.raises(RecipeError, match="has no effect for regression"):
        check_label_settings(unknown, summary({}, problem_type="regression"))


# ---- rare classes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "train", "evaluate", "message"),
    [
        (
            "text-classification",
            {},
            {"metric": "f1"},
            "metric: f1 is that of one class against the rest; also set evaluate",
        ),
        ("image-classification", {}, {"metric": "roc_auc"}, "metric: roc_auc is that of one class"),
        ("causal-lm", {}, {"metric": "f1"}, "metric: 'f1' is not available for causal-lm; expected one of loss"),
        ("causal-lm", {}, {"positive_label": "a"}, "positive_label: has no effect for causal-lm, which has no classes"),
        ("text-classification", {}, {"threshold": "fit"}, "threshold: needs evaluate.positive_label: CLASS; set it"),
        ("causal-lm", {"sampling": "balanced"}, {}, "train.sampling: 'balanced' has no effect for causal-lm"),
        (
            "text-classification",
            {"sampling": "balanced", "class_weights": "balanced"},
            {},
            "train.sampling: 'balanced' and train.class_weights: balanced would correct the frequencies twice",
        ),
    ],
)
def test_settings_of_a_rare_class_that_cannot_be_are_refused(
    task: str, train: dict[str, Any], evaluate: dict[str, Any], message: str
) -> None:
    given = recipe(task, train).model_copy(update={"evaluate": EvaluateBlock.model_validate(evaluate)})
    (found,) = problems_of(given)
    assert message in found
    assert problems_of(recipe("token-classification")) == []


@pytest.mark.parametrize(
    ("label", "problem_type", "counts", "message"),
    [
        (1, "single_label", ({"0": 9, "1": 1}, {"0": 9, "1": 1}), None),
        (
            "rar",
            "single_label",
            ({"rare": 1, "usual": 9},) * 2,
            "have the class 'rar'; did you mean 'rare'?",
        ),
        (
            "a",
            "single_label",
            ({"a": 0, "b": 9},) * 2,
            "0 of 9 eval rows have the class 'a'; give data.eval rows with and without it",
        ),
        ("a", "single_label", ({"a": 1, "b": 9}, {"a": 9, "b": 0}), "9 of 9 test rows have the class 'a'"),
        ("a", "multi_label", ({"a": 1, "b": 9},) * 2, "evaluate.positive_label: needs rows with one label each"),
    ],
)
def test_positive_label_must_be_in_the_rows(
    label: Any, problem_type: str, counts: tuple[dict[str, int], ...], message: str | None
) -> None:
    given = recipe("text-classification")
    block = EvaluateBlock(positive_label=label)
    splits = {name: summary(one).splits["train"] for name, one in zip(("eval", "test"), counts, strict=True)}
    read = summary(counts[0], positive_label=block.positive_label, splits=splits, problem_type=problem_type)
    with nullcontext() if message is None else pytest.raises(RecipeError, match=re.escape(message)):
        check_label_settings(given.model_copy(update={"evaluate": block}), read)


# ---- class weights ---------------------------------------------------------------------------------------------


def weighted(given: Any) -> Recipe:
    return recipe("text-classification", {"class_weights": given})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("equal", "expected balanced, or a weight for each class, such as {rare: 5, usual: 1}, found 'equal'"),
        ([1, -1], "expected numbers of 0 or more"),
        ([1, float("nan")], "expected numbers of 0 or more"),
        ([0, 0], "not all 0"),
        ({"a": "much", "b": 1}, "expected numbers of 0 or more, not all 0, found ['much', 1]"),
    ],
)
def test_class_weights_that_cannot_be_are_refused_with_the_recipe(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        weighted(given)


def test_class_weights_of_a_task_without_classes_are_refused_with_the_recipe() -> None:
    (found,) = problems_of(recipe("causal-lm", {"class_weights": "balanced"}))
    assert found.startswith("train.class_weights: has no effect for causal-lm")


def summary(counts: dict[str, int], **changes: Any) -> DataSummary:
    split = SplitSummary(
        rows=sum(counts.values()),
        tokens=1,
        trained_tokens=1,
        truncated_rows=0,
        dropped_rows=0,
        length_percentiles={},
        label_counts={label: count for label, count in counts.items() if count},
    )
    values: dict[str, Any] = {
        "task": "text-classification",
        "problem_type": "single_label",
        "columns": {},
        "labels": tuple(sorted(counts)),
        "max_length": 8,
        "max_length_reason": "",
        "splits": {"train": split},
        "sources": {},
        "fingerprint": "",
    }
    return DataSummary(**{**values, **changes})


@pytest.mark.parametrize(
    ("given", "counts", "expected"),
    [
        (None, {"a": 10, "b": 30}, None),
        ("balanced", {"a": 10, "b": 30}, [2.0, 2 / 3]),
        ("balanced", {"a": 10, "b": 30, "c": 0}, [40 / 30, 40 / 90, 0.0]),
        ({"b": 3, "a": 1}, {"a": 10, "b": 30}, [1.0, 3.0]),
        ([0.0, 2], {"a": 10, "b": 30}, [0.0, 2.0]),
        ({0: 1, 1: 5}, {"0": 10, "1": 1}, [1.0, 5.0]),
    ],
)
def test_class_weights_come_in_the_order_of_the_labels(
    given: Any, counts: dict[str, int], expected: list[float] | None
) -> None:
    """A class that lost all its train rows weighs nothing; YAML reads some labels as numbers."""
    assert class_weights(weighted(given), summary(counts)) == (expected and pytest.approx(expected))


@pytest.mark.parametrize(
    ("given", "labels", "message"),
    [
        ({"a": 1}, "ab", "no weight for b"),
        ({"a": 1, "b": 1, "c": 1}, "ab", "no such label: c"),
        ([1, 2, 3], "ab", "3 weights for 2 labels"),
        ([1.0], "", "no classes"),
    ],
)
def test_wrong_class_weights_are_refused(given: Any, labels: str, message: str) -> None:
    kind = "single_label" if labels else "regression"
    with pytest.raises(RecipeError, match=message):
        check_label_settings(weighted(given), summary(dict.fromkeys(labels, 1), problem_type=kind))


@pytest.mark.parametrize(
    ("task", "kind", "word"),
    [
        ("text-classification", "bert", ""),
        ("text-classification", "vit", "cannot classify texts"),
        ("token-classification", "vit", "cannot tag words"),
        ("question-answering", "gpt2", ""),
        ("question-answering", "layoutlmv2", "cannot find answers"),
        ("multiple-choice", "gpt2", "a 'gpt2' model cannot choose"),
        ("image-classification", "convnext", ""),
        ("image-classification", "bert", "cannot classify images"),
        ("causal-lm", "gpt2", ""),
        ("causal-lm", "bert", "cannot generate text"),
        ("seq2seq", "t5", ""),
        ("seq2seq", "led", ""),
        ("seq2seq", "mbart", "language"),
        ("seq2seq", "gpt2", "encoder-decoder"),
    ],
)
def test_model_of_another_kind_is_refused(task: str, kind: str, word: str) -> None:
    problem = why_unfit_for_task(AutoConfig.for_model(kind), FACTS[task])
    assert (problem is None) == (not word)
    assert word in str(problem)
