"""Multiple choice: which of a row's choices is right. The model reads the question with each choice and scores it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fulltune.errors import DataError, RecipeError
from fulltune.recipe import tasks as recipe_tasks
from fulltune.recipe.data import DataBlock
from fulltune.records.data import Preview, Segment
from fulltune.records.scores import Answer
from fulltune.tasks import LENGTH, Example, Predictions, Refused, Row, Target
from fulltune.tasks.choices import choice_texts as choice_texts
from fulltune.tasks.choices import find_columns as find_columns
from fulltune.tasks.choices import question_text, right_choice
from fulltune.tasks.columns import as_text, normalised
from fulltune.tasks.labels import is_empty, label_name
from fulltune.tasks.text_classification import count_items as count_items
from fulltune.tasks.text_classification import loss as loss
from fulltune.tasks.text_classification import reduce as reduce

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

FACTS = recipe_tasks.FACTS["multiple-choice"]
CHOICE_LENGTHS = "choice_lengths"
"""Feature with the tokens of each choice [choices]: `input_ids` holds them one after another."""

# ---- rows ------------------------------------------------------------------------------------------------------


def find_target(rows: Iterable[Row], columns: Mapping[str, str], data: DataBlock, where: str) -> Target:
    """The usual number of choices; how the label names the right one is checked over all rows."""
    if data.problem_type != "auto":
        raise RecipeError(f"data.problem_type: {data.problem_type} is not possible for choices; remove the setting")
    column = columns["label"]
    sizes: Counter[int] = Counter()
    ways: Counter[str] = Counter()
    one_too_high = only_by_place = differing = 0
    for row in rows:
        texts, value = choice_texts(row, Target("choice", columns)), row.get(column)
        if len(texts) < 2 or is_empty(value):
            continue
        sizes[len(texts)] += 1
        right = right_choice(row, columns, texts)
        if right is None:
            one_too_high += label_name(value) == str(len(texts))
            continue
        ways[right.how] += 1
        only_by_place += right.by_text is None
        differing += right.by_text is not None and right.by_text != right.index
    if not sizes:
        raise DataError(f"{where}: no row has two choices or more and a label in column '{column}'")
    number = sizes.most_common(1)[0][0]
    if one_too_high:
        raise DataError(
            f"{where}: column '{column}' holds the number of choices in {one_too_high} rows; the first choice is 0, "
            f"expected 0 to {number - 1}: subtract 1 from all, or write letters (A, B ...) or the text of the choice"
        )
    if len(ways) > 1:
        shown = ", ".join(f"{count} rows by {how}" for how, count in ways.most_common())
        raise DataError(f"{where}: column '{column}' names the right choice in several ways ({shown}); expected one")
    if differing and not only_by_place:
        raise DataError(
            f"{where}: column '{column}' can be the place of the right choice or its text, which are not the same in "
            f"{differing} rows; write letters (A, B ...)"
        )
    return Target("choice", columns, num_choices=number)


def refuse(row: Row, target: Target) -> Refused | None:
    """Rows with an empty choice, another number of choices or without a right one are left out."""
    if (refused := refuse_choices(row, target)) is not None:
        return refused
    texts, column = choice_texts(row, target), target.columns["label"]
    value = row.get(column)
    if is_empty(value):
        return Refused("no label", f"column '{column}' is empty")
    if right_choice(row, target.columns, texts) is None:
        return Refused(
            "no right choice",
            f"column '{column}' holds {value!r}, expected 0 to {len(texts) - 1}, a letter or the text of one choice",
        )
    return None


def refuse_choices(row: Row, target: Target) -> Refused | None:
    """Why nothing can be chosen, whatever the right choice is."""
    texts = choice_texts(row, target)
    if len(texts) != target.num_choices:
        return Refused("other number of choices", f"{len(texts)} choices, expected {target.num_choices}")
    return None if all(text.strip() for text in texts) else Refused("empty choice", "a choice is empty")


def group_key(row: Row, target: Target) -> str:
    """The passage, where there is one: its questions say much about each other. Else question and choices, in whatever
    order these stand."""
    passage = as_text(row.get(target.columns["context"])) if "context" in target.columns else ""
    if passage.strip():
        return normalised(passage)
    return normalised(" \0 ".join([question_text(row, target), *sorted(choice_texts(row, target))]))


def row_labels(row: Row, target: Target) -> list[str]:
    return []


def encode(
    rows: Sequence[Row], target: Target, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[list[Example]]:
    """Tokenise the question with each choice; the longer of the two is cut first."""
    choices = [choice_texts(row, target) for row in rows]
    questions = [question_text(row, target) for row in rows]
    texts: tuple[list[str], ...]
    if any(questions):
        asked = [question for question, row in zip(questions, choices, strict=True) for _ in row]
        texts = (asked, [text for row in choices for text in row])
    else:
        texts = ([text for row in choices for text in row],)
    # Encoded without a limit first: only so can truncation be counted.
    cut = tokenizer(*texts, truncation=False, verbose=False)
    whole = np.array([len(ids) for ids in cut["input_ids"]])
    if whole.max() > max_length:
        cut = tokenizer(*texts, truncation="longest_first", max_length=max_length, verbose=False)
    names = [name for name in tokenizer.model_input_names if name in cut and name != "attention_mask"]
    encoded = []
    for number, row in enumerate(rows):
        members = range(number * target.num_choices, (number + 1) * target.num_choices)
        right = right_choice(row, target.columns, choices[number])
        lengths = [len(cut["input_ids"][i]) for i in members]
        features: dict[str, Any] = {name: [token for i in members for token in cut[name][i]] for name in names}
        # All choices are padded to the longest one. Only rows of `predict` have no right choice: others are refused.
        features |= {
            CHOICE_LENGTHS: lengths,
            "labels": right.index if right else 0,
            LENGTH: max(lengths) * len(lengths),
        }
        is_cut = bool((whole[members.start : members.stop] > max_length).any())
        encoded.append([Example(features, trained_tokens=1, truncated=is_cut, longest=max(lengths))])
    return encoded


def preview(features: Mapping[str, Any], target: Target, tokenizer: PreTrainedTokenizerBase) -> Preview:
    """The question with each choice, as the model reads them, and the place of the right one."""
    ends = np.cumsum(features[CHOICE_LENGTHS])[:-1]
    parts = [tokenizer.decode(ids.tolist()) for ids in np.split(np.asarray(features["input_ids"]), ends)]
    text = "\n".join(f"({place}) {part}" for place, part in enumerate(parts))
    return Preview(segments=(Segment(text=text, trained=False),), label=str(int(features["labels"])))


def as_shown(row: Row, target: Target) -> str:
    """A row in one line: the question and the numbered choices."""
    choices = (f"({place}) {text}" for place, text in enumerate(choice_texts(row, target)))
    return " ".join(part for part in (question_text(row, target), *choices) if part)


# ---- model -----------------------------------------------------------------------------------------------------


def check_model(config: PretrainedConfig) -> str | None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES

    if config.model_type in MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES:
        return None
    return f"a '{config.model_type}' model cannot choose among texts; take an encoder (BERT-, RoBERTa-, DeBERTa-like)"


def config_changes(target: Target, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Nothing: the head gives one number for each choice, however many there are."""
    return {}


