from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain

import numpy as np
from transformers import PreTrainedModel

from fulltune.evaluate.scoring import WORST, Scored, Scoring
from fulltune.inference.store import read_original_rows
from fulltune.records.scores import Answer
from fulltune.tasks import Tokenizer, reranking
from fulltune.tasks.embedding import row_texts, text_id


def baseline_scorers(scoring: Scoring) -> dict[str, Callable[[], Scored]]:
    return {"baseline-bm25": lambda: _score(scoring, "BM25", np.stack(scoring.rows("test")[reranking.FIRST_STAGE]))}


def score_frozen_classifier(scoring: Scoring, name: str, predicted: Sequence[tuple[int, np.ndarray]]) -> Scored:
    """Score a classifier fitted on embeddings. `predicted` has each row's index and scores [candidates, 1]."""
    return _score(scoring, name, np.stack([scores[:, 0] for _, scores in sorted(predicted, key=lambda row: row[0])]))


def _score(scoring: Scoring, name: str, scores: np.ndarray) -> Scored:
    return scoring.make_scores(name, "baseline", len(scores), metrics=scoring.estimate_metrics({"logits": scores}))


def score_model(scoring: Scoring, model: PreTrainedModel, tokenizer: Tokenizer) -> Scored:
    outputs = scoring.predict_split(model, tokenizer)
    rank, loss = reranking.ranks(outputs), outputs["loss"]
    wrong = np.flatnonzero(rank)
    wrong = wrong[np.lexsort((-loss[wrong], -rank[wrong]))][:WORST]
    own, candidates = scoring.texts, scoring.rows("test")[reranking.CANDIDATES]
    rows = chain(own, read_original_rows(scoring.data / "train"))
    by_id = {text_id(text): text for row in rows for text in row_texts(row, scoring.target)[1:]}
    texts = {row: row_texts(own[row], scoring.target) for row in wrong}
    worst = tuple(
        Answer(
            text=texts[row][0],
            expected=texts[row][1],
            predicted=by_id[candidates[row][outputs["logits"][row].argmax()]],
            loss=float(loss[row]),
        )
        for row in wrong
    )
    metrics = scoring.estimate_metrics(outputs)
    return scoring.make_scores(scoring.plan.trial, "trained", len(rank), metrics=metrics, worst=worst)
