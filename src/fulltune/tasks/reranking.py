"""Scores of documents for a query, read with each: rows are queries with candidates, or labelled candidates."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain

import numpy as np

from fulltune.errors import DataError
from fulltune.recipe import tasks as recipe_tasks
from fulltune.recipe.data import DataBlock
from fulltune.tasks import (
    IncompleteRows,
    Predictions,
    Refused,
    Row,
    RowAnswer,
    RowExamples,
    RowFeatures,
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
from fulltune.tasks.labels import label_name
from fulltune.tasks.padding import TEXT_LENGTHS, cut_long_text, join_rows, pad_texts, tokenise_and_cut
from fulltune.text import counted

FACTS = recipe_tasks.FACTS["reranking"]
group_key, row_labels, display_text = embedding.group_key, embedding.row_labels, embedding.display_text
loss, count_items, chance_loss = classes.loss, classes.count_items, classes.chance_loss
preview, reduce_logits = multiple_choice.preview, classes.reduce_logits
CANDIDATES = "candidates"
"""Feature of a row: the ids of its candidates."""
CUTOFF, MOST_DOCUMENTS = embedding.CUTOFF, 200_000
_ROWS_AT_ONCE, _SCORES_AT_ONCE = 256, 10_000_000

# ---- rows --------------------------------------------------------------------------------------------------------


def find_columns(names: Sequence[str], sample: Sequence[Row], data: DataBlock, file: str) -> dict[str, str]:
    """Map `query`, `text` and `label` if the recipe names one of the last two, else the columns of pairs."""
    if data.text or data.label:
        return columns.find_columns(("query", "text", "label"), names, sample, data, file)
    return embedding.find_pairs(names, sample, data, file)


def find_target(rows: Iterable[Row], roles: Mapping[str, str], data: DataBlock, file: str) -> Target:
    """Return the target; raise `DataError` if rows have too many documents, or all labels are equal."""
    if (label := roles.get("label")) is not None:
        grades = {grade for row in rows for grade in _read_grades(row.get(label))}
        if len(grades) < 2:
            raise DataError(f"{file}: column '{label}' has no two grades, such as 0 (irrelevant) and 1; set data.label")
        return Target("relevance", roles, num_choices=1 + max(grades))
    if len(roles) > data.candidates + 1:
        raise DataError(f"{file}: {len(roles) - 1} documents in a row; set data.candidates: {len(roles) - 1} or more")
    return Target("ranking", roles, num_choices=data.candidates)


def _read_grades(cell: object) -> list[int]:
    """Return a label, or each of a list, as a number from 0 (irrelevant) to 999. Other labels are left out."""
    cells, words = columns.parse_cell(cell), {"false": "0", "true": "1"}
    names = (label_name(one).lower() for one in (cells if isinstance(cells, list) else [cells]))
    return [int(digits) for name in names if re.fullmatch(r"\d{1,3}", digits := words.get(name, name))]


def why_unusable(row: Row, target: Target) -> Refused | None:
    refused = embedding.why_unusable(row, target)
    if refused or not target.form.ranks_rows or len(_read_grades(cell := row[target.columns["label"]])) == 1:
        return refused
    what = f"column '{target.columns['label']}' holds {cell!r:.60}"
    return Refused("no grade", f"{what}, expected 0 (irrelevant), 1 (relevant) or a higher whole number as a grade")


def why_unanswerable(row: Row, target: Target) -> Refused | None:
    return columns.why_cell_blank(row, target, *[*target.columns][:2])


def with_placeholder_answer(row: Row, target: Target) -> Row:
    return {name: row.get(name) for name in [*target.columns.values()][:2]}


def encode(rows: Sequence[Row], target: Target, tokenizer: Tokenizer, max_length: int) -> RowExamples:
    """Tokenise the query with each text of a row. A labelled candidate's label is its query's number and its grade."""
    lists, labels = [row_texts(row, target) for row in rows], list[object]()
    if target.form.ranks_rows:
        grades = (_read_grades(row.get(target.columns["label"])) or [0] for row in rows)  # unknown if to be predicted
        labels = [np.array([text_id(query), *grade]) for (query, _), grade in zip(lists, grades, strict=True)]
    return _encode_lists(lists, labels, tokenizer, max_length)


def _encode_lists(lists: list[list[str]], labels: list[object], tokenizer: Tokenizer, max_length: int) -> RowExamples:
    """Tokenise queries with each of the documents after them, the positive first, whose place is the default label."""
    flat = [(query, text) for query, *documents in lists for text in documents]
    pairs = [[cut_long_text(text, tokenizer, max_length) for text in column] for column in zip(*flat, strict=True)]
    tokens, names, is_cut = tokenise_and_cut(tokenizer, pairs, max_length)
    counts = [len(row) - 1 for row in lists]
    return join_rows({name: tokens[name] for name in names}, is_cut, counts, labels or [0] * len(lists))


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
        examples = _encode_lists(lists, [], split.tokenizer, split.max_length)
        for [example], candidates in zip(examples, chosen, strict=True):
            yield {**example.features, CANDIDATES: np.array(candidates)}


def collate(features: Sequence[RowFeatures], pad_token_id: int) -> dict[str, Tensor]:
    return pad_texts([{name: row[name] for name in row if name != CANDIDATES} for row in features], pad_token_id)


def full_row(target: Target, length: int) -> RowFeatures:
    if not target.form.ranks_rows:
        return multiple_choice.full_row(target, length)
    return {"input_ids": np.ones(length, np.int64), "labels": np.zeros(2, np.int64), TEXT_LENGTHS: np.array([length])}


def config_changes(target: Target, processor: Tokenizer) -> dict[str, object]:
    of_library = {"sentence_transformers": {"activation_fn": "torch.nn.modules.activation.Sigmoid"}}
    return {"num_labels": 1, "pad_token_id": processor.pad_token_id, **of_library}


# ---- evaluation --------------------------------------------------------------------------------------------------


def row_scores(predictions: Predictions, target: Target) -> Predictions:
    """Add each row's metrics, of labelled candidates those of their query, which is `counted` once if any is relevant.
    Grades are NDCG's gains, as in trec_eval; of equal scores, the lowest grade comes first. `best` and `ideal` are the
    places of the highest score and grade."""
    if "counted" in predictions:
        return predictions
    rows, width = predictions["logits"].shape
    ids, places = np.divmod(np.arange(rows * width), width)
    ids, grades = predictions["labels"].T if target.form.ranks_rows else (ids, 1 * (places == 0))
    _, first, query, sizes = np.unique(ids, return_index=True, return_inverse=True, return_counts=True)
    starts = np.cumsum(sizes) - sizes
    rank = np.arange(len(ids)) - np.repeat(starts, sizes)
    gains = np.where(rank < CUTOFF, 1 / np.log2(rank + 2), 0.0)
    ranked, ideal = np.lexsort((grades, -predictions["logits"].ravel(), query)), np.lexsort((-grades, query))
    reached, possible = (np.bincount(query[order], gains * grades[order]) for order in (ranked, ideal))
    nearest = np.minimum.reduceat(np.where(grades[ranked] > 0, rank, CUTOFF), starts)
    of_queries = {
        "ndcg@10": classes.share(reached, possible),
        "mrr@10": np.where(nearest < CUTOFF, 1 / (nearest + 1), 0.0),
        "recall@1": nearest < 1,
        "best": ranked[starts],
        "ideal": ideal[starts],
    }
    counted = {"counted": np.bincount(first // width, possible > 0, rows), "loss counted": np.ones(rows)}
    return {**predictions, **{name: values[query[::width]] for name, values in of_queries.items()}, **counted}


metrics = partial(classes.metrics_by_row, row_scores, FACTS.metrics)
metrics_from_sums = partial(classes.sums_by_row, row_scores, FACTS.metrics)


def answers(
    predictions: Predictions, rows: Sequence[Row], examples: RowExamples, target: Target, temperature: float
) -> list[RowAnswer]:
    """Return the score between 0 and 1 of each row's document, which orders documents of one query."""
    from scipy.special import expit

    return [{"score": score} for score in expit(predictions["logits"][:, 0].astype(np.float64)).tolist()]
