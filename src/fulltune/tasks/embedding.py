"""Texts as vectors near those of their positives: rows are pairs of query and positive, or texts with a class."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from fulltune.errors import DataError
from fulltune.recipe import tasks as recipe_tasks
from fulltune.recipe.data import DataBlock
from fulltune.records.data import Preview
from fulltune.tasks import (
    LENGTH,
    PLACE,
    PLAIN_LOSS,
    IncompleteRows,
    LossSettings,
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
    multiple_choice,
)
from fulltune.tasks.labels import is_empty, label_name
from fulltune.tasks.padding import TEXT_LENGTHS, encode_apart, join_texts, pad_texts, split_texts

FACTS = recipe_tasks.FACTS["embedding"]
collate, config_changes = pad_texts, classes.config_changes
SCALE = 20.0  # of the cosines, as in sentence-transformers: a temperature of 0.05
CUTOFF, _SCORES_AT_ONCE = 10, 1_000_000
SUSPECT = 0.95  # of the positive's cosine: a negative nearer than this may be a false one

# ---- rows --------------------------------------------------------------------------------------------------------


def find_columns(names: Sequence[str], sample: Sequence[Row], data: DataBlock, file: str) -> dict[str, str]:
    """Map `query`, `positive` and all `negative` columns, or else `text` and `label`, or raise `DataError`."""
    ways = [("query", "positive"), ("text", "label")][: 1 if data.query or data.positive or data.negative else 2]
    for roles in ways[::-1] if data.text or data.label else ways:
        if all(columns.find_column(role, getattr(data, role), names, file) for role in roles):
            break
    else:
        raise DataError(
            f"{file}: no columns found for data.query and data.positive, nor for data.text and data.label; set them in "
            f"the recipe (columns in the file: {columns.shown(names)})"
        )
    find = find_pairs if "query" in roles else partial(columns.find_columns, roles)
    return find(names, sample, data, file)


def find_pairs(names: Sequence[str], sample: Sequence[Row], data: DataBlock, file: str) -> dict[str, str]:
    """Map `query`, `positive` and all `negative` columns; raise `DataError` if a label says which rows match."""
    by_role = columns.find_columns(("query", "positive"), names, sample, data, file)
    label = columns.find_usual_column(columns.USUAL_NAMES["label"], names, file)
    pair = tuple(name.lower().strip() for name in by_role.values())
    says_match = label is not None and {label_name(row.get(label)) for row in sample} == {"0", "1"}
    if label is not None and (pair in columns.USUAL_PAIRS or says_match) and None in (data.query, data.positive):
        raise DataError(
            f"{file}: '{label}' seems to say which rows of {pair} match, but with this task all rows do. Write task: "
            "text-classification, or keep the rows that match (data.where) and set data.query and data.positive; task: "
            "reranking also ranks them by data.query, data.text and data.label"
        )
    negatives = [name for name in names if re.fullmatch(r"negative[ _-]?\d{1,2}", name.lower().strip())]
    negatives.sort(key=lambda name: int(re.sub(r"\D", "", name)))
    named = columns.find_column("negative", data.negative, names, file)
    several = dict.fromkeys(filter(None, [named, *negatives]))
    return by_role | {f"negative{number or ''}": name for number, name in enumerate(several)}


def find_target(rows: Iterable[Row], roles: Mapping[str, str], data: DataBlock, file: str) -> Target:
    """Return the target, or raise `DataError` if no text can have a positive or a negative, or a query's negative is
    its positive in another row."""
    if "label" in roles and data.hard_negatives:
        raise DataError("data.hard_negatives: needs queries and positives, not classes: batches hold others of a class")
    name, target = roles.get("positive") or roles["label"], Target("query_and_positive", roles)
    cells, positives, negatives = list[int](), set[tuple[int, int]](), dict[tuple[int, int], object]()
    for row in rows:
        cells += [] if is_empty(row.get(name)) else [text_id(label_name(row[name]))]
        if len(roles) > 2 and why_unusable(row, target) is None:
            query, positive, *others = map(text_id, row_texts(row, target))
            positives.add((query, positive))
            negatives |= {(query, one): row.get(PLACE) for one in others}
    if len(set(cells)) < 2:
        what = "class" if "label" in roles else "positive"
        raise DataError(f"{file}: column '{name}' has a single {what}, which has no negatives; add rows with others")
    if "label" in roles and len(set(cells)) == len(cells):
        raise DataError(f"{file}: no two rows have the same '{name}', so no text has a positive; set data.label")
    if both := sorted(str(negatives[one]) for one in positives & negatives.keys()):
        what = "a negative is a positive of the same query in another row"
        raise DataError(f"{both[0]}: {what} (found {len(both):,} times); remove it")
    return replace(target, num_choices=len(roles) - 1 + data.hard_negatives)


def why_unusable(row: Row, target: Target) -> Refused | None:
    if refused := columns.why_cell_blank(row, target, *target.columns):
        return refused
    query, *others = (columns.normalised(text) for text in row_texts(row, target))
    if query in others[:1]:
        return Refused("own positive", "the text is the query itself")
    if {query, *others[:1]} & {*others[1:]}:
        return Refused("positive is a negative", "a negative is also the positive, or the query itself")
    return None


def why_unanswerable(row: Row, target: Target) -> Refused | None:
    return columns.why_cell_blank(row, target, next(iter(target.columns)))


def with_placeholder_answer(row: Row, target: Target) -> Row:
    return {name: row.get(name) for name in [*target.columns.values()][:1]}


def row_texts(row: Row, target: Target) -> list[str]:
    """Return a row's query, positive and negatives, or only the text that it has."""
    return [columns.as_text(row[name]) for role, name in target.columns.items() if role != "label" and name in row]


