"""Extractive question answering: the model predicts the answer's first and last token within the context."""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from fulltune.errors import DataError, SetupError
from fulltune.recipe import tasks as recipe_tasks
from fulltune.recipe.data import DataBlock
from fulltune.records.data import DataSummary, Preview
from fulltune.tasks import (
    PLAIN_LOSS,
    Example,
    FromSums,
    LossSettings,
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
)
from fulltune.tasks.classes import ratio, terms_of_mean
from fulltune.tasks.columns import as_text, normalised, parse_cell, why_cell_blank
from fulltune.tasks.columns import find_columns as columns_of_roles
from fulltune.tasks.labels import is_empty
from fulltune.tasks.labels import row_labels as labels_of_row
from fulltune.tasks.padding import pad_features

FACTS = recipe_tasks.FACTS["question-answering"]
find_columns = partial(columns_of_roles, ("context", "question", "answers"))
row_labels, config_changes, count_items = labels_of_row, classes.config_changes, classes.count_items
MOST_ANSWER_TOKENS = 30
STARTS, ENDS = "starts", "ends"
"""Features that the model does not read: each token's start and end in the context, in characters [tokens], or -1."""
collate = partial(pad_features, omit=(STARTS, ENDS))
IMPOSSIBLE = "is_impossible"
"""SQuAD 2's column that marks questions without an answer."""
ONLY_FOR_TEST_ROWS = (STARTS, ENDS)
START, END, FIRST, LAST, TOKENS = range(5)
"""Positions in `labels` [5]: the answer's first and last token, the context's first and last, the number of tokens."""
NOWHERE = 0
"""Index of the token that marks a window without the answer."""

# ---- rows ------------------------------------------------------------------------------------------------------


def find_target(rows: Iterable[Row], columns: Mapping[str, str], data: DataBlock, file: str) -> Target:
    """Return the target with the recipe's stride, or raise `DataError` if no row has an answer in its context."""
    target = Target("span", columns, stride=data.stride)
    answered = 0
    for row in rows:
        answered += why_unusable(row, target) is None and bool(accepted_answers(row, target))
    if not answered:
        raise DataError(
            f"{file}: no row has an answer in column '{columns['answers']}' that occurs in '{columns['context']}' (at "
            "its answer_start, if it has one). Correct the answers, or set data.answers and data.context"
        )
    return target


def why_unusable(row: Row, target: Target) -> Refused | None:
    """Return the reason to drop a row without question or context, or whose answer is not in the context, else None."""
    if refused := why_cell_blank(row, target, "question", "context"):
        return refused
    try:
        accepted_answers(row, target)
    except DataError as error:
        return Refused("answer not in context", str(error))
    return None


def with_placeholder_answer(row: Row, target: Target) -> Row:
    return {**row, target.columns["answers"]: None}


why_unanswerable = why_unusable


def accepted_answers(row: Row, target: Target) -> list[AnswerSpan]:
    """Return a row's accepted answers, the first of which is trained on, or an empty list for impossible questions."""
    if str(row.get(IMPOSSIBLE)).lower() == "true":
        return []
    return parse_answers(row.get(target.columns["answers"]), context_of(row, target))


def context_of(row: Row, target: Target) -> str:
    return as_text(row.get(target.columns["context"]))


def question_of(row: Row, target: Target) -> str:
    return as_text(row.get(target.columns["question"])).strip()


def group_key(row: Row, target: Target) -> str:
    return normalised(context_of(row, target))


# ---- cells with answers -----------------------------------------------------------------------------------------

AnswerSpan = tuple[str, int]
"""An answer's text and the position of its first character in the context."""


def parse_answers(cell: Any, context: str) -> list[AnswerSpan]:
    """Return the answers in a cell in SQuAD's format, or find answer texts in the context.

    Raises `DataError` if an answer is not at its `answer_start`, or no answer is in the context.
    """
    parts = list(_texts_and_starts(parse_cell(cell)))
    answers: list[AnswerSpan] = []
    for text, start in parts:
        if start is None:
            # Whole words first: `he` is not the beginning of `hello`.
            match = re.search(rf"(?<!\w){re.escape(text)}(?!\w)", context)
            position = match.start() if match else context.find(text)
            answers += [(text, position)] if position >= 0 else []
        elif context[start : start + len(text)] != text:
            there = context[start : start + len(text)] if start >= 0 else ""
            raise DataError(f"the context has {there!r} at character {start}, expected the answer {text!r}")
        else:
            answers.append((text, start))
    if parts and not answers:
        raise DataError(f"the answer {parts[0][0]!r} is not in the context")
    return answers


