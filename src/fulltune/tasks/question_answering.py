"""Extractive question answering: the answer is a piece of the context, found by its first and last token.

A long context becomes several windows that overlap; each window is an example. A window without the answer, like a
question without one, points at its first token (BERT's CLS).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from fulltune.errors import DataError, SetupError
from fulltune.recipe import tasks as recipe_tasks
from fulltune.recipe.data import DataBlock
from fulltune.records.data import DataSummary, Preview
from fulltune.tasks import (
    Count,
    Encoded,
    Example,
    Predictions,
    Refused,
    Row,
    Target,
    Tensor,
    Tokenizer,
    Value,
    classes,
)
from fulltune.tasks.classes import mean_of, ratio
from fulltune.tasks.columns import as_text, normalised, parsed, without_text
from fulltune.tasks.columns import find_columns as columns_of_roles
from fulltune.tasks.labels import is_empty
from fulltune.tasks.labels import row_labels as labels_of_row
from fulltune.tasks.padding import collated

FACTS = recipe_tasks.FACTS["question-answering"]
find_columns = partial(columns_of_roles, ("context", "question", "answers"))
row_labels, config_changes, count_items = labels_of_row, classes.config_changes, classes.count_items
MOST_ANSWER_TOKENS = 30
"""Longest answer that is looked for; longer ones can be trained."""
STARTS, ENDS = "starts", "ends"
"""Features beside those of the model: each token's first character in the context and the one after its last; -1
outside of the context [tokens]."""
collate = partial(collated, left_out=(STARTS, ENDS))
IMPOSSIBLE = "is_impossible"
"""The column by which SQuAD 2 says that a question has no answer, beside answers that are only plausible."""
ONLY_FOR_TEST_ROWS = (STARTS, ENDS)
"""What only answers as texts need: it would be half of the train rows' bytes."""
START, END, FIRST, LAST, TOKENS = range(5)
"""What stands in `labels` [5]: first and last token of the answer, first and last of the context, number of tokens."""
NOWHERE = 0
"""The token that a window without the answer points at."""

# ---- rows ------------------------------------------------------------------------------------------------------


def find_target(rows: Iterable[Row], columns: Mapping[str, str], data: DataBlock, where: str) -> Target:
    """Nothing is found out, but some row must have an answer."""
    target = Target("span", columns, stride=data.stride)
    answered = 0
    for row in rows:
        answered += refuse(row, target) is None and bool(answers_of(row, target))
    if not answered:
        raise DataError(
            f"{where}: no row has an answer in column '{columns['answers']}' that stands in '{columns['context']}' "
            "(at its answer_start, where one is given); repair them, or name other columns with data.answers and "
            "data.context"
        )
    return target


def refuse(row: Row, target: Target) -> Refused | None:
    """Rows without question or context are dropped, and those whose answer does not stand in the context."""
    if refused := without_text(row, target, "question", "context"):
        return refused
    try:
        answers_of(row, target)
    except DataError as error:
        return Refused("answer not in context", str(error))
    return None


def as_question(row: Row, target: Target) -> Row:
    """The row without answers."""
    return {**row, target.columns["answers"]: None}


refuse_question = refuse


def answers_of(row: Row, target: Target) -> list[tuple[str, int]]:
    """The accepted answers with their places in the context; the first one is trained. SQuAD's impossible questions
    have none, whatever stands there."""
    if str(row.get(IMPOSSIBLE)).lower() == "true":
        return []
    return accepted(row.get(target.columns["answers"]), context_of(row, target))


def context_of(row: Row, target: Target) -> str:
    """The passage."""
    return as_text(row.get(target.columns["context"]))


def question_of(row: Row, target: Target) -> str:
    """What is asked about it."""
    return as_text(row.get(target.columns["question"])).strip()


def group_key(row: Row, target: Target) -> str:
    """The passage alone: its questions say much about each other."""
    return normalised(context_of(row, target))


# ---- cells with answers -----------------------------------------------------------------------------------------

Place = tuple[str, int]
"""A text and its first character in the context."""