def group_key(row: Row, target: Target) -> str:
    return columns.normalised(row_texts(row, target)[0])


def display_text(row: Row, target: Target) -> str:
    return " / ".join(row_texts(row, target))


def row_labels(row: Row, target: Target) -> list[str]:
    return []  # classes of held-out texts need not occur in train


def text_id(text: str) -> int:
    """Return a number of 63 bits that equal texts share, whatever their case and white space."""
    return int.from_bytes(hashlib.sha256(columns.normalised(text).encode()).digest()[:8]) >> 1


def encode(rows: Sequence[Row], target: Target, tokenizer: Tokenizer, max_length: int) -> RowExamples:
    """Tokenise each text by itself, after the model's prompt for its role. Labels are the numbers of the row's query or
    class, which shares its positives, and of its texts: int64 [1 + texts]."""
    first, *rest = (role for role in target.columns if role != "label")
    prompts = tokenizer.prompts
    prefixes = [prompts.get(role, prompts[""]) for role in (first, *("document" for _ in rest))]
    texts = [row_texts(row, target) for row in rows]
    prompted = [[prefix + text for prefix, text in zip(prefixes, row, strict=False)] for row in texts]
    labels = []
    for row, of_row in zip(rows, texts, strict=True):
        ids, label = [text_id(text) for text in of_row], row.get(target.columns.get("label", ""))
        labels.append(np.array([ids[0] if label is None else text_id(label_name(label)), *ids]))
    return encode_apart(prompted, labels, tokenizer, max_length)


def complete_rows(split: IncompleteRows) -> Iterator[RowFeatures] | None:
    """Yield each text joined with its positive: the next of its class in the order of their numbers, which is arbitrary
    but fixed, or the first; a lone text is its own. Return None if rows have positives, or raise `DataError` if no text
    has one."""
    rows = split.features
    labels = np.array([row["labels"] for row in rows])
    if labels.shape[1] > 2:
        return None
    texts, index, place = np.unique(labels[:, :2], axis=0, return_index=True, return_inverse=True)  # sorted by class
    starts = np.flatnonzero(np.diff(texts[:, 0], prepend=-1))
    following = np.roll(index, -1)
    following[np.append(starts[1:], len(index)) - 1] = index[starts]
    positives = following[place.ravel()]
    if (labels[positives, 1] == labels[:, 1]).all():
        raise DataError(f"{split.where}: no two of these rows have the same class, so no text has a positive; add rows")
    return (with_negatives(row, [rows[int(positive)]], 0) for row, positive in zip(rows, positives, strict=True))


