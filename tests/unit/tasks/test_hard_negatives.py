"""Hard negatives: which texts of other rows are chosen, which may be false ones, and what rows and plans gain."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from fulltune import pipeline
from fulltune.errors import DataError, RecipeError
from fulltune.inference.store import Rows
from fulltune.tasks import Target, embedding
from fulltune.tasks.padding import split_texts, texts_per_row
from tests import tiny
from tests.train import runs

# Of each row: the query, the positive and a given negative. Rows 0 and 4 share a query; row 5's positive is it.
IDS = np.array([[1, 1, 11, 99], [2, 2, 12, 99], [3, 3, 13, 99], [4, 4, 14, 99], [1, 1, 15, 16], [6, 6, 1, 99]])
ANGLES = {1: 0, 2: 90, 3: 100, 4: 110, 6: 120, 11: 20, 12: 10, 13: 30, 14: 40, 15: 80, 16: 5, 99: 45}


def predictions(ids: np.ndarray) -> dict[str, np.ndarray]:
    angles = np.deg2rad([[ANGLES[one] for one in row[1:]] for row in ids.tolist()])
    lengths = 1 + np.arange(angles.size).reshape(*angles.shape, 1) % 3  # only directions count
    return {"ids": ids, "vectors": (lengths * np.stack([np.cos(angles), np.sin(angles)], axis=-1)).astype(np.float32)}


def chosen_texts(ids: np.ndarray, count: int) -> list[list[int]]:
    rows, _ = embedding.choose_negatives(predictions(ids), count, "cpu")
    return np.asarray(ids[rows, 2]).tolist()


def test_nearest_texts_are_chosen_without_positives_the_query_and_likely_false_ones() -> None:
    """The limit of row 0 is 0.95 cos 20° = cos 26.8°: text 12 at 10° is suspected, and comes after all others."""
    assert chosen_texts(IDS, 2)[0] == [13, 14]
    assert chosen_texts(IDS, 3)[0] == [13, 14, 12]
    # The positive of row 4 is at 80°: all others are suspected, so the farthest come first.
    assert chosen_texts(IDS, 3)[4] == [14, 13, 12]
    given = np.array([[*row[:3], 13 if not place else row[3]] for place, row in enumerate(IDS)])
    assert chosen_texts(given, 2)[0] == [14, 12]


def test_share_of_suspected_ones_is_that_among_the_nearest() -> None:
    """All but text 13 of row 0, at 30°, and text 13 of row 3, which is farther than its positive."""
    _, share = embedding.choose_negatives(predictions(IDS), 2, "cpu")
    assert share == pytest.approx(10 / 12)


def test_texts_of_the_same_class_are_never_negatives_in_blocks_of_any_size() -> None:
    draw = np.random.default_rng(0)
    classes = np.arange(60) % 3
    ids = np.stack([classes, 100 + np.arange(60), 100 + (np.arange(60) + 3) % 60], axis=1)
    given = {"ids": ids, "vectors": draw.normal(size=(60, 2, 8)).astype(np.float32)}
    rows, share = embedding.choose_negatives(given, 5, "cpu")
    assert (classes[(ids[rows, 2] - 100) % 60] != classes[:, None]).all()
    assert [len(set(row)) for row in rows.tolist()] == [5] * 60
    with mock.patch.object(embedding, "_SCORES_AT_ONCE", 130):
        again, same = embedding.choose_negatives(given, 5, "cpu")
    assert (rows == again).all()
    assert share == same


def test_too_few_texts_are_refused() -> None:
    with pytest.raises(DataError, match=r"data\.hard_negatives: 4, but a train row has only 3 texts .* at most 3"):
        chosen_texts(IDS, 4)


def pair_rows(count: int = 40) -> list[dict[str, str]]:
    return [{"query": f"ask {number}", "positive": f"say {number}" + " so" * (number % 5)} for number in range(count)]


def test_row_takes_the_positives_of_others_with_their_numbers() -> None:
    target = Target("query_and_positive", {"query": "query", "positive": "positive"})
    examples = embedding.encode(pair_rows(4), target, tiny.encoder_tokenizer(), 32)
    first, *others = (example.features for [example] in examples)
    joined = embedding.with_negatives(first, others[1:])
    texts = split_texts(joined)
    expected = [*split_texts(first), *(split_texts(other)[1] for other in others[1:])]
    assert [text.tolist() for text in texts] == [text.tolist() for text in expected]
    assert joined["labels"].tolist() == [*first["labels"], *(other["labels"][2] for other in others[1:])]
    assert joined["length"] == 4 * max(map(len, texts))


def test_plan_counts_them_as_texts_of_train_rows(tmp_path: Path) -> None:
    model, summaries = tiny.save_model(tmp_path / "model", "bert"), []
    for folder, data in ((tmp_path / "without", {}), (tmp_path / "with", {"hard_negatives": 3})):
        folder.mkdir()
        summaries.append(pipeline.prepare(runs.job(folder, model, pair_rows(), task="embedding", data=data)))
    without, added = summaries
    assert added.splits["train"].tokens == without.splits["train"].tokens * 5 // 2
    assert added.splits["eval"] == without.splits["eval"]
    assert added.max_length == without.max_length
    assert [texts_per_row(embedding, Target.of(summary)) for summary in summaries] == [2, 5]
    labels = Rows(tmp_path / "with" / "run" / "data" / "train")[0]["labels"]
    assert len(labels) == 3  # they are chosen in training


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ({"task": "embedding", "data": {"hard_negatives": 11}}, "data.hard_negatives.*10"),
        ({"data": {"hard_negatives": 1}}, "data.hard_negatives: has no effect for text-classification"),
    ],
)
def test_values_that_cannot_be_are_refused(tmp_path: Path, blocks: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        runs.job(tmp_path, tmp_path, pair_rows(), **blocks)
