"""Which columns text classification reads: one text, or the usual pairs of names."""

from __future__ import annotations

import pytest

from fulltune.errors import DataError
from fulltune.recipe.data import DataBlock
from fulltune.tasks import Refused, Target, text_classification


@pytest.mark.parametrize(
    ("columns", "text", "text_pair"),
    [
        (("idx", "premise", "hypothesis", "label"), "premise", "hypothesis"),
        (("Sentence1", "Sentence2", "label"), "Sentence1", "Sentence2"),
        (("question1", "question2", "label"), "question1", "question2"),
        (("question1", "question2", "is_duplicate"), "question1", "question2"),
        (("sentence1", "sentence2", "similarity"), "sentence1", "sentence2"),
        (("text_a", "text_b", "label"), "text_a", "text_b"),
        (("text", "text_pair", "label"), "text", "text_pair"),
        (("query", "passage", "score"), "query", "passage"),
        (("question", "sentence", "label"), "question", "sentence"),
        (("sentence", "label"), "sentence", None),
        (("text", "hypothesis", "label"), "text", None),
    ],
)
def test_usual_pairs_of_columns_are_read_together(columns: tuple[str, ...], text: str, text_pair: str | None) -> None:
    found = text_classification.find_columns(columns, [], DataBlock(train="rows.csv"), "rows.csv")
    assert (found["text"], found.get("text_pair")) == (text, text_pair)
    assert found["label"] == columns[-1]


@pytest.mark.parametrize(
    "roles", [{"text": "label"}, {"text_pair": "label"}, {"text": "premise", "text_pair": "premise"}]
)
def test_column_with_two_roles_is_refused(roles: dict[str, str]) -> None:
    data = DataBlock(train="rows.csv", **roles)
    with pytest.raises(DataError, match=rf"rows.csv: column '{next(iter(roles.values()))}' has two of the roles"):
        text_classification.find_columns(("premise", "hypothesis", "label"), [], data, "rows.csv")


@pytest.mark.parametrize("text", ["premise", "hypothesis"])
def test_named_text_is_read_alone(text: str) -> None:
    columns = ("premise", "hypothesis", "label")
    found = text_classification.find_columns(columns, [], DataBlock(train="rows.csv", text=text), "rows.csv")
    assert found == {"text": text, "label": "label"}


@pytest.mark.parametrize(
    ("row", "refused"),
    [
        ({"a": "one", "b": "other", "same": "x"}, None),
        ({"a": "one", "b": "", "same": "x"}, None),
        ({"a": "one", "b": None, "same": "x"}, Refused("no text", "column 'b' is missing")),
        ({"a": "one", "same": "x"}, Refused("no text", "column 'b' is missing")),
        (
            {"a": "one", "b": ["other"], "same": "x"},
            Refused("no text", "column 'b' holds a list or an object, not text"),
        ),
    ],
)
def test_second_text_may_be_empty_and_not_missing(row: dict[str, object], refused: Refused | None) -> None:
    target = Target("single_label", {"text": "a", "text_pair": "b", "label": "same"}, ("x", "y"))
    assert text_classification.refuse(row, target) == refused