def _texts_and_starts(cell: Any) -> Iterator[tuple[str, int | None]]:
    """Yield the text and `answer_start` (None if missing) of each answer in a cell with objects, lists or texts."""
    match cell:
        case {"text": texts, **more}:
            texts, starts = _as_list(texts), _as_list(more.get("answer_start"))
            if starts and len(starts) != len(texts):
                raise DataError(f"found {len(texts)} answers, but {len(starts)} values of answer_start")
            for text, start in zip(texts, starts or [None] * len(texts), strict=True):
                if str(text).strip():
                    yield str(text), None if start is None else _parse_answer_start(start)
        case dict():
            if cell:
                raise DataError(f"expected an object with 'text' and 'answer_start', found {sorted(cell)}")
        case list() | tuple():
            for part in cell:
                yield from _texts_and_starts(part)
        case _:
            if not is_empty(cell):
                yield str(cell).strip(), None


def _parse_answer_start(start: Any) -> int:
    try:
        return int(start)
    except (ValueError, TypeError, OverflowError):
        raise DataError(f"answer_start is {start!r}, expected a position in characters") from None


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


# ---- tokens ----------------------------------------------------------------------------------------------------


def encode(rows: Sequence[Row], target: Target, tokenizer: Tokenizer, max_length: int) -> RowExamples:
    """Tokenise each question with its context, one example per window. Windows overlap by the stride, if there is room.

    Raises `SetupError` for slow tokenizers.
    """
    if not tokenizer.is_fast:
        raise SetupError(
            "question-answering needs the positions of tokens in the text from a fast tokenizer, but "
            f"{type(tokenizer).__name__} is slow (no tokenizer.json): use another model, or convert its tokenizer"
        )
    return [_encode_windows(row, target, tokenizer, max_length) for row in rows]