def collate(features: Sequence[Mapping[str, Any]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """`input_ids`, `attention_mask` ... [batch, choices, length] and `labels` [batch]."""
    import torch

    lengths = np.array([row[CHOICE_LENGTHS] for row in features])
    shown = np.arange(lengths.max()) < lengths[:, :, None]
    batch = {"attention_mask": torch.from_numpy(shown.astype(np.int64))}
    for name in features[0]:
        if name not in (CHOICE_LENGTHS, LENGTH, "labels"):
            block = np.full(shown.shape, pad_token_id if name == "input_ids" else 0, np.int64)
            # Row by row and choice by choice, as the tokens lie in the features.
            block[shown] = np.concatenate([row[name] for row in features])
            batch[name] = torch.from_numpy(block)
    batch["labels"] = torch.tensor([int(row["labels"]) for row in features], dtype=torch.long)
    return batch


# ---- evaluation ------------------------------------------------------------------------------------------------


def metrics(kept: Predictions, target: Target) -> dict[str, float]:
    """Accuracy and loss from the choices' `logits` [rows, choices]."""
    return label_metrics(kept["labels"], kept["logits"].argmax(axis=-1)) | {"loss": float(np.mean(kept["loss"]))}


def label_metrics(true: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """The metric that needs only the places chosen, so that baselines have it too."""
    return {"accuracy": float(np.mean(true == predicted))}


def worst(kept: Predictions, texts: Sequence[str], target: Target, count: int) -> Iterable[Answer]:
    """The wrong rows with the highest loss, with the places of the choices."""
    predicted = kept["logits"].argmax(axis=-1)
    order = [row for row in np.argsort(-kept["loss"], kind="stable") if predicted[row] != kept["labels"][row]]
    for row in order[:count]:
        yield Answer(
            text=texts[row],
            expected=f"({int(kept['labels'][row])})",
            predicted=f"({int(predicted[row])})",
            loss=float(kept["loss"][row]),
        )
