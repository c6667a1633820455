"""Queries with labelled candidates: one in each row, or lists; metrics by query; what is refused."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import ndcg_score

from fulltune.errors import DataError, RecipeError
from fulltune.inference.store import Rows, read_original_rows
from fulltune.recipe.data import DataBlock
from fulltune.records.data import DataSummary
from fulltune.tasks import Row, Target, reranking
from tests import tiny
from tests.train import runs

COLUMNS = {"query": "question", "text": "answer", "label": "label"}
GRADED = Target("relevance", COLUMNS, num_choices=4)


def predictions(scores: list[float], labels: list[tuple[int, int]]) -> dict[str, np.ndarray]:
    return {"logits": np.array(scores)[:, None], "labels": np.array(labels)}


def test_metrics_are_those_of_a_table() -> None:
    """Queries 7 and 8 are scattered over the rows; no candidate of query 9 is relevant."""
    values = predictions(
        [0.9, 0.1, 0.8, 0.7, 0.6, 0.5, 0.4],
        [(7, 0), (8, 3), (7, 2), (9, 0), (8, 0), (7, 1), (9, 0)],
    )
    # 7: 0, 2, 1, ideally 2, 1. 8: 0, 3.
    second, third = 1 / np.log2(3), 1 / np.log2(4)
    of_seven = (2 * second + third) / (2 + second)
    expected = {"ndcg@10": (of_seven + second) / 2, "mrr@10": 1 / 2, "recall@1": 0.0}
    assert reranking.metrics(values, GRADED) == pytest.approx(expected)
    rows = reranking.row_scores(values, GRADED)
    assert rows["counted"].tolist() == [1, 1, 0, 0, 0, 0, 0]
    assert (rows["best"][0], rows["ideal"][0], rows["best"][1], rows["ideal"][1]) == (0, 2, 4, 1)


def test_ndcg_is_that_of_scikit_learn() -> None:
    chance = np.random.default_rng(0)
    labels = np.stack([np.repeat(np.arange(30), 20), chance.integers(0, 4, 600)], axis=1)
    scores, order = chance.random(600), chance.permutation(600)
    expected = ndcg_score(labels[:, 1].reshape(30, 20), scores.reshape(30, 20), k=10)
    values = reranking.metrics({"logits": scores[order, None], "labels": labels[order]}, GRADED)
    assert values["ndcg@10"] == pytest.approx(expected)


def test_equal_scores_count_against_relevant_candidates() -> None:
    same = reranking.metrics(predictions([1.0, 1.0], [(1, 1), (1, 0)]), GRADED)
    assert same["mrr@10"] == 1 / 2
    missing = reranking.metrics(predictions([np.nan, -5.0], [(1, 1), (1, 0)]), GRADED)
    assert missing["mrr@10"] == 1 / 2


def test_loss_is_the_cross_entropy_of_the_share_of_the_highest_grade() -> None:
    import torch

    logits, labels = torch.tensor([[2.0], [-1.0], [0.0]]), torch.tensor([[1, 0], [1, 3], [2, 9]])
    chances = torch.sigmoid(logits[:, 0])
    losses = torch.stack([-torch.log(1 - chances[0]), -torch.log(chances[1]), -torch.log(chances[2])])
    assert torch.allclose(reranking.reduce_logits(logits, labels, GRADED)["loss"], losses)
    assert reranking.loss(logits, labels, GRADED) == pytest.approx(float(losses.sum()))
    assert reranking.count_items(labels) == 3
    half = Target("relevance", COLUMNS, num_choices=3)
    assert reranking.loss(torch.zeros(1, 1), torch.tensor([[5, 1]]), half) == pytest.approx(np.log(2))


@pytest.mark.parametrize(
    ("label", "grade"), [(0, 0), ("1", 1), (3.0, 3), ("2.0", 2), (True, 1), ("false", 0), (999, 999)]
)
def test_labels_are_grades(label: object, grade: int) -> None:
    row = {"question": "what", "answer": "that", "label": label}
    assert reranking.why_unusable(row, GRADED) is None
    [[example]] = reranking.encode([row], GRADED, tiny.encoder_tokenizer(), 32)
    assert example.features["labels"][1] == grade


@pytest.mark.parametrize("label", [-1, "0.5", "relevant", 1000, [0, 1], float("inf")])
def test_other_labels_are_refused(label: object) -> None:
    refused = reranking.why_unusable({"question": "what", "answer": "that", "label": label}, GRADED)
    assert refused is not None
    assert "column 'label' holds" in refused.reason


def test_recipe_says_that_candidates_are_labelled() -> None:
    names = ("question", "answer", "label")
    rows: list[Row] = [{"question": "a", "answer": "b", "label": number} for number in (0, 1)]
    found = reranking.find_columns(names, rows, DataBlock(train="x", text="answer", label="label"), "f")
    assert found == COLUMNS
    with pytest.raises(DataError, match=r"task: reranking also ranks them by data\.query, data\.text and data\.label"):
        reranking.find_columns(names, rows, DataBlock(train="x"), "f")
    assert reranking.find_target(rows, COLUMNS, DataBlock(train="x"), "f") == Target(
        "relevance", COLUMNS, num_choices=2
    )
    with pytest.raises(DataError, match=r"f: column 'label' has no two grades, such as 0"):
        reranking.find_target(rows[:1], COLUMNS, DataBlock(train="x"), "f")


# ---- reading and splitting ---------------------------------------------------------------------------------------


def candidates(count: int = 30, each: int = 4) -> list[dict[str, Any]]:
    """The rows of a query are far apart in the file; the last query has no relevant candidate."""
    return [
        {
            "question": f"{tiny.WEATHER[query % 8]} in {tiny.PLACES[query % 10]} {query}",
            "answer": f"{'yes' if place == query % each else 'no'} {tiny.PLACES[place]} {query} {place}",
            "label": int(place == query % each and query < count - 1),
        }
        for place in range(each)
        for query in range(count)
    ]


def as_lists(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    of_query = defaultdict[str, list[dict[str, Any]]](list)
    for row in rows:
        of_query[row["question"]].append(row)
    return [
        {"question": query, "answer": [row["answer"] for row in of], "label": [row["label"] for row in of]}
        for query, of in of_query.items()
    ]


def prepare(folder: Path, rows: list[dict[str, Any]], **data: Any) -> DataSummary:
    model = tiny.save_model(folder / "model", "bert")
    block = {"query": "question", "text": "answer", "label": "label", **data}
    reached = runs.run(folder, model, rows, until="data", task="reranking", data=block)
    assert reached.summary is not None
    return reached.summary


def of_splits(folder: Path) -> dict[str, list[dict[str, Any]]]:
    return {name: list(read_original_rows(folder / "run" / "data" / name)) for name in ("train", "eval", "test")}


@pytest.mark.parametrize("has_lists", [False, True])
def test_candidates_of_a_query_stay_in_one_split(tmp_path: Path, has_lists: bool) -> None:
    rows = candidates()
    summary = prepare(tmp_path, as_lists(rows) if has_lists else rows)
    assert summary.problem_type == "relevance"
    splits = of_splits(tmp_path)
    cells = {(row["question"], row["answer"], row["label"]) for of in splits.values() for row in of}
    assert cells == {(row["question"], row["answer"], row["label"]) for row in rows}
    queries = [{row["question"] for row in of} for of in splits.values()]
    assert sum(map(len, queries)) == len(set.union(*queries)) == 30
    assert all(sum(row["question"] == query for of in splits.values() for row in of) == 4 for query in queries[2])
    [note] = [note for note in summary.notes if "without a relevant candidate" in note]
    assert ": 1 of " in note
    labels = np.stack(Rows(tmp_path / "run" / "data" / "test")["labels"])
    assert len(np.unique(labels[:, 0])) == len(queries[2])


def test_sample_of_rows_is_refused_as_it_would_cut_queries(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"data\.max_rows: would cut candidates off their queries"):
        prepare(tmp_path, candidates(60), max_rows=80)


def test_labels_that_are_no_grades_are_listed_with_their_place(tmp_path: Path) -> None:
    rows = [{**row, "label": "good" if number % 9 == 4 else row["label"]} for number, row in enumerate(candidates())]
    with pytest.raises(DataError, match=r"no grade: 13\).*rows\.jsonl:5: column 'label' holds 'good', expected 0"):
        prepare(tmp_path, rows)


def test_lists_of_other_lengths_are_listed_with_their_place(tmp_path: Path) -> None:
    rows = as_lists(candidates())
    for row in rows[2:9]:
        row["label"].pop()
    with pytest.raises(DataError, match=r"rows\.jsonl:3: column 'answer' holds a list"):
        prepare(tmp_path, rows)


def test_held_out_rows_need_a_relevant_candidate(tmp_path: Path) -> None:
    test = tiny.write_jsonl(tmp_path / "test.jsonl", [{**row, "label": 0} for row in candidates(5)])
    with pytest.raises(DataError, match=r"data\.test: no query has a relevant candidate"):
        prepare(tmp_path, candidates(), test=str(test))


def test_pairs_and_labels_are_not_both_read(tmp_path: Path) -> None:
    rows = [{**row, "positive": "some text"} for row in candidates()]
    with pytest.raises(RecipeError, match=r"data\.positive: cannot be combined with data\.text"):
        prepare(tmp_path, rows, positive="positive")
