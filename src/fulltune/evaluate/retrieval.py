from __future__ import annotations

from collections.abc import Callable

import numpy as np
from transformers import PreTrainedModel

from fulltune.evaluate.scoring import WORST, Scored, Scoring
from fulltune.records.scores import Answer
from fulltune.tasks import Tokenizer, embedding
from fulltune.tasks.bm25 import bm25_terms


def baseline_scorers(scoring: Scoring) -> dict[str, Callable[[], Scored]]:
    return {"baseline-bm25": lambda: _score_bm25(scoring)}


def score_model(scoring: Scoring, model: PreTrainedModel, tokenizer: Tokenizer) -> Scored:
    outputs = scoring.predict_split(model, tokenizer)
    rows = embedding.row_scores(outputs, scoring.target)
    ids, queries, documents = _read_test_texts(scoring)
    expected = np.searchsorted(ids[:, 2:].ravel()[embedding.corpus(ids)], ids[:, 2])
    wrong = np.flatnonzero(rows["counted"] * (rows["ndcg@10"] < 1))
    worst = tuple(
        Answer(
            text=queries[row],
            expected=documents[expected[row]],
            predicted=documents[rows["best"][row]],
            loss=float(rows["loss"][row]),
        )
        for row in wrong[np.argsort(rows["ndcg@10"][wrong], kind="stable")][:WORST]
    )
    metrics = scoring.estimate_metrics(rows)
    for size in scoring.recipe.train.matryoshka:
        cut = scoring.estimate_metrics({**outputs, "vectors": outputs["vectors"][..., :size]})
        metrics |= {f"{name}_of_{size}": cut[name] for name in ("ndcg@10", "recall@10")}
    return scoring.make_scores(scoring.plan.trial, "trained", int(rows["counted"].sum()), metrics=metrics, worst=worst)


def _score_bm25(scoring: Scoring) -> Scored:
    ids, queries, documents = _read_test_texts(scoring)
    asked, stored = bm25_terms(queries, documents)
    rows = embedding.rank(ids, lambda some: (asked[some] @ stored.T).toarray())
    return scoring.make_scores("BM25", "baseline", int(rows["counted"].sum()), metrics=scoring.estimate_metrics(rows))


def _read_test_texts(scoring: Scoring) -> tuple[np.ndarray, list[str], list[str]]:
    ids = np.stack(scoring.rows("test")["labels"])
    texts = [embedding.row_texts(row, scoring.target) for row in scoring.texts]
    by_id = {embedding.text_id(text): text for row in texts for text in row}
    return ids, [row[0] for row in texts], [by_id[one] for one in ids[:, 2:].ravel()[embedding.corpus(ids)]]
