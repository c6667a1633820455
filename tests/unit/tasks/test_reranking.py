"""Queries with candidates: columns, mined candidates, ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from transformers import BertConfig

from fulltune.errors import DataError
from fulltune.models.encoders import model_class
from fulltune.recipe.data import DataBlock
from fulltune.tasks import IncompleteRows, Row, Target, reranking
from fulltune.tasks.bm25 import bm25_terms
from fulltune.tasks.embedding import text_id
from tests import tiny

ROLES = {"query": "q", "positive": "p", "negative": "n"}
ROWS = [
    {"q": "sun in rome", "p": "the sun shines", "n": "red"},
    {"q": "rain in oslo", "p": "rain falls in oslo", "n": "blue"},
    {"q": "sun in rome", "p": "rome is hot", "n": "red"},
    {"q": "snow", "p": "the sun in rome is snow", "n": "green"},
]


def complete(rows: Sequence[Row], count: int, roles: Mapping[str, str] = ROLES) -> list[Any]:
    target, tokenizer = Target("ranking", roles, num_choices=count), tiny.encoder_tokenizer()
    features = [one.features for [one] in reranking.encode(rows, target, tokenizer, 32)]
    split = IncompleteRows(features, lambda: rows, lambda: ROWS, target, tokenizer, 32, "rows.csv: test")
    return list(reranking.complete_rows(split))


def texts(row: Any) -> list[str]:
    by_id = {text_id(text): text for one in ROWS for text in one.values()}
    return [by_id[one] for one in row[reranking.CANDIDATES]]


def test_columns_are_those_of_embeddings() -> None:
    names, block = ("question", "answer", "negative2", "negative_1", "id"), DataBlock(train="x")
    found = reranking.find_columns(names, [], block, "rows.csv")
    assert found == {"query": "question", "positive": "answer", "negative": "negative_1", "negative1": "negative2"}
    with pytest.raises(DataError, match=r"no column found for data\.positive"):
        reranking.find_columns(("query", "label"), [], block, "rows.csv")


def test_candidates_are_the_positive_the_negatives_and_what_bm25_ranks_highest() -> None:
    sun, rain, rome, snow = complete(ROWS, 3)
    assert texts(sun) == ["the sun shines", "red", "the sun in rome is snow"]  # not its other positive
    assert texts(rain)[:2] == ["rain falls in oslo", "blue"]
    assert texts(rome) == ["rome is hot", "red", "the sun in rome is snow"]
    assert all(row["labels"] == 0 and len(row["text_lengths"]) == 3 for row in (sun, rain, rome, snow))
    assert len(set(texts(snow))) == 3


def test_held_out_rows_are_completed_with_texts_of_train() -> None:
    [row] = complete([{"q": "hot rome", "p": "an answer of its own", "n": "red"}], 5)
    assert {*row[reranking.CANDIDATES][2:]} < {text_id(text) for one in ROWS for text in (one["p"], one["n"])}
    with pytest.raises(DataError, match=r"rows\.csv: test: 8 documents .* 9; add rows, or set data\.candidates: 8"):
        complete([{"q": "hot rome", "p": "an answer of its own", "n": "red"}], 9)


def test_negatives_beyond_the_number_of_candidates_are_left_out() -> None:
    assert [texts(row)[1:] for row in complete(ROWS, 2)] == [["red"], ["blue"], ["red"], ["green"]]


def test_query_is_no_candidate_of_itself() -> None:
    [row] = complete([{"q": "Rome is  hot", "p": "the sun shines", "n": "red"}], 6)
    assert text_id("rome is hot") not in row[reranking.CANDIDATES]


def test_equal_scores_count_against_the_positive() -> None:
    logits = np.array([[1.0, 1.0, 0.0], [2.0, 1.0, 0.0], [0.0, 1.0, 2.0], [np.nan, 0.0, 0.0]])
    values = reranking.metrics({"logits": logits}, Target("ranking", ROLES))
    assert values == pytest.approx(
        {"ndcg@10": (1 / np.log2(3) + 1 + 0.5 + 0.5) / 4, "mrr@10": (1 / 2 + 1 + 2 / 3) / 4, "recall@1": 1 / 4}
    )
    late = np.arange(12.0)[None]
    assert reranking.metrics({"logits": late}, Target("ranking", ROLES)) == {"ndcg@10": 0, "mrr@10": 0, "recall@1": 0}


def test_model_scores_each_pair_as_the_classifier_does() -> None:
    import torch
    from transformers import AutoModelForSequenceClassification

    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=1
    )
    torch.manual_seed(0)
    model = model_class("Reranker").from_config(config).eval()
    plain = AutoModelForSequenceClassification.from_config(config).eval()
    plain.load_state_dict(model.state_dict())
    ids = torch.arange(2 * 3 * 4).reshape(2, 3, 4)
    mask = torch.ones_like(ids)
    mask[:, 1, 2:] = 0
    with torch.no_grad():
        scores = model(input_ids=ids, attention_mask=mask).logits
        expected = plain(input_ids=ids.flatten(0, 1), attention_mask=mask.flatten(0, 1)).logits.view(2, 3)
    assert type(model).__name__ == "BertForSequenceClassification"
    assert torch.equal(scores, expected)


def test_negative_that_is_a_positive_of_the_query_elsewhere_is_no_candidate() -> None:
    [row] = complete([{"q": "sun in rome", "p": "the sun shines", "n": "rome is hot"}], 3)
    assert "rome is hot" not in texts(row)
    assert texts(row)[0] == "the sun shines"


def test_row_with_more_documents_than_candidates_is_refused() -> None:
    roles = ROLES | {"negative1": "m"}
    with pytest.raises(DataError, match=r"f: 3 documents in a row; set data\.candidates: 3 or more"):
        reranking.find_target(ROWS, roles, DataBlock(train="x", candidates=2), "f")
    assert reranking.find_target(ROWS, roles, DataBlock(train="x", candidates=3), "f").num_choices == 3


def test_terms_of_scripts_without_spaces_are_letters() -> None:
    asked, stored = bm25_terms(["東京の天気", "東京tower"], ["大阪の天気です", "東京 Tower", "雨"])
    scores = (asked @ stored.T).toarray()
    assert scores[0].argmax() == 0
    assert scores[1].argmax() == 1
    assert not scores[:, 2].any()
