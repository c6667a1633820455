"""Which columns text classification reads: one text, or the usual pairs of names."""

from __future__ import annotations

import pytest

from fulltune.recipe.data import DataBlock
from fulltune.tasks import text_classification


@pytest.mark.parametrize(
    ("columns", "text", "text_pair"),
    [
        (("idx", "premise", "hypothesis", "label"), "premise", "hypothesis"),
        (("Sentence1", "Sentence2", "label"), "Sentence1", "Sentence2"),
        (("question1", "question2", "label"), "question1", "question2"),
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


def test_named_text_is_read_alone() -> None:
    columns = ("premise", "hypothesis", "label")
    data = DataBlock(train="rows.csv", text="hypothesis")
    found = text_classification.find_columns(columns, [], data, "rows.csv")
    assert found == {"text": "hypothesis", "label": "label"}
