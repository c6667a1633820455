"""Rows of queries and positives, or of texts with a class: columns, checks, pairs, loss and ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from fulltune.errors import DataError
from fulltune.recipe.data import DataBlock
from fulltune.stats.bootstrap import find_metric
from fulltune.tasks import PLACE, IncompleteRows, RowFeatures, Target, embedding, reranking
from fulltune.tasks.bm25 import bm25_terms
from tests import tiny

PAIRS = Target("query_and_positive", {"query": "q", "positive": "p", "negative": "n1", "negative1": "n2"})
TEXTS = Target("query_and_positive", {"text": "text", "label": "intent"})
ROW = {"q": "a question", "p": "its answer", "n1": "another", "n2": "a third"}


def columns(names: Sequence[str], **data: str) -> dict[str, str]:
    return embedding.find_columns(names, [], DataBlock(train="x", **data), "rows.csv")


@pytest.mark.parametrize(
    ("names", "data", "expected"),
    [
        (("anchor", "positive"), {}, {"query": "anchor", "positive": "positive"}),
        (("question", "answer", "id"), {}, {"query": "question", "positive": "answer"}),
        (("query", "document", "negative"), {}, {"query": "query", "positive": "document", "negative": "negative"}),
        (
            ("query", "positive", "Negative_10", "negative_2"),
            {},
            {"query": "query", "positive": "positive", "negative": "negative_2", "negative1": "Negative_10"},
        ),
        (
            ("query", "positive", "neg", "negative_1"),
            {},
            {"query": "query", "positive": "positive", "negative": "neg", "negative1": "negative_1"},
        ),
        (
            ("query", "positive", "negative_1", "negative_2"),
            {"negative": "negative_2"},
            {"query": "query", "positive": "positive", "negative": "negative_2", "negative1": "negative_1"},
        ),
        (("title", "body", "category"), {}, {"query": "title", "positive": "body"}),
        (
            ("question1", "question2", "is_duplicate"),
            {"query": "question1", "positive": "question2"},
            {"query": "question1", "positive": "question2"},
        ),
        (("text", "category"), {}, {"text": "text", "label": "category"}),
        (("question", "answer", "topic"), {"label": "topic"}, {"text": "question", "label": "topic"}),
        (("a", "b"), {"query": "b", "positive": "a"}, {"query": "b", "positive": "a"}),
        (("q", "positive", "label"), {"query": "q", "label": "label"}, {"query": "q", "positive": "positive"}),
    ],
)
def test_columns_are_found(names: Sequence[str], data: Mapping[str, str], expected: Mapping[str, str]) -> None:
    assert columns(names, **data) == expected


def test_file_without_pairs_or_classes_is_refused() -> None:
    message = r"rows\.csv: no columns found for data\.query and data\.positive, nor for data\.text and data\.label"
    with pytest.raises(DataError, match=message):
        columns(("a", "b"))


@pytest.mark.parametrize("data", [{"query": "q"}, {"negative": "q"}, {"text": "text", "positive": "q"}])
def test_query_that_the_recipe_names_is_not_dropped_for_texts_with_classes(data: dict[str, str]) -> None:
    with pytest.raises(DataError, match=r"rows\.csv: no columns found for data\.query and data\.positive"):
        columns(("text", "label", "q"), **data)


@pytest.mark.parametrize(
    "names",
    [("question1", "question2", "is_duplicate"), ("Sentence1", "sentence2", "score"), ("query", "document", "label")],
)
@pytest.mark.parametrize("task", [embedding, reranking])
def test_labelled_pairs_are_not_all_trained_as_positives(task: Any, names: Sequence[str]) -> None:
    with pytest.raises(
        DataError, match=rf"rows\.csv: '{names[2]}' seems to say .*: text-classification, or keep the rows"
    ):
        task.find_columns(names, [], DataBlock(train="x"), "rows.csv")


@pytest.mark.parametrize(
    ("target", "rows", "message"),
    [
        (TEXTS, [{"text": "a", "intent": "one"}] * 3, "column 'intent' has a single class, which has no negatives"),
        (PAIRS, [ROW, ROW], "column 'p' has a single positive, which has no negatives"),
        (TEXTS, [{"text": "a", "intent": name} for name in "ab"], "no two rows have the same 'intent'"),
    ],
)
def test_rows_without_negatives_or_positives_are_refused(target: Target, rows: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        embedding.find_target(iter(rows), target.columns, DataBlock(train="x"), "rows.csv")


def test_negative_that_another_row_gives_its_query_as_positive_is_refused() -> None:
    """Also if the texts differ in case; not if the row is refused itself, or the query is another."""
    rows = [
        {**ROW, PLACE: "rows.csv:2"},
        {**ROW, "q": "A question", "p": "Another", "n1": "a fourth", PLACE: "rows.csv:3"},
        {**ROW, "q": "another question", "p": "a third", "n2": "", PLACE: "rows.csv:4"},
    ]
    with pytest.raises(DataError, match=r"^rows\.csv:2: a negative is a positive .* \(found 1 times\); remove it$"):
        embedding.find_target(iter(rows), PAIRS.columns, DataBlock(train="x"), "rows.csv")
    target = embedding.find_target(iter(rows[1:]), PAIRS.columns, DataBlock(train="x"), "rows.csv")
    assert target.num_choices == 3


def test_hard_negatives_of_classes_are_refused() -> None:
    """In a batch, a text of another row's class may be one of this row's."""
    rows, block = [{"text": "a", "intent": name} for name in "aabb"], DataBlock(train="x", hard_negatives=2)
    with pytest.raises(DataError, match=r"data\.hard_negatives: needs queries and positives, not classes"):
        embedding.find_target(iter(rows), TEXTS.columns, block, "rows.csv")


@pytest.mark.parametrize(
    ("changes", "check"),
    [
        ({}, None),
        ({"p": "A  Question"}, "own positive"),
        ({"n2": "its ANSWER"}, "positive is a negative"),
        ({"n1": "a question"}, "positive is a negative"),
        ({"n1": None}, "no negative"),
        ({"p": ["a list"]}, "no positive"),
    ],
)
def test_row_with_a_text_in_two_roles_is_refused(changes: Mapping[str, Any], check: str | None) -> None:
    refused = embedding.why_unusable({**ROW, **changes}, PAIRS)
    assert (refused.check if refused else None) == check


def test_prompts_of_the_model_belong_before_texts_by_role() -> None:
    tokenizer = tiny.encoder_tokenizer()
    tokenizer.prompts = {"query": "ask: ", "document": "doc: ", "": "any: "}
    [[pair]], [[alone]], [[text]] = (
        embedding.encode([row], target, tokenizer, 32)
        for row, target in ((ROW, PAIRS), ({"q": "a question"}, PAIRS), ({"text": "b", "intent": 1}, TEXTS))
    )
    decoded = embedding.preview(pair.features, PAIRS, tokenizer).segments[0].text
    assert decoded.splitlines()[:3] == [
        "(0) [CLS]ask: a question[SEP]",
        "(1) [CLS]doc: its answer[SEP]",
        "(2) [CLS]doc: another[SEP]",
    ]
    assert tokenizer.decode(alone.features["input_ids"]) == "[CLS]ask: a question[SEP]"
    assert tokenizer.decode(text.features["input_ids"]) == "[CLS]any: b[SEP]"
    assert pair.features["labels"].dtype == np.int64
    assert pair.longest == max(pair.features["text_lengths"])


def test_texts_of_a_class_are_paired_in_a_circle() -> None:
    rows = [{"text": f"text {number}", "intent": name} for number, name in enumerate("abbabbc")]
    tokenizer = tiny.encoder_tokenizer()
    features = [example.features for [example] in embedding.encode(rows, TEXTS, tokenizer, 32)]

    def complete(some: Sequence[RowFeatures], where: str) -> Iterator[RowFeatures] | None:
        return embedding.complete_rows(IncompleteRows(some, list, list, TEXTS, tokenizer, 32, where))

    joined = complete(features, "rows.csv: train")
    assert joined is not None
    labels = np.array([row["labels"] for row in joined])
    own = [row["labels"][1] for row in features]
    partners = [own.index(positive) for positive in labels[:, 2]]
    assert ["abbabbc"[one] for one in partners] == list("abbabbc")
    assert sorted(partners) == list(range(7))
    assert [one == number for number, one in enumerate(partners)] == [False] * 6 + [True]
    assert embedding.count_items(torch.tensor(labels)) == 6
    again = complete(features[::-1], "rows.csv: train")
    assert again is not None
    assert {tuple(row["labels"]) for row in again} == set(map(tuple, labels))
    with pytest.raises(DataError, match=r"rows\.csv: eval: no two of these rows have the same class"):
        complete(features[-1:], "rows.csv: eval")


def test_text_that_stands_twice_is_not_its_own_positive() -> None:
    rows = [{"text": text, "intent": "a"} for text in ("one", "One", "two")]
    tokenizer = tiny.encoder_tokenizer()
    features = [example.features for [example] in embedding.encode(rows, TEXTS, tokenizer, 32)]
    joined = embedding.complete_rows(IncompleteRows(features, list, list, TEXTS, tokenizer, 32, "rows.csv: train"))
    assert joined is not None
    labels = torch.tensor(np.array([row["labels"] for row in joined]))
    assert embedding.count_items(labels) == 3


def test_known_false_negatives_never_count() -> None:
    """Row 0 shares its query with row 1, its positive with row 2, and row 3's positive is its query."""
    labels = torch.tensor([[1, 1, 11], [1, 1, 12], [2, 2, 11], [3, 3, 1], [4, 4, 14]])
    vectors = torch.randn(5, 2, 8, generator=torch.Generator().manual_seed(0))
    units = torch.nn.functional.normalize(vectors, dim=-1)
    scores = 20 * units[:, 0] @ units[:, 1].T
    losses = embedding.row_losses(vectors, labels)
    assert losses[0] == pytest.approx(float(scores[0, [0, 4]].logsumexp(0) - scores[0, 0]), abs=1e-5)
    assert losses[4] == pytest.approx(float(scores[4].logsumexp(0) - scores[4, 4]), abs=1e-5)
    torch.testing.assert_close(embedding.row_losses(vectors, labels, slice(2, 4)), losses[2:4])
    labels[4, 2] = 4  # its positive is itself
    assert embedding.row_losses(vectors, labels)[4] == 0


