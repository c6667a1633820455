from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain

import numpy as np
from transformers import PreTrainedModel

from fulltune.evaluate.scoring import WORST, Scored, Scoring
from fulltune.inference.store import read_original_rows
from fulltune.records.scores import Answer
from fulltune.tasks import Tokenizer, reranking
from fulltune.tasks.bm25 import bm25_terms
from fulltune.tasks.embedding import row_texts, text_id


def baseline_scorers(scoring: Scoring) -> dict[str, Callable[[], Scored]]:
    own, candidates, by_id = _read_test_texts(scoring)
    asked, stored = bm25_terms([row[0] for row in own], [*by_id.values()])
    place_of, width = {one: place for place, one in enumerate(by_id)}, len(candidates) // len(own)
    products = asked[np.repeat(np.arange(len(own)), width)] * stored[[place_of[one] for one in candidates]]
    first_stage = np.asarray(products.sum(axis=1)).reshape(-1, width)
    drawn = np.random.default_rng(0).random(first_stage.shape)
    named = {"bm25": ("BM25", first_stage), "random": ("random order", drawn)}
    return {f"baseline-{name}": partial(_score, scoring, *scores) for name, scores in named.items()}


def _read_test_texts(scoring: Scoring) -> tuple[list[list[str]], list[int], dict[int, str]]:
    """Return the test rows' texts, their candidates' ids in order, and the documents of test and train by id."""
    own = [row_texts(row, scoring.target) for row in scoring.texts]
    train = (row_texts(row, scoring.target) for row in read_original_rows(scoring.data / "train"))
    by_id = {text_id(text): text for row in chain(own, train) for text in row[1:]}
    if scoring.target.form.ranks_rows:
        return own, [text_id(text) for _, text in own], by_id
    return own, np.concatenate(scoring.rows("test")[reranking.CANDIDATES]).tolist(), by_id


def score_frozen_classifier(scoring: Scoring, name: str, predicted: Sequence[tuple[int, np.ndarray]]) -> Scored:
    """Score a classifier fitted on embeddings. `predicted` has each row's index and scores [candidates, 1]."""
    return _score(scoring, name, np.stack([scores[:, 0] for _, scores in sorted(predicted, key=lambda row: row[0])]))


def _score(scoring: Scoring, name: str, scores: np.ndarray) -> Scored:
    rows = reranking.row_scores({"logits": scores, "labels": np.stack(scoring.rows("test")["labels"])}, scoring.target)
    return scoring.make_scores(name, "baseline", int(rows["counted"].sum()), metrics=scoring.estimate_metrics(rows))


def score_model(scoring: Scoring, model: PreTrainedModel, tokenizer: Tokenizer) -> Scored:
    outputs = reranking.row_scores(scoring.predict_split(model, tokenizer), scoring.target)
    own, candidates, by_id = _read_test_texts(scoring)
    wrong = np.flatnonzero(outputs["counted"] * (outputs["recall@1"] < 1))
    worst = tuple(
        Answer(
            text=own[row][0],
            expected=by_id[candidates[outputs["ideal"][row]]],
            predicted=by_id[candidates[outputs["best"][row]]],
            loss=float(outputs["loss"][row]),
        )
        for row in wrong[np.lexsort((-outputs["loss"][wrong], outputs["ndcg@10"][wrong]))][:WORST]
    )
    counted, metrics = int(outputs["counted"].sum()), scoring.estimate_metrics(outputs)
    return scoring.make_scores(scoring.plan.trial, "trained", counted, metrics=metrics, worst=worst)
