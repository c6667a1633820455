"""Which columns each task reads, by their usual names; rows that it cannot use."""

from __future__ import annotations

from typing import Any

import pytest

from fulltune.errors import DataError
from fulltune.recipe.data import DataBlock
from fulltune.tasks import Target, task_named, text_classification


@pytest.mark.parametrize(
    ("task", "columns", "found"),
    [
        ("text-classification", "idx premise hypothesis label", "text:premise text_pair:hypothesis label:label"),
        ("text-classification", "Sentence1 Sentence2 label", "text:Sentence1 text_pair:Sentence2 label:label"),
        ("text-classification", "question1 question2 label", "text:question1 text_pair:question2 label:label"),
        ("text-classification", "question1 question2 is_duplicate", "text:question1 text_pair:question2"),
        ("text-classification", "sentence1 sentence2 similarity", "text_pair:sentence2 label:similarity"),
        ("text-classification", "text_a text_b label", "text:text_a text_pair:text_b label:label"),
        ("text-classification", "text text_pair label", "text:text text_pair:text_pair label:label"),
        ("text-classification", "query passage score", "text:query text_pair:passage label:score"),
        ("text-classification", "question sentence label", "text:question text_pair:sentence label:label"),
        ("text-classification", "sentence label", "text:sentence label:label"),
        ("text-classification", "text hypothesis label", "text:text label:label"),
        ("token-classification", "id words ner_tags", "tokens:words tags:ner_tags"),
        ("question-answering", "id title context question answers", "context:context question:question"),
        ("image-classification", "file_name label", "image:file_name label:label"),
        ("seq2seq", "document summary", "source:document target:summary"),
        ("seq2seq", "id highlights article", "source:article target:highlights"),
        ("seq2seq", "input output", "source:input target:output"),
        ("seq2seq", "text target", "source:text target:target"),
        ("multiple-choice", "question choices answer", "choices:choices label:answer question:question"),
        ("multiple-choice", "sent1 sent2 ending0 ending1 label", "choice0:ending0 choice1:ending1"),
        ("multiple-choice", "article question A B C answer", "choice0:A choice2:C context:article"),
        ("multiple-choice", "premise choice1 choice2 label", "choice0:choice1 choice1:choice2"),
        ("multiple-choice", "question option_b option_a answer", "choice0:option_a choice1:option_b"),
        ("multiple-choice", "ctx answerA answerB label", "choice0:answerA label:label context:ctx"),
        ("multiple-choice", "stem options answerKey", "choices:options question:stem label:answerKey"),
    ],
)
def test_columns_of_usual_names_are_found(task: Any, columns: str, found: str) -> None:
    roles = dict(one.split(":") for one in found.split())
    seen = task_named(task).find_columns(columns.split(), [], DataBlock(train="rows.csv"), "rows.csv")
    assert roles.items() <= seen.items()
    assert ("text_pair" in roles) == ("text_pair" in seen)


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


TARGETS = {
    "text-classification": Target("single_label", {"text": "a", "text_pair": "b", "label": "same"}, ("x", "y")),
    "token-classification": Target("tags", {"tokens": "tokens", "tags": "tags"}, ("O", "B-PER", "I-PER")),
    "question-answering": Target("span", {"context": "c", "question": "q", "answers": "a"}),
    "image-classification": Target("single_label", {"image": "image", "label": "label"}, ("cat", "dog")),
    "seq2seq": Target("source_target", {"source": "s", "target": "t"}),
    "multiple-choice": Target(
        "choice", {"question": "question", "choices": "choices", "label": "label"}, num_choices=4
    ),
}
CHOICES = ["soup", "warm bread", "an apple", "rice"]
TAGS = "token-classification"


@pytest.mark.parametrize(
    ("task", "row", "check", "reason"),
    [
        ("text-classification", {"a": "one", "b": "other", "same": "x"}, None, ""),
        ("text-classification", {"a": "one", "b": "", "same": "x"}, None, ""),
        ("text-classification", {"a": "one", "b": None, "same": "x"}, "no text", "column 'b' is missing"),
        ("text-classification", {"a": "one", "same": "x"}, "no text", "column 'b' is missing"),
        ("text-classification", {"a": "one", "b": ["other"], "same": "x"}, "no text", "column 'b' holds a list or an "),
        (TAGS, {"tokens": ["Ada", "in"], "tags": ["I-PER", "O"]}, None, ""),
        (TAGS, {"tokens": "a b c", "tags": "O O"}, "counts differ", "3 tokens and 2 tags; expected one tag for each "),
        (TAGS, {"tokens": None, "tags": "O O"}, "no tokens", "column 'tokens' holds 'None', expected a list of words"),
        (TAGS, {"tokens": [], "tags": []}, "no tokens", "column 'tokens' is empty"),
        (TAGS, {"tokens": ["a"], "tags": {"x": 1}}, "no tags", "column 'tags' holds \"{'x': 1}\", expected a list of"),
        (TAGS, {"tokens": ["a"], "tags": ["PER"]}, "not BIO", "tag 'PER', expected O, B-TYPE or I-TYPE"),
        (TAGS, {"tokens": ["a"], "tags": [3]}, "not BIO", "tag '3', expected O, B-TYPE or I-TYPE"),
        ("question-answering", {"c": "x", "a": "x"}, "no question", ""),
        ("question-answering", {"q": "x", "a": ""}, "no context", ""),
        ("image-classification", {"image": "", "label": "cat"}, "no image", ""),
        ("image-classification", {"image": {"bytes": None, "path": None}, "label": "cat"}, "no image", ""),
        ("image-classification", {"image": 7, "label": "cat"}, "no image", ""),
        ("image-classification", {"image": "a.png", "label": ""}, "no label", ""),
        ("seq2seq", {"s": "a", "t": "b"}, None, ""),
        ("seq2seq", {"s": "a", "t": " "}, "no target", ""),
        ("seq2seq", {"s": "a"}, "no target", ""),
        ("seq2seq", {"s": None, "t": "b"}, "no source", ""),
        ("seq2seq", {"s": "a", "t": ["b"]}, "no target", ""),
        ("multiple-choice", {"choices": CHOICES, "label": 1}, None, ""),
        ("multiple-choice", {"choices": CHOICES[:3], "label": 1}, "other number of choices", ""),
        ("multiple-choice", {"choices": "soup", "label": 1}, "other number of choices", ""),
        ("multiple-choice", {"choices": ["soup", " ", "rice", "egg"], "label": 1}, "empty choice", ""),
        ("multiple-choice", {"choices": CHOICES, "label": None}, "no label", ""),
        ("multiple-choice", {"choices": CHOICES, "label": -1}, "no right choice", ""),
        ("multiple-choice", {"choices": CHOICES, "label": "cake"}, "no right choice", ""),
    ],
)
def test_row_that_cannot_be_used_is_refused(task: Any, row: dict[str, Any], check: str | None, reason: str) -> None:
    refused = task_named(task).why_unusable(row, TARGETS[task])
    assert (refused.check if refused else None) == check
    assert refused is None or refused.reason.startswith(reason)