def accepted(cell: Any, context: str) -> list[Place]:
    """The accepted answers to a question; none when it cannot be answered from the context.

    The cell is as in SQuAD, `{"text": [...], "answer_start": [...]}` or a list of such objects; or it holds texts, each
    taken at its first place in the context. Raises `DataError` when an answer does not stand where it should.
    """
    given = list(_parts(parsed(cell)))
    found = []
    for text, start in given:
        if start is None:
            # Whole words first: `he` is not the beginning of `hello`.
            whole = re.search(rf"(?<!\w){re.escape(text)}(?!\w)", context)
            place = whole.start() if whole else context.find(text)
            found += [(text, place)] if place >= 0 else []
        elif context[start : start + len(text)] != text:
            there = context[start : start + len(text)] if start >= 0 else ""
            raise DataError(f"at character {start} of the context stands {there!r}, not the answer {text!r}")
        else:
            found.append((text, start))
    if given and not found:
        raise DataError(f"the answer {given[0][0]!r} does not stand in the context")
    return found


def _parts(cell: Any) -> Iterator[tuple[str, int | None]]:
    """Texts that are not empty, each with its start where one is given."""
    match cell:
        case {"text": texts, **more}:
            texts, starts = _listed(texts), _listed(more.get("answer_start"))
            if starts and len(starts) != len(texts):
                raise DataError(f"{len(texts)} answers have {len(starts)} values of answer_start")
            for text, start in zip(texts, starts or [None] * len(texts), strict=True):
                if str(text).strip():
                    yield str(text), None if start is None else _place(start)
        case dict():
            if cell:
                raise DataError(f"an object with 'text' and 'answer_start' was expected, found {sorted(cell)}")
        case list() | tuple():
            for part in cell:
                yield from _parts(part)
        case _:
            if not is_empty(cell):
                yield str(cell).strip(), None


def _place(start: Any) -> int:
    """A character's place; pandas writes whole numbers as floats where some are missing."""
    try:
        return int(start)
    except (ValueError, TypeError, OverflowError):
        raise DataError(f"answer_start is {start!r}, expected the number of a character") from None


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


# ---- tokens ----------------------------------------------------------------------------------------------------


def encode(rows: Sequence[Row], target: Target, tokenizer: Tokenizer, max_length: int) -> Encoded:
    """Tokenise question and context together; one example per window. Raises `SetupError` when the tokenizer cannot say
    where its tokens stand in the text.

    Windows overlap by the stride, by less where a long question leaves too little room for it. A row whose answer is
    whole in no window is refused: trained, it would say that there is no answer.
    """
    if not tokenizer.is_fast:
        raise SetupError(
            f"{type(tokenizer).__name__} cannot say where a token stands in the text (it is a slow tokenizer, without "
            "tokenizer.json); question-answering needs a fast one: take another model, or convert its tokenizer"
        )
    return [_windows(row, target, tokenizer, max_length) for row in rows]


