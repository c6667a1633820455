"""Scores of documents for a query, which reads each document with it: rows are queries with candidates."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain

import numpy as np

from fulltune.errors import DataError
from fulltune.recipe import tasks as recipe_tasks
from fulltune.recipe.data import DataBlock
from fulltune.tasks import (
    FromSums,
    IncompleteRows,
    Predictions,
    Refused,
    Row,
    RowAnswer,
    RowExamples,
    RowFeatures,
    RowTerms,
    Target,
    Tensor,
    Tokenizer,
    classes,
    columns,
    embedding,
    multiple_choice,
)
from fulltune.tasks.bm25 import bm25_terms
from fulltune.tasks.embedding import row_texts, text_id
from fulltune.tasks.padding import cut_long_text, join_rows, pad_texts, tokenise_and_cut
from fulltune.text import counted

FACTS = recipe_tasks.FACTS["reranking"]
why_unusable, group_key, row_labels = embedding.why_unusable, embedding.group_key, embedding.row_labels
display_text, preview, full_row = embedding.display_text, multiple_choice.preview, multiple_choice.full_row
loss, count_items, chance_loss = classes.loss, classes.count_items, classes.chance_loss
find_columns, reduce_logits = embedding.find_pairs, classes.reduce_logits
CANDIDATES, FIRST_STAGE = "candidates", "first_stage"
"""Features of a row: the ids of its candidates, and their scores by BM25."""
CUTOFF, MOST_DOCUMENTS = embedding.CUTOFF, 200_000
_ROWS_AT_ONCE, _SCORES_AT_ONCE = 256, 10_000_000

# ---- rows --------------------------------------------------------------------------------------------------------


def find_target(rows: Iterable[Row], roles: Mapping[str, str], data: DataBlock, file: str) -> Target:
    if len(roles) > data.candidates + 1:
        raise DataError(f"{file}: {len(roles) - 1} documents in a row; set data.candidates: {len(roles) - 1} or more")
    return Target("ranking", roles, num_choices=data.candidates)


def why_unanswerable(row: Row, target: Target) -> Refused | None:
    return columns.why_cell_blank(row, target, "query", "positive")


def with_placeholder_answer(row: Row, target: Target) -> Row:
    return {name: row.get(name) for name in [*target.columns.values()][:2]}


def encode(rows: Sequence[Row], target: Target, tokenizer: Tokenizer, max_length: int) -> RowExamples:
    """Tokenise the query with each text of a row; `complete_rows` adds other candidates."""
    return _encode_lists([row_texts(row, target) for row in rows], tokenizer, max_length)


def _encode_lists(lists: Sequence[list[str]], tokenizer: Tokenizer, max_length: int) -> RowExamples:
    """Tokenise queries with each of the documents after them, the positive first, whose label is 0."""
    flat = [(query, text) for query, *documents in lists for text in documents]
    pairs = [[cut_long_text(text, tokenizer, max_length) for text in column] for column in zip(*flat, strict=True)]
    tokens, names, is_cut = tokenise_and_cut(tokenizer, pairs, max_length)
    counts = [len(row) - 1 for row in lists]
    return join_rows({name: tokens[name] for name in names}, is_cut, counts, [0] * len(lists))


def complete_rows(split: IncompleteRows) -> Iterator[RowFeatures]:
    """Yield rows with their positive, their negatives, and the documents of this split and of train that BM25 ranks
    highest for the query and that are not its positives. Raise `DataError` if there are too few."""
    target, count = split.target, split.target.num_choices
    own, positives, by_id = list[tuple[str, list[str]]](), dict[int, set[int]](), dict[int, str]()
    for row in chain(split.own(), split.train()):
        query, *documents = row_texts(row, target)
        own += [(query, documents)] if len(own) < len(split.features) else []
        positives.setdefault(text_id(query), set()).add(text_id(documents[0]))
        by_id |= {text_id(text): text for text in documents}
    ids = sorted(by_id)  # in an arbitrary order, in which documents without a common word stay
    if len(ids) > MOST_DOCUMENTS:
        raise DataError(
            f"{split.where}: {len(ids):,} different documents, but BM25 compares at most {MOST_DOCUMENTS:,}; set "
            "data.max_rows"
        )
    place_of = {one: place for place, one in enumerate(ids)}
    asked, stored = bm25_terms([query for query, _ in own], [by_id[one] for one in ids])
    at_once = max(1, min(_ROWS_AT_ONCE, _SCORES_AT_ONCE // len(ids)))
    for start in range(0, len(own), at_once):
        scores = (asked[start : start + at_once] @ stored.T).toarray()
        lists, chosen = list[list[str]](), list[list[int]]()
        for (query, documents), of_row in zip(own[start : start + at_once], scores, strict=True):
            barred = {text_id(query), *positives[text_id(query)]}
            given = [one for one in dict.fromkeys(map(text_id, documents[1:])) if one not in barred]
            given.insert(0, text_id(documents[0]))
            barred.update(given)
            most = min(len(ids), count + len(barred))
            best = np.argpartition(-of_row, most - 1)[:most]
            best = best[np.lexsort((best, -of_row[best]))]
            mined = [ids[place] for place in best if ids[place] not in barred]
            candidates = [*given, *mined][:count]
            if len(candidates) < count:
                raise DataError(
                    f"{split.where}: {counted(len(candidates), 'document')} to rank for '{query[:60]}', expected "
                    f"{count}; add rows{f', or set data.candidates: {len(candidates)}' * (len(candidates) > 1)}"
                )
            lists.append([query, *(by_id[one] for one in candidates)])
            chosen.append(candidates)
        examples = _encode_lists(lists, split.tokenizer, split.max_length)
        for [example], candidates, of_row in zip(examples, chosen, scores, strict=True):
            first_stage = of_row[[place_of[one] for one in candidates]].astype(np.float32)
            yield {**example.features, CANDIDATES: np.array(candidates), FIRST_STAGE: first_stage}


def collate(features: Sequence[RowFeatures], pad_token_id: int) -> dict[str, Tensor]:
    read = [{name: row[name] for name in row if name not in (CANDIDATES, FIRST_STAGE)} for row in features]
    return pad_texts(read, pad_token_id)


def config_changes(target: Target, processor: Tokenizer) -> dict[str, object]:
    of_library = {"sentence_transformers": {"activation_fn": "torch.nn.modules.activation.Sigmoid"}}
    return {"num_labels": 1, "pad_token_id": processor.pad_token_id, **of_library}


# ---- evaluation --------------------------------------------------------------------------------------------------


def metrics(predictions: Predictions, target: Target) -> dict[str, float]:
    sums = metrics_from_sums(target, "")
    return classes.over_all({name: sums[name] for name in sums if name != "loss" or name in predictions}, predictions)


def metrics_from_sums(target: Target, metric: str) -> Mapping[str, tuple[RowTerms, FromSums]]:
    terms = {name: classes.terms_of_mean(partial(_of_ranks, name)) for name in FACTS.metrics if name != "loss"}
    return {name: (of, classes.ratio) for name, of in {**terms, "loss": classes.stack_arrays("loss", "")}.items()}


def ranks(predictions: Predictions) -> np.ndarray:
    """Return each positive's rank from 0 on: behind candidates of the same score, int64 [rows]."""
    logits = predictions["logits"]
    return np.asarray((~(logits[:, 1:] < logits[:, :1])).sum(axis=1))


def _of_ranks(name: str, predictions: Predictions) -> np.ndarray:
    rank = ranks(predictions)
    gains = {"ndcg@10": 1 / np.log2(rank + 2), "mrr@10": 1 / (rank + 1), "recall@1": rank < 1}
    return np.where(rank < CUTOFF, gains[name], 0.0)


def answers(
    predictions: Predictions, rows: Sequence[Row], examples: RowExamples, target: Target, temperature: float
) -> list[RowAnswer]:
    """Return the score between 0 and 1 of each row's document, which orders documents of one query."""
    from scipy.special import expit

    return [{"score": score} for score in expit(predictions["logits"][:, 0].astype(np.float64)).tolist()]