def _encode_windows(row: Row, target: Target, tokenizer: Tokenizer, max_length: int) -> list[Example]:
    """Tokenise a row into windows. Return one refused example if the question or the answer does not fit."""
    question = question_of(row, target)
    question_ids = tokenizer(question, add_special_tokens=False, verbose=False)["input_ids"]
    # Each window must advance by some tokens, or a long context would give very many windows.
    least = max(1, max_length // 16)
    room = max_length - tokenizer.num_special_tokens_to_add(pair=True) - len(question_ids)
    if room < least:
        reason = f"{len(question_ids)} tokens are too many for windows of {max_length}"
        return [_refused_example("question too long", reason)]
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
    answer, examples = accepted_answers(row, target)[:1], list[Example]()
    for window, encoding in enumerate(cut.encodings):
        features = {name: cut[name][window] for name in names}
        inside = np.array([part == 1 for part in encoding.sequence_ids])
        # The offsets of all windows at once (`return_offsets_mapping`) would take most of the memory.
        examples.append(_window_example(features, np.array(encoding.offsets, np.int32), inside, answer))
    # Without a window that holds the whole answer, the row would teach that there is none.
    if answer and all(not window.refused and window.features["labels"][START] == NOWHERE for window in examples):
        reason = f"no window of {max_length} tokens holds the whole answer of {len(answer[0][0])} characters"
        return [_refused_example("answer cut off", reason)]
    return examples


def _refused_example(check: str, reason: str) -> Example:
    return Example({"input_ids": [], "labels": [], STARTS: [], ENDS: []}, 0, refused=Refused(check, reason))


def _window_example(
    features: RowFeatures, offsets: np.ndarray, inside: np.ndarray, answer: Sequence[AnswerSpan]
) -> Example:
    """Make a window's example from its tokens' character offsets [tokens, 2], the context's mask `inside`, and at most
    one `answer`."""
    if not inside.any():
        return _refused_example("no context", "the tokenizer produces no tokens for the context")
    first, last = np.flatnonzero(inside)[[0, -1]].tolist()
    starts, ends = np.where(inside, offsets[:, 0], -1), np.where(inside, offsets[:, 1], -1)
    start = end = NOWHERE
    for text, position in answer:
        after = position + len(text)
        if starts[first] <= position and after <= ends[last]:
            # The last token that starts at or before the answer, and the first that ends at or after its end.
            start = first + int(np.searchsorted(starts[first : last + 1], position, side="right")) - 1
            end = max(start, first + int(np.searchsorted(ends[first : last + 1], after, side="left")))
    labels = [start, end, first, last, len(starts)]
    return Example({**features, "labels": labels, STARTS: starts.tolist(), ENDS: ends.tolist()}, trained_tokens=1)


def preview(features: RowFeatures, target: Target, tokenizer: Tokenizer) -> Preview:
    """Decode a window, and the answer if the window contains it."""
    ids = list(features["input_ids"])
    start, end = features["labels"][START], features["labels"][END]
    answer = str(tokenizer.decode(ids[start : end + 1])).strip()
    label = "(no answer in this window)" if start == NOWHERE else answer
    return Preview.labelled(str(tokenizer.decode(ids)), label)


# ---- model -----------------------------------------------------------------------------------------------------


def position_log_probabilities(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute each token's log probability of being the answer's first and of being its last: [batch, tokens, 2], -inf
    for padding."""
    import torch

    is_token = torch.arange(logits.shape[1], device=logits.device) < labels[:, TOKENS, None]
    return logits.float().masked_fill(~is_token.unsqueeze(-1), -math.inf).log_softmax(dim=1)


def loss(logits: Tensor, labels: Tensor, target: Target, settings: LossSettings = PLAIN_LOSS) -> Tensor:
    """Sum the windows' losses, each the mean cross entropy of the answer's first and last token."""
    chances = position_log_probabilities(logits, labels)
    plain = -_answer_log_probabilities(chances, labels).mean(dim=-1)
    if not settings.smoothing:
        return plain.sum()
    everywhere = -chances.masked_fill(chances.isinf(), 0.0).sum(dim=1).mean(dim=-1) / labels[:, TOKENS]
    return ((1 - settings.smoothing) * plain + settings.smoothing * everywhere).sum()


def _answer_log_probabilities(chances: Tensor, labels: Tensor) -> Tensor:
    return chances.gather(1, labels[:, None, [START, END]])[:, 0]


# ---- evaluation ------------------------------------------------------------------------------------------------


def reduce_logits(logits: Tensor, labels: Tensor, target: Target) -> dict[str, Tensor]:
    """Find each window's most probable answer in `logits[batch, tokens, 2]`: `first` and `last` token and log
    probability `chance`. Also return the log probability of no answer (`nowhere`), the true tokens and the `loss`."""
    import torch
    import torch.nn.functional as F

    chances = position_log_probabilities(logits, labels)
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
        "loss": -_answer_log_probabilities(chances, labels).mean(dim=-1),
    }


def metrics(predictions: Predictions, target: Target) -> dict[str, float]:
    return {name: float(np.mean(values)) for name, values in window_scores(predictions).items()}


def window_scores(predictions: Predictions) -> dict[str, np.ndarray]:
    """Return each window's token `f1`, `exact_match` and `loss`, reusing any scores in `predictions`."""
    if "f1" in predictions:
        return {name: predictions[name] for name in FACTS.metrics if name in predictions}
    none, truly_none = predictions["nowhere"] > predictions["chance"], predictions["true_first"] == NOWHERE
    first, last = (np.where(none, NOWHERE, predictions[name]) for name in ("first", "last"))
    shared = np.minimum(last, predictions["true_last"]) - np.maximum(first, predictions["true_first"]) + 1
    sizes = last - first + predictions["true_last"] - predictions["true_first"] + 2
    f1 = np.where(none | truly_none, none & truly_none, 2 * np.maximum(shared, 0) / sizes)
    same = (first == predictions["true_first"]) & (last == predictions["true_last"])
    return {"f1": f1, "exact_match": same, "loss": predictions["loss"]}


def best_answers(
    predictions: Predictions, windows: Sequence[RowFeatures], questions: Sequence[Hashable], contexts: Sequence[str]
) -> dict[Hashable, RowAnswer]:
    """Map each question to its most probable answer over all windows. `questions` and `contexts` have one entry per
    window."""
    best: dict[Hashable, RowAnswer] = {}
    nowhere: dict[Hashable, float] = {}
    for number, (key, context) in enumerate(zip(questions, contexts, strict=True)):
        chance = float(predictions["chance"][number])
        nowhere[key] = min(nowhere.get(key, 0.0), float(predictions["nowhere"][number]))
        if key in best and chance <= best[key]["probability"]:
            continue
        window = windows[number]
        start, end = int(window[STARTS][predictions["first"][number]]), int(window[ENDS][predictions["last"][number]])
        text = context[start:end]
        # Some tokens start with the space before a word.
        start += len(text) - len(text.lstrip())
        best[key] = {"answer": text.strip(), "probability": chance, "start": start}
    for key, answer in best.items():
        if nowhere[key] > answer["probability"]:
            answer |= {"answer": "", "probability": nowhere[key], "start": None}
        answer["probability"] = math.exp(answer["probability"])
    return best


def answers(
    predictions: Predictions, rows: Sequence[Row], examples: RowExamples, target: Target, temperature: float
) -> list[RowAnswer]:
    """Return each row's most probable answer over its windows, with its probability and start."""
    numbers = [number for number, windows in enumerate(examples) for _ in windows]
    features = [example.features for windows in examples for example in windows]
    best = best_answers(predictions, features, numbers, [context_of(rows[number], target) for number in numbers])
    return [best[number] for number in range(len(rows))]


def metrics_from_sums(target: Target, metric: str) -> dict[str, tuple[RowTerms, FromSums]]:
    return {metric: (terms_of_mean(lambda predictions: window_scores(predictions)[metric]), ratio)}


def chance_loss(summary: DataSummary, class_weights: Sequence[float] | None) -> float:
    return math.log(summary.max_length)


def full_row(target: Target, length: int) -> RowFeatures:
    return {"input_ids": np.ones(length, np.int64), "labels": np.array([0, 0, 0, length - 1, length])}