def _windows(row: Row, target: Target, tokenizer: Tokenizer, max_length: int) -> list[Example]:
    """The windows of a question and its context."""
    question = question_of(row, target)
    asked = tokenizer(question, add_special_tokens=False, verbose=False)["input_ids"]
    # A window must move on by some tokens, or a long context would become very many.
    least = max(1, max_length // 16)
    room = max_length - tokenizer.num_special_tokens_to_add(pair=True) - len(asked)
    if room < least:
        return [_refused("question too long", f"{len(asked)} tokens, with windows of {max_length}")]
    cut = tokenizer(
        question,
        context_of(row, target),
        truncation="only_second",
        max_length=max_length,
        stride=min(max_length // 3 if target.stride is None else target.stride, room - least),
        return_overflowing_tokens=True,
        return_attention_mask=False,
        verbose=False,
    )
    names = [name for name in tokenizer.model_input_names if name in cut]
    answer, examples = answers_of(row, target)[:1], list[Example]()
    for window, encoding in enumerate(cut.encodings):
        features = {name: cut[name][window] for name in names}
        inside = np.array([part == 1 for part in encoding.sequence_ids])
        # Asked for all windows at once (`return_offsets_mapping`), they would take most of the memory.
        examples.append(_example(features, np.array(encoding.offsets, np.int32), inside, answer))
    if answer and all(not one.refused and one.features["labels"][START] == NOWHERE for one in examples):
        reason = f"the answer of {len(answer[0][0])} characters is whole in no window of {max_length} tokens"
        return [_refused("answer cut off", reason)]
    return examples


def _refused(check: str, reason: str) -> Example:
    return Example({"input_ids": [], "labels": [], STARTS: [], ENDS: []}, 0, refused=Refused(check, reason))


def _example(
    features: Mapping[str, Any], offsets: np.ndarray, inside: np.ndarray, answer: Sequence[tuple[str, int]]
) -> Example:
    """A window, with the answer's first and last token if the whole answer stands in it."""
    if not inside.any():
        return _refused("no context", "the tokenizer makes no token of the context")
    first, last = np.flatnonzero(inside)[[0, -1]].tolist()
    starts, ends = np.where(inside, offsets[:, 0], -1), np.where(inside, offsets[:, 1], -1)
    start = end = NOWHERE
    for text, place in answer:
        after = place + len(text)
        if starts[first] <= place and after <= ends[last]:
            # Tokens stand in the order of the text: the last one that begins not after the answer does, the first one
            # that ends not before it does.
            start = first + int(np.searchsorted(starts[first : last + 1], place, side="right")) - 1
            end = max(start, first + int(np.searchsorted(ends[first : last + 1], after, side="left")))
    labels = [start, end, first, last, len(starts)]
    return Example({**features, "labels": labels, STARTS: starts.tolist(), ENDS: ends.tolist()}, trained_tokens=1)


def preview(features: Mapping[str, Any], target: Target, tokenizer: Tokenizer) -> Preview:
    """The window, and its answer decoded from its tokens."""
    ids = list(features["input_ids"])
    start, end = features["labels"][START], features["labels"][END]
    answer = str(tokenizer.decode(ids[start : end + 1])).strip()
    label = "(no answer in this window)" if start == NOWHERE else answer
    return Preview.labelled(str(tokenizer.decode(ids)), label)


# ---- model -----------------------------------------------------------------------------------------------------


def log_chances(logits: Tensor, labels: Tensor) -> Tensor:
    """Log probability of each token to be the answer's first or last one, [batch, tokens, 2]; padding has none."""
    import torch

    is_token = torch.arange(logits.shape[1], device=logits.device) < labels[:, TOKENS, None]
    return logits.float().masked_fill(~is_token.unsqueeze(-1), -math.inf).log_softmax(dim=1)


def loss(
    logits: Tensor,
    labels: Tensor,
    target: Target,
    smoothing: float = 0.0,
    class_weights: Sequence[float] | None = None,
) -> Tensor:
    """Mean of the cross entropies of first and last token, summed over windows: see `log_chances`."""
    chances = log_chances(logits, labels)
    plain = -_at_answer(chances, labels).mean(dim=-1)
    if not smoothing:
        return plain.sum()
    everywhere = -chances.masked_fill(chances.isinf(), 0.0).sum(dim=1).mean(dim=-1) / labels[:, TOKENS]
    return ((1 - smoothing) * plain + smoothing * everywhere).sum()


def _at_answer(chances: Tensor, labels: Tensor) -> Tensor:
    """Log probability of the true first and last token, [batch, 2]."""
    return chances.gather(1, labels[:, None, [START, END]])[:, 0]


# ---- evaluation ------------------------------------------------------------------------------------------------


def reduce(logits: Tensor, labels: Tensor, target: Target) -> dict[str, Tensor]:
    """Keep the most probable answer of each window, from `logits[batch, tokens, 2]` and `labels[batch, 5]`."""
    import torch
    import torch.nn.functional as F

    chances = log_chances(logits, labels)
    places = torch.arange(logits.shape[1], device=logits.device)
    outside = (places < labels[:, FIRST, None]) | (places > labels[:, LAST, None])
    starts, ends = chances.masked_fill(outside.unsqueeze(-1), -math.inf).unbind(dim=-1)
    # [batch, first token, number of further tokens]
    windows = F.pad(ends, (0, MOST_ANSWER_TOKENS - 1), value=-math.inf).unfold(1, MOST_ANSWER_TOKENS, 1)
    best = (starts.unsqueeze(-1) + windows).flatten(1).max(dim=-1)
    first = best.indices // MOST_ANSWER_TOKENS
    return {
        "first": first,
        "last": first + best.indices % MOST_ANSWER_TOKENS,
        "chance": best.values,
        "nowhere": chances[:, NOWHERE].sum(dim=-1),
        "true_first": labels[:, START],
        "true_last": labels[:, END],
        "loss": -_at_answer(chances, labels).mean(dim=-1),
    }


def metrics(kept: Predictions, target: Target) -> dict[str, float]:
    """Exact match and F1 of each window's tokens, or of whole questions once `evaluate.spans` scored them, loss."""
    return {name: float(np.mean(values)) for name, values in row_scores(kept).items()}


def row_scores(kept: Predictions) -> dict[str, np.ndarray]:
    """What `metrics` are the means of, [rows]."""
    if "f1" in kept:
        return {name: kept[name] for name in FACTS.metrics if name in kept}
    none, truly_none = kept["nowhere"] > kept["chance"], kept["true_first"] == NOWHERE
    first, last = (np.where(none, NOWHERE, kept[name]) for name in ("first", "last"))
    shared = np.minimum(last, kept["true_last"]) - np.maximum(first, kept["true_first"]) + 1
    sizes = last - first + kept["true_last"] - kept["true_first"] + 2
    f1 = np.where(none | truly_none, none & truly_none, 2 * np.maximum(shared, 0) / sizes)
    same = (first == kept["true_first"]) & (last == kept["true_last"])
    return {"f1": f1, "exact_match": same, "loss": kept["loss"]}


def find_answers(
    kept: Predictions, windows: Sequence[Mapping[str, Any]], questions: Sequence[Any], contexts: Sequence[str]
) -> dict[Any, dict[str, Any]]:
    """The answer to each question: the most probable one of all its windows."""
    found: dict[Any, dict[str, Any]] = {}
    nowhere: dict[Any, float] = {}
    for number, (key, context) in enumerate(zip(questions, contexts, strict=True)):
        chance = float(kept["chance"][number])
        nowhere[key] = min(nowhere.get(key, 0.0), float(kept["nowhere"][number]))
        if key in found and chance <= found[key]["probability"]:
            continue
        window = windows[number]
        start, end = int(window[STARTS][kept["first"][number]]), int(window[ENDS][kept["last"][number]])
        text = context[start:end]
        # Some tokens begin with the space before them.
        start += len(text) - len(text.lstrip())
        found[key] = {"answer": text.strip(), "probability": chance, "start": start}
    for key, answer in found.items():
        if nowhere[key] > answer["probability"]:
            answer |= {"answer": "", "probability": nowhere[key], "start": None}
        answer["probability"] = math.exp(answer["probability"])
    return found


def answers(
    kept: Predictions, rows: Sequence[Row], encoded: Encoded, target: Target, temperature: float
) -> list[dict[str, Any]]:
    """`answer`, its first character `start`, and its `probability`; a long context is several windows."""
    numbers = [number for number, windows in enumerate(encoded) for _ in windows]
    features = [example.features for windows in encoded for example in windows]
    found = find_answers(kept, features, numbers, [context_of(rows[number], target) for number in numbers])
    return [found[number] for number in range(len(rows))]


def sums(target: Target, metric: str) -> dict[str, tuple[Count, Value]]:
    """Each metric is a mean over questions."""
    return {metric: (mean_of(lambda kept: row_scores(kept)[metric]), ratio)}


def chance_loss(summary: DataSummary, weights: Sequence[float] | None) -> float:
    """Every token of a window is as likely as all others."""
    return math.log(summary.max_length)


def full_row(target: Target, length: int) -> dict[str, Any]:
    """A window whose answer is its first token."""
    return {"input_ids": np.ones(length, np.int64), "labels": np.array([0, 0, 0, length - 1, length])}
