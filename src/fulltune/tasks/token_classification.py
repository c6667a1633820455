from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from fulltune.errors import DataError, SetupError
from fulltune.recipe import tasks as recipe_tasks
from fulltune.recipe.data import DataBlock
from fulltune.records.data import DataSummary, Preview
from fulltune.records.scores import Answer
from fulltune.tasks import (
    PLACE,
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
from fulltune.tasks.classes import flat, macro_f1_of_present_classes, over_all, ratio, stack_arrays
from fulltune.tasks.columns import find_columns as columns_of_roles
from fulltune.tasks.columns import is_blank, normalised
from fulltune.tasks.labels import parse_list
from fulltune.tasks.padding import IGNORED, cut_long_text, object_array, pad_features, tokenise_and_cut

FACTS = recipe_tasks.FACTS["token-classification"]
find_columns = partial(columns_of_roles, ("tokens", "tags"))
TAGS, WORD_IDS = "tags", "word_ids"
"""Features that the model does not read: each word's label id [words], and each token's word index [tokens], or -1."""
collate = partial(pad_features, omit=(TAGS, WORD_IDS), label_per_token=True)
_BIO = re.compile(r"O|[BI]-\S+")
WORD = re.compile(r"https?://\S*[\w/]|[@#]?\w+(?:[.'’&/-]\w+)*|\S")
"""Regular expression for a word without punctuation, as in CoNLL files."""
_SHOWN = 5

# ---- words and their tags --------------------------------------------------------------------------------------


def parse_word_list(value: Any) -> list[str] | None:
    """Return the words or tags in a list, JSON list or text separated by spaces, or None for other values."""
    if isinstance(value, str):
        text = value.strip()
        listed = parse_list(text) if text.startswith("[") and text.endswith("]") else None
        value = value.split() if listed is None else listed
    if not isinstance(value, (list, tuple)) or any(isinstance(part, (list, tuple, dict)) for part in value):
        return None
    return ["" if part is None else str(part) for part in value]


def _words_and_tags_if_lists(row: Row, columns: Mapping[str, str]) -> tuple[list[str] | None, list[str] | None]:
    tokens, tags = row.get(columns["tokens"]), row.get(columns["tags"])
    # With tags separated by spaces, a sentence such as `[1]` is a word and not a list.
    if isinstance(tokens, str) and isinstance(tags, str) and not tags.lstrip().startswith("["):
        return tokens.split(), tags.split()
    return parse_word_list(tokens), parse_word_list(tags)


def words_and_tags(row: Row, columns: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Return the words and the strict BIO tags of a usable row (see `why_unusable`)."""
    words, tags = _words_and_tags_if_lists(row, columns)
    assert words is not None, "why_unusable() drops rows without words"
    assert tags is not None, "why_unusable() drops rows without tags"
    return words, to_strict_bio(tags)


def why_unusable(row: Row, target: Target) -> Refused | None:
    """Return the reason to drop a row whose words or BIO tags are missing, invalid or differ in number, else None."""
    names = (target.columns["tokens"], target.columns["tags"])
    words, tags = _words_and_tags_if_lists(row, target.columns)
    for name, role, cell in zip(names, ("tokens", "tags"), (words, tags), strict=True):
        if cell is None:
            return Refused(f"no {role}", f"column '{name}' holds {str(row.get(name))[:60]!r}, expected a list of words")
        if is_blank("".join(cell)):
            return Refused(f"no {role}", f"column '{name}' is empty")
    assert words is not None
    assert tags is not None
    if len(words) != len(tags):
        return Refused("counts differ", f"{len(words)} tokens and {len(tags)} tags; expected one tag for each token")
    wrong = next((tag for tag in tags if not _BIO.fullmatch(tag)), None)
    return None if wrong is None else Refused("not BIO", f"tag {wrong!r}, expected O, B-TYPE or I-TYPE")


def to_strict_bio(tags: Sequence[str]) -> list[str]:
    """Rewrite tags so that each entity begins with `B-`, even one that begins with `I-`, as in IOB1."""
    return [
        f"B{tag[1:]}" if tag.startswith("I-") and before[2:] != tag[2:] else tag
        for before, tag in zip(["O", *tags], tags, strict=False)
    ]


def entity_spans(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """Return each entity's type, the index of its first word, and the index after its last word."""
    entities: list[tuple[str, int, int]] = []
    for position, tag in enumerate(tags):
        if tag == "O":
            continue
        kind, start, end = entities[-1] if entities else ("", 0, -1)
        if tag.startswith("I-") and kind == tag[2:] and end == position:
            entities[-1] = (kind, start, position + 1)
        else:
            entities.append((tag[2:], position, position + 1))
    return entities


def bracket_entities(sentence: Sequence[str], tags: Sequence[str]) -> str:
    """Return a sentence with its entities in brackets: `[Ada Lovelace]PER was born in [London]LOC`."""
    shown = list(sentence)
    for kind, start, end in entity_spans(tags):
        shown[start] = f"[{shown[start]}"
        shown[end - 1] = f"{shown[end - 1]}]{kind}"
    return " ".join(shown)


def entity_types(labels: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(label[2:] for label in labels if label != "O"))


def find_target(rows: Iterable[Row], columns: Mapping[str, str], data: DataBlock, file: str) -> Target:
    """Return a target with the labels `O`, then sorted `B-` and `I-` of all entity types. Raise `DataError` if tags are
    not BIO."""
    known_tags: set[str] = set()
    wrong: list[tuple[str, int, str]] = []
    num_rows = num_wrong = 0
    for row in rows:
        num_rows += 1
        at = str(row.get(PLACE, f"{file}: row {num_rows}"))
        sentence, tags = (cell or [] for cell in _words_and_tags_if_lists(row, columns))
        unknown = [(place, tag) for place, tag in enumerate(tags, start=1) if tag not in known_tags]
        bad = [(at, place, tag) for place, tag in unknown if not _BIO.fullmatch(tag)]
        num_wrong += len(bad)
        wrong += bad[: _SHOWN - len(wrong)]
        if bad or len(tags) != len(sentence):
            continue  # other numbers of tags than words are dropped row by row
        known_tags.update(tags)
    if wrong:
        advice = (
            f"{file}: column '{columns['tags']}' holds tags that are not BIO, expected O, B-TYPE (first word of an "
            "entity) or I-TYPE (each further word). Rename them: in other schemes, S- and U- mean B-; E-, L- and M- "
            f"mean I-; numbers are positions in a data set's list of labels ({num_wrong} such tags)"
        )
        raise DataError([advice, *(f"{at}, word {place}: tag {tag[:60]!r}" for at, place, tag in wrong)])
    kinds = sorted(entity_types(known_tags))
    if not kinds:
        raise DataError(
            f"{file}: none of {num_rows} rows has an entity, so there is nothing to learn: column '{columns['tags']}' "
            "holds only O, or the numbers of tokens and tags differ"
        )
    return Target("tags", columns, ("O", *sorted(f"{mark}-{kind}" for mark in "BI" for kind in kinds)))


why_unanswerable, config_changes = why_unusable, classes.config_changes

# ---- rows ------------------------------------------------------------------------------------------------------


def with_placeholder_answer(row: Row, target: Target) -> Row:
    """Return a row with its words and an `O` tag for each, which `encode` accepts."""
    tokens = target.columns["tokens"]
    words = parse_word_list(row.get(tokens))
    return {tokens: row.get(tokens) if words is None else words, target.columns["tags"]: ["O"] * len(words or ())}


def group_key(row: Row, target: Target) -> str:
    return normalised(" ".join(parse_word_list(row.get(target.columns["tokens"])) or []))


def row_labels(row: Row, target: Target) -> list[str]:
    return sorted(entity_types(parse_word_list(row.get(target.columns["tags"])) or []))


def encode(rows: Sequence[Row], target: Target, tokenizer: Tokenizer, max_length: int) -> RowExamples:
    """Tokenise word by word. A word's first sub-word has its label, all other tokens -100.

    Raises `SetupError` for slow tokenizers.
    """
    if not tokenizer.is_fast:
        raise SetupError(
            "token-classification needs the word of each token from a fast tokenizer, but "
            f"{type(tokenizer).__name__} is slow (no tokenizer.json): use another model, or convert its tokenizer"
        )
    parsed = [words_and_tags(row, target.columns) for row in rows]
    sentences = [[cut_long_text(word, tokenizer, max_length) for word in words] for words, _ in parsed]
    sentences = add_leading_spaces(sentences, tokenizer)
    tokens, names, is_cut = tokenise_and_cut(tokenizer, [sentences], max_length, is_split_into_words=True)
    ids = {label: position for position, label in enumerate(target.labels)}
    encoded = []
    for position, (_, row_tags) in enumerate(parsed):
        unknown = sorted(set(row_tags) - set(ids))
        refused = Refused("unknown tag", f"the type of tag '{unknown[0]}' does not occur in train") if unknown else None
        values = [ids.get(tag, 0) for tag in row_tags]
        word_ids = [-1 if word is None else word for word in tokens.word_ids(position)]
        firsts = [word >= 0 and word != before for before, word in zip([-1, *word_ids], word_ids, strict=False)]
        labels = [values[word] if first else IGNORED for word, first in zip(word_ids, firsts, strict=True)]
        features = {name: list(tokens[name][position]) for name in names}
        features |= {"labels": labels, TAGS: values, WORD_IDS: word_ids}
        encoded.append([Example(features, sum(firsts), truncated=is_cut[position], refused=refused)])
    return encoded


def add_leading_spaces(sentences: Sequence[list[str]], tokenizer: Tokenizer) -> list[list[str]]:
    """Put a space before all words but the first, if the tokenizer (such as GPT-2's) then reads them as in running
    text."""
    plain = tokenizer("of the", add_special_tokens=False)["input_ids"]

    def split(words: list[str]) -> object:
        return tokenizer(words, is_split_into_words=True, add_special_tokens=False)["input_ids"]

    if not tokenizer.is_fast or split(["of", "the"]) == plain or split(["of", " the"]) != plain:
        return list(sentences)
    return [words[:1] + [f" {word}" if word else word for word in words[1:]] for words in sentences]


def preview(features: RowFeatures, target: Target, tokenizer: Tokenizer) -> Preview:
    """Decode a sentence, with its entities in brackets as the label."""
    ids, word_ids = np.asarray(features["input_ids"]), np.asarray(features[WORD_IDS])
    positions = words_with_token(features)
    words = [str(tokenizer.decode(ids[word_ids == word].tolist())).strip() for word in positions]
    row_tags = [target.labels[features[TAGS][word]] for word in positions]
    return Preview.labelled(str(tokenizer.decode(ids.tolist())), bracket_entities(words, row_tags))


def words_with_token(features: RowFeatures) -> np.ndarray:
    """Return the positions of the words that are neither cut off nor ignored by the tokenizer."""
    return np.asarray(features[WORD_IDS])[np.asarray(features["labels"]) != IGNORED]


def loss(logits: Tensor, labels: Tensor, target: Target, settings: LossSettings = PLAIN_LOSS) -> Tensor:
    """Sum the cross entropy at each word's first token."""
    # PyTorch's loss of label -100 is 0; selecting the other tokens would make the host wait for the device.
    return classes.row_losses(logits.flatten(0, 1), labels.flatten(), target, settings).sum()


def count_items(labels: Tensor) -> int:
    return int((labels != IGNORED).sum())


def reduce_logits(logits: Tensor, labels: Tensor, target: Target) -> dict[str, np.ndarray]:
    """Return each row's entity counts, loss `nll`, number of words `seen`, and these words' `predicted` labels and
    `probability`."""
    is_word = labels != IGNORED
    true = labels[is_word]
    log_probabilities = logits[is_word].float().log_softmax(dim=-1)
    best = log_probabilities.max(dim=-1)
    num_words = is_word.sum(dim=1).cpu().numpy()
    ends = np.cumsum(num_words)[:-1]

    def by_row(values: Tensor) -> np.ndarray:
        return object_array(np.split(values.cpu().numpy(), ends))

    predicted = by_row(best.indices)
    nll = by_row(-log_probabilities.gather(1, true[:, None])[:, 0])
    return count_spans(by_row(true), predicted, target) | {
        "nll": np.array([values.sum(dtype=np.float64) for values in nll]),
        "seen": num_words,
        "predicted": predicted,
        "probability": by_row(best.values.exp()),
    }


def count_spans(true: Iterable[np.ndarray], predicted: Iterable[np.ndarray], target: Target) -> dict[str, np.ndarray]:
    """Count per row: `entities` [rows, types, 3] (right, predicted, expected), `words`, and `right` (words with the
    right label)."""
    pairs = list(zip(true, predicted, strict=True))
    place = {kind: number for number, kind in enumerate(entity_types(target.labels))}
    entities = np.zeros((len(pairs), len(place), 3), dtype=np.int32)
    for row, pair in enumerate(pairs):
        if not (pair[0].any() or pair[1].any()):
            continue  # label 0 is O: no entity on either side
        expected, guessed = (set(entity_spans([target.labels[i] for i in labels])) for labels in pair)
        for column, entity_set in enumerate((expected & guessed, guessed, expected)):
            for kind, *_ in entity_set:
                entities[row, place[kind], column] += 1
    return {
        "entities": entities,
        "words": np.array([len(one) for one, _ in pairs]),
        "right": np.array([int((one == two).sum()) for one, two in pairs]),
    }


def add_words_without_token(
    predictions: Predictions, rows: Sequence[RowFeatures], target: Target
) -> dict[str, np.ndarray]:
    """Return the predictions with words that have no token added as `O`, the true labels as `gold`, and new counts from
    `count_spans`."""
    gold = object_array([np.asarray(row[TAGS]) for row in rows])
    positions = [words_with_token(row) for row in rows]
    everywhere = {}
    for name in ("predicted", "probability"):
        everywhere[name] = object_array([np.zeros(len(row), predictions[name][0].dtype) for row in gold])
        for values, words, row_values in zip(everywhere[name], positions, predictions[name], strict=True):
            values[words] = row_values
    return {**predictions, **everywhere, "gold": gold, **count_spans(gold, everywhere["predicted"], target)}


def answers(
    predictions: Predictions, rows: Sequence[Row], examples: RowExamples, target: Target, temperature: float
) -> list[RowAnswer]:
    """Return each row's words, tags and entities. An entity's probability is the lowest of its words' probabilities."""
    predictions = add_words_without_token(predictions, [example.features for [example] in examples], target)
    row_answers: list[RowAnswer] = []
    for row, labels, chances in zip(rows, predictions["predicted"], predictions["probability"], strict=True):
        words = row[target.columns["tokens"]]
        row_tags = [target.labels[label] for label in labels]
        entities = [
            {
                "type": kind,
                "start": start,
                "end": end,
                "text": " ".join(words[start:end]),
                "probability": float(chances[start:end].min()),
            }
            for kind, start, end in entity_spans(row_tags)
        ]
        row_answers.append({"entities": entities, "tokens": list(words), "tags": row_tags})
    return row_answers


def metrics(predictions: Predictions, target: Target) -> dict[str, float]:
    """Compute entity F1, precision and recall, word accuracy and loss."""
    return over_all(
        {name: part for name, part in metrics_from_sums(target, "").items() if name != "loss" or "nll" in predictions},
        predictions,
    )


def worst_rows(predictions: Predictions, texts: Sequence[str], target: Target, count: int) -> Iterable[Answer]:
    """Yield the `count` rows with the most wrong entities. `predictions` come from `add_words_without_token`."""
    right, guessed, expected = np.moveaxis(predictions["entities"].sum(axis=1), -1, 0)
    wrong = guessed + expected - 2 * right
    for row in [row for row in np.lexsort((-predictions["nll"], -wrong)) if wrong[row]][:count]:
        shown = [
            bracket_entities(predictions["tokens"][row], [target.labels[i] for i in predictions[name][row]])
            for name in ("gold", "predicted")
        ]
        yield Answer(text=texts[row], expected=shown[0], predicted=shown[1], loss=float(predictions["nll"][row]))


def metrics_from_sums(target: Target, metric: str) -> dict[str, tuple[RowTerms, FromSums]]:
    """Map each metric (ignoring `metric`) to two functions: one computes its row terms, the other its value from their
    sums."""
    return {
        **{name: (_entity_counts, value) for name, value in classes.OF_ONE.items()},
        "f1_macro": (
            lambda predictions: flat(np.asarray(predictions["entities"], np.float64)),
            macro_f1_of_present_classes,
        ),
        "accuracy": (stack_arrays("right", "words"), ratio),
        "loss": (stack_arrays("nll", "seen"), ratio),
    }


def _entity_counts(predictions: Predictions) -> np.ndarray:
    return np.asarray(predictions["entities"].sum(axis=1), np.float64)


def chance_loss(summary: DataSummary, class_weights: Sequence[float] | None) -> float:
    return math.log(max(2, len(summary.labels))) * (1.0 if class_weights is None else max(class_weights))


def full_row(target: Target, length: int) -> RowFeatures:
    return {"input_ids": np.ones(length, np.int64), "labels": np.zeros(length, np.int64)}
