"""Settings that the task does not read are refused, all at once; defaults that are written out are not."""

from __future__ import annotations

from typing import Any

import pytest

from fulltune.errors import RecipeError
from fulltune.recipe import DataBlock, Recipe
from fulltune.recipe_rules import READ_BY, check, of_pairs, of_settings
from fulltune.records import DataSummary
from fulltune.tasks.settings import check_settings_for


def recipe(task: str, train: dict[str, Any] | None = None, **data: Any) -> Recipe:
    values = {"model": "m", "task": task, "data": {"train": "t.csv", **data}, "train": train or {}}
    return Recipe.model_validate(values)


def test_settings_of_another_task_are_all_named() -> None:
    with pytest.raises(RecipeError) as caught:
        check(recipe("text-classification", text="a", tokens="b", stride=0, source_prefix="sum: "))
    assert sorted(caught.value.problems) == [
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
    assert [*of_settings(given), *of_pairs(given)] == []


def test_every_column_belongs_to_some_task() -> None:
    columns = {name for name, field in DataBlock.model_fields.items() if (field.description or "").startswith("Column")}
    assert columns <= set(READ_BY) <= set(DataBlock.model_fields)


def test_smoothing_of_a_number_is_refused_when_it_is_known() -> None:
    smooth = {"label_smoothing_factor": 0.1}
    with pytest.raises(RecipeError, match="label_smoothing_factor: has no effect for regression"):
        check(recipe("text-classification", smooth, problem_type="regression"))
    unknown = recipe("text-classification", smooth)
    check(unknown)
    found: dict[str, Any] = {
        **{"task": "text-classification", "columns": {}, "max_length": 8, "max_length_reason": ""},
        **{"splits": {}, "sources": {}, "fingerprint": ""},
    }
    check_settings_for(unknown, DataSummary(problem_type="single_label", **found))
    with pytest.raises(RecipeError, match="has no effect for regression"):
        check_settings_for(unknown, DataSummary(problem_type="regression", **found))
