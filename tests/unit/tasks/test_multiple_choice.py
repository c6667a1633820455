"""Forms of multiple choice, what is refused, and the shape of a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from fulltune.errors import DataError
from fulltune.recipe.data import DataBlock
from fulltune.tasks import Target, multiple_choice
from tests import tiny

CHOICES = ["soup", "warm bread", "an apple", "rice"]


def described(rows: Sequence[Mapping[str, Any]], **data: Any) -> Target:
    block = DataBlock(train="rows.jsonl", **data)
    columns = multiple_choice.find_columns(tuple(rows[0]), rows, block, "rows.jsonl")
    return multiple_choice.find_target(iter(rows), columns, block, "rows.jsonl")


def right(row: Mapping[str, Any], target: Target) -> int:
    [[example]] = multiple_choice.encode([row], target, tiny.encoder_tokenizer(), 64)
    return int(example.features["labels"])


def test_columns_that_are_missing_are_all_named() -> None:
    with pytest.raises(DataError) as caught:
        multiple_choice.find_columns(("number", "choice0", "choice2"), [], DataBlock(train="x"), "rows.csv")
    assert [problem.split(";")[0] for problem in caught.value.problems] == [
        "rows.csv: no column found for data.choices (one with lists, or several: choice0, choice1)",
        "rows.csv: no column found for data.label",
    ]


def test_question_of_an_unusual_name_is_not_left_out_in_silence() -> None:
    rows = [{"riddle": "what is warm and flat", "choices": CHOICES, "label": 1}]
    with pytest.raises(DataError, match=r"no column found for data\.question"):
        described(rows)
    assert described(rows, question="riddle").columns["question"] == "riddle"


@pytest.mark.parametrize(
    ("label", "index"),
    [(2, 2), ("2", 2), (2.0, 2), ("C", 2), ("c", 2), ("an apple", 2), ("warm bread", 1), ("D", 3)],
)
def test_label_names_the_right_choice_by_place_letter_or_text(label: Any, index: int) -> None:
    for choices in (CHOICES, str(CHOICES)):
        row = {"question": "which?", "choices": choices, "label": label}
        assert right(row, described([row, row])) == index


def test_label_of_named_choices_is_one_of_their_names() -> None:
    """As ARC and CommonsenseQA write them; ARC's names are sometimes numbers from 1."""
    row = {"question": "which?", "choices": {"text": CHOICES, "label": ["1", "2", "3", "4"]}, "answerKey": "4"}
    target = described([row])
    assert target.num_choices == 4
    assert right(row, target) == 3


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ((1, 2, 3, 4), "counts choices from 1 .1 labels equal the number of choices., expected 0 to 3"),
        ((None, ""), "no row has at least two choices and a label"),
    ],
)
def test_labels_that_cannot_be_understood_are_refused_with_advice(labels: Sequence[Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        described([{"question": "which?", "choices": CHOICES, "label": label} for label in labels])


def test_label_that_may_be_place_or_letter_or_text_is_refused() -> None:
    for choices, labels in ((["2", "1", "0"], (0, 1, 2)), (["c", "b", "a"], "abc")):
        rows = [{"question": "how many?", "choices": choices, "label": label} for label in labels]
        refused = [multiple_choice.why_unusable(row, described(rows)) for row in rows]
        assert [one is None for one in refused] == [False, True, False]


def test_numbered_columns_with_an_empty_last_cell_are_another_number_of_choices() -> None:
    row = {"question": "which?", "A": "soup", "B": "rice", "C": "egg", "answer": "B"}
    refused = multiple_choice.why_unusable({**row, "C": ""}, described([row]))
    assert refused is not None
    assert refused.reason == "2 choices, expected 3"


def test_batch_holds_each_choice_with_its_question() -> None:
    tokenizer = tiny.encoder_tokenizer()
    rows = [
        {"context": "it is cold", "question": "what is eaten?", "choices": CHOICES, "label": 1},
        {"context": "", "question": "and?", "choices": ["a", "b", "c", "dinner"], "label": 3},
    ]
    target = described(rows)
    examples = [example for [example] in multiple_choice.encode(rows, target, tokenizer, 64)]
    features = [{name: np.array(v) if isinstance(v, list) else v for name, v in e.features.items()} for e in examples]
    batch = multiple_choice.collate(features, tokenizer.pad_token_id)
    assert batch["input_ids"].shape == batch["token_type_ids"].shape == batch["attention_mask"].shape
    assert batch["input_ids"].shape[:2] == (2, 4)
    assert batch["labels"].tolist() == [1, 3]
    for row, ids, mask, types in zip(
        rows, batch["input_ids"], batch["attention_mask"], batch["token_type_ids"], strict=True
    ):
        question = multiple_choice.question_text(row, target)
        for choice, one, shown, kinds in zip(row["choices"], ids, mask, types, strict=True):
            alone = tokenizer(question, choice)
            assert one[shown.bool()].tolist() == alone["input_ids"]
            assert kinds[shown.bool()].tolist() == alone["token_type_ids"]
            assert set(one[~shown.bool()].tolist()) <= {tokenizer.pad_token_id}
    longest = max(len(tokenizer("it is cold what is eaten?", choice)["input_ids"]) for choice in CHOICES)
    assert features[0]["length"] == 4 * longest
    assert examples[0].longest == longest


def test_long_question_is_cut_before_the_choice_and_counted() -> None:
    tokenizer = tiny.encoder_tokenizer()
    row = {"question": "rain " * 40, "choices": CHOICES, "label": 1}
    [[example]] = multiple_choice.encode([row], described([row]), tokenizer, 24)
    assert example.truncated
    assert max(example.features["text_lengths"]) == 24
    assert "warm bread" in multiple_choice.preview(example.features, described([row]), tokenizer).segments[0].text


def test_choices_without_a_question_are_read_alone() -> None:
    row = {"choices": CHOICES, "label": 0}
    tokenizer = tiny.encoder_tokenizer()
    [[example]] = multiple_choice.encode([row], described([row]), tokenizer, 64)
    assert example.features["text_lengths"] == [len(tokenizer(choice)["input_ids"]) for choice in CHOICES]


def test_same_question_with_its_choices_in_another_order_is_a_duplicate() -> None:
    row = {"question": "Which?", "choices": CHOICES, "label": 0}
    target = described([row])
    other = {**row, "question": "which?", "choices": CHOICES[::-1]}
    assert multiple_choice.group_key(row, target) == multiple_choice.group_key(other, target)


def test_questions_about_one_passage_stay_together() -> None:
    row = {"article": "It rains.", "question": "Which?", "choices": CHOICES, "label": 0}
    target = described([row])
    other = {**row, "question": "why?", "choices": CHOICES[1:]}
    assert multiple_choice.group_key(row, target) == multiple_choice.group_key(other, target)
    without = [{**row, "article": " "}, {**other, "article": ""}]
    assert len({multiple_choice.group_key(one, target) for one in without}) == 2