def test_losses_of_cut_vectors_are_averaged() -> None:
    labels, vectors = torch.tensor([[n, n, 10 + n] for n in range(4)]), torch.randn(4, 2, 8)
    both = [embedding.row_losses(vectors[..., :size], labels) for size in (8, 2)]
    assert torch.allclose(embedding.row_losses(vectors, labels, sizes=(8, 2)), sum(both) / 2)


def predictions(seed: int, labels: np.ndarray) -> dict[str, np.ndarray]:
    shape = (len(labels), labels.shape[1] - 1, 6)
    return {"vectors": np.random.default_rng(seed).standard_normal(shape).astype(np.float32), "ids": labels}


@pytest.mark.long
def test_metrics_are_those_of_sentence_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries have one to three positives; equal texts are one document."""
    from sentence_transformers.evaluation import InformationRetrievalEvaluator

    monkeypatch.setattr(embedding, "_SCORES_AT_ONCE", 100)
    draw = np.random.default_rng(3)
    labels = np.array([[q, q, 1000 + draw.integers(60), 1000 + draw.integers(60)] for q in (n // 2 for n in range(80))])
    given = predictions(1, labels)
    first = {one: np.flatnonzero(labels[:, 1] == one)[0] for one in labels[:, 1]}
    given["vectors"][:, 0] = given["vectors"][[first[one] for one in labels[:, 1]], 0]
    by_document = {one: given["vectors"][row, place] for (row, place), one in np.ndenumerate(labels[:, 1:]) if place}
    for (row, place), one in np.ndenumerate(labels[:, 1:]):
        given["vectors"][row, place] = by_document.get(one, given["vectors"][row, place])
    relevant = {str(q): {str(one) for one in labels[labels[:, 1] == q, 2]} for q in labels[:, 1]}
    texts = {str(one): str(one) for one in by_document}
    oracle = InformationRetrievalEvaluator(
        dict(zip(relevant, relevant, strict=True)), texts, relevant, ndcg_at_k=[10], mrr_at_k=[10], accuracy_at_k=[1]
    )
    results = []
    for one in oracle.queries_ids:
        query = given["vectors"][first[int(one)], 0]
        cosines = {str(name): query @ vector / np.linalg.norm(vector) for name, vector in by_document.items()}
        results.append([{"corpus_id": name, "score": float(cosine)} for name, cosine in cosines.items()])
    theirs = oracle.compute_metrics(results)
    found = embedding.metrics(given, PAIRS)
    assert found["ndcg@10"] == pytest.approx(theirs["ndcg@k"][10], abs=1e-6)
    assert found["mrr@10"] == pytest.approx(theirs["mrr@k"][10], abs=1e-6)
    assert found["recall@1"] == pytest.approx(theirs["accuracy@k"][1], abs=1e-6)


def test_metrics_come_from_sums_over_the_counted_queries() -> None:
    labels = np.array([[7, 1, 2], [7, 2, 1], [8, 3, 3], [9, 4, 5], [9, 5, 4]])  # a class each; 3 is alone
    given = predictions(2, labels)
    found = embedding.metrics(given, TEXTS)
    scores = embedding.row_scores(given, TEXTS)
    assert scores["counted"].tolist() == [1, 1, 0, 1, 1]
    assert embedding.metrics(scores, TEXTS) == found
    for name, value in found.items():
        measure = find_metric("embedding", TEXTS, name)
        assert measure.row_terms is not None
        assert measure.from_sums is not None
        assert float(measure.from_sums(measure.row_terms(given).sum(axis=0))) == pytest.approx(value)
        assert measure.greater_is_better == (name != "loss")
    perfect = np.eye(5, 6, dtype=np.float32)[[[0, 0], [0, 0], [2, 2], [3, 3], [3, 3]]]
    best = embedding.metrics({"vectors": perfect, "ids": labels}, TEXTS)
    assert {name: best[name] for name in ("ndcg@10", "mrr@10", "recall@1", "recall@10")} == dict.fromkeys(
        ("ndcg@10", "mrr@10", "recall@1", "recall@10"), 1.0
    )


def test_bm25_scores_are_those_of_the_formula() -> None:
    documents = ["the red fox and the hen", "a red car", "the hen"]
    asked, stored = bm25_terms(["Red, red hen!", "nothing known"], documents)
    scores = (asked @ stored.T).toarray()

    def term(total: int, count: int, length: int) -> float:
        rarity = math.log(1 + (3 - total + 0.5) / (total + 0.5))
        return rarity * count * 2.2 / (count + 1.2 * (0.25 + 0.75 * length / (11 / 3)))

    assert scores[0, 0] == pytest.approx(2 * term(2, 1, 6) + term(2, 1, 6))
    assert scores[0, 1] == pytest.approx(2 * term(2, 1, 3))
    assert scores[0, 2] == pytest.approx(term(2, 1, 2))
    assert scores[1].tolist() == [0, 0, 0]


def test_label_of_zero_and_one_beside_queries_is_refused() -> None:
    rows = [{"query": f"q{n}", "positive": f"p{n}", "label": n % 2} for n in range(4)]
    for task in (embedding, reranking):
        with pytest.raises(DataError, match=r"'label' seems to say which rows of .* match"):
            task.find_columns(list(rows[0]), rows, DataBlock(train="x"), "rows.csv")
        topics = [{**row, "label": "red"} for row in rows]
        assert "label" not in task.find_columns(list(rows[0]), topics, DataBlock(train="x"), "rows.csv")