def with_negatives(row: RowFeatures, others: Sequence[RowFeatures], place: int = 1) -> RowFeatures:
    tokens = {
        name: [*split_texts(row, name), *(split_texts(other, name)[place] for other in others)]
        for name in row
        if name not in ("labels", LENGTH, TEXT_LENGTHS)
    }
    return {**join_texts(tokens), "labels": np.append(row["labels"], [other["labels"][1 + place] for other in others])}


def choose_negatives(predictions: Predictions, count: int, device: str) -> tuple[np.ndarray, float]:
    """Choose rows [rows, count] whose positives are nearest to each query, and return the share of suspected false
    negatives among the nearest (arXiv 2407.15831), which come last. Known positives, the query and given negatives are
    left out. Raises `DataError` if too few texts remain."""
    import torch
    from scipy.sparse import csr_array

    ids, vectors = predictions["ids"], torch.from_numpy(predictions["vectors"]).to(device)
    names, row_of, place = np.unique(ids[:, 2], return_index=True, return_inverse=True)
    group_of = np.unique(ids[:, 0], return_inverse=True)[1]
    positives = csr_array((np.ones(len(ids), bool), (group_of, place)))
    own, documents = (torch.from_numpy(array).to(device) for array in (np.delete(ids, (0, 2), axis=1), names))
    queries, nearest = (torch.nn.functional.normalize(vectors[:, n].float(), dim=-1) for n in (0, 1))
    limits, nearest = SUSPECT * (queries * nearest).sum(dim=-1, keepdim=True), nearest[row_of].T
    chosen, suspected, at_once = list[Tensor](), 0, max(1, _SCORES_AT_ONCE // len(names))
    for rows in (slice(start, start + at_once) for start in range(0, len(ids), at_once)):
        barred, known = (own[rows, :, None] == documents).any(dim=1), positives[group_of[rows]].tocoo()
        barred[known.row, known.col] = True
        if (least := int((~barred).sum(dim=1).min())) < count:
            raise DataError(
                f"data.hard_negatives: {count}, but a train row has only {least} texts of other rows that are not its "
                f"positives; set at most {least}, or add rows"
            )
        scores = (queries[rows] @ nearest).masked_fill(barred, -torch.inf)
        is_suspect = scores > limits[rows]
        suspected += int(is_suspect.gather(1, scores.topk(count).indices).sum())
        chosen.append(torch.where(is_suspect, -2 - scores, scores).topk(count).indices)
    return row_of[torch.cat(chosen).cpu().numpy()], suspected / (len(ids) * count)


def preview(features: RowFeatures, target: Target, tokenizer: Tokenizer) -> Preview:
    return multiple_choice.preview({**features, "labels": 1}, target, tokenizer)


def full_row(target: Target, length: int) -> RowFeatures:
    texts = max(2, len(target.columns), 1 + target.num_choices)
    ids, labels = np.ones(length * texts, np.int64), np.arange(texts + 1)
    return {"input_ids": ids, "labels": labels, TEXT_LENGTHS: np.full(texts, length)}


# ---- loss --------------------------------------------------------------------------------------------------------


def row_losses(vectors: Tensor, labels: Tensor, anchors: slice = slice(None), sizes: Sequence[int] = ()) -> Tensor:
    """Compute the InfoNCE loss of each query among the `anchors`: the cross entropy of choosing its positive, by
    cosines, among the positives and negatives of all rows.

    Known false negatives never count: positives of the same query or class in other rows, and texts equal to these or
    to the query. A query that is its own positive has no loss. Losses of vectors cut to `sizes` count as much.
    """
    import torch
    import torch.nn.functional as F

    shared, query, positive, texts = labels[:, 0], labels[:, 1], labels[:, 2], labels[:, 2:].flatten()
    own = torch.arange(len(labels), device=labels.device)[anchors, None] * (labels.shape[1] - 2)
    known = (shared[anchors, None] == shared).float() @ (positive[:, None] == texts).float() > 0
    masked = (known | (query[anchors, None] == texts)).scatter(1, own, False)
    losses = []
    for size in dict.fromkeys((vectors.shape[-1], *sizes)):
        units = F.normalize(vectors[..., :size].float(), dim=-1)
        scores = SCALE * units[anchors, 0] @ units[:, 1:].flatten(0, 1).T
        losses.append(F.cross_entropy(scores.masked_fill(masked, -torch.inf), own[:, 0], reduction="none"))
    return torch.stack(losses).mean(dim=0) * (query != positive)[anchors]


def loss(logits: Tensor, labels: Tensor, target: Target, settings: LossSettings = PLAIN_LOSS) -> Tensor:
    return row_losses(logits, labels).sum()


def count_items(labels: Tensor) -> int:
    return int((labels[:, 1] != labels[:, 2]).sum())


# ---- evaluation --------------------------------------------------------------------------------------------------


def reduce_logits(logits: Tensor, labels: Tensor, target: Target) -> dict[str, Tensor]:
    return {"vectors": logits.float(), "ids": labels}


def row_scores(predictions: Predictions, target: Target) -> Predictions:
    """Replace vectors by each query's metrics and loss, which depend on other rows, and by whether it is `counted`."""
    import torch

    if "vectors" not in predictions:
        return predictions
    vectors, ids = predictions["vectors"], predictions["ids"]
    units = vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
    documents = units[:, 1:].reshape(-1, units.shape[-1])[corpus(ids)]
    order, size = np.argsort(ids[:, 1]), target.loss_rows or len(ids)  # files may be sorted by class
    parts = zip(*(torch.from_numpy(array[order]).split(size) for array in (vectors, ids)), strict=True)
    losses = torch.cat([row_losses(*part) for part in parts]).double().numpy()
    return {**rank(ids, lambda rows: units[rows, 0] @ documents.T), "loss": losses[np.argsort(order)]}


metrics = partial(classes.metrics_by_row, row_scores, FACTS.metrics)
metrics_from_sums = partial(classes.sums_by_row, row_scores, FACTS.metrics)


def corpus(ids: np.ndarray) -> np.ndarray:
    """Return the positions of the different positives and negatives in the flattened array of all [rows * texts]."""
    return np.unique(ids[:, 2:].ravel(), return_index=True)[1]


def rank(ids: np.ndarray, score: Callable[[slice], np.ndarray]) -> dict[str, np.ndarray]:
    """Compute each query's metrics from its ranks of the relevant documents: all positives of the same query or class.

    `score` returns the scores of some queries [rows, documents of `corpus`]. Documents equal to the query are left out.
    Recall at k is relative to min(k, relevant documents); queries without these are not `counted`. `best` is first.
    """
    from scipy.sparse import csr_array

    names, (groups, group_of) = ids[:, 2:].ravel()[corpus(ids)], np.unique(ids[:, 0], return_inverse=True)
    places = group_of, np.searchsorted(names, ids[:, 2])
    is_positive = csr_array((np.ones(len(ids), np.int32), places), shape=(len(groups), len(names)))
    top, gains = min(CUTOFF, len(names)), 1 / np.log2(np.arange(CUTOFF) + 2)
    parts, at_once = list[dict[str, np.ndarray]](), max(1, _SCORES_AT_ONCE // len(names))
    for rows in (slice(start, start + at_once) for start in range(0, len(ids), at_once)):
        is_query = ids[rows, 1, None] == names
        relevant = (is_positive[group_of[rows]].toarray() > 0) & ~is_query
        scores = np.where(is_query, -np.inf, score(rows))
        first = np.argpartition(-scores, top - 1, axis=1)[:, :top]
        order = np.argsort(-np.take_along_axis(scores, first, axis=1), axis=1, kind="stable")
        first = np.take_along_axis(first, order, axis=1)
        hits, total = np.take_along_axis(relevant, first, axis=1), relevant.sum(axis=1)
        ideal = np.append(0.0, gains.cumsum())[np.minimum(total, CUTOFF)]
        recalls = {f"recall@{k}": classes.share(hits[:, :k].sum(axis=1), np.minimum(total, k)) for k in (1, CUTOFF)}
        scored = {
            "ndcg@10": classes.share(hits @ gains[:top], ideal),
            "mrr@10": np.where(hits.any(axis=1), 1 / (hits.argmax(axis=1) + 1), 0.0),
            "counted": (total > 0).astype(np.float64),
            "best": first[:, 0],
        }
        parts.append(scored | recalls)
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def answers(
    predictions: Predictions, rows: Sequence[Row], examples: RowExamples, target: Target, temperature: float
) -> list[RowAnswer]:
    return [{"embedding": vector.tolist()} for vector in predictions["vectors"][:, 0]]
