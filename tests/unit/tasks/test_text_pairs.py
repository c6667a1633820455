"""Rows whose two texts are read apart: what is refused, how texts are cut, and the shape of a batch."""

from __future__ import annotations

from typing import Any

import pytest

from fulltune.errors import DataError
from fulltune.recipe.data import DataBlock
from fulltune.recipe.fields import Recipe
from fulltune.recipe.rules import problems_of
from fulltune.tasks import Target, text_pairs
from fulltune.tasks.padding import TEXT_LENGTHS
from tests import tiny

ROW = {"sentence1": "the rain falls", "sentence2": "we cook soup", "label": "no"}


def described(rows: list[dict[str, Any]]) -> Target:
    columns = text_pairs.find_columns(tuple(rows[0]), rows, DataBlock(train="x"), "rows.csv")
    return text_pairs.find_target(iter(rows), columns, DataBlock(train="x"), "rows.csv")


def recipe(task: str = "text-classification", **model: str) -> Recipe:
    return Recipe.model_validate({"model": {"name": "m", **model}, "task": task, "data": {"train": "x.csv"}})


def test_rows_of_one_text_are_refused() -> None:
    with pytest.raises(DataError, match=r"rows\.csv: model\.pairs: apart needs rows of two texts, found one"):
        described([{"text": "the rain falls", "label": "no"}])


def test_each_text_is_cut_by_itself() -> None:
    rows = [ROW, {**ROW, "sentence2": "soup " * 40, "label": "yes"}]
    tokenizer = tiny.encoder_tokenizer()
    target = described(rows)
    [[short], [long]] = text_pairs.encode(rows, target, tokenizer, 12)
    first = tokenizer(ROW["sentence1"])["input_ids"]
    assert not short.truncated
    assert short.features[TEXT_LENGTHS] == [len(first), len(tokenizer(ROW["sentence2"])["input_ids"])]
    assert long.truncated
    assert long.features[TEXT_LENGTHS] == [len(first), 12]
    assert long.longest == 12
    assert text_pairs.preview(long.features, target, tokenizer).segments[0].text.startswith("[CLS]the rain falls[SEP]")
    batch = text_pairs.collate([short.features, long.features], tokenizer.pad_token_id)
    assert batch["input_ids"].shape == (2, 2, 12)
    assert batch["input_ids"][1, 0, : len(first)].tolist() == first
    assert batch["attention_mask"].sum(dim=2).tolist() == [short.features[TEXT_LENGTHS], [len(first), 12]]
    assert "token_type_ids" not in batch


def test_an_empty_text_is_read_as_padding_if_the_tokenizer_makes_nothing_of_it() -> None:
    tokenizer = tiny.decoder_tokenizer(pad="<|im_end|>")
    [[example]] = text_pairs.encode([{**ROW, "sentence2": ""}], described([ROW, {**ROW, "label": "yes"}]), tokenizer, 9)
    assert example.features["input_ids"][-1] == tokenizer.pad_token_id
    assert example.features[TEXT_LENGTHS][1] == 1


def test_the_way_of_reading_decides_the_task_and_survives_saving() -> None:
    apart = recipe(pairs="apart")
    assert apart.task == "text-pairs"
    assert Recipe.model_validate(apart.model_dump(mode="json")) == apart
    assert recipe("text-pairs") == apart
    assert recipe(pairs="joint").task == recipe().task == "text-classification"
    assert len({one.fingerprint() for one in (apart, recipe(), recipe(pairs="joint"))}) == 3


@pytest.mark.parametrize(
    ("task", "pairs", "problem"),
    [
        ("causal-lm", "apart", "model.pairs: has no effect for causal-lm"),
        ("text-pairs", "joint", "model.pairs: joint, but task: text-pairs means apart"),
    ],
)
def test_other_tasks_have_no_pairs(task: str, pairs: str, problem: str) -> None:
    assert any(line.startswith(problem) for line in problems_of(recipe(task, pairs=pairs)))
